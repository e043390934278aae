import numpy as np
import openmm
import pytest
from openmmml import MLPotential

pytest.importorskip("warp")

import openmm_mlffd
from openmm_mlffd.evaluator import StudentSource
from openmm_mlffd.interfaces.openmm_force import VERSION, ComputationSettings, StudentComputation


@pytest.fixture
def running(student_file, make_topology, make_context, ethanol):
    """A System and a Context a few steps into a simulation, with its last energy [kJ/mol]."""
    system = MLPotential("mlffd", modelPath=student_file).createSystem(
        make_topology(ethanol.numbers), selfTest=False
    )
    context = make_context(system, ethanol.positions)
    context.setVelocitiesToTemperature(100.0, 1)
    context.getIntegrator().step(5)
    state = context.getState(positions=True, velocities=True, energy=True)
    return system, context, state


def test_last_state_survives_positions_that_are_not_finite(running):
    system, context, state = running
    broken = state.getVelocities(asNumpy=True)._value.copy()
    broken[3, 1] = np.inf
    context.setVelocities(broken)
    with pytest.raises(openmm.OpenMMException, match=r"must be finite.*last_good\(system\)"):
        context.getIntegrator().step(3)
    good = openmm_mlffd.last_good(system)
    assert np.array_equal(good.positions, state.getPositions(asNumpy=True)._value)
    assert good.energy == state.getPotentialEnergy()._value
    assert good.step == 5
    assert good.box is None
    context.setPositions(good.positions)
    assert context.getState(energy=True).getPotentialEnergy()._value == good.energy
    context.setVelocitiesToTemperature(100.0, 1)
    context.getIntegrator().step(2)
    assert openmm_mlffd.last_good(system).step > 5


def test_context_still_has_its_state_after_too_many_neighbors(student_file, make_context, make_box):
    box = make_box(30, 9.0)
    cell = np.diag([9.0, 9.0, 9.0])
    source = StudentSource.find(student_file)
    computation = StudentComputation(
        ComputationSettings(
            version=VERSION, name=source.name, path=source.path, sha256=source.sha256,
            numbers=box.numbers.tolist(), atoms=None, periodic=True, precision="single",
            device="cpu", kernels="fused", self_test=False,
        )
    )  # fmt: skip
    computation.start()._capacity = 90
    system = openmm.System()
    for _ in box.numbers:
        system.addParticle(12.0)
    force = openmm.PythonForce(computation)
    force.setUsesPeriodicBoundaryConditions(True)
    system.addForce(force)
    context = make_context(system, box.positions, cell)
    context.getIntegrator().step(3)
    before = context.getState(positions=True, velocities=True, energy=True)
    context.setPeriodicBoxVectors(*0.04 * np.eye(3) * 9)
    with pytest.raises(openmm.OpenMMException, match=r"NeighborOverflow.*room for 90"):
        context.getIntegrator().step(1)
    after = context.getState(positions=True, velocities=True)
    for name in ("getPositions", "getVelocities"):
        assert getattr(after, name)() == getattr(before, name)()
    assert openmm_mlffd.last_good(system).energy == before.getPotentialEnergy()._value
    context.setPeriodicBoxVectors(*cell / 10)
    energy = context.getState(energy=True).getPotentialEnergy()._value
    assert energy == before.getPotentialEnergy()._value
    context.getIntegrator().step(1)


def test_system_without_a_student_has_no_last_state():
    with pytest.raises(ValueError, match="no student"):
        openmm_mlffd.last_good(openmm.System())
