"""A solvated peptide with a student for a part of it, on every platform that there is.

What openmm-ml checks of its own potentials, for this one: whole and mixed Systems, interpolation,
subsets in any order, cut bonds, periodic boxes, finite differences, stored Systems.
"""

import copy
from pathlib import Path

import numpy as np
import openmm
import pytest
import torch
from ase import Atoms
from openmm import app, unit
from openmmml import MLPotential
from openmmml.embeddings.utilities import COVALENT_RADII

from openmm_mlffd import MLFFDCalculator, load_system, save_system
from openmm_mlffd.interfaces.openmm_stored import student_functions
from openmm_mlffd.units import ANGSTROM_PER_NM

PEPTIDE = Path(__file__).parents[2] / "examples" / "structures" / "alanine-dipeptide.pdb"
GROUP = 7
NO_CUDA = not torch.cuda.is_available()
PLATFORMS = [
    "Reference",
    "CPU",
    pytest.param(
        "CUDA", marks=[pytest.mark.gpu, pytest.mark.skipif(NO_CUDA, reason="no CUDA device")]
    ),
]
TOLERANCE = {"Reference": 1e-7, "CPU": 2e-3, "CUDA": 5e-3}  # eV, of the classical part


@pytest.fixture(scope="module")
def force_field():
    return app.ForceField("amber14-all.xml", "amber14/tip3p.xml")


@pytest.fixture(scope="module")
def model(force_field):
    """Topology, positions [Å] and box [Å] of the peptide in about 150 waters."""
    pdb = app.PDBFile(str(PEPTIDE))
    modeller = app.Modeller(pdb.topology, pdb.positions)
    modeller.addSolvent(force_field, boxSize=openmm.Vec3(1.8, 1.8, 1.8) * unit.nanometer)
    positions = modeller.positions.value_in_unit(unit.angstrom)
    return modeller.topology, np.array(positions), 18.0 * np.eye(3)


@pytest.fixture(scope="module")
def make_mm(model, force_field):
    def make(topology=None, **keywords):
        keywords = {
            "nonbondedMethod": app.PME,
            "nonbondedCutoff": 0.8 * unit.nanometer,
            "rigidWater": False,
        } | keywords
        return force_field.createSystem(topology or model[0], **keywords)

    return make


@pytest.fixture(scope="module")
def mm_system(make_mm):
    return make_mm()


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


def indices(topology, *names):
    return [a.index for a in topology.atoms() if a.residue.name in names]


def shuffled(atoms):
    return [int(i) for i in np.random.default_rng(4).permutation(atoms)]


def numbers_of(topology, atoms):
    every = [a.element.atomic_number for a in topology.atoms()]
    return np.array([every[i] for i in atoms])


# whole molecules


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("part", ["peptide", "scattered waters"])
def test_the_students_atoms_and_no_others_change_hands(
    model, mm_system, make_mm, potential, from_ase, make_context, energy_and_forces, platform, part
):
    topology, positions, cell = model
    if part == "peptide":
        atoms = shuffled(indices(topology, "ACE", "ALA", "NME"))
    else:
        waters = [r for r in topology.residues() if r.name == "HOH"]
        atoms = shuffled([a.index for r in (waters[3], waters[40], waters[90]) for a in r.atoms()])
    mixed = potential.createMixedSystem(topology, mm_system, atoms, forceGroup=GROUP)
    function = student_functions(mixed)
    assert len(function) == 1
    index = next(iter(function))
    assert list(mixed.getForce(index).getParticles()) == atoms  # nothing else travels
    assert function[index].settings["numbers"] == numbers_of(topology, atoms).tolist()

    context = make_context(mixed, positions, cell, platform=platform)
    energy, forces = energy_and_forces(context, groups={GROUP})
    expected, expected_forces = from_ase(numbers_of(topology, atoms), positions[atoms], cell)
    assert energy == pytest.approx(expected, abs=1e-8 if platform == "Reference" else 2e-5)
    np.testing.assert_allclose(
        forces[atoms], expected_forces, atol=1e-8 if platform == "Reference" else 1e-3
    )
    others = np.setdiff1d(np.arange(len(positions)), atoms)
    assert not forces[others].any()

    # whatever is classical between and outside of them is what it was
    charges = parameters(mm_system, "charge")
    assert np.array_equal(parameters(mixed, "charge"), charges)
    assert np.array_equal(parameters(mixed, "epsilon"), parameters(mm_system, "epsilon"))


def parameters(system, name):
    column = {"charge": 0, "epsilon": 2}[name]
    force = next(f for f in system.getForces() if isinstance(f, openmm.NonbondedForce))
    return np.array(
        [force.getParticleParameters(i)[column]._value for i in range(force.getNumParticles())]
    )


def test_forces_of_the_whole_mixed_system_are_its_derivative(
    model, mm_system, potential, make_context, energy_and_forces, derivative
):
    topology, positions, cell = model
    atoms = shuffled(indices(topology, "ACE", "ALA", "NME"))
    mixed = potential.createMixedSystem(topology, mm_system, atoms)
    context = make_context(mixed, positions, cell)
    forces = energy_and_forces(context)[1]
    chosen = [atoms[2], indices(topology, "HOH")[30]]
    # PME is as exact as its tolerance
    np.testing.assert_allclose(derivative(context, chosen), forces[chosen], atol=5e-3)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_interpolation_is_linear_between_amber_and_the_mixed_system(
    model, mm_system, potential, make_context, energy_and_forces, platform
):
    topology, positions, cell = model
    atoms = shuffled(indices(topology, "ACE", "ALA", "NME"))
    pure = energy_and_forces(make_context(mm_system, positions, cell, platform=platform))
    mixed = potential.createMixedSystem(topology, mm_system, atoms)
    mixed = energy_and_forces(make_context(mixed, positions, cell, platform=platform))
    both = potential.createMixedSystem(topology, mm_system, atoms, interpolate=True)
    context = make_context(both, positions, cell, platform=platform)
    assert abs(pure[0] - mixed[0]) > 1.0
    tolerance = max(TOLERANCE[platform], 2e-3)  # OpenMM computes the exceptions in another way
    for scale in (0.0, 0.4, 1.0):
        context.setParameter("lambda_interpolate", scale)
        energy, forces = energy_and_forces(context)
        assert energy == pytest.approx(scale * mixed[0] + (1 - scale) * pure[0], abs=tolerance)
        expected = scale * mixed[1] + (1 - scale) * pure[1]
        np.testing.assert_allclose(forces, expected, atol=max(tolerance, 5e-3))


def test_interpolated_systems_survive_storing_and_copying(
    model, mm_system, potential, make_context, energy_and_forces, tmp_path
):
    topology, positions, cell = model
    atoms = shuffled(indices(topology, "ACE", "ALA", "NME"))
    for interpolate in (False, True):
        system = potential.createMixedSystem(topology, mm_system, atoms, interpolate=interpolate)
        save_system(system, tmp_path / "system.xml")
        results = [
            energy_and_forces(make_context(s, positions, cell))
            for s in (system, load_system(tmp_path / "system.xml"), copy.deepcopy(system))
        ]
        for energy, forces in results[1:]:
            assert energy == pytest.approx(results[0][0], abs=1e-9)
            np.testing.assert_allclose(forces, results[0][1], atol=1e-9)


# cut bonds


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_residue_cut_out_of_a_chain_gets_a_cap_on_either_side(
    model, mm_system, potential, from_ase, make_context, energy_and_forces, derivative, platform
):
    topology, positions, cell = model
    residue = shuffled(indices(topology, "ALA"))
    info = potential.createMixedSystem(
        topology, mm_system, residue, forceGroup=GROUP, returnInfo=True
    )
    system, extended = info["system"], info["topology"]
    assert extended.getNumAtoms() == topology.getNumAtoms() + 2 == system.getNumParticles()
    assert info["oldToNew"] == list(range(topology.getNumAtoms()))

    atoms = {(a.residue.name, a.name): a.index for a in topology.atoms()}
    cuts = {
        (atoms["ALA", "N"], atoms["ACE", "C"]): 7,
        (atoms["ALA", "C"], atoms["NME", "N"]): 6,
    }
    caps = []
    for (inside, outside), z in cuts.items():
        length = (COVALENT_RADII[z] + COVALENT_RADII[1]).value_in_unit(unit.angstrom)
        bond = positions[outside] - positions[inside]
        caps.append(positions[inside] + length * bond / np.linalg.norm(bond))

    context = make_context(
        system, np.vstack([positions, np.zeros((2, 3))]), cell, platform=platform
    )
    context.computeVirtualSites()
    found = context.getState(positions=True).getPositions(asNumpy=True)._value * ANGSTROM_PER_NM
    assert {tuple(np.round(c, 3)) for c in found[-2:]} == {tuple(np.round(c, 3)) for c in caps}
    energy, forces = energy_and_forces(context, groups={GROUP})
    expected = from_ase(
        [*numbers_of(topology, residue), 1, 1], np.vstack([positions[residue], *caps]), cell
    )[0]
    exact = platform == "Reference"
    assert energy == pytest.approx(expected, abs=1e-6 if exact else 1e-4)
    moved = [i for cut in cuts for i in cut]
    assert np.abs(forces[moved]).max() > 0.01
    if exact:
        np.testing.assert_allclose(
            derivative(context, moved, groups={GROUP}), forces[moved], atol=1e-5
        )
    # a student pushes nothing as a whole; the forces on the caps are on the atoms by now
    np.testing.assert_allclose(forces[:-2].sum(0), 0.0, atol=1e-7 if exact else 1e-3)


def test_the_length_of_a_capping_bond_may_be_chosen(
    model, mm_system, potential, make_context, energy_and_forces
):
    topology, positions, cell = model
    residue = indices(topology, "ALA", "NME")
    atoms = {(a.residue.name, a.name): a.index for a in topology.atoms()}
    inside, outside = atoms["ALA", "N"], atoms["ACE", "C"]
    distances = [(outside, inside, 0.95 * unit.angstrom)]
    system = potential.createMixedSystem(topology, mm_system, residue, linkAtomDistances=distances)
    context = make_context(system, np.vstack([positions, np.zeros((1, 3))]), cell)
    context.computeVirtualSites()
    found = context.getState(positions=True).getPositions(asNumpy=True)._value * ANGSTROM_PER_NM
    assert np.linalg.norm(found[-1] - positions[inside]) == pytest.approx(0.95, abs=1e-9)


def test_capped_systems_can_be_simulated_at_constant_pressure(
    model, make_mm, potential, make_context
):
    topology, positions, cell = model
    mm_system = make_mm(constraints=app.HBonds, rigidWater=True)
    residue = indices(topology, "ALA")
    system = potential.createMixedSystem(topology, mm_system, residue)
    barostat = openmm.MonteCarloBarostat(1.0, 300.0, 2)
    barostat.setRandomNumberSeed(2)
    system.addForce(barostat)
    integrator = openmm.LangevinMiddleIntegrator(300.0, 5.0, 0.0005)
    integrator.setRandomNumberSeed(2)
    every = np.vstack([positions, np.zeros((2, 3))])
    context = make_context(system, every, cell, platform="CPU", integrator=integrator)
    context.computeVirtualSites()
    openmm.LocalEnergyMinimizer.minimize(context, 100.0, 20)
    volumes = set()
    for _ in range(10):
        integrator.step(2)
        state = context.getState(energy=True)
        volumes.add(state.getPeriodicBoxVolume()._value)
        assert np.isfinite(state.getPotentialEnergy()._value)
    assert len(volumes) > 1


# the rest of createMixedSystem


def test_constraints_go_within_the_students_atoms_and_stay_elsewhere(model, make_mm, potential):
    topology = model[0]
    mm_system = make_mm(constraints=app.HBonds, rigidWater=True)
    peptide = indices(topology, "ACE", "ALA", "NME")
    n_water = sum(r.name == "HOH" for r in topology.residues())

    def constraints(system):
        pairs = [system.getConstraintParameters(i)[:2] for i in range(system.getNumConstraints())]
        return sum(i in peptide and j in peptide for i, j in pairs), len(pairs)

    assert constraints(mm_system) == (12, 3 * n_water + 12)
    system = potential.createMixedSystem(topology, mm_system, peptide)
    assert constraints(system) == (0, 3 * n_water)
    kept = potential.createMixedSystem(topology, mm_system, peptide, removeConstraints=False)
    assert constraints(kept) == constraints(mm_system)


def test_the_students_have_no_long_range_and_do_not_let_anyone_say_so(model, mm_system, potential):
    peptide = indices(model[0], "ACE", "ALA", "NME")
    assert potential._impl.getMLLongRange() is False
    with pytest.raises(ValueError, match="does not support the mlLongRange option"):
        potential.createMixedSystem(model[0], mm_system, peptide, mlLongRange=True)


def test_two_embeddings_are_offered_and_no_other_is_taken(model, mm_system, potential):
    assert sorted(potential.getSupportedEmbeddings()) == ["electrostatic", "mechanical"]
    with pytest.raises(KeyError):
        potential.createMixedSystem(model[0], mm_system, [0], embedding="polarizable")


def test_the_system_that_was_given_is_left_alone(model, mm_system, potential):
    before = openmm.XmlSerializer.serialize(mm_system)
    n_atoms = model[0].getNumAtoms()
    for interpolate in (False, True):
        potential.createMixedSystem(
            model[0], mm_system, indices(model[0], "ALA"), interpolate=interpolate
        )
    assert openmm.XmlSerializer.serialize(mm_system) == before
    assert model[0].getNumAtoms() == n_atoms


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_whole_system_of_the_student_runs_and_agrees_with_ase(
    potential, from_ase, make_context, energy_and_forces, platform
):
    pdb = app.PDBFile(str(PEPTIDE))
    positions = np.array(pdb.positions.value_in_unit(unit.angstrom))
    system = potential.createSystem(pdb.topology, removeCMMotion=False)
    assert system.getNumForces() == 1
    context = make_context(system, positions, platform=platform)
    energy, forces = energy_and_forces(context)
    numbers = numbers_of(pdb.topology, range(len(positions)))
    expected, expected_forces = from_ase(numbers, positions)
    exact = platform == "Reference"
    assert energy == pytest.approx(expected, abs=1e-8 if exact else 1e-3)
    np.testing.assert_allclose(forces, expected_forces, atol=1e-8 if exact else 1e-3)
