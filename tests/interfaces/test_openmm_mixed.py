"""Mixed systems: alanine dipeptide and some water, part student, part Amber."""

import copy

import numpy as np
import openmm
import pytest
from ase import Atoms
from openmm import app, unit
from openmmml import MLPotential
from openmmml.embeddings.utilities import COVALENT_RADII

from openmm_mlffd import MLFFDCalculator
from openmm_mlffd.units import ANGSTROM_PER_NM, KJ_PER_MOL_PER_EV

DIPEPTIDE = """
ACE HH31 H  2.000 1.000 0.000
ACE CH3  C  2.000 2.090 0.000
ACE HH32 H  1.486 2.454 0.890
ACE HH33 H  1.486 2.454 -0.890
ACE C    C  3.427 2.641 0.000
ACE O    O  4.391 1.877 0.000
ALA N    N  3.555 3.970 0.000
ALA H    H  2.733 4.556 0.000
ALA CA   C  4.853 4.614 0.000
ALA HA   H  5.408 4.316 0.890
ALA CB   C  5.661 4.221 -1.232
ALA HB1  H  5.123 4.521 -2.131
ALA HB2  H  6.630 4.719 -1.206
ALA HB3  H  5.809 3.141 -1.241
ALA C    C  4.713 6.129 0.000
ALA O    O  3.601 6.653 0.000
NME N    N  5.846 6.835 0.000
NME H    H  6.737 6.359 0.000
NME C    C  5.846 8.284 0.000
NME H1   H  4.819 8.648 0.000
NME H2   H  6.360 8.648 0.890
NME H3   H  6.360 8.648 -0.890
"""
DIPEPTIDE_BONDS = (
    "0-1 1-2 1-3 1-4 4-5 4-6 6-7 6-8 8-9 8-10 10-11 10-12 10-13 8-14 14-15 14-16 16-17 16-18 "
    "18-19 18-20 18-21"
)
OXYGENS = np.array([[1.0, 6.5, 1.0], [8.5, 2.5, 0.8], [6.0, 1.0, 3.0]])
WATER = np.array([[0.0, 0.0, 0.0], [0.757, 0.586, 0.0], [-0.757, 0.586, 0.0]])
N_WATER_ATOMS = 6  # two waters come before the dipeptide, one after
CUTOFF = 10.0
BOX = 24.0


@pytest.fixture(scope="module")
def model():
    """Topology, positions [Å] and the indices of the dipeptide."""
    topology, positions = app.Topology(), []

    def add_water(oxygen):
        residue = topology.addResidue("HOH", topology.addChain())
        o, *hydrogens = (
            topology.addAtom(name, app.Element.getBySymbol(name[0]), residue)
            for name in ("O", "H1", "H2")
        )
        for hydrogen in hydrogens:
            topology.addBond(o, hydrogen)
        positions.extend(oxygen + WATER)

    for oxygen in OXYGENS[:2]:
        add_water(oxygen)
    chain, residue, atoms = topology.addChain(), None, []
    for line in DIPEPTIDE.split("\n")[1:-1]:
        where, name, symbol, *xyz = line.split()
        if residue is None or residue.name != where:
            residue = topology.addResidue(where, chain)
        atoms.append(topology.addAtom(name, app.Element.getBySymbol(symbol), residue))
        positions.append(np.array(xyz, dtype=float))
    for pair in DIPEPTIDE_BONDS.split():
        topology.addBond(*(atoms[int(i)] for i in pair.split("-")))
    add_water(OXYGENS[2])
    rng = np.random.default_rng(0)
    noise = rng.normal(scale=0.04, size=(len(positions), 3))
    return topology, np.array(positions) + noise, [a.index for a in atoms]


@pytest.fixture(scope="module")
def force_field():
    return app.ForceField("amber14-all.xml", "amber14/tip3p.xml")


@pytest.fixture(scope="module")
def mm_system(model, force_field):
    return force_field.createSystem(model[0], rigidWater=False)


@pytest.fixture(scope="module")
def potential(student_file):
    return MLPotential("mlffd", modelPath=student_file, precision="double", device="cpu")


@pytest.fixture(scope="module")
def from_ase(student_file):
    def compute(numbers, positions, cell=None):
        atoms = Atoms(numbers, positions, cell=cell, pbc=cell is not None)
        atoms.calc = MLFFDCalculator(student_file, device="cpu", precision="double")
        return atoms.get_potential_energy(), atoms.get_forces()

    return compute


@pytest.fixture(scope="module")
def numbers(model):
    return np.array([a.element.atomic_number for a in model[0].atoms()])


@pytest.fixture(scope="module")
def dipeptide_mm(model, force_field, make_context, energy_and_forces):
    """Amber energy and forces of the dipeptide alone."""
    modeller = app.Modeller(model[0], model[1] / ANGSTROM_PER_NM * unit.nanometer)
    keep = set(model[2])
    modeller.delete([a for a in modeller.topology.atoms() if a.index not in keep])
    system = force_field.createSystem(modeller.topology, rigidWater=False)
    return energy_and_forces(make_context(system, model[1][model[2]]))


def shuffled(indices, seed=4):
    return [int(i) for i in np.random.default_rng(seed).permutation(indices)]


def test_atoms_in_any_order_get_their_own_forces(
    model, mm_system, potential, numbers, dipeptide_mm, from_ase, make_context, energy_and_forces
):
    topology, positions, dipeptide = model
    atoms = shuffled(dipeptide)
    assert atoms != sorted(atoms)
    assert min(atoms) == N_WATER_ATOMS
    mixed = potential.createMixedSystem(topology, mm_system, atoms)
    energy, forces = energy_and_forces(make_context(mixed, positions))

    # mechanical embedding: Amber's energy within the dipeptide gives way to the student's
    mm_energy, mm_forces = energy_and_forces(make_context(mm_system, positions))
    ml_energy, ml_forces = from_ase(numbers[dipeptide], positions[dipeptide])
    assert energy == pytest.approx(mm_energy - dipeptide_mm[0] + ml_energy, abs=1e-5)
    expected = mm_forces.copy()
    expected[dipeptide] += ml_forces - dipeptide_mm[1]
    assert np.abs(ml_forces).max() > 1.0
    np.testing.assert_allclose(forces, expected, atol=1e-4)


def test_atoms_of_two_molecules_in_any_order(
    model, mm_system, potential, numbers, from_ase, make_context, energy_and_forces
):
    topology, positions, _ = model
    n = topology.getNumAtoms()
    atoms = [n - 1, 4, n - 3, 3, n - 2, 5]  # parts of the last and the second water
    mixed = potential.createMixedSystem(topology, mm_system, atoms, forceGroup=3)
    energy, forces = energy_and_forces(make_context(mixed, positions), groups={3})
    expected_energy, expected_forces = from_ase(numbers[atoms], positions[atoms])
    assert energy == pytest.approx(expected_energy, abs=1e-8)
    np.testing.assert_allclose(forces[atoms], expected_forces, atol=1e-8)
    assert not np.delete(forces, atoms, axis=0).any()


def test_the_force_group_is_honoured(
    model, mm_system, potential, numbers, from_ase, make_context, energy_and_forces
):
    topology, positions, dipeptide = model
    mixed = potential.createMixedSystem(topology, mm_system, dipeptide, forceGroup=7)
    context = make_context(mixed, positions)
    expected = from_ase(numbers[dipeptide], positions[dipeptide])[0]
    assert energy_and_forces(context, groups={7})[0] == pytest.approx(expected, abs=1e-8)
    rest = energy_and_forces(context, groups={0})[0]
    total = energy_and_forces(context)[0]
    assert rest + expected == pytest.approx(total, abs=1e-8)
    forces = [f for f in mixed.getForces() if isinstance(f, openmm.PythonForce)]
    assert [f.getForceGroup() for f in forces] == [7]


def test_cut_bonds_are_capped_with_hydrogen(
    model, mm_system, potential, numbers, from_ase, make_context, energy_and_forces, derivative
):
    topology, positions, dipeptide = model
    methyl, carbonyl = [dipeptide[i] for i in (3, 1, 0, 2)], dipeptide[4]
    info = potential.createMixedSystem(topology, mm_system, methyl, forceGroup=5, returnInfo=True)
    mixed = info["system"]
    cap = topology.getNumAtoms()
    assert mixed.getNumParticles() == cap + 1
    assert mixed.isVirtualSite(cap)

    length = (COVALENT_RADII[6] + COVALENT_RADII[1]).value_in_unit(unit.angstrom)
    bond = positions[carbonyl] - positions[methyl[1]]
    site = positions[methyl[1]] + length * bond / np.linalg.norm(bond)
    context = make_context(mixed, np.vstack([positions, [0.0, 0.0, 0.0]]))
    context.computeVirtualSites()
    energy, forces = energy_and_forces(context, groups={5})
    expected, _ = from_ase([*numbers[methyl], 1], np.vstack([positions[methyl], site]))
    assert energy == pytest.approx(expected, abs=1e-6)

    # the force on the cap belongs to the atoms that place it
    near = [methyl[1], carbonyl]
    assert np.abs(forces[carbonyl]).max() > 0.01
    np.testing.assert_allclose(derivative(context, near, groups={5}), forces[near], atol=1e-5)


@pytest.mark.parametrize("periodic", [False, True])
def test_interpolation_goes_from_amber_to_the_mixed_system(
    model, mm_system, force_field, potential, make_context, energy_and_forces, periodic
):
    topology, positions, dipeptide = model
    cell = None
    if periodic:
        cell = BOX * np.eye(3)
        topology = copy.deepcopy(topology)
        topology.setPeriodicBoxVectors(cell / ANGSTROM_PER_NM * unit.nanometer)
        mm_system = force_field.createSystem(
            topology,
            nonbondedMethod=app.PME,
            nonbondedCutoff=CUTOFF / ANGSTROM_PER_NM,
            rigidWater=False,
        )
    # the student's atoms lie on both sides of the box
    positions = positions - positions[dipeptide].mean(0) if periodic else positions
    atoms = shuffled(dipeptide)
    pure = energy_and_forces(make_context(mm_system, positions, cell))
    mixed = potential.createMixedSystem(topology, mm_system, atoms)
    mixed = energy_and_forces(make_context(mixed, positions, cell))
    both = potential.createMixedSystem(topology, mm_system, atoms, interpolate=True)
    assert both.usesPeriodicBoundaryConditions() == periodic
    context = make_context(both, positions, cell)
    assert abs(pure[0] - mixed[0]) > 1.0
    for scale in (0.0, 0.3, 1.0):
        context.setParameter("lambda_interpolate", scale)
        energy, forces = energy_and_forces(context)
        expected = [scale * m + (1.0 - scale) * p for m, p in zip(mixed, pure, strict=True)]
        # Amber's part is computed in another way: the nonbonded exceptions differ
        assert energy == pytest.approx(expected[0], abs=2e-3 if periodic else 1e-4)
        np.testing.assert_allclose(forces, expected[1], atol=2e-3 if periodic else 1e-4)


def test_a_periodic_student_sees_images_in_a_mixed_system(
    model, force_field, potential, numbers, from_ase, make_context, energy_and_forces
):
    topology, positions, dipeptide = copy.deepcopy(model)
    cell = BOX * np.eye(3)
    topology.setPeriodicBoxVectors(cell / ANGSTROM_PER_NM * unit.nanometer)
    mm_system = force_field.createSystem(
        topology, nonbondedMethod=app.CutoffPeriodic, nonbondedCutoff=0.9, rigidWater=False
    )
    mixed = potential.createMixedSystem(topology, mm_system, shuffled(dipeptide), forceGroup=2)
    across = positions.copy()
    across[dipeptide[:10], 0] += BOX
    energy, forces = energy_and_forces(make_context(mixed, across, cell), groups={2})
    expected_energy, expected_forces = from_ase(numbers[dipeptide], positions[dipeptide], cell)
    assert energy == pytest.approx(expected_energy, abs=1e-8)
    np.testing.assert_allclose(forces[dipeptide], expected_forces, atol=1e-8)


def test_keywords_reach_the_student_through_the_embedding(model, mm_system, potential):
    topology, _, dipeptide = model
    for interpolate in (False, True):
        with pytest.raises(TypeError, match=r"createMixedSystem: .*did you mean 'precision'"):
            potential.createMixedSystem(
                topology, mm_system, dipeptide, interpolate=interpolate, precison="single"
            )
        with pytest.raises(ValueError, match="no charge to set"):
            potential.createMixedSystem(
                topology, mm_system, dipeptide, interpolate=interpolate, charge=1
            )
    cut = [(dipeptide[1], dipeptide[4], 1.09 * unit.angstrom)]
    system = potential.createMixedSystem(
        topology, mm_system, dipeptide[:4], linkAtomDistances=cut, precision="single"
    )
    assert system.getNumParticles() == topology.getNumAtoms() + 1


def test_selections_that_make_no_sense_are_refused(model, mm_system, potential):
    topology, _, dipeptide = model
    with pytest.raises(ValueError, match="list of atoms is empty"):
        potential.createMixedSystem(topology, mm_system, [])
    twice = [*dipeptide, dipeptide[3]]
    with pytest.raises(ValueError, match=f"atom {dipeptide[3]} is more than once"):
        potential._impl.addForces(topology, openmm.System(), twice, 0)
    for outside in (-1, topology.getNumAtoms()):
        with pytest.raises(ValueError, match=f"no atom {outside} in a Topology of 31"):
            potential._impl.addForces(topology, openmm.System(), [outside], 0)


def test_a_periodic_system_with_a_topology_without_a_box_is_refused(model, force_field, potential):
    topology, _, dipeptide = copy.deepcopy(model)
    topology.setPeriodicBoxVectors(BOX / ANGSTROM_PER_NM * np.eye(3) * unit.nanometer)
    mm_system = force_field.createSystem(topology, nonbondedMethod=app.PME)
    topology.setPeriodicBoxVectors(None)
    with pytest.raises(ValueError, match="Topology has no box"):
        potential.createMixedSystem(topology, mm_system, dipeptide)


def test_broken_positions_are_named_by_their_index_in_the_system(
    model, mm_system, potential, make_context
):
    topology, positions, dipeptide = model
    mixed = potential.createMixedSystem(topology, mm_system, shuffled(dipeptide))
    positions = positions.copy()
    positions[dipeptide[2]] = np.nan
    with pytest.raises(openmm.OpenMMException, match=f"not those of atom {dipeptide[2]} "):
        make_context(mixed, positions).getState(energy=True)


def test_the_energy_of_the_mixed_system_is_in_the_units_of_openmm(
    model, mm_system, potential, numbers, from_ase, make_context
):
    topology, positions, dipeptide = model
    mixed = potential.createMixedSystem(topology, mm_system, dipeptide, forceGroup=1)
    state = make_context(mixed, positions).getState(energy=True, groups={1})
    expected = from_ase(numbers[dipeptide], positions[dipeptide])[0] * KJ_PER_MOL_PER_EV
    found = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)
    assert found == pytest.approx(expected, rel=1e-10)
