"""Run these with OpenMM-Torch installed; without, all but the refusals are skipped."""

import importlib.util
import logging
import subprocess
import sys

import numpy as np
import openmm
import pytest
from openmmml import MLPotential

pytest.importorskip("warp")

import openmm_mlffd
from openmm_mlffd.interfaces import openmm_torch
from openmm_mlffd.interfaces.openmm_stored import UnsafeSystemError, student_functions


@pytest.fixture
def platform():
    """The platform on which OpenMM-Torch works here."""
    try:
        openmm_torch.torch_force_class()
    except ImportError as error:
        pytest.skip(str(error))
    name = openmm_torch.best_platform()
    reason = openmm_torch._failure(name)
    if reason:
        pytest.skip(f"OpenMM-Torch does not work here: {reason}")
    return name


@pytest.fixture
def make_system(student_file, make_topology):
    def make(system, engine, **keywords):
        topology = make_topology(system.numbers, cell=system.cell)
        return MLPotential("mlffd", modelPath=student_file).createSystem(
            topology, engine=engine, **keywords
        )

    return make


@pytest.mark.parametrize("precision", ["single", "double"])
def test_forces_are_those_of_the_other_engine(
    platform, make_system, make_context, energy_and_forces, ethanol, reduced_box, precision
):
    for system in (ethanol, reduced_box):
        found, expected = (
            make_context(
                make_system(system, engine, precision=precision),
                system.positions, system.cell, platform=platform,
            )
            for engine in ("torchscript", "python")
        )  # fmt: skip
        for _ in range(3):
            for a, b in zip(energy_and_forces(found), energy_and_forces(expected), strict=True):
                assert np.abs(a - b).max() < 1e-4
            found.getIntegrator().step(5)
            expected.setPositions(found.getState(positions=True).getPositions())
        assert np.abs(energy_and_forces(expected)[1]).max() > 0.1


def test_atoms_of_a_mixed_system_are_the_chosen_ones(
    platform, student_file, make_topology, make_context, energy_and_forces, ethanol
):
    topology = make_topology(ethanol.numbers)
    classical = openmm.System()
    for _ in ethanol.numbers:
        classical.addParticle(12.0)
    atoms = [8, 2, 0, 5, 1, 3]
    contexts = []
    for engine in ("torchscript", "python"):
        mixed = MLPotential("mlffd", modelPath=student_file, engine=engine).createMixedSystem(
            topology, classical, atoms, allowMissingHydrogens=True
        )
        contexts.append(make_context(mixed, ethanol.positions, platform=platform))
    (energy, forces), (right, right_forces) = map(energy_and_forces, contexts)
    assert abs(energy - right) < 1e-4
    assert np.abs(forces - right_forces).max() < 1e-4
    assert np.abs(forces[[4, 6, 7]]).max() == 0.0
    assert np.abs(forces[atoms]).min() > 1e-6


def test_what_goes_wrong_is_an_exception_and_the_last_state_is_there(
    platform, make_system, make_context, ethanol
):
    system = make_system(ethanol, "torchscript")
    context = make_context(system, ethanol.positions, platform=platform)
    energy = context.getState(energy=True).getPotentialEnergy()._value
    broken = ethanol.positions.copy()
    broken[3, 1] = np.nan
    context.setPositions(broken / 10)
    with pytest.raises(openmm.OpenMMException, match="must be finite, but not those of atom 3"):
        context.getState(energy=True)
    good = openmm_mlffd.last_good(system)
    assert np.abs(good.positions - ethanol.positions / 10).max() < 1e-6
    context.setPositions(good.positions)
    again = context.getState(energy=True).getPotentialEnergy()._value
    assert abs(again - energy) < 1e-2


def test_stored_system_is_refused_unless_it_is_trusted(
    platform, make_system, make_context, energy_and_forces, ethanol, tmp_path
):
    system = make_system(ethanol, "torchscript")
    openmm_mlffd.save_system(system, tmp_path / "system.xml")
    with pytest.raises(UnsafeSystemError, match=r"load_system\(path, trusted=True\)"):
        openmm_mlffd.load_system(tmp_path / "system.xml")
    # OpenMM-Torch may end the process where it was not compiled for this PyTorch
    script = _READ.format(folder=tmp_path, platform=platform, positions=ethanol.positions.tolist())
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=200, check=False
    )
    if result.returncode < 0:
        pytest.skip(f"OpenMM-Torch cannot read what it wrote (signal {-result.returncode})")
    assert result.returncode == 0, result.stderr[-2000:]
    expected = energy_and_forces(make_context(system, ethanol.positions, platform=platform))[0]
    energy, numbers = result.stdout.strip().split("\n")[-2:]
    assert abs(float(energy) - expected) < 1e-5
    assert numbers == str(ethanol.numbers.tolist())


_READ = """
import openmm
import openmm_mlffd
from openmm_mlffd.interfaces.openmm_stored import student_functions
from openmm_mlffd.units import ANGSTROM_PER_NM, KJ_PER_MOL_PER_EV
system = openmm_mlffd.load_system("{folder}/system.xml", trusted=True)
platform = openmm.Platform.getPlatform("{platform}")
context = openmm.Context(system, openmm.VerletIntegrator(0.001), platform)
context.setPositions([[x / ANGSTROM_PER_NM for x in row] for row in {positions}])
print(context.getState(energy=True).getPotentialEnergy()._value / KJ_PER_MOL_PER_EV)
print(student_functions(system)[0].settings["numbers"])
"""


def test_interpolation_is_refused(student_file, make_topology, ethanol):
    classical = openmm.System()
    for _ in ethanol.numbers:
        classical.addParticle(12.0)
    potential = MLPotential("mlffd", modelPath=student_file, engine="torchscript")
    with pytest.raises(ValueError, match="interpolate=True copies forces"):
        potential.createMixedSystem(
            make_topology(ethanol.numbers), classical, list(range(9)), interpolate=True
        )


def test_faster_engine_is_measured_once_and_logged(platform, make_system, ethanol, caplog):
    settings = student_functions(make_system(ethanol, "python"))[0].settings
    openmm_torch._chosen.clear()
    with caplog.at_level(logging.INFO, logger="openmm_mlffd"):
        first = openmm_torch.faster_engine(settings, platform)
        assert openmm_torch.faster_engine(settings, platform) == first
    assert first in ("python", "torchscript")
    lines = [r.message for r in caplog.records if "a step:" in r.message]
    assert len(lines) == 1
    assert "python" in lines[0]
    assert "torchscript" in lines[0]


def test_missing_openmm_torch_is_an_error_that_says_what_to_install(make_system, ethanol):
    if importlib.util.find_spec("openmmtorch") is not None:
        pytest.skip("OpenMM-Torch is installed")
    with pytest.raises(ImportError, match=r"pip install 'openmmtorch\[cuda"):
        make_system(ethanol, "torchscript")


def test_device_is_the_context_s_own(make_system, ethanol):
    with pytest.raises(ValueError, match="leave device out"):
        make_system(ethanol, "torchscript", device="cpu")


def test_crafted_torch_force_is_not_read(tmp_path):
    path = tmp_path / "system.xml"
    path.write_text(
        '<System openmmVersion="8.6.1" type="System" version="1"><Forces>'
        '<Force type="TorchForce" version="3" encodedFileContents="00"/></Forces></System>'
    )
    with pytest.raises(UnsafeSystemError, match="TorchForce, which is code"):
        openmm_mlffd.load_system(path)
