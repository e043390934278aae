import subprocess
import sys
from pathlib import Path

import pytest

import openmm_mlffd

HEAVY = {
    "torch",
    "warp",
    "numpy",
    "openmm",
    "openmmml",
    "ase",
    "h5py",
    "omegaconf",
    "mdtraj",
    "typer",
}
TRAINING_ONLY = {"h5py", "omegaconf", "tensorboard", "mdtraj", "matplotlib", "rdkit", "typer"}
# Warp writes this to the process's stderr, whatever its settings
NO_DRIVER = (
    "Warp CUDA warning: Could not find or load the NVIDIA CUDA driver. "
    "GPU execution will not be available.\n"
)


def loaded_by(code):
    """Modules that a fresh interpreter has after the code, which must print nothing."""
    code += "\nimport sys\nprint(' '.join(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert result.stderr in ("", NO_DRIVER)
    assert result.stdout.count("\n") == 1
    return set(result.stdout.split())


def test_importing_the_package_is_cheap_and_silent():
    assert not loaded_by("import openmm_mlffd") & HEAVY


def test_importing_the_entry_point_loads_nothing():
    before = loaded_by("import openmm_mlffd.interfaces")
    after = loaded_by("import openmm_mlffd.interfaces.openmm_factory")
    assert after - before == {"openmm_mlffd.interfaces.openmm_factory"}
    assert not after & HEAVY


def test_help_is_there_before_torch():
    code = "import sys; sys.argv = ['mlffd', '--version']\nimport openmm_mlffd.cli"
    assert not loaded_by(code) & (HEAVY - {"typer"})


def test_students_need_no_library_of_the_training():
    code = "import openmm_mlffd.evaluator, openmm_mlffd.interfaces.openmm_force"
    modules = loaded_by(code)
    assert "torch" in modules
    assert not modules & (TRAINING_ONLY | {"openmm", "openmmml", "ase", "warp"})
    assert not any(name.startswith("openmm_mlffd.training") for name in modules)


def test_fused_kernels_start_in_silence_and_leave_warp_as_it_was():
    pytest.importorskip("warp")
    code = (
        "import warp\n"
        "before = warp.config.log_level\n"
        "import torch\n"
        "from openmm_mlffd.kernels.neighbor_ops import neighbor_rows\n"
        "i = torch.zeros(1, dtype=torch.int32)\n"
        "box, first = torch.zeros(1, 3, 3).double(), torch.tensor([0, 1]).int()\n"
        "neighbor_rows(box[0, :1], box, box[:, 0].bool(), i, first, 3.0, 4, False)\n"
        "assert warp.config.log_level == before"
    )
    assert "warp" in loaded_by(code)


def test_validations_are_measured_without_what_reports_need():
    modules = loaded_by("import openmm_mlffd.validation.suite.command")
    assert {"torch", "openmm"} <= modules
    assert not modules & {"matplotlib", "mdtraj", "rdkit", "h5py", "ase", "physical_validation"}


def test_importing_leaves_torch_and_warnings_as_they_were():
    loaded_by(
        "import torch, warnings\n"
        "def state():\n"
        "    return (torch.get_default_dtype(), torch.get_num_threads(), warnings.filters[:],\n"
        "            torch.backends.cuda.matmul.allow_tf32, torch.get_rng_state().tolist(),\n"
        "            torch.are_deterministic_algorithms_enabled())\n"
        "before = state()\n"
        "import openmm_mlffd.evaluator, openmm_mlffd.interfaces.openmm_force\n"
        "import openmm_mlffd.modelfile\n"
        "assert state() == before"
    )


@pytest.mark.parametrize("name", sorted(set(openmm_mlffd.__all__) - {"__version__"}))
def test_public_name_is_the_object_of_its_module(name):
    found = getattr(openmm_mlffd, name)
    module = sys.modules[found.__module__]
    assert module.__name__.startswith("openmm_mlffd.")
    assert getattr(module, name) is found
    assert name in dir(openmm_mlffd)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"'openmm_mlffd' has no attribute 'load_studnt'"):
        _ = openmm_mlffd.load_studnt


def test_there_is_one_copy_of_each_module():
    import openmm_mlffd.kernels.reference as kernels
    import openmm_mlffd.training.hdf5 as training

    assert kernels.__name__ == "openmm_mlffd.kernels.reference"
    assert training.__name__ == "openmm_mlffd.training.hdf5"
    files = {
        Path(module.__file__).resolve(): name
        for name, module in list(sys.modules.items())
        if getattr(module, "__file__", None) and "mlffd" in name
    }
    assert len({str(f) for f in files}) == len(files)
    assert "kernels" not in sys.modules
    assert "training" not in sys.modules
