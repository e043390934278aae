"""Multiple time steps: the teacher's energy, the student's pace."""

import pickle

import numpy as np
import openmm
import pytest
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from openmmml import MLPotential

from openmm_mlffd import MLFFDCalculator
from openmm_mlffd.evaluator import Evaluator
from openmm_mlffd.interfaces.openmm_correction import CalculatorTeacher, TeacherCorrection
from openmm_mlffd.interfaces.openmm_mts import (
    FAST_GROUP,
    SLOW_GROUP,
    respa_integrator,
    respa_system,
)
from openmm_mlffd.units import ANGSTROM_PER_NM, BOLTZMANN, KJ_PER_MOL_PER_EV


class Springs(MLFFDCalculator):
    """A slow teacher: the student plus weak springs between all atoms; counts its calls."""

    stiffness = 0.05  # eV/Å²
    calls = 0

    def calculate(self, atoms=None, properties=None, system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        Springs.calls += 1
        center = self.atoms.positions - self.atoms.positions.mean(0)
        spring = 0.5 * self.stiffness * (center**2).sum()
        self.results["energy"] += spring
        self.results["forces"] = self.results["forces"] - self.stiffness * center


@pytest.fixture
def teacher(student_file):
    Springs.calls = 0
    return Springs(student_file, device="cpu", precision="double")


@pytest.fixture
def make_system(student_file, make_topology):
    def make(structure, slow, **keywords):
        return respa_system(
            make_topology(*structure), slow, modelPath=student_file, device="cpu",
            precision="double", allowMissingHydrogens=True, **keywords,
        )  # fmt: skip

    return make


def test_the_energy_is_the_teachers_and_the_fast_group_the_students(
    make_system, make_context, energy_and_forces, derivative, teacher, ethanol, student_file
):
    context = make_context(make_system(ethanol, teacher), ethanol.positions)
    atoms = Atoms(ethanol.numbers, ethanol.positions, calculator=teacher)
    energy, forces = energy_and_forces(context)
    assert energy == pytest.approx(atoms.get_potential_energy(), abs=1e-8)
    np.testing.assert_allclose(forces, atoms.get_forces(), atol=1e-8)
    atoms.calc = MLFFDCalculator(student_file, device="cpu", precision="double")
    fast, fast_forces = energy_and_forces(context, groups={FAST_GROUP})
    assert fast == pytest.approx(atoms.get_potential_energy(), abs=1e-8)
    np.testing.assert_allclose(fast_forces, atoms.get_forces(), atol=1e-8)
    slow, slow_forces = energy_and_forces(context, groups={SLOW_GROUP})
    assert slow == pytest.approx(energy - fast, abs=1e-8)
    assert np.abs(slow_forces).max() > 0.01
    np.testing.assert_allclose(derivative(context, [0, 5]), forces[[0, 5]], atol=1e-5)


def test_another_student_as_the_teacher_in_a_periodic_box(
    make_system, make_context, energy_and_forces, other_student_file, make_topology, reduced_box
):
    system = make_system(reduced_box, other_student_file)
    assert system.usesPeriodicBoundaryConditions()
    plain = MLPotential("mlffd", modelPath=other_student_file, device="cpu").createSystem(
        make_topology(*reduced_box), precision="double", allowMissingHydrogens=True
    )
    found = energy_and_forces(make_context(system, reduced_box.positions))
    expected = energy_and_forces(make_context(plain, reduced_box.positions))
    assert found[0] == pytest.approx(expected[0], abs=1e-8)
    np.testing.assert_allclose(found[1], expected[1], atol=1e-8)


def test_an_outer_step_costs_one_teacher_and_as_many_students_as_inner_steps(
    make_system, make_context, teacher, ethanol, monkeypatch
):
    calls = []
    predict = Evaluator.predict

    def counted(self, *arguments):
        calls.append(None)
        return predict(self, *arguments)

    monkeypatch.setattr(Evaluator, "predict", counted)
    integrator = respa_integrator(1.0, 4)
    context = make_context(make_system(ethanol, teacher), ethanol.positions, integrator=integrator)
    integrator.step(1)  # the first one starts from nothing
    teachers, both = Springs.calls, len(calls)
    integrator.step(5)
    assert Springs.calls - teachers == 5
    assert len(calls) - both - 5 == 5 * 4  # the teacher of this test is a student, too
    assert context.getState().getTime()._value == pytest.approx(0.006, abs=1e-12)


def test_energy_is_conserved_as_with_the_plain_integrator_and_its_short_step(
    make_system, make_context, teacher, ethanol
):
    system = make_system(ethanol, teacher)
    context = make_context(system, ethanol.positions)
    openmm.LocalEnergyMinimizer.minimize(context, 1.0, 40)
    state = context.getState(positions=True)
    relaxed = state.getPositions(asNumpy=True)._value * ANGSTROM_PER_NM

    def fluctuation(outer, inner):
        """Of the total energy [eV] over 16 fs."""
        integrator = respa_integrator(outer, inner)
        context = make_context(system, relaxed, integrator=integrator)
        context.setVelocitiesToTemperature(300.0, 7)
        totals = []
        for _ in range(round(16 / outer)):
            integrator.step(1)
            state = context.getState(energy=True)
            totals.append((state.getPotentialEnergy() + state.getKineticEnergy())._value)
        return np.std(totals) / KJ_PER_MOL_PER_EV

    plain, multiple, coarse = fluctuation(0.2, 1), fluctuation(0.8, 4), fluctuation(0.8, 1)
    assert 0.0 < multiple < 1.5 * plain
    assert coarse > 4.0 * multiple


def test_a_thermostat_holds_the_temperature(make_system, make_context, teacher, ethanol):
    integrator = respa_integrator(0.8, 4, temperature=300.0, friction=50.0)
    context = make_context(make_system(ethanol, teacher), ethanol.positions, integrator=integrator)
    openmm.LocalEnergyMinimizer.minimize(context, 1.0, 60)
    integrator.step(30)
    energies = []
    for _ in range(80):
        integrator.step(1)
        energies.append(context.getState(energy=True).getKineticEnergy()._value)
    kinetic = 1.5 * 9 * 300.0 * BOLTZMANN * KJ_PER_MOL_PER_EV
    assert np.mean(energies) == pytest.approx(kinetic, rel=0.4)


def test_systems_with_a_calculator_cannot_be_stored_and_say_so(make_system, teacher, ethanol):
    system = make_system(ethanol, teacher)
    with pytest.raises(openmm.OpenMMException, match="could not be pickled"):
        openmm.XmlSerializer.serialize(system)
    with pytest.raises(TypeError, match="cannot be stored or copied: make it again"):
        pickle.dumps(TeacherCorrection(None, CalculatorTeacher(teacher, [1], False, {})))


def test_what_a_calculator_needs_to_know_is_handed_on(student_file, ethanol):
    class Charged(Calculator):
        implemented_properties = ["energy", "forces"]  # noqa: RUF012

        def calculate(self, atoms=None, properties=None, system_changes=all_changes):
            self.results = {
                "energy": float(atoms.info["charge"]),
                "forces": np.zeros((len(atoms), 3)),
            }

    teacher = CalculatorTeacher(Charged(), ethanol.numbers.tolist(), False, {"charge": -1})

    class State:
        def getPositions(self, asNumpy):
            return openmm.unit.Quantity(ethanol.positions / 10.0, openmm.unit.nanometer)

    assert teacher(State())[0] == pytest.approx(-KJ_PER_MOL_PER_EV)


def test_errors_of_the_teacher_are_told(make_system, make_context, ethanol):
    class Broken(Calculator):
        implemented_properties = ["energy", "forces"]  # noqa: RUF012

        def calculate(self, *_):
            raise ValueError("out of licences")

    context = make_context(make_system(ethanol, Broken()), ethanol.positions)
    with pytest.raises(openmm.OpenMMException, match="the teacher: ValueError: out of licences"):
        context.getState(energy=True)


def test_senseless_arguments_are_refused(make_system, ethanol, student_file):
    with pytest.raises(TypeError, match="ASE calculator, or the name or path of a student"):
        make_system(ethanol, 3)
    with pytest.raises(TypeError, match="did you mean 'precision'"):
        make_system(ethanol, student_file, precison="double")
    for step, inner in ((0.0, 1), (1.0, 0), (float("nan"), 2)):
        with pytest.raises(ValueError, match="positive time step"):
            respa_integrator(step, inner)
