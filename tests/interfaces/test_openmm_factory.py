"""OpenMM-ML loads the entry point while it is half imported itself: the order must not matter."""

import ast
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from openmm_mlffd.interfaces import openmm_factory


@pytest.mark.parametrize(
    "first",
    [
        "import openmmml",
        "from openmmml import MLPotential",
        "import openmmml.mlpotential",
        "import openmm_mlffd",
        "import openmm_mlffd.interfaces.openmm_factory",
        "import openmm_mlffd.interfaces.openmm_potential",
        "import openmm_mlffd.interfaces.openmm_force",
        "import torch, openmm_mlffd.interfaces.ase_calculator",
    ],
)
def test_the_potential_is_registered_whatever_is_imported_first(first, student_file):
    script = (
        f"{first}\n"
        "from openmmml import MLPotential\n"
        f"impl = MLPotential('mlffd', modelPath={student_file!r})._impl\n"
        "from openmmml.mlpotential import MLPotentialImpl\n"
        "assert isinstance(impl, MLPotentialImpl)\n"
        "assert impl.getMLLongRange() is False\n"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", script],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr


def test_the_factory_imports_nothing_when_loaded():
    tree = ast.parse(Path(openmm_factory.__file__).read_text())
    assert not any(isinstance(node, ast.Import | ast.ImportFrom) for node in tree.body)


def test_openmmml_alone_does_not_load_torch_or_the_student():
    script = (
        "import sys, openmmml; assert not {'torch', 'openmm_mlffd.modelfile'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_there_is_one_entry_point():
    found = [e for e in entry_points(group="openmmml.potentials") if e.name == "mlffd"]
    assert len(found) == 1
    assert found[0].load() is openmm_factory.MLFFDPotentialImplFactory
