"""Boxes that change under the student: barostats, boxes below twice the cutoff, lone images."""

import numpy as np
import openmm
import pytest
import torch
from openmmml import MLPotential

from openmm_mlffd.evaluator import Evaluator
from openmm_mlffd.graph import build_graph
from openmm_mlffd.interfaces.openmm_stored import student_functions
from openmm_mlffd.modelfile import load_student
from openmm_mlffd.units import ANGSTROM_PER_NM, KJ_PER_MOL_NM_PER_EV_ANGSTROM, KJ_PER_MOL_PER_EV

CUTOFF = 4.0  # of the toy students
ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
BAROSTATS = {
    "isotropic": lambda bar: openmm.MonteCarloBarostat(bar, 300.0, 1),
    "anisotropic": lambda bar: openmm.MonteCarloAnisotropicBarostat(
        openmm.Vec3(bar, bar, bar), 300.0, True, True, True, 1
    ),
    "membrane": lambda bar: openmm.MonteCarloMembraneBarostat(
        bar, 0.0, 300.0, openmm.MonteCarloMembraneBarostat.XYAnisotropic,
        openmm.MonteCarloMembraneBarostat.ZFree, 1,
    ),
    "flexible": lambda bar: openmm.MonteCarloFlexibleBarostat(bar, 300.0, 1),
}  # fmt: skip


class Recorder:
    """Every evaluation that OpenMM asks for: positions and box [Å], energy [eV], forces [eV/Å]."""

    def __init__(self, computation):
        self.computation = computation
        self.calls = []

    def __call__(self, state):
        energy, forces = self.computation(state)
        positions = np.array(state.getPositions(asNumpy=True)._value) * ANGSTROM_PER_NM
        box = np.array(state.getPeriodicBoxVectors(asNumpy=True)._value) * ANGSTROM_PER_NM
        self.calls.append(
            (positions, box, energy / KJ_PER_MOL_PER_EV, forces / KJ_PER_MOL_NM_PER_EV_ANGSTROM)
        )
        return energy, forces


@pytest.fixture
def record(student_file, make_topology, make_context):
    """Run with a barostat; gives the recorder and, for each step, the State's box and energy."""

    def run(structure, barostat, *, steps, precision="single", platform="Reference"):
        device = "cuda" if platform == "CUDA" else "cpu"
        potential = MLPotential("mlffd", modelPath=student_file, device=device, selfTest=False)
        system = potential.createSystem(
            make_topology(*structure), precision=precision, allowMissingHydrogens=True
        )
        recorder = Recorder(student_functions(system)[0])
        system.removeForce(0)
        force = openmm.PythonForce(recorder)
        force.setUsesPeriodicBoundaryConditions(True)
        system.addForce(force)
        barostat.setRandomNumberSeed(5)
        system.addForce(barostat)
        integrator = openmm.LangevinMiddleIntegrator(300.0, 20.0, 0.0001)
        integrator.setRandomNumberSeed(5)
        context = make_context(
            system, structure.positions, structure.cell, platform=platform, integrator=integrator
        )
        seen = []
        for _ in range(steps):
            integrator.step(1)
            state = context.getState(positions=True, energy=True)
            seen.append(
                (
                    np.array(state.getPositions(asNumpy=True)._value) * ANGSTROM_PER_NM,
                    np.array(state.getPeriodicBoxVectors(asNumpy=True)._value) * ANGSTROM_PER_NM,
                    state.getPotentialEnergy()._value / KJ_PER_MOL_PER_EV,
                )
            )
        return recorder.calls, seen

    return run


@pytest.fixture
def in_double(student_file):
    """Energy [eV] and forces [eV/Å] by a new graph each time, without neighbor list or OpenMM."""
    potential = load_student(student_file, precision="double")

    def evaluate(numbers, positions, cell):
        graph = build_graph(
            torch.tensor(positions),
            potential.species(torch.tensor(numbers)),
            cutoff=potential.cutoff,
            cell=torch.tensor(cell),
        )
        found = potential(graph)
        return found.energy.item(), found.forces.numpy()

    return evaluate


def supercell(numbers, positions, cell):
    shifts = np.array([[i, j, k] for i in (0, 1) for j in (0, 1) for k in (0, 1)]) @ cell
    return np.tile(numbers, 8), (positions + shifts[:, None]).reshape(-1, 3), 2 * cell


def cube(make_box, length, n_atoms=8, seed=2):
    box = make_box(n_atoms=n_atoms, length=length, seed=seed)
    cell = length * np.eye(3)
    return box._replace(positions=box.positions @ np.linalg.inv(box.cell) @ cell, cell=cell)


def triclinic(make_box):
    box = make_box(n_atoms=9, length=5.0, seed=3)
    cell = np.array([[5.5, 0.0, 0.0], [1.9, 5.2, 0.0], [-2.3, 1.7, 6.0]])
    return box._replace(positions=box.positions @ np.linalg.inv(box.cell) @ cell, cell=cell)


@pytest.mark.parametrize(
    ("kind", "shape", "platform"),
    [
        ("isotropic", "cube", "CPU"),
        ("isotropic", "triclinic", "Reference"),
        ("anisotropic", "cube", "Reference"),
        ("anisotropic", "triclinic", "CPU"),
        ("membrane", "cube", "Reference"),
        ("flexible", "triclinic", "Reference"),
        pytest.param("isotropic", "cube", "CUDA", marks=ON_GPU),
        pytest.param("anisotropic", "triclinic", "CUDA", marks=ON_GPU),
    ],
)
def test_accepted_and_rejected_boxes_have_the_energy_of_double_precision(
    record, in_double, make_box, kind, shape, platform
):
    structure = cube(make_box, 6.0) if shape == "cube" else triclinic(make_box)
    calls, seen = record(structure, BAROSTATS[kind](1000.0), steps=20, platform=platform)
    n_atoms = len(structure.numbers)
    for positions, box, energy, forces in calls:
        expected, expected_forces = in_double(structure.numbers, positions, box)
        assert energy == pytest.approx(expected, abs=1e-6 * n_atoms)
        np.testing.assert_allclose(forces, expected_forces, atol=1e-4)
    # what OpenMM keeps after each move is that box's energy: nothing stays from a rejected one
    for positions, box, energy in seen:
        expected = in_double(structure.numbers, positions, box)[0]
        assert energy == pytest.approx(expected, abs=1e-6 * n_atoms)
    tried = {box.tobytes() for _, box, _, _ in calls}
    kept = {box.tobytes() for _, box, _ in seen}
    assert len(kept) > 1
    assert len(tried - kept) > 1  # rejected


def test_a_box_shrinking_below_twice_the_cutoff_stays_equal_to_its_supercell(
    record, in_double, make_box
):
    structure = cube(make_box, 2 * CUTOFF + 0.02, n_atoms=14)
    calls, _ = record(structure, BAROSTATS["isotropic"](3e5), steps=16)
    lengths = np.array([box[0, 0] for _, box, _, _ in calls])
    assert lengths.max() > 2 * CUTOFF > lengths.min() + 0.02
    for positions, box, energy, forces in calls:
        expected, expected_forces = in_double(*supercell(structure.numbers, positions, box))
        assert energy == pytest.approx(expected / 8, abs=1e-5)
        np.testing.assert_allclose(np.tile(forces, (8, 1)), expected_forces, atol=1e-4)


def test_across_twice_the_cutoff_nothing_jumps(in_double, make_box):
    start = cube(make_box, 2 * CUTOFF, n_atoms=14)
    energies, forces = [], []
    for scale in 1.0 + np.linspace(-1e-5, 1e-5, 41):
        energy, f = in_double(start.numbers, scale * start.positions, scale * start.cell)
        energies.append(energy)
        forces.append(f)
    assert np.abs(np.diff(energies, 2)).max() < 1e-7
    assert np.abs(np.diff(forces, axis=0)).max() < 5e-5


@pytest.mark.parametrize("length", [8.0, 9.9, 10.0, 10.1, 14.0, 20.0, 30.0])
def test_boxes_of_8_to_30_angstrom_equal_their_supercells_with_the_bundled_student(
    make_topology, make_context, energy_and_forces, make_box, length
):
    structure = cube(make_box, length, n_atoms=12, seed=1)
    # half of the atoms in one corner, for pairs that are close also in large boxes
    structure.positions[:6] = cube(make_box, 5.0, n_atoms=6, seed=4).positions
    potential = MLPotential("mlffd", device="cpu")
    results = []
    for numbers, positions, cell in (structure, supercell(*structure)):
        system = potential.createSystem(
            make_topology(numbers, cell=cell), precision="double", allowMissingHydrogens=True,
            selfTest=False,
        )  # fmt: skip
        results.append(energy_and_forces(make_context(system, positions)))
    assert results[1][0] / 8 == pytest.approx(results[0][0], abs=1e-5)
    np.testing.assert_allclose(results[1][1], np.tile(results[0][1], (8, 1)), atol=1e-5)


def test_a_box_thinner_than_the_cutoff_is_its_supercell(in_double, make_box):
    box = make_box(n_atoms=3, length=3.2, seed=6)
    energy, forces = in_double(*box)
    energy8, forces8 = in_double(*supercell(*box))
    assert energy8 / 8 == pytest.approx(energy, abs=1e-8)
    np.testing.assert_allclose(forces8, np.tile(forces, (8, 1)), atol=1e-8)


def test_the_neighbor_list_follows_a_box_that_moves_without_its_atoms(student_file, make_box):
    structure = cube(make_box, 6.0)
    evaluator = Evaluator(load_student(student_file, precision="double"), structure.numbers)
    for scale in (1.0, 1.001, 1.05, 0.97, 1.0):
        fresh = Evaluator(evaluator.potential, structure.numbers)
        found = evaluator.compute(structure.positions, scale * structure.cell)
        expected = fresh.compute(structure.positions, scale * structure.cell)
        assert found.energy == expected.energy
        np.testing.assert_array_equal(found.forces, expected.forces)


def test_atoms_outside_the_box_stay_there_through_barostat_moves(record, in_double, make_box):
    structure = triclinic(make_box)
    images = np.random.default_rng(0).integers(-2, 3, (len(structure.numbers), 3))
    apart = structure._replace(positions=structure.positions + images @ structure.cell)
    calls, seen = record(apart, BAROSTATS["isotropic"](1000.0), steps=10, precision="double")
    for positions, box, energy, _ in calls:
        assert energy == pytest.approx(in_double(apart.numbers, positions, box)[0], abs=1e-8)
    fractional = seen[-1][0] @ np.linalg.inv(seen[-1][1])
    assert np.ptp(fractional) > 2.0
