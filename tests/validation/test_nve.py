from dataclasses import replace

import numpy as np
import openmm
import pytest
from openmm import app, unit

from openmm_mlffd.units import KJ_PER_MOL_PER_EV
from openmm_mlffd.validation.conservation import halving_ratio
from openmm_mlffd.validation.nve import (
    ConstantEnergy,
    degrees_of_freedom,
    equilibrate,
    measure_nve,
    run_nve,
    time_reversal_error,
    velocity_verlet,
)


def start_of(chain, **options):
    options = {"picoseconds": 0.2, "platform": "Reference"} | options
    return equilibrate(chain.system(), chain.positions(), **options)


def measure(chain, start, **options):
    # atoms of carbon with long bonds: larger steps than for hydrogen
    options = {"timesteps": (1.0, 2.0), "picoseconds": 1.0, "platform": "Reference"} | options
    return measure_nve(chain.system(), start, **options)


def test_exact_forces_pass_with_a_halving_ratio_of_four(make_chain):
    result = measure(make_chain(), start_of(make_chain()))
    assert result.halving_ratios == [pytest.approx(4, abs=0.3)]
    assert result.passed
    assert len(result.checks) == 2
    assert [run.timestep for run in result.runs] == [1.0, 2.0]


def test_a_run_that_goes_on_is_that_of_one_portion(make_chain):
    chain = make_chain()
    start = start_of(chain)
    options = {"timestep": 1.0, "sample": 2.0, "platform": "Reference"}
    whole = run_nve(chain.system(), start, picoseconds=0.2, **options)
    run = ConstantEnergy(chain.system(), start, **options)
    first, state = run.go_on(0.08)
    second, _ = run.go_on(0.12)
    for name in ("potential", "kinetic", "shadow"):
        joined = np.concatenate([getattr(first, name), getattr(second, name)[1:]])
        np.testing.assert_array_equal(joined, getattr(whole, name))
    assert np.isfinite(second.shadow).all()
    assert second.time[0] == 0
    # and from the State between them
    again, _ = ConstantEnergy(chain.system(), state, **options).go_on(0.12)
    np.testing.assert_allclose(again.potential, second.potential, rtol=0, atol=1e-9)


def test_forces_one_percent_too_large_fail_the_halving_ratio(make_chain):
    result = measure(make_chain(scale=1.01), start_of(make_chain()), timesteps=(0.5, 0.25))
    ratio, _ = result.checks
    assert ratio.value < 2
    assert not ratio.passed
    assert not result.passed


def test_forces_that_are_no_gradient_fail_the_drift(make_chain):
    result = measure(make_chain(swirl=10.0), start_of(make_chain()))
    _, drift = result.checks
    assert "drift" in drift.name
    assert drift.value > 0.05
    assert not result.passed


def test_leapfrog_energies_fail_the_halving_ratio(make_chain):
    start, traces = start_of(make_chain()), []
    for timestep in (1.0, 2.0):
        system = make_chain().system()
        trace = run_nve(
            system, start, timestep=timestep, picoseconds=0.4, sample=2.0, platform="Reference"
        )
        leapfrog = openmm.CustomIntegrator(timestep * unit.femtosecond)
        leapfrog.addGlobalVariable("kinetic", 0)
        leapfrog.addGlobalVariable("potential", 0)
        leapfrog.addComputeGlobal("potential", "energy")
        leapfrog.addComputePerDof("v", "v + dt*f/m")
        leapfrog.addComputeSum("kinetic", "0.5*m*v*v")  # half a step later
        leapfrog.addComputePerDof("x", "x + dt*v")
        context = openmm.Context(system, leapfrog, openmm.Platform.getPlatform("Reference"))
        context.setPositions(start.getPositions())
        context.setVelocities(start.getVelocities())
        energies = []
        for _ in trace.time:
            leapfrog.step(round(2.0 / timestep))
            energies.append(
                [
                    leapfrog.getGlobalVariableByName(n) / KJ_PER_MOL_PER_EV
                    for n in ("potential", "kinetic")
                ]
            )
        potential, kinetic = np.array(energies).T
        traces.append(replace(trace, potential=potential, kinetic=kinetic))
    assert halving_ratio(*traces) < 2.5


def test_the_integrator_knows_the_energies_of_its_own_positions(make_chain):
    integrator = velocity_verlet(1.0)
    platform = openmm.Platform.getPlatform("Reference")
    context = openmm.Context(make_chain().system(), integrator, platform)
    context.setPositions(make_chain().positions())
    for _ in range(5):
        integrator.step(3)
        potential, _ = make_chain()(context.getState(positions=True))
        velocities = context.getState(velocities=True).getVelocities(asNumpy=True)
        kinetic = 6.0 * (velocities._value**2).sum()
        assert integrator.getGlobalVariableByName("potential") == pytest.approx(potential)
        assert integrator.getGlobalVariableByName("kinetic") == pytest.approx(kinetic)


def test_the_shadow_energy_has_less_ripple_of_a_higher_order(make_chain):
    result = measure(make_chain(), start_of(make_chain()), picoseconds=0.4)
    shadows = [trace.shadow[np.isfinite(trace.shadow)].std() for trace in result.traces]
    assert shadows[1] < 0.1 * result.traces[1].total.std()
    assert shadows[1] / shadows[0] == pytest.approx(16, abs=4)


@pytest.mark.parametrize("sample", [1.0, 2.0, 3.0, 7.0])
def test_the_shadow_energy_is_right_from_its_first_value(make_chain, sample):
    trace = run_nve(
        make_chain().system(), start_of(make_chain()), timestep=1.0, picoseconds=0.1,
        sample=sample, platform="Reference",
    )  # fmt: skip
    known = trace.shadow[np.isfinite(trace.shadow)]
    assert len(known) >= len(trace.time) - 3
    assert np.ptp(known) < 0.2 * np.ptp(trace.total)


def test_runs_are_sampled_at_the_same_times(make_chain):
    fine, coarse = measure(make_chain(), start_of(make_chain()), picoseconds=0.3).traces
    np.testing.assert_allclose(fine.time, coarse.time)
    assert fine.time[-1] == pytest.approx(0.3)
    assert fine.total[0] == pytest.approx(coarse.total[0], rel=1e-12)


def test_time_runs_backwards_too(make_chain):
    start = start_of(make_chain())
    system = make_chain().system()
    error = time_reversal_error(system, start, timestep=1.0, steps=200, platform="Reference")
    trace = run_nve(system, start, timestep=1.0, picoseconds=0.2, platform="Reference")
    moved = np.abs(trace.end - start.getPositions(asNumpy=True)._value).max()
    assert moved > 1e-3
    assert error < 1e-10


def test_a_thermostat_in_the_system_stays_out_of_the_run(make_chain):
    start = start_of(make_chain())
    system = make_chain().system()
    system.addForce(openmm.AndersenThermostat(1000 * unit.kelvin, 100 / unit.picosecond))
    trace = run_nve(system, start, timestep=1.0, picoseconds=0.2, platform="Reference")
    assert trace.total.std() < 0.03 * trace.kinetic.std()


def test_the_start_depends_on_nothing_but_the_seed(make_chain):
    positions = [
        start_of(make_chain(), seed=seed).getPositions(asNumpy=True)._value for seed in (1, 1, 2)
    ]
    np.testing.assert_array_equal(positions[0], positions[1])
    assert np.abs(positions[0] - positions[2]).max() > 1e-3


def test_progress_is_told_to_the_end(make_chain):
    told = []
    run_nve(
        make_chain().system(), start_of(make_chain()), timestep=1.0, picoseconds=0.01,
        sample=4.0, platform="Reference", progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert told == [(4, 8), (8, 8)]


def test_progress_counts_the_steps_of_all_runs(make_chain):
    told = []
    measure(
        make_chain(), start_of(make_chain()), timesteps=(0.5, 1.0), picoseconds=0.1,
        progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert told[-1] == (300, 300)
    assert {total for _, total in told} == {300}
    assert told == sorted(told)


def test_a_run_without_a_sample_is_refused(make_chain):
    with pytest.raises(ValueError, match="has no sample"):
        run_nve(
            make_chain().system(), start_of(make_chain()), timestep=1.0, picoseconds=0.001,
            sample=5.0, platform="Reference",
        )  # fmt: skip


@pytest.fixture(scope="module")
def waters():
    force_field = app.ForceField("tip3p.xml")
    modeller = app.Modeller(app.Topology(), [] * unit.nanometer)
    modeller.addSolvent(force_field, numAdded=4)
    return force_field, modeller


def test_constraints_hold_and_leave_the_shadow_energy_unknown(waters):
    force_field, modeller = waters
    system = force_field.createSystem(modeller.topology, rigidWater=True)
    start = equilibrate(system, modeller.positions, picoseconds=0.1, platform="Reference")
    trace = run_nve(system, start, timestep=0.5, picoseconds=0.2, platform="Reference")
    assert np.isnan(trace.shadow).all()
    assert trace.total.std() < 0.02 * trace.kinetic.std()
    bonds = np.linalg.norm(trace.end[1::3] - trace.end[::3], axis=1)
    np.testing.assert_allclose(bonds, 0.09572, atol=1e-5)


@pytest.mark.parametrize(("rigid", "expected"), [(True, 4 * 6 - 3), (False, 4 * 9 - 3)])
def test_degrees_of_freedom_leave_out_constraints_and_drift(waters, rigid, expected):
    force_field, modeller = waters
    system = force_field.createSystem(modeller.topology, rigidWater=rigid)
    assert degrees_of_freedom(system) == expected


def test_degrees_of_freedom_leave_out_particles_without_mass():
    system = openmm.System()
    system.addParticle(1.0)
    system.addParticle(0.0)
    assert degrees_of_freedom(system) == 3
