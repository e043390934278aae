"""How configurations are made: force fields, dynamics, normal modes, clusters, boxes."""

import numpy as np
import openmm
import pytest

from openmm_mlffd.elements import COVALENT_RADII
from openmm_mlffd.training.generation import boxes, clusters, openmm_mmff
from openmm_mlffd.training.generation.mmff import RdkitForces
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


def test_forces_of_rdkit_are_the_gradient_at_the_positions_asked_for():
    molecule = embed("CCO", 1)
    forces = RdkitForces(molecule)
    rng = np.random.default_rng(0)
    x = molecule.GetConformer().GetPositions() + rng.normal(scale=0.1, size=(9, 3))
    forces(x + 1.0 * rng.normal(size=x.shape))  # whose distances must be forgotten
    found, step = forces(x), 1e-4
    for atom, axis in [(0, 0), (4, 2), (8, 1)]:
        shift = np.zeros_like(x)
        shift[atom, axis] = step
        slope = (forces.energy(x + shift) - forces.energy(x - shift)) / (2 * step)
        assert found[atom, axis] == pytest.approx(-slope, abs=1e-5)


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


@pytest.mark.parametrize("method", ["md", "modes", "rattle", "none"])
def test_every_method_gives_what_was_asked_for(method):
    molecule = embed("CO", 1)
    x = np.array(molecule.GetConformer().GetPositions())
    config = SamplingConfig(method=method, frames=3, equilibration=5, interval=5)
    found = list(
        sample(RdkitForces(molecule), x, masses_of(molecule), config, np.random.default_rng(0))
    )
    assert len(found) == (1 if method == "none" else 3)
    warm = [s.temperature for s in found]
    assert np.isnan(warm).all() == (method in ("rattle", "none"))
    if method in ("md", "modes"):
        assert abs(found[0].positions - found[1].positions).max() > 1e-3


def test_configurations_with_large_forces_are_left_out():
    molecule = embed("CO", 1)
    x = np.array(molecule.GetConformer().GetPositions())
    config = SamplingConfig(frames=3, equilibration=5, interval=5, max_force=1e-3)
    forces = RdkitForces(molecule)
    assert not list(sample(forces, x, masses_of(molecule), config, np.random.default_rng(0)))


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
