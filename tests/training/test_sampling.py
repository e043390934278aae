"""How configurations are made: force fields, dynamics, normal modes, clusters, boxes."""

import numpy as np
import openmm
import pytest
from rdkit.Chem.rdMolTransforms import GetDihedralDeg

from openmm_mlffd.elements import COVALENT_RADII
from openmm_mlffd.training.generation import boxes, clusters, openmm_mmff
from openmm_mlffd.training.generation.mmff import RdkitForces, choose_field
from openmm_mlffd.training.generation.molecules import embed, masses_of, numbers_of
from openmm_mlffd.training.generation.recipe import BoxesConfig, SamplingConfig
from openmm_mlffd.training.generation.sampling import (
    Langevin,
    SamplingError,
    normal_modes,
    rattle,
    sample,
    sample_modes,
)
from openmm_mlffd.training.generation.tearing import bonds_of, side_of, tear
from openmm_mlffd.units import BOLTZMANN, KJ_PER_MOL_PER_EV


def springs(stiffness):
    return lambda x: -stiffness * x


# force fields


@pytest.mark.parametrize(
    "smiles",
    [["CC(=O)NC(C)C(=O)NC"], ["CC#N", "O", "O"], ["c1ccncc1", "C[NH3+]"], ["CS(=O)(=O)N", "ClCCF"],
     ["COP(=O)([O-])OC"], ["C=C=C", "C1CC1", "CC(=O)[O-]"]],
)  # fmt: skip
def test_mmff_in_openmm_is_that_of_rdkit(smiles):
    rng = np.random.default_rng(1)
    molecules = [embed(s, 3) for s in smiles]
    start = clusters.assemble(molecules, [1.0, 1.5], rng)
    start += rng.normal(scale=0.05, size=start.shape)
    ours = openmm_mmff.OpenmmForces(
        openmm_mmff.build_system(molecules, list(range(len(molecules))))
    )
    theirs = RdkitForces(clusters.combine(molecules, start))
    np.testing.assert_allclose(ours(start), theirs(start), rtol=0, atol=2e-3)  # eV/Å
    moved = start + rng.normal(scale=0.05, size=start.shape)
    difference = (ours.energy(moved) - ours.energy(start)) / KJ_PER_MOL_PER_EV
    assert difference == pytest.approx(theirs.energy(moved) - theirs.energy(start), abs=1e-3)


@pytest.mark.parametrize("smiles", ["CCO", "CC(=O)O[O-]"])  # by MMFF94, and by UFF
def test_forces_of_rdkit_are_the_gradient_at_the_positions_asked_for(smiles):
    molecule = embed(smiles, 1, "auto")
    forces = RdkitForces(molecule, "auto")
    rng = np.random.default_rng(0)
    start = molecule.GetConformer().GetPositions()
    x = start + rng.normal(scale=0.1, size=start.shape)
    forces(x + 1.0 * rng.normal(size=x.shape))  # whose distances must be forgotten
    found, step = forces(x), 1e-4
    for atom, axis in [(0, 0), (4, 2), (len(x) - 1, 1)]:
        shift = np.zeros_like(x)
        shift[atom, axis] = step
        slope = (forces.energy(x + shift) - forces.energy(x - shift)) / (2 * step)
        assert found[atom, axis] == pytest.approx(-slope, abs=1e-5)


def test_uff_takes_the_place_of_mmff94_only_where_it_is_asked_for():
    anion = "CC(=O)O[O-]"
    with pytest.raises(SamplingError, match="MMFF94 has no parameters for it"):
        embed(anion, 1)
    molecule = embed(anion, 1, "auto")
    assert choose_field(molecule, "auto") == "uff"
    assert choose_field(embed("CCO", 1), "auto") == "mmff94"
    with pytest.raises(SamplingError, match="neither MMFF94 nor UFF"):
        embed("FS(F)(F)(F)(F)F", 1, "auto")
    # molecules of a cluster feel one another
    waters = [molecule, embed("O", 1)]
    anion_at, water_at = (m.GetConformer().GetPositions() for m in waters)
    near, far = (np.concatenate([anion_at, water_at + np.array([x, 0, 0])]) for x in (3.5, 30.0))
    forces = RdkitForces(clusters.combine(waters, near), "auto")
    assert abs(forces(near)[-3:].sum(0)).max() > 1e-3
    assert abs(forces(far)[-3:].sum(0)).max() < 1e-4


# dynamics and modes


def test_dynamics_have_the_temperature_asked_for():
    n, temperature, stiffness = 200, 400.0, 5.0
    masses = np.full(n, 12.0)
    rng = np.random.default_rng(0)
    dynamics = Langevin(
        springs(stiffness), np.zeros((n, 3)), masses, temperature=temperature, rng=rng, timestep=1.0
    )
    dynamics.run(300)
    kinetic, squares = [], []
    for _ in range(60):
        dynamics.run(20)
        kinetic.append((12.0 * dynamics.velocities**2).mean())
        squares.append((stiffness * dynamics.positions**2).mean())
    kt = BOLTZMANN * temperature
    assert np.mean(kinetic) == pytest.approx(kt, rel=0.03)
    assert np.mean(squares) == pytest.approx(kt, rel=0.03)


def test_dynamics_that_blow_up_are_given_up():
    x = np.random.default_rng(0).normal(size=(5, 3))
    dynamics = Langevin(
        springs(-50.0), x, np.ones(5), temperature=300, rng=np.random.default_rng(0), timestep=1.0
    )
    with pytest.raises(SamplingError, match="times too hot"):
        dynamics.run(500)


def test_modes_of_water_are_three_and_leave_its_center_where_it_is():
    molecule = embed("O", 1)
    values, modes = normal_modes(
        RdkitForces(molecule), molecule.GetConformer().GetPositions(), masses_of(molecule)
    )
    assert len(values) == 3
    assert values.min() > 0
    overlap = np.einsum("kix,lix,i->kl", modes, modes, masses_of(molecule))
    np.testing.assert_allclose(overlap, np.eye(3), atol=1e-8)
    assert abs(np.einsum("kix,i->kx", modes, masses_of(molecule))).max() < 1e-4


def test_displacements_along_modes_have_the_energy_of_the_temperature():
    molecule = embed("C#C", 1)
    forces = RdkitForces(molecule)
    x = forces.minimize(np.array(molecule.GetConformer().GetPositions()), 500)
    values, modes = normal_modes(forces, x, masses_of(molecule))
    stiff = values > 0.5  # of the others the cap is at work
    rng = np.random.default_rng(0)
    masses = masses_of(molecule)
    moves = np.array([sample_modes(values, modes, 300.0, rng) for _ in range(2000)])
    along = np.einsum("nix,kix,i->nk", moves, modes, masses)
    energies = 0.5 * values * (along**2).mean(0)
    np.testing.assert_allclose(energies[stiff], 0.5 * BOLTZMANN * 300.0, rtol=0.12)
    assert np.sqrt((moves**2).sum(2).mean(0)).max() < 0.6


@pytest.mark.parametrize("method", ["md", "modes", "rattle", "torn", "none"])
def test_every_method_gives_what_was_asked_for(method):
    molecule = embed("CO", 1)
    x = np.array(molecule.GetConformer().GetPositions())
    config = SamplingConfig(method=method, frames=3, equilibration=5, interval=5)
    rng = np.random.default_rng(0)
    forces, numbers = RdkitForces(molecule), numbers_of(molecule)
    found = list(sample(forces, x, numbers, masses_of(molecule), config, rng))
    assert len(found) == (1 if method == "none" else 3)
    warm = [s.temperature for s in found]
    assert np.isnan(warm).all() == (method in ("rattle", "torn", "none"))
    if method in ("md", "modes", "torn"):
        assert abs(found[0].positions - found[1].positions).max() > 1e-3


def test_configurations_with_large_forces_are_left_out():
    molecule = embed("CO", 1)
    x = np.array(molecule.GetConformer().GetPositions())
    config = SamplingConfig(frames=3, equilibration=5, interval=5, max_force=1e-3)
    forces, rng = RdkitForces(molecule), np.random.default_rng(0)
    assert not list(sample(forces, x, numbers_of(molecule), masses_of(molecule), config, rng))


def test_torn_bonds_have_the_lengths_asked_for_and_fragments_stay_whole():
    molecule = embed("CCO", 1)
    x, z = np.array(molecule.GetConformer().GetPositions()), numbers_of(molecule)
    bonds = bonds_of(z, x)
    assert set(bonds) == {
        tuple(sorted((b.GetBeginAtomIdx(), b.GetEndAtomIdx()))) for b in molecule.GetBonds()
    }
    config = SamplingConfig(method="torn", torn=[1], lengths=[0.6, 3.0])
    rng, factors, which = np.random.default_rng(0), [], set()
    before = np.array([np.linalg.norm(x[i] - x[j]) for i, j in bonds])
    for _ in range(300):
        moved = tear(x, z, config, rng)
        after = np.array([np.linalg.norm(moved[i] - moved[j]) for i, j in bonds])
        changed = np.flatnonzero(abs(after / before - 1) > 1e-9)
        assert len(changed) <= 1  # all other bonds are as they were
        for k in changed.tolist():
            factors.append(after[k] / before[k])
            which.add(bonds[k])
    assert which == set(bonds)
    assert 0.6 <= min(factors) < 0.65
    assert 2.7 < max(factors) <= 3.0
    assert np.median(factors) == pytest.approx(np.sqrt(0.6 * 3.0), rel=0.12)


def test_atoms_of_a_ring_leave_it_with_their_hydrogens():
    molecule = embed("C1CCCC1", 1)
    x, z = np.array(molecule.GetConformer().GetPositions()), numbers_of(molecule)
    bonds = bonds_of(z, x)
    side = side_of(1, 0, bonds, len(z))
    assert sorted(z[side].tolist()) == [1, 1, 6]
    assert side[1]
    hydrogen = next(j for i, j in bonds if i == 1 and z[j] == 1)
    assert side_of(hydrogen, 1, bonds, len(z)).sum() == 1
    assert side_of(1, hydrogen, bonds, len(z)).sum() == len(z) - 1


def test_turned_bonds_keep_all_lengths_and_angles_and_meet_every_torsion():
    molecule = embed("CCCC", 1)
    x, z = np.array(molecule.GetConformer().GetPositions()), numbers_of(molecule)
    bonds = bonds_of(z, x)
    before = np.array([np.linalg.norm(x[i] - x[j]) for i, j in bonds])
    config = SamplingConfig(method="torn", torn=[0], turned=[1, 2, 3])
    rng, torsions = np.random.default_rng(0), []
    conformer = molecule.GetConformer()
    for _ in range(200):
        moved = tear(x, z, config, rng)
        after = np.array([np.linalg.norm(moved[i] - moved[j]) for i, j in bonds])
        np.testing.assert_allclose(after, before, rtol=1e-9)
        conformer.SetPositions(moved)
        torsions.append(GetDihedralDeg(conformer, 0, 1, 2, 3))
    counts, _ = np.histogram(torsions, bins=6, range=(-180, 180))
    assert (counts > 8).all()
    ring = embed("C1CCCCC1", 1)
    y = np.array(ring.GetConformer().GetPositions())
    assert tear(y, numbers_of(ring), config, rng) is None  # nothing can turn
    with pytest.raises(SamplingError, match="nothing of it can be torn, turned or scaled"):
        list(sample(RdkitForces(ring), y, numbers_of(ring), masses_of(ring), config, rng))


def test_molecules_are_scaled_and_atoms_never_on_one_another():
    molecule = embed("c1ccccc1", 1)
    x, z = np.array(molecule.GetConformer().GetPositions()), numbers_of(molecule)
    config = SamplingConfig(method="torn", torn=[0], scale=[0.7, 1.1])
    rng = np.random.default_rng(0)
    scales = [np.linalg.norm(tear(x, z, config, rng)) / np.linalg.norm(x) for _ in range(100)]
    assert 0.7 <= min(scales) < 0.72
    assert 1.08 < max(scales) <= 1.1
    hard = SamplingConfig(method="torn", torn=[3], lengths=[0.2, 0.5])
    radii = np.array(COVALENT_RADII)[z]
    tries = [tear(x, z, hard, rng) for _ in range(50)]
    assert sum(moved is not None for moved in tries) > 10
    for moved in filter(lambda x: x is not None, tries):
        distance = np.linalg.norm(moved[:, None] - moved, axis=-1) + 9 * np.eye(len(z))
        assert (distance / (radii[:, None] + radii)).min() > 0.4


def test_rattle_has_the_width_asked_for():
    x = np.zeros((4000, 3))
    moved = rattle(x, [0.08], np.random.default_rng(0))
    assert moved.std() == pytest.approx(0.08, rel=0.03)
    assert rattle(x, [0.0], np.random.default_rng(0)) is x


# clusters and boxes


@pytest.mark.parametrize("seed", range(4))
def test_molecules_of_a_cluster_touch_and_do_not_overlap(seed):
    rng = np.random.default_rng(seed)
    molecules = [embed(s, 1) for s in ("c1ccccc1", "CCO", "O", "O", "O")]
    positions = clusters.assemble(molecules, [0.8, 1.2], rng)
    assert len(positions) == 12 + 9 + 9
    sizes = np.cumsum([0, *[m.GetNumAtoms() for m in molecules]])
    radii = np.array(COVALENT_RADII)[np.concatenate([numbers_of(m) for m in molecules])]
    for k in range(1, len(molecules)):
        before, own = slice(0, sizes[k]), slice(sizes[k], sizes[k + 1])
        gaps = (
            np.linalg.norm(positions[before, None] - positions[None, own], axis=2)
            - radii[before, None]
            - radii[None, own]
        )
        assert 0.8 - 1e-9 <= gaps.min() < 1.2 + 0.11


def test_rotations_are_proper_and_uniform():
    rng = np.random.default_rng(0)
    all_ = np.array([clusters.random_rotation(rng) for _ in range(2000)])
    np.testing.assert_allclose(np.linalg.det(all_), 1.0)
    assert abs(all_.mean(0)).max() < 0.05
    np.testing.assert_allclose((all_**2).mean(0), 1 / 3, atol=0.03)


@pytest.mark.parametrize("triclinic", [0.0, 1.0])
def test_box_is_full_of_whole_waters_around_the_solute(triclinic):
    rng = np.random.default_rng(0)
    config = BoxesConfig(sources=[], edges=[15.0, 16.0], triclinic=triclinic)
    cell = boxes.random_cell(config, 0.0, rng)
    openmm.System().setDefaultPeriodicBoxVectors(*(cell / 10.0).tolist())  # refuses unreduced ones
    assert bool(abs(cell[np.tril_indices(3, -1)]).max() > 0) == bool(triclinic)
    solute = embed("CC(=O)[O-]", 1)
    positions = boxes.solvate(solute, cell, rng)
    n_waters = (len(positions) - 7) // 3
    numbers = boxes.numbers_in_box(solute, n_waters)
    assert len(numbers) == len(positions)
    inner = solute.GetConformer().GetPositions()
    np.testing.assert_allclose(
        np.linalg.norm(positions[:7, None] - positions[:7], axis=2),
        np.linalg.norm(inner[:, None] - inner, axis=2),
        atol=1e-5,
    )
    waters = positions[7:].reshape(-1, 3, 3)
    assert abs(np.linalg.norm(waters[:, 1] - waters[:, 0], axis=1) - 0.9572).max() < 5e-3
    density = n_waters * 18.015 / 0.602214 / np.linalg.det(cell)  # g/cm^3
    assert 0.75 < density < 1.1
    moved, larger = boxes.scale_density(positions, cell, 7, 0.5)
    assert np.linalg.det(larger) == pytest.approx(2.0 * np.linalg.det(cell))
    waters = moved[7:].reshape(-1, 3, 3)
    assert abs(np.linalg.norm(waters[:, 1] - waters[:, 0], axis=1) - 0.9572).max() < 5e-3
