"""The bundled student in OpenMM at constant energy; pass marks are those of docs/validation.md."""

from pathlib import Path

import numpy as np
import openmm
import pytest
from openmmml import MLPotential

from openmm_mlffd.validation.nve import equilibrate, measure_nve, time_reversal_error
from openmm_mlffd.validation.structures import read_structure

STRUCTURE = Path(__file__).parents[2] / "examples" / "structures" / "alanine-dipeptide.pdb"

WARM = Path(__file__).parents[1] / "data" / "warm_dipeptide.npz"


@pytest.fixture(scope="module")
def dipeptide():
    topology, positions = read_structure(STRUCTURE)
    system = MLPotential("mlffd").createSystem(topology, device="cpu")
    start = equilibrate(system, positions, picoseconds=0.5, platform="CPU")
    return system, start


def warm_state(system):
    """A state at 300 K from which students with sharp norms lose energy within 0.3 ps."""
    integrator = openmm.VerletIntegrator(0.001)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatform("CPU"))
    with np.load(WARM) as start:
        context.setPositions(start["positions"])
        context.setVelocities(start["velocities"])
    return context.getState(positions=True, velocities=True)


def test_energy_does_not_wander_within_a_third_of_a_picosecond():
    topology, _ = read_structure(STRUCTURE)
    system = MLPotential("mlffd").createSystem(topology, device="cpu")
    options = {"timesteps": [0.5], "picoseconds": 0.3, "platform": "CPU"}
    (trace,) = measure_nve(system, warm_state(system), **options).traces
    spread = np.nanstd(trace.shadow) / 22 * 1e3
    assert spread < 0.006  # meV/atom; 0.017 with norms softened by 1e-4


@pytest.mark.slow
def test_forces_belong_to_the_energy(dipeptide):
    system, start = dipeptide
    result = measure_nve(system, start, picoseconds=0.2, platform="CPU")
    assert 3.0 < result.halving_ratios[0] < 5.0


@pytest.mark.slow
def test_energy_does_not_drift(dipeptide):
    system, start = dipeptide
    result = measure_nve(system, start, timesteps=[0.5], picoseconds=2.0, platform="CPU")
    (drift,) = result.checks
    assert drift.value < 0.01
    assert 150 < result.runs[0].mean_temperature < 450


@pytest.mark.slow
def test_the_student_runs_backwards_in_time(dipeptide):
    system, start = dipeptide
    assert time_reversal_error(system, start, steps=200, platform="CPU") < 1e-5


@pytest.mark.slow
def test_the_molecule_does_not_move_as_a_whole(dipeptide):
    system, start = dipeptide
    masses = np.array([system.getParticleMass(i)._value for i in range(22)])
    trace = measure_nve(system, start, timesteps=[0.5], picoseconds=0.05, platform="CPU").traces[0]
    before = start.getPositions(asNumpy=True)._value
    drift = masses @ (trace.end - before) / masses.sum()
    velocity = masses @ start.getVelocities(asNumpy=True)._value / masses.sum()
    np.testing.assert_allclose(drift, velocity * trace.time[-1], atol=1e-9)
