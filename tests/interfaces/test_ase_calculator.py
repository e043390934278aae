import copy
import pickle

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.fd import FiniteDifferenceCalculator, calculate_numerical_forces
from ase.io import Trajectory
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS
from ase.units import fs

from openmm_mlffd import MLFFDCalculator
from openmm_mlffd.modelfile import save_student


@pytest.fixture
def make_calculator(student_file):
    def make(model=student_file, precision="double"):
        return MLFFDCalculator(model, device="cpu", precision=precision)

    return make


@pytest.fixture
def molecule(ethanol, make_calculator):
    atoms = Atoms(*ethanol[:2])
    atoms.calc = make_calculator()
    return atoms


@pytest.fixture
def crystal(reduced_box, make_calculator):
    atoms = Atoms(reduced_box.numbers, reduced_box.positions, cell=reduced_box.cell, pbc=True)
    atoms.calc = make_calculator()
    return atoms


def without_calculator(atoms, calculator):
    atoms = atoms.copy()
    atoms.calc = calculator
    return atoms


# numbers


def test_forces_and_stress_are_derivatives_of_the_energy(crystal):
    numerical = without_calculator(crystal, FiniteDifferenceCalculator(crystal.calc, 1e-4, 1e-5))
    assert np.abs(crystal.get_forces()).max() > 0.5
    assert np.abs(crystal.get_stress()).max() > 0.01
    np.testing.assert_allclose(crystal.get_forces(), numerical.get_forces(), atol=1e-5)
    np.testing.assert_allclose(crystal.get_stress(), numerical.get_stress(), atol=1e-6)


def test_forces_of_a_molecule_are_derivatives_of_the_energy(molecule):
    numerical = calculate_numerical_forces(molecule, eps=1e-4)
    np.testing.assert_allclose(molecule.get_forces(), numerical, atol=1e-5)


def test_energies_of_the_atoms_add_up(molecule, crystal):
    for atoms in (molecule, crystal):
        energies = atoms.get_potential_energies()
        assert energies.shape == (len(atoms),)
        assert energies.sum() == pytest.approx(atoms.get_potential_energy(), rel=1e-12)
        assert atoms.get_potential_energy(force_consistent=True) == atoms.get_potential_energy()


def test_precision_is_single_unless_asked_for_otherwise(molecule, student_file, make_calculator):
    energies = [
        without_calculator(molecule, c).get_potential_energy()
        for c in (
            MLFFDCalculator(student_file, device="cpu"),
            make_calculator(precision="single"),
            make_calculator(precision="double"),
        )
    ]
    assert energies[0] == energies[1] != energies[2]
    assert energies[0] == pytest.approx(energies[2], abs=1e-6 * len(molecule))


# periodicity


def test_a_slab_has_energy_and_forces_but_no_stress(crystal, make_calculator):
    crystal.pbc = (True, True, False)
    energy, forces = crystal.get_potential_energy(), crystal.get_forces()
    for _ in range(2):
        with pytest.raises(PropertyNotImplementedError, match="stress needs"):
            crystal.get_stress()
    # a slab in a box that is too high for its images to meet
    high = without_calculator(crystal, make_calculator())
    high.pbc = True
    cell = high.cell.array.copy()
    cell[2] = np.cross(cell[0], cell[1]) / np.linalg.norm(np.cross(cell[0], cell[1])) * 60.0
    high.set_cell(cell)
    assert high.get_potential_energy() == pytest.approx(energy, abs=1e-9)
    np.testing.assert_allclose(high.get_forces(), forces, atol=1e-9)
    periodic = without_calculator(crystal, make_calculator())
    periodic.pbc = True
    assert abs(periodic.get_potential_energy() - energy) > 0.01


def test_a_slab_needs_no_third_vector(crystal):
    crystal.pbc = (True, True, False)
    energy = crystal.get_potential_energy()
    cell = crystal.cell.array.copy()
    cell[2] = 0.0
    crystal.set_cell(cell)
    assert crystal.get_potential_energy() == pytest.approx(energy, abs=1e-9)


def test_a_cell_that_is_not_periodic_is_ignored(molecule):
    energy = molecule.get_potential_energy()
    molecule.set_cell([2.0, 2.0, 2.0])
    assert molecule.get_potential_energy() == energy
    with pytest.raises(PropertyNotImplementedError):
        molecule.get_stress()


def test_wrapping_changes_nothing(crystal, make_calculator):
    shifted = without_calculator(crystal, make_calculator())
    rng = np.random.default_rng(0)
    shifted.positions += rng.integers(-4, 5, (len(crystal), 3)) @ crystal.cell.array
    for _ in range(2):
        assert shifted.get_potential_energy() == pytest.approx(
            crystal.get_potential_energy(), abs=1e-9
        )
        np.testing.assert_allclose(shifted.get_forces(), crystal.get_forces(), atol=1e-9)
        np.testing.assert_allclose(shifted.get_stress(), crystal.get_stress(), atol=1e-10)
        shifted.wrap()


def test_a_repeated_cell_has_the_same_stress(crystal, make_calculator):
    large = without_calculator(crystal * (2, 1, 2), make_calculator())
    assert large.get_potential_energy() == pytest.approx(
        4 * crystal.get_potential_energy(), abs=1e-6
    )
    np.testing.assert_allclose(large.get_stress(), crystal.get_stress(), atol=1e-10)


# ASE's ways


def test_nothing_is_computed_twice(molecule, monkeypatch):
    calls = []
    original = MLFFDCalculator.calculate
    monkeypatch.setattr(
        MLFFDCalculator, "calculate", lambda *a, **k: calls.append(1) or original(*a, **k)
    )
    for _ in range(2):
        molecule.get_potential_energy()
        molecule.get_forces()
        molecule.get_potential_energies()
    assert len(calls) == 1
    assert not molecule.calc.calculation_required(molecule, ["energy", "forces"])
    molecule.set_cell([9.0, 9.0, 9.0])
    assert molecule.calc.calculation_required(molecule, ["energy"])


@pytest.mark.parametrize("change", ["positions", "cell", "pbc", "numbers"])
def test_every_change_is_noticed(crystal, make_calculator, change):
    before = crystal.get_potential_energy()
    if change == "positions":
        crystal.positions[0, 0] += 0.3
    elif change == "cell":
        crystal.set_cell(crystal.cell.array * 1.05)
    elif change == "pbc":
        crystal.pbc = (True, False, True)
    else:
        crystal.numbers[0] = 1 if crystal.numbers[0] != 1 else 8
    expected = without_calculator(crystal, make_calculator()).get_potential_energy()
    assert abs(expected - before) > 1e-3
    assert crystal.get_potential_energy() == pytest.approx(expected, abs=1e-9)


def test_one_calculator_serves_two_structures_in_turn(molecule, crystal, make_calculator):
    expected = [(a.get_potential_energy(), a.get_forces()) for a in (molecule, crystal)]
    shared = make_calculator()
    for _ in range(2):
        for atoms, (energy, forces) in zip((molecule, crystal), expected, strict=True):
            atoms = without_calculator(atoms, shared)
            assert atoms.get_potential_energy() == energy
            np.testing.assert_array_equal(atoms.get_forces(), forces)


def test_arrays_are_the_callers_own(molecule):
    first = molecule.get_forces()
    kept = first.copy()
    first[:] = 0.0
    np.testing.assert_array_equal(molecule.get_forces(), kept)
    results = molecule.calc.results["forces"]
    molecule.rattle(0.1, seed=1)
    molecule.get_forces()
    np.testing.assert_array_equal(results, kept)


@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_copies_compute_the_same_and_on_their_own(molecule, duplicate):
    energy = molecule.get_potential_energy()
    other = without_calculator(molecule, duplicate(molecule.calc))
    assert other.get_potential_energy() == energy
    other.rattle(0.1, seed=1)
    assert other.get_potential_energy() != energy
    assert molecule.get_potential_energy() == energy
    assert molecule.calc.results["energy"] == energy


def test_a_pickled_calculator_holds_no_weights_and_refuses_another_student(
    make_student_file, make_student, make_header, ethanol
):
    path = make_student_file()
    calculator = MLFFDCalculator(str(path), device="cpu")
    atoms = without_calculator(Atoms(*ethanol[:2]), calculator)
    atoms.get_potential_energy()
    payload = pickle.dumps(calculator)
    assert b"torch" not in payload
    save_student(path, make_student(seed=3), make_header())
    again = pickle.loads(payload)
    atoms.rattle(0.1, seed=2)
    atoms.calc = again
    with pytest.raises(ValueError, match="is another student"):
        atoms.get_potential_energy()


def test_results_survive_a_trajectory_file(crystal, tmp_path):
    expected = (crystal.get_potential_energy(), crystal.get_forces(), crystal.get_stress())
    with Trajectory(tmp_path / "t.traj", "w") as trajectory:
        trajectory.write(crystal)
    with Trajectory(tmp_path / "t.traj") as trajectory:
        again = trajectory[0]
    assert again.calc.name == "mlffd"
    assert again.calc.parameters["precision"] == "double"
    assert again.get_potential_energy() == pytest.approx(expected[0], rel=1e-12)
    np.testing.assert_allclose(again.get_forces(), expected[1], atol=1e-12)
    np.testing.assert_allclose(again.get_stress(), expected[2], atol=1e-12)


def test_parameters_can_be_changed(molecule, other_student_file, make_calculator):
    calculator = molecule.calc
    before = molecule.get_potential_energy()
    calculator.set(precision="single")
    assert molecule.get_potential_energy() != before
    calculator.set(model=other_student_file, precision="double")
    expected = without_calculator(molecule, make_calculator(other_student_file))
    assert molecule.get_potential_energy() == expected.get_potential_energy()
    with pytest.raises(TypeError, match="no parameter 'modle'"):
        calculator.set(modle="default")


def test_optimizers_and_dynamics_run(molecule):
    start = molecule.get_potential_energy()
    BFGS(molecule, logfile=None).run(fmax=0.5, steps=15)
    assert molecule.get_potential_energy() < start
    molecule.set_momenta(np.random.default_rng(0).normal(scale=1.0, size=(9, 3)))
    total = molecule.get_total_energy()
    VelocityVerlet(molecule, timestep=0.1 * fs).run(100)
    assert molecule.get_total_energy() == pytest.approx(total, abs=0.02)


def test_the_bundled_student_is_the_default(ethanol):
    atoms = without_calculator(Atoms(*ethanol[:2]), MLFFDCalculator(device="cpu"))
    named = without_calculator(atoms, MLFFDCalculator("default", device="cpu"))
    assert atoms.get_potential_energy() == named.get_potential_energy()
    stretched = atoms.copy()
    stretched.positions[3] += 0.4 * (atoms.positions[3] - atoms.positions[2])  # O-H
    stretched.calc = atoms.calc
    rise = stretched.get_potential_energy() - named.get_potential_energy()
    assert 0.2 < rise < 5.0


# refusals


def test_charge_and_spin_are_refused_even_after_a_calculation(molecule):
    energy = molecule.get_potential_energy()
    for key, value in [("charge", 1), ("charge", -2.0), ("spin", 2), ("multiplicity", 3)]:
        molecule.info[key] = value
        with pytest.raises(ValueError, match=f"'{key}'.*told of neither charge nor spin"):
            molecule.get_potential_energy()
        del molecule.info[key]
    molecule.set_initial_charges([1.0] + [0.0] * 8)
    with pytest.raises(ValueError, match="charges add up to 1"):
        molecule.get_potential_energy()
    molecule.set_initial_charges([0.3, -0.3] + [0.0] * 7)  # partial charges of a neutral molecule
    molecule.set_initial_magnetic_moments([1.0] + [0.0] * 8)
    with pytest.raises(ValueError, match="magnetic moments"):
        molecule.get_potential_energy()
    molecule.set_initial_magnetic_moments(None)
    molecule.info.update(charge=0, spin=1, multiplicity=1)
    assert molecule.get_potential_energy() == energy


def test_unknown_elements_are_named(make_calculator):
    atoms = Atoms("CH3I", positions=np.eye(5, 3) * 2.0)
    atoms.calc = make_calculator()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"I \(first at atom 4\).*H, C, N, O"):
            atoms.get_potential_energy()


def test_positions_that_are_not_finite_are_refused_and_forgotten(molecule):
    forces = molecule.get_forces()
    good = molecule.positions.copy()
    molecule.positions[3, 1] = np.nan
    for _ in range(2):
        with pytest.raises(ValueError, match="finite, but not those of atom 3 "):
            molecule.get_forces()
    molecule.positions = good
    np.testing.assert_array_equal(molecule.get_forces(), forces)


def test_no_atoms_are_refused(make_calculator):
    atoms = without_calculator(Atoms(), make_calculator())
    with pytest.raises(ValueError, match="no atoms"):
        atoms.get_potential_energy()


def test_a_periodic_direction_needs_a_vector(molecule):
    molecule.pbc = True
    with pytest.raises(ValueError, match="no volume"):
        molecule.get_potential_energy()


def test_wrong_arguments_are_refused(student_file):
    with pytest.raises(ValueError, match="single, mixed, double"):
        MLFFDCalculator(student_file, precision="half")
    with pytest.raises(ValueError, match="there are cpu"):
        MLFFDCalculator(student_file, device="cuda:99")
    with pytest.raises(ValueError, match="nor a bundled student"):
        MLFFDCalculator("no-such-student")
