from dataclasses import replace

import numpy as np
import openmm
import pytest
from openmm import app

from openmm_mlffd.units import BOLTZMANN
from openmm_mlffd.validation.conservation import temperature
from openmm_mlffd.validation.nve import run_nve
from openmm_mlffd.validation.suite.dynamics import run_langevin, run_nve_on_disk
from openmm_mlffd.validation.suite.plan import WATER, EnsembleRun
from openmm_mlffd.validation.suite.store import Clock, OutOfTime
from openmm_mlffd.validation.suite.systems import load_system

RUN = EnsembleRun(system="methanol", picoseconds=1.0, frame=0.005)


class Interrupted(Clock):
    """A clock that stops after so many looks."""

    def __init__(self, looks):
        super().__init__()
        self.looks = looks

    def check(self, seconds=0.0):
        self.looks -= 1
        if self.looks < 0:
            raise OutOfTime("stopped")


@pytest.fixture
def methanol(make_springs):
    system = load_system("methanol")
    return system, make_springs(system.positions)


def run(methanol, folder, clock=None, **changes):
    system, model = methanol
    folder.mkdir(exist_ok=True)
    return run_langevin(
        lambda: model.system(system.topology), system, replace(RUN, **changes), folder,
        clock=clock or Clock(),
    )  # fmt: skip


def test_an_interrupted_run_has_the_frames_of_one_that_was_not(methanol, tmp_path):
    whole = run(methanol, tmp_path / "whole")
    with pytest.raises(OutOfTime):
        run(methanol, tmp_path / "parts", Interrupted(3))
    assert len(list((tmp_path / "parts").glob("*.npz"))) == 3
    resumed = run(methanol, tmp_path / "parts")
    np.testing.assert_array_equal(resumed.positions, whole.positions)
    np.testing.assert_array_equal(resumed.kinetic, whole.kinetic)
    np.testing.assert_allclose(resumed.time, 0.005 * np.arange(1, 201))


def test_the_thermostat_holds_its_temperature(make_springs, tmp_path):
    # 48 degrees of freedom and some 45 independent samples: 9 K is the standard error
    system = load_system("trimethyl phosphate")
    molecule = system, make_springs(system.positions)
    trajectory = run(molecule, tmp_path / "run", system=system.name, picoseconds=10.0, frame=0.02)
    found = temperature(trajectory.kinetic[50:], trajectory.n_dof)
    assert trajectory.n_dof == 48
    assert found.mean() == pytest.approx(300, abs=30)
    width = trajectory.kinetic[50:].std() / (np.sqrt(24) * BOLTZMANN * 300)
    assert width == pytest.approx(1.0, abs=0.3)


def test_a_run_out_of_minutes_is_as_long_as_it_is(methanol, tmp_path):
    run(methanol, tmp_path / "run", picoseconds=0.5)
    system, model = methanol
    shorter = run_langevin(
        lambda: model.system(system.topology), system, RUN, tmp_path / "run",
        clock=Clock(), minutes=0.0,
    )  # fmt: skip
    assert shorter.time[-1] == pytest.approx(0.5)
    assert not shorter.failure


def test_frames_up_to_a_time_are_the_first_ones(methanol, tmp_path):
    trajectory = run(methanol, tmp_path / "run", picoseconds=0.25)
    part = trajectory.until(0.1)
    assert len(part.time) == len(part.positions) == 20
    np.testing.assert_array_equal(part.positions, trajectory.positions[:20])


def test_a_run_that_explodes_says_so_and_keeps_its_frames(methanol, tmp_path):
    system, model = methanol

    class Exploding(type(model)):
        calls = 0

        def label(self, batch, *, precision="single"):
            labels = super().label(batch, precision=precision)
            Exploding.calls += 1
            if Exploding.calls > 120:
                labels.energy[:] = np.nan
                labels.forces[:] = np.nan
            return labels

    trajectory = run((system, Exploding(system.positions)), tmp_path / "run")
    assert trajectory.failure.startswith("after 0.")
    assert 0 < len(trajectory.time) < 200
    again = run(methanol, tmp_path / "run")
    assert again.failure == trajectory.failure


def test_segments_at_constant_energy_follow_one_trajectory(methanol, tmp_path):
    system, model = methanol
    made = model.system(system.topology)
    context = openmm.Context(made, openmm.VerletIntegrator(0.001))
    context.setPositions(system.nanometers)
    context.setVelocitiesToTemperature(300, 1)
    start = context.getState(positions=True, velocities=True)
    arguments = {"timestep": 0.5, "picoseconds": 0.5, "sample": 1.0}
    whole = run_nve(made, start, platform="Reference", **arguments)
    go = dict(arguments, make_system=lambda: made, start=start, folder=tmp_path)
    with pytest.raises(OutOfTime):
        run_nve_on_disk(**go, clock=Interrupted(2))
    trace = run_nve_on_disk(**go, clock=Clock())
    assert len(list(tmp_path.glob("*.npz"))) == 4
    np.testing.assert_allclose(trace.time, whole.time, atol=1e-12)
    np.testing.assert_allclose(trace.potential, whole.potential, atol=1e-7)
    np.testing.assert_allclose(trace.end, whole.end, atol=1e-6)
    known = np.isfinite(trace.shadow)
    np.testing.assert_allclose(trace.shadow[known], whole.shadow[known], atol=1e-7)
    assert known.mean() > 0.95


def test_a_repeated_box_is_the_same_liquid():
    single, double = load_system(WATER), load_system(WATER, (2, 1, 1))
    assert len(double.numbers) == 2 * len(single.numbers)
    assert len(double.bonds) == 2 * len(single.bonds)
    np.testing.assert_allclose(double.cell[0], 2 * single.cell[0], atol=1e-4)
    moved = double.positions[len(single.numbers) :] - single.positions
    np.testing.assert_allclose(moved, np.tile(single.cell[0], (len(moved), 1)), atol=1e-6)
    assert isinstance(double.topology, app.Topology)
    with pytest.raises(ValueError, match="has no box"):
        load_system("methanol", (2, 1, 1))
    with pytest.raises(ValueError, match="no system and no file is called 'methanole'"):
        load_system("methanole")
