"""Which module may import what. An import inside a function counts like any other."""

import ast
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "openmm_mlffd": "openmm_mlffd",
    "kernels": "openmm_mlffd.kernels",
    "training": "openmm_mlffd.training",
}

# group: its modules, the groups that it may import, the libraries that it may import
# "" is the package itself, for its version; the standard library is free for all but the first
GROUPS: dict[str, tuple[str, str, str]] = {
    "facts": ("units elements", "", ""),
    "process": ("memory storage", "", ""),
    "kernels": ("kernels kernels.*", "kernels", "torch warp triton"),
    "physics": (
        "blocks crowding fast filters fused graph neighbors painn pairs potential radial repulsion "
        "rows tail variants",
        "facts kernels physics",
        "torch numpy",
    ),
    "files": ("modelfile", "facts physics process package", "torch numpy safetensors"),
    "adapter": (
        "batched captured charges engine engines evaluator faults novelty novelty_fused",
        "facts kernels physics files adapter process package",
        "torch numpy safetensors",
    ),
    "factory": ("interfaces.openmm_factory", "openmm", ""),
    # the self-test compares the adapter's answer with that of the physics below it
    "self-test": ("interfaces.openmm_selftest", "physics adapter", "torch numpy"),
    "openmm": (
        "interfaces.openmm_*",
        "facts files adapter openmm self-test process",
        "numpy torch openmm openmmml openmmtorch ase",
    ),
    "ase": ("interfaces.ase_*", "facts files adapter", "numpy ase"),
    "torchscript": (
        "interfaces.torchscript interfaces.torchscript_kernels",
        "facts kernels physics files torchscript",
        "torch numpy",
    ),
    # of processes of their own: teachers run where nothing of this project is installed
    "teachers": (
        "training.teacher_worker training.so3lr training.orb",
        "",
        "numpy torch ase matscipy so3krates_torch orb_models jax fennol",
    ),
    "sources": ("training.sources", "training", "numpy ase rdkit"),
    # structures to be labelled: force fields, and the student as one of them
    "generation": (
        "training.generation training.generation.*",
        "facts adapter training sources generation package",
        "numpy tqdm openmm rdkit",
    ),
    "datasets": (
        "training.datasets training.datasets.*",
        "facts kernels training sources datasets",
        "numpy torch h5py ase rdkit matplotlib jinja2",
    ),
    # the student explores, a teacher labels, the student is trained: all of the above
    "active": (
        "training.active training.active.*",
        "facts files adapter process training sources datasets active",
        "numpy tqdm",
    ),
    "training": (
        "training training.*",
        "facts physics files adapter process training sources teachers",
        "torch numpy ase h5py omegaconf yaml tqdm optuna wandb jinja2 matplotlib "
        "distributed dask_jobqueue",
    ),
    "suite": (
        "validation.suite validation.suite.*",
        "package process facts physics files adapter training sources teachers validation suite",
        "numpy torch openmm openmmml mdtraj matplotlib jinja2 rdkit ase tqdm physical_validation",
    ),
    "validation": (
        "validation validation.*",
        "facts files adapter openmm validation",
        "numpy openmm openmmml mdtraj matplotlib jinja2 rdkit ase",
    ),
    "timed teachers": ("bench.teacher_timing", "", "torch numpy ase orb_models"),
    "bench": (
        "bench bench.*",
        "facts physics files adapter factory openmm bench package",
        "torch numpy openmm openmmml matplotlib",
    ),
    "empty": ("interfaces students", "", ""),
    "package": (
        "",
        "physics files adapter ase openmm torchscript",
        "",
    ),  # only lazily: tests/test_import.py
    "cli": (
        "cli cli_data cli_learn",
        "cli package process facts files adapter openmm torchscript training sources generation "
        "datasets active validation suite bench",
        "typer",
    ),
}

_OPENMM = (
    "interfaces.openmm_potential interfaces.openmm_stored interfaces.openmm_pressure "
    "interfaces.openmm_mts interfaces.openmm_alarm interfaces.openmm_prepare "
    "interfaces.openmm_untangle interfaces.openmm_device interfaces.openmm_torch "
    "interfaces.openmm_mixed validation.*"
)
# libraries that are imported in these modules and nowhere else, however deep the call
ONLY_IN = {
    "openmm": f"{_OPENMM} bench.* training.generation.*",
    "openmmml": (
        "interfaces.openmm_potential interfaces.openmm_mixed interfaces.openmm_mts "
        "interfaces.openmm_prepare validation.* bench.*"
    ),
    "openmmtorch": "interfaces.openmm_torch",
    "ase": (
        "interfaces.ase_calculator interfaces.openmm_correction validation.* training.sources "
        "training.teacher_worker training.orb training.datasets.convert bench.teacher_timing "
        "training.clash"
    ),
    "rdkit": "validation.* training.sources training.generation.* training.datasets.chemistry",
    "orb_models": "training.orb bench.teacher_timing",
    "fennol": "training.teacher_worker",
    "distributed": "training.parallel",
    "so3krates_torch": "training.so3lr",
    "matscipy": "training.so3lr",
    "h5py": (
        "training.hdf5 training.hessian training.pack training.starter training.datasets.spice"
    ),
    "omegaconf": "training.config",
    "mdtraj": "validation.*",
    "matplotlib": "validation.* bench.* training.plots training.datasets.page",
    "optuna": "training.tune",
    "wandb": "training.boards",
    "physical_validation": "validation.suite.ensembles",
    "typer": "cli cli_data cli_learn",
}


class Import(NamedTuple):
    """An import statement: who, what, and whether it runs when the module is imported."""

    module: str
    target: str
    at_import: bool


def modules():
    """Name within the package and file of every module."""
    for folder, package in FOLDERS.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = [package, *file.relative_to(ROOT / folder).with_suffix("").parts]
            name = ".".join(parts).removesuffix(".__init__").removeprefix("openmm_mlffd")
            yield name.removeprefix("."), file


def imports_of(name, source):
    def visit(node, at_import):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(name, alias.name, at_import)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield Import(name, whole if whole in MODULES else str(node.module), at_import)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            at_import = False
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            at_import = False
        for child in ast.iter_child_nodes(node):
            yield from visit(child, at_import)

    return list(visit(ast.parse(source), True))


MODULES = {f"openmm_mlffd.{name}".removesuffix("."): file for name, file in modules()}
IMPORTS = [i for name, file in modules() for i in imports_of(name, file.read_text())]


def matches(name, patterns):
    return any(
        name.startswith(p.removesuffix("*")) if p.endswith("*") else name == p
        for p in patterns.split(" ")
    )


def group_of(name):
    found = [group for group, (members, *_) in GROUPS.items() if matches(name, members)]
    assert found, f"{name} belongs to no group: give it a place in the table"
    return found[0]


def own(target):
    return target == "openmm_mlffd" or target.startswith("openmm_mlffd.")


def forbidden(imports):
    """Imports that the table does not allow, as text."""
    for module, target, at_import in imports:
        group = group_of(module)
        _, groups, libraries = GROUPS[group]
        top = target.split(".")[0]
        if own(target):
            other = group_of(target.removeprefix("openmm_mlffd").removeprefix("."))
            if other not in groups.split(" "):
                yield f"{module} ({group}) imports {target} ({other})"
        elif top in EXTERNAL:
            if top not in libraries.split(" "):
                yield f"{module} ({group}) imports {target}"
            if top in ONLY_IN and not matches(module, ONLY_IN[top]):
                yield f"{module} imports {top}, which only {ONLY_IN[top]} may"
        elif group == "factory" or (group == "facts" and target != "typing"):
            yield f"{module} imports {target}, but should import nothing"
        early = own(target) and target not in ("openmm_mlffd", *COMMANDS)
        if group in ("cli", "factory") and at_import and early:
            yield f"{module} imports {target} before it is needed"


# parts of the command line, which import what they need inside their functions
COMMANDS = ("openmm_mlffd.cli_data", "openmm_mlffd.cli_learn")

# what is neither the standard library's nor ours
EXTERNAL = {
    i.target.split(".")[0] for i in IMPORTS if i.target.split(".")[0] not in sys.stdlib_module_names
} - {"openmm_mlffd"}


def test_every_module_has_a_place_in_the_table():
    assert len(MODULES) > 25
    for name, _ in modules():
        group_of(name)


def test_no_module_imports_what_the_table_forbids():
    assert not list(forbidden(IMPORTS))


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("units", "import math"),
        ("elements", "from openmm_mlffd import units"),
        ("kernels.reference", "from openmm_mlffd.graph import Graph"),
        ("radial", "import h5py"),
        ("potential", "from openmm_mlffd.modelfile import load_student"),
        ("modelfile", "from openmm_mlffd.training import hdf5"),
        ("training.train", "from openmm_mlffd.interfaces.ase_calculator import MLFFDCalculator"),
        ("training.train", "import h5py"),
        ("training.label", "from openmm_mlffd.training.so3lr import So3lr\nimport so3krates_torch"),
        ("training.teacher_worker", "from openmm_mlffd import units"),
        ("evaluator", "def f():\n    import openmm"),
        ("interfaces.ase_calculator", "from openmm_mlffd.interfaces import openmm_force"),
        ("interfaces.openmm_force", "import openmm"),
        ("interfaces.openmm_selftest", "import openmm"),
        ("interfaces.openmm_stored", "import ase"),
        ("interfaces.openmm_factory", "import os"),
        ("interfaces.openmm_factory", "from openmm_mlffd.interfaces import openmm_potential"),
        ("cli", "from openmm_mlffd.training.train import Trainer"),
        ("validation.nve", "from openmm_mlffd.validation.suite.plan import Plan"),
        ("validation.nve", "from openmm_mlffd.training.hdf5 import Dataset"),
    ],
)
def test_import_that_crosses_layers_is_noticed(module, line):
    assert list(forbidden(imports_of(module, line)))


def test_import_of_a_layer_below_is_allowed():
    lines = "from openmm_mlffd.graph import Graph\nimport math, torch\nimport torch.nn"
    assert not list(forbidden(imports_of("potential", lines)))
