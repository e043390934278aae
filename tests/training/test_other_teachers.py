"""Orb and FeNNol, from files with random weights; their environments.

These teachers need environments of their own, which are named by MLFFD_ORB_PYTHON (of several
generations of orb-models, separated as in PATH) and MLFFD_FENNOL_PYTHON.
"""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from openmm_mlffd.cli import app
from openmm_mlffd.training import environments
from openmm_mlffd.training.environments import (
    Environment,
    InstallError,
    environment_of,
    family_of,
    install,
    installed_python,
)
from openmm_mlffd.training.teacher_worker import Batch
from openmm_mlffd.training.teachers import TeacherError, WorkerTeacher

HERE = Path(__file__).parent
ORBS = [p for p in os.environ.get("MLFFD_ORB_PYTHON", "").split(os.pathsep) if p]
WATER = ([8, 1, 1], [[-1.5210, -0.1176, 0.0], [-1.9228, 0.7518, 0.0], [-0.5778, 0.0486, 0.0]])
HYDROXIDE = ([8, 1], [[0.0, 0.0, 0.0], [0.0, 0.0, 0.97]])
BROMIDE = ([35, 1], [[0.0, 0.0, 0.0], [0.0, 0.0, 1.41]])
BOX = np.array([[8.0, 0.0, 0.0], [1.0, 8.5, 0.0], [-1.0, 0.5, 9.0]])


def batch(*structures, charges=None, cell=None, shift=None):
    count = [len(numbers) for numbers, _ in structures]
    n = len(count)
    positions = np.concatenate([p for _, p in structures]).astype("f8")
    return Batch(
        offsets=np.concatenate([[0], np.cumsum(count)]).astype("i8"),
        atomic_numbers=np.concatenate([z for z, _ in structures]).astype("u1"),
        positions=positions if shift is None else positions + shift,
        cell=np.zeros((n, 3, 3)) if cell is None else np.stack([cell] * n),
        pbc=np.full((n, 3), cell is not None),
        total_charge=np.zeros(n, "i2") if charges is None else np.array(charges, "i2"),
    )


def assert_forces_are_the_gradient(teacher, structure, *, step, tolerance):
    found = teacher.label(batch(structure)).forces
    for atom, axis in [(0, 0), (1, 1), (2, 0)]:
        shift = np.zeros((3, 3))
        shift[atom, axis] = step
        up = teacher.label(batch(structure, shift=shift)).energy[0]
        down = teacher.label(batch(structure, shift=-shift)).energy[0]
        assert found[atom, axis] == pytest.approx(-(up - down) / (2 * step), abs=tolerance)


def assert_stress_is_the_derivative(teacher, *, step, tolerance):
    numbers, positions = WATER

    def energy(strain):
        one = batch((numbers, positions @ (np.eye(3) + strain)), cell=BOX @ (np.eye(3) + strain))
        return teacher.label(one).energy[0]

    stress = teacher.label(batch(WATER, cell=BOX)).stress[0]
    for a, b in [(0, 0), (1, 1), (0, 1)]:
        strain = np.zeros((3, 3))
        strain[a, b] += 0.5 * step
        strain[b, a] += 0.5 * step
        slope = (energy(strain) - energy(-strain)) / (2 * step) / np.linalg.det(BOX)
        assert stress[a, b] == pytest.approx(slope, abs=tolerance)


# Orb


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Write a checkpoint of a model by one of the Pythons."""
    folder = tmp_path_factory.mktemp("orb")

    def make(python, name):
        path = folder / f"{ORBS.index(python)}-{name}.ckpt"
        if not path.exists():
            command = [python, str(HERE / "make_orb.py"), name, str(path)]
            subprocess.run(command, check=True, capture_output=True)
        return str(path)

    return make


needs_orb = pytest.mark.skipif(not ORBS, reason="MLFFD_ORB_PYTHON names no Python")


@needs_orb
@pytest.mark.slow
@pytest.mark.parametrize("python", ORBS)
def test_direct_orb_labels_batches_as_single_structures(checkpoint, python):
    weights = checkpoint(python, "orb-d3-xs-v2")
    with WorkerTeacher("orb-d3-xs-v2", {"weights_path": weights}, python=python) as teacher:
        assert teacher.describe().startswith("orb-d3-xs-v2 (orb-models 0.")
        assert "weights with SHA-256" in teacher.describe()
        both = teacher.label(batch(WATER, HYDROXIDE, BROMIDE, charges=[0, -1, 0]))
        alone = teacher.label(batch(WATER))
        boxed = teacher.label(batch(WATER, cell=BOX))
    assert both.failure.tolist() == ["", "total charge -1, of which orb-d3-xs-v2 knows nothing", ""]
    assert both.energy[0] == pytest.approx(alone.energy[0], abs=1e-4)
    np.testing.assert_allclose(both.forces[:3], alone.forces, atol=1e-4)
    assert np.isnan(both.energy[1])
    assert np.isnan(alone.stress).all()
    assert np.isfinite(boxed.stress).all()
    assert boxed.energy[0] == pytest.approx(alone.energy[0], abs=1e-3)  # images beyond 6 Å


@needs_orb
@pytest.mark.slow
@pytest.mark.parametrize("python", ORBS)
def test_conservative_orb_knows_the_charge_and_its_forces_are_the_gradient(checkpoint, python):
    name = "orb-v3-conservative-omol"
    options = {"weights_path": checkpoint(python, name), "precision": "float64"}
    with WorkerTeacher(name, options, python=python) as teacher:
        labels = teacher.label(batch(WATER, WATER, HYDROXIDE, HYDROXIDE, charges=[0, 2, -1, 0]))
        assert labels.failure.tolist()[:3] == ["", "", ""]
        assert labels.failure[3] == "9 electrons, an odd number, at total charge 0"
        assert abs(labels.energy[1] - labels.energy[0]) > 1e-4
        assert_forces_are_the_gradient(teacher, WATER, step=1e-3, tolerance=1e-4)


@needs_orb
@pytest.mark.slow
def test_generations_of_orb_give_the_same_labels(checkpoint):
    if len(ORBS) < 2:
        pytest.skip("needs two generations of orb-models")
    found = []
    for python in ORBS:
        weights = checkpoint(ORBS[0], "orb-d3-xs-v2")  # the layout of v2 is that of both
        with WorkerTeacher("orb-d3-xs-v2", {"weights_path": weights}, python=python) as teacher:
            found.append(teacher.label(batch(WATER, cell=BOX)))
    np.testing.assert_allclose(found[0].energy, found[1].energy, rtol=0, atol=1e-4)
    np.testing.assert_allclose(found[0].forces, found[1].forces, rtol=0, atol=1e-4)
    np.testing.assert_allclose(found[0].stress, found[1].stress, rtol=0, atol=1e-4)


@needs_orb
@pytest.mark.slow
def test_orb_that_cannot_be_loaded_says_why(checkpoint, tmp_path):
    python = ORBS[0]
    with pytest.raises(TeacherError, match="did you mean orb-v2"):
        WorkerTeacher("orb-v22", python=python)
    with pytest.raises(TeacherError, match="there is no such checkpoint of orb-v2"):
        WorkerTeacher("orb-v2", {"weights_path": "/no/file.ckpt"}, python=python)
    weights = checkpoint(python, "orb-d3-xs-v2")
    with pytest.raises(TeacherError, match="is no checkpoint of orb-v2"):
        WorkerTeacher("orb-v2", {"weights_path": weights}, python=python)


def test_orb_without_its_package_says_what_to_install():
    with pytest.raises(TeacherError, match="mlffd teacher install orb"):
        WorkerTeacher("orb-v2", python=sys.executable)


# FeNNol


@pytest.fixture(scope="module")
def fennix(tmp_path_factory):
    """Python and file of a random model."""
    python = os.environ.get("MLFFD_FENNOL_PYTHON")
    if not python:
        pytest.skip("MLFFD_FENNOL_PYTHON names no Python")
    path = tmp_path_factory.mktemp("fennix") / "random.fnx"
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [python, str(HERE / "make_fennix.py"), str(path)]
    subprocess.run(command, check=True, capture_output=True, env=environment)
    return python, str(path)


@pytest.mark.slow
def test_fennol_model_labels_molecules_of_its_elements(fennix):
    python, path = fennix
    with WorkerTeacher("fennix", {"model": path}, python=python) as teacher:
        labels = teacher.label(batch(WATER, BROMIDE, HYDROXIDE, HYDROXIDE, charges=[0, 0, -1, 0]))
        assert labels.failure[0] == ""
        assert labels.failure[1] == "the teacher does not know atomic number 35"
        assert labels.failure[2].endswith("total charge -1, on which this model does not depend")
        assert labels.failure[3] == "9 electrons, an odd number, at total charge 0"
        assert_forces_are_the_gradient(teacher, WATER, step=1e-4, tolerance=1e-6)
        assert_stress_is_the_derivative(teacher, step=1e-4, tolerance=1e-7)


def test_fennol_files_that_cannot_be_used_are_refused(tmp_path):
    (tmp_path / "a.pkl").touch()
    for path, message in [("a.pkl", "could run any code"), ("no.fnx", "there is no such model")]:
        with pytest.raises(TeacherError, match=message):
            WorkerTeacher("fennix", {"model": str(tmp_path / path)})
    (tmp_path / "a.fnx").touch()
    with pytest.raises(TeacherError, match="mlffd teacher install fennix"):
        WorkerTeacher("fennix", {"model": str(tmp_path / "a.fnx")})


# environments


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv(environments.FOLDER_VARIABLE, str(tmp_path / "teachers"))
    return tmp_path / "teachers"


def write_wheel(path, code):
    """A package of one module, as small as wheels can be."""
    info = "toy-1.0.dist-info"
    with zipfile.ZipFile(path / "toy-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("toy.py", code)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", f"toy.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n")
    return str(path / "toy-1.0-py3-none-any.whl")


def test_environment_is_made_found_and_not_made_again(folder, tmp_path):
    toy = Environment(requirements=(write_wheel(tmp_path, "x = 1\n"),), modules=("toy",))
    assert installed_python("so3lr") is None
    (folder / "so3lr" / "bin").mkdir(parents=True)  # of an installation that was ended
    said = []
    python = install("so3lr", pip_arguments=["--no-index"], environment=toy, echo=said.append)
    code = "import toy, sys; print(toy.x, sys.prefix)"
    shown = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == ["1", str(folder / "so3lr")]
    assert installed_python("so3lr") == installed_python("so3lr-stock") == python
    assert installed_python("orb-v2") is None
    assert install("so3lr", environment=toy, echo=said.append) == python
    assert said[-1].endswith("is there already")


def test_environment_that_cannot_be_made_leaves_nothing(folder, tmp_path):
    broken = Environment(requirements=("no-such-package==0",), modules=("toy",))
    with pytest.raises(InstallError, match=r"pip failed: .*no-such-package"):
        install("orb", pip_arguments=["--no-index"], environment=broken)
    assert not (folder / "orb").exists()
    with pytest.raises(InstallError, match="cannot be started"):
        install("orb", python="/no/python")


def test_names_of_teachers_lead_to_environments():
    assert family_of("orb-v3-conservative-omol") == "orb"
    assert family_of("so3lr-stock") == family_of("so3lr") == "so3lr"
    assert family_of("ase:module:factory") is None
    assert environment_of("orb", (3, 11)).requirements == ("orb-models==0.5.5",)
    assert environment_of("orb", (3, 12)).requirements == ("orb-models==0.7.0",)
    with pytest.raises(InstallError, match="there is no environment 'gfn3'; there are so3lr"):
        environment_of("gfn3", (3, 12))


def test_command_refuses_unknown_teachers(folder):
    done = CliRunner().invoke(app, ["teacher", "install", "mace"])
    assert isinstance(done.exception, InstallError)


@pytest.mark.slow
def test_environment_of_gfn2_is_installed_and_used(folder):
    if os.environ.get("MLFFD_NETWORK") != "1":
        pytest.skip("MLFFD_NETWORK=1 allows downloads")
    install("gfn2-xtb")
    with WorkerTeacher("gfn2-xtb", python=installed_python("gfn2-xtb")) as teacher:
        assert teacher.label(batch(WATER)).energy[0] == pytest.approx(-137.97, abs=0.1)
