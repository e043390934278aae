"""The virial is dE/dε, the pressure is -dE/dV plus the kinetic part."""

import numpy as np
import openmm
import pytest
from openmm import unit
from openmmml import MLPotential

from openmm_mlffd.interfaces.openmm_pressure import Barometer, pressure
from openmm_mlffd.units import (
    ANGSTROM_PER_NM,
    BAR_PER_EV_PER_CUBIC_ANGSTROM,
    BOLTZMANN,
    KJ_PER_MOL_PER_EV,
)


@pytest.fixture
def make_system(student_file, make_topology):
    def make(structure, **keywords):
        potential = MLPotential("mlffd", modelPath=student_file, device="cpu", precision="double")
        return potential.createSystem(
            make_topology(*structure), allowMissingHydrogens=True, selfTest=False, **keywords
        )

    return make


def energy_at(context, positions, box):
    context.setPeriodicBoxVectors(*box / ANGSTROM_PER_NM)
    context.setPositions(positions / ANGSTROM_PER_NM)
    return context.getState(energy=True).getPotentialEnergy()._value / KJ_PER_MOL_PER_EV


@pytest.mark.parametrize("platform", ["Reference", "CPU"])
def test_pressure_without_motion_is_minus_the_derivative_of_the_energy_by_the_volume(
    make_system, make_context, reduced_box, platform
):
    _, positions, cell = reduced_box
    context = make_context(make_system(reduced_box), positions, platform=platform)
    found = pressure(context)
    step = 1e-5
    energies, volumes = [], []
    for scale in (1.0 - step, 1.0 + step):
        energies.append(energy_at(context, scale * positions, scale * cell))
        volumes.append(scale**3 * np.linalg.det(cell))
    expected = -np.diff(energies)[0] / np.diff(volumes)[0] * BAR_PER_EV_PER_CUBIC_ANGSTROM
    assert abs(expected) > 1000.0
    assert found.bar == pytest.approx(expected, abs=1.0)
    assert found.volume == pytest.approx(np.linalg.det(cell), abs=1e-6)
    assert not found.kinetic.any()


def test_virial_is_the_derivative_by_each_strain(make_system, make_context, reduced_box):
    _, positions, cell = reduced_box
    context = make_context(make_system(reduced_box), positions)
    found = pressure(context)
    assert np.abs(found.virial).max() > 1.0
    np.testing.assert_allclose(found.virial, found.virial.T, atol=1e-10)
    step = 1e-4
    for i, j in ((0, 0), (1, 1), (2, 2), (1, 0), (2, 0), (2, 1)):
        energies = []
        for sign in (-1, 1):
            strain = np.eye(3)
            strain[i, j] += sign * step
            energies.append(energy_at(context, positions @ strain, cell @ strain))
        assert found.virial[i, j] == pytest.approx(np.diff(energies)[0] / (2 * step), abs=1e-4)


def test_motion_adds_what_an_ideal_gas_has(make_system, make_context, reduced_box):
    context = make_context(make_system(reduced_box), reduced_box.positions)
    still = pressure(context)
    context.setVelocitiesToTemperature(300.0, 3)
    moving = pressure(context)
    state = context.getState(energy=True)
    kinetic = state.getKineticEnergy()._value / KJ_PER_MOL_PER_EV
    assert np.trace(moving.kinetic) == pytest.approx(2 * kinetic, abs=1e-8)
    gas = 2 * kinetic / 3 / moving.volume * BAR_PER_EV_PER_CUBIC_ANGSTROM
    assert moving.bar - still.bar == pytest.approx(gas, abs=1e-3)
    n_atoms = len(reduced_box.numbers)
    assert 0.3 < 2 * kinetic / (3 * n_atoms * BOLTZMANN * 300.0) < 3.0


def test_a_barostat_measures_the_same(make_system, make_context, reduced_box):
    system = make_system(reduced_box, removeCMMotion=False)
    barostat = openmm.MonteCarloBarostat(1.0, 300.0, 0)
    system.addForce(barostat)
    # its velocities are those of now
    integrator = openmm.LangevinMiddleIntegrator(300.0, 1.0, 0.0005)
    context = make_context(system, reduced_box.positions, integrator=integrator)
    context.setVelocitiesToTemperature(300.0, 3)
    expected = barostat.computeCurrentPressure(context)
    found = pressure(context)
    # OpenMM moves whole molecules; without bonds in the System every atom is one
    assert found.bar == pytest.approx(expected.value_in_unit(unit.bar), rel=2e-3)


def test_with_other_forces_the_whole_energy_counts(make_system, make_context, reduced_box):
    system = make_system(reduced_box, removeCMMotion=False)
    alone = pressure(make_context(system, reduced_box.positions))
    bond = openmm.HarmonicBondForce()
    bond.addBond(0, 5, 0.1, 5000.0)
    bond.setUsesPeriodicBoundaryConditions(True)
    system.addForce(bond)
    context = make_context(system, reduced_box.positions)
    both = pressure(context)
    _, positions, cell = reduced_box
    step = positions[5] - positions[0]
    step -= np.round(step @ np.linalg.inv(cell)) @ cell
    images = np.stack(np.meshgrid(*[[-1, 0, 1]] * 3), -1).reshape(-1, 3) @ cell
    step = min((step + i for i in images), key=np.linalg.norm)
    length = np.linalg.norm(step)
    stiffness = 5000.0 / KJ_PER_MOL_PER_EV / ANGSTROM_PER_NM**2
    pull = stiffness * (length - 1.0) / length
    expected = alone.virial + pull * np.outer(step, step)
    assert np.abs(pull * np.outer(step, step)).max() > 0.1
    np.testing.assert_allclose(both.virial, expected, atol=1e-5)
    np.testing.assert_array_equal(
        context.getState(positions=True).getPositions(asNumpy=True)._value,
        positions / ANGSTROM_PER_NM,
    )


def test_a_subset_of_the_atoms_has_its_own_virial(make_system, make_context, reduced_box):
    alone = pressure(make_context(make_system(reduced_box), reduced_box.positions))
    system = make_system(reduced_box)
    force = system.getForce(0)
    order = [3, 1, 2, 8, 7, 0, 4, 6, 5]
    system.addParticle(1.0)  # a particle that the student does not see
    from openmm_mlffd.interfaces.openmm_force import StudentComputation
    from openmm_mlffd.interfaces.openmm_stored import student_functions

    settings = dict(student_functions(system)[0].settings)
    settings |= {"atoms": order, "numbers": reduced_box.numbers[order].tolist()}
    system.removeForce(0)
    force = openmm.PythonForce(StudentComputation(settings))
    force.setParticles(order)
    force.setUsesPeriodicBoundaryConditions(True)
    system.addForce(force)
    context = make_context(system, np.vstack([reduced_box.positions, [[1.0, 1.0, 1.0]]]))
    np.testing.assert_allclose(pressure(context).virial, alone.virial, atol=1e-8)


def test_what_has_no_pressure_is_refused(make_system, ethanol, reduced_box):
    with pytest.raises(ValueError, match="periodic System"):
        Barometer(make_system(ethanol))
    system = make_system(reduced_box)
    system.addConstraint(0, 1, 0.1)
    with pytest.raises(ValueError, match=r"1 constraints.*computeCurrentPressure"):
        Barometer(system)
