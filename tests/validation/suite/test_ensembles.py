from dataclasses import replace

import numpy as np
import pytest

from openmm_mlffd.units import BOLTZMANN
from openmm_mlffd.validation.suite.dynamics import Trajectory
from openmm_mlffd.validation.suite.ensemble_section import run_ensembles
from openmm_mlffd.validation.suite.ensembles import (
    ensemble_checks,
    ensemble_numbers,
    physical_validation_numbers,
)
from openmm_mlffd.validation.suite.plan import WATER, EnsembleRun
from openmm_mlffd.validation.suite.systems import load_system

NVT = EnsembleRun(system="methanol", picoseconds=10.0, frame=0.02)
NPT = EnsembleRun(system=WATER, picoseconds=10.0, frame=0.02, pressure=1.0)


def failed(run, numbers):
    return {check.name.split(",")[0] for check in ensemble_checks(run, numbers) if not check.passed}


@pytest.fixture
def make_trajectory():
    """Five hundred frames at rest, with kinetic energies drawn from the right distribution."""

    def make(system, kelvin=300.0, spread=1.0, seed=0):
        rng = np.random.default_rng(seed)
        n, n_dof = 500, 3 * len(system.numbers) - 3
        kinetic = rng.gamma(n_dof / 2, BOLTZMANN * kelvin, n)
        kinetic = kinetic.mean() + spread * (kinetic - kinetic.mean())
        cell = np.zeros((3, 3)) if system.cell is None else system.cell
        positions = np.tile(system.positions.astype(np.float32), (n, 1, 1))
        return Trajectory(
            time=0.02 * np.arange(1, n + 1), positions=positions, cell=np.tile(cell, (n, 1, 1)),
            potential=np.zeros(n), kinetic=kinetic, n_dof=n_dof, seconds_per_step=1e-3,
        )  # fmt: skip

    return make


def test_the_right_distribution_passes(make_trajectory):
    system = load_system("methanol")
    numbers = ensemble_numbers(NVT, system, make_trajectory(system))
    assert not failed(NVT, numbers)
    assert numbers["temperature"] == pytest.approx(300, abs=3 * numbers["temperature_error"])
    assert numbers["kinetic_width"] == pytest.approx(1, abs=0.1)


def test_a_wrong_temperature_fails_there(make_trajectory):
    system = load_system("methanol")
    numbers = ensemble_numbers(NVT, system, make_trajectory(system, kelvin=340.0))
    assert "mean temperature" in failed(NVT, numbers)


def test_a_wrong_width_fails_there_alone(make_trajectory):
    # as a weak-coupling thermostat has it
    system = load_system("methanol")
    numbers = ensemble_numbers(NVT, system, make_trajectory(system, spread=0.5))
    assert failed(NVT, numbers) == {"width of the kinetic energy / expected − 1"}


def test_a_broken_bond_fails_there(make_trajectory):
    system = load_system("methanol")
    trajectory = make_trajectory(system)
    trajectory.positions[300, 5] += 2.0
    numbers = ensemble_numbers(NVT, system, trajectory)
    assert failed(NVT, numbers) == {"longest bond / its length at the start"}


def test_a_molecule_turned_inside_out_fails_there(make_trajectory):
    system = load_system("alanine dipeptide")
    run = replace(NVT, system="alanine dipeptide")
    trajectory = make_trajectory(system)
    assert not failed(run, ensemble_numbers(run, system, trajectory))
    trajectory.positions[250:] *= [1, 1, -1]
    numbers = ensemble_numbers(run, system, trajectory)
    assert failed(run, numbers) == {"centers of four neighbors that were turned inside out"}


def test_a_box_that_boils_fails_there(make_trajectory):
    system = load_system(WATER)
    trajectory = make_trajectory(system)
    numbers = ensemble_numbers(NPT, system, trajectory)
    assert not failed(NPT, numbers)
    assert numbers["density"] == pytest.approx(1.0, abs=0.05)
    boiled = replace(trajectory, cell=1.15 * trajectory.cell)
    assert failed(NPT, ensemble_numbers(NPT, system, boiled)) == {"density"}


def test_the_compressibility_is_that_of_the_fluctuations(make_trajectory):
    system = load_system(WATER)
    trajectory = make_trajectory(system)
    rng = np.random.default_rng(0)
    volume = abs(np.linalg.det(system.cell))
    kappa = 4.5e-5  # 1/bar
    from openmm_mlffd.units import BAR_PER_EV_PER_CUBIC_ANGSTROM

    variance = kappa * BAR_PER_EV_PER_CUBIC_ANGSTROM * volume * BOLTZMANN * 300
    scale = (1 + rng.normal(scale=np.sqrt(variance) / volume, size=500)) ** (1 / 3)
    breathing = replace(
        trajectory, time=3 * trajectory.time, cell=trajectory.cell * scale[:, None, None]
    )
    numbers = ensemble_numbers(NPT, system, breathing)
    assert numbers["compressibility"] == pytest.approx(kappa, rel=0.2)
    assert "compressibility" not in ensemble_numbers(NPT, system, breathing.until(15.0))


def test_physical_validation_agrees(make_trajectory):
    pytest.importorskip("physical_validation")
    system = load_system("methanol")
    right = physical_validation_numbers(NVT, system, make_trajectory(system))
    hot = physical_validation_numbers(NVT, system, make_trajectory(system, kelvin=340.0))
    assert abs(right["mean_deviation"]) < 3
    assert abs(right["width_deviation"]) < 3
    assert abs(hot["mean_deviation"]) > 5


def test_runs_that_are_too_short_are_not_judged_by_their_temperature(make_trajectory):
    system = load_system("methanol")
    short = make_trajectory(system, kelvin=400.0).until(0.5)
    assert not failed(NVT, ensemble_numbers(NVT, system, short))


def test_a_run_that_failed_fails(toy, make_job):
    run = EnsembleRun(system="methanol", picoseconds=0.1, frame=0.005)

    class Exploding(type(toy)):
        def label(self, batch, *, precision="single"):
            labels = super().label(batch, precision=precision)
            labels.forces *= 1e6
            return labels

    job = make_job(Exploding(toy.potential, "boom", "boom"), ensembles=(run,))
    result = run_ensembles(job)
    assert not result.passed
    (found,) = result.numbers.values()
    assert found["failure"] or found["longest_bond"] is None or not found["longest_bond"] < 1.5
