"""Structures denser than any data: what training asks of a student there."""

import itertools
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openmm_mlffd.elements import COVALENT_RADII
from openmm_mlffd.graph import build_graph
from openmm_mlffd.potential import Potential
from openmm_mlffd.training.batches import Batch
from openmm_mlffd.training.targets import TrainingBatch, training_batch

DISTANCES = (0.3, 0.72)
"""Range of the distances of pairs, in units of the sum of the covalent radii: no bond is that
short."""

N_DISTANCES = 32
"""Distances of each pair of elements in that range."""

N_CLUSTERS = 96
"""Clusters whose bonds are all too short."""

CLUSTER_SIZES = (3, 12)
"""Smallest and largest number of their atoms."""

CLUSTER_BONDS = (0.55, 0.75)
"""Range of the lengths of their bonds, in the same units."""

CLUSTER_GAP = 0.95
"""Other atoms of a cluster are at least this far apart, in the same units."""

N_TREES = 24
"""Trees like the clusters, of bonds as long as they should be, that are squeezed as molecules."""

TREE_SIZES = (12, 26)
"""Smallest and largest number of their atoms."""

SQUEEZES = (0.05, 0.2, 0.35, 0.5, 0.65)
"""Sizes of a squeezed molecule, in units of its own, are drawn once between each two of these."""

PUSH = 3.0
"""The atoms should push one another apart with at least this force [eV/Å]."""


class _Clash(NamedTuple):
    species: NDArray[np.int64]
    places: NDArray[np.float64]  # Å
    ways: NDArray[np.float64]  # to where the atoms should go, Å


class Clashes(NamedTuple):
    """Structures whose atoms should push one another apart."""

    batch: TrainingBatch
    """The structures; labels are not known."""

    arms: Tensor
    """Ways to where the atoms should go over the sum of their lengths, shape ``(n_atoms, 3)``:
    multiplied with the forces and added up they are the mean outward force of a structure."""


def make_clashes(potential: Potential, keep: Tensor | None = None) -> Clashes:
    """Two atoms of each pair of elements, clusters of short bonds, and squeezed molecules.

    The clusters are trees of random elements, half of them hydrogens at their ends: every bond is
    too short, and no atom need have too many. The molecules (the G2 set of Curtiss et al., 1997, as
    far as the elements are known, and larger trees) are made smaller as a whole, down to a
    twentieth, every second time with their hydrogens further out: the first trial of a minimiser
    does that to symmetric ones.

    Parameters
    ----------
    potential
        Gives elements, repulsion, precision and device; its network is not evaluated.
    keep
        Which of the structures to make, by a mask of all of them; None for all.
    """
    radii = np.array([COVALENT_RADII[z] for z in potential.numbers])
    found: list[_Clash] = []
    for a, b in itertools.combinations_with_replacement(range(len(radii)), 2):
        for share in np.linspace(*DISTANCES, N_DISTANCES):
            places = np.array([[0.0, 0.0, 0.0], [share * (radii[a] + radii[b]), 0.0, 0.0]])
            found.append(_Clash(np.array([a, b]), places, places - places.mean(0)))
    rng = np.random.default_rng(0)
    hydrogen = np.array(potential.numbers) == 1
    sizes = [int(n) for n in rng.integers(CLUSTER_SIZES[0], CLUSTER_SIZES[1] + 1, N_CLUSTERS)]
    for size in sizes:
        species, places = _tree(radii, hydrogen, size, CLUSTER_BONDS, rng)
        found.append(_Clash(species, places, places))
    for n, (species, places) in enumerate(_molecules(potential.numbers)):
        found += [
            _squeezed(species, places, hydrogen, SQUEEZES[k : k + 2], rng)
            for k in (n % 2, n % 2 + 2)
        ]
    for _ in range(N_TREES):
        size = int(rng.integers(TREE_SIZES[0], TREE_SIZES[1] + 1))
        species, places = _tree(radii, hydrogen, size, (0.95, 1.05), rng)
        found += [
            _squeezed(species, places, hydrogen, bounds, rng)
            for bounds in itertools.pairwise(SQUEEZES)
        ]
    if keep is not None:
        found = list(itertools.compress(found, keep.tolist()))
    return _as_batch(potential, found)


def lack_of_push(forces: Tensor, clashes: Clashes) -> Tensor:
    """Mean of log(1 + what a structure's outward force lacks of `PUSH`), shape ().

    The logarithm, because forces that close are anything up to hundreds of eV/Å.

    Parameters
    ----------
    forces
        On the atoms of the clashes [eV/Å], shape ``(n_atoms, 3)``.
    clashes
        The structures.
    """
    outward = torch.zeros_like(clashes.batch.energy).index_add(
        0, clashes.batch.system, (clashes.arms * forces).sum(1)
    )
    return torch.log1p((PUSH - outward).clamp(min=0.0)).mean()


def _tree(
    radii: NDArray[np.float64],
    hydrogen: NDArray[np.bool_],
    size: int,
    lengths: tuple[float, float],
    rng: np.random.Generator,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Species and positions around their middle [Å] of a tree; smaller without more room."""
    weights = np.where(hydrogen, max(1.0, len(radii) - 1.0), 1.0)
    species = rng.choice(len(radii), size, p=weights / weights.sum())
    species = species[np.argsort(hydrogen[species], kind="stable")]  # hydrogens are added last
    places = np.zeros((1, 3))
    for _ in range(100 * size):
        n = len(places)
        if n == size:
            break
        heavy = np.flatnonzero(~hydrogen[species[:n]])
        near = int(rng.choice(heavy)) if len(heavy) else 0
        bonds = radii[species[n]] + radii[species[:n]]
        direction = rng.normal(size=3)
        direction *= rng.uniform(*lengths) * bonds[near] / np.linalg.norm(direction)
        gaps = np.linalg.norm(places - (places[near] + direction), axis=1) / bonds
        if (np.delete(gaps, near) > CLUSTER_GAP).all():
            places = np.vstack([places, places[near] + direction])
    return species[: len(places)], places - places.mean(0)


def _molecules(numbers: list[int]) -> list[tuple[NDArray[np.int64], NDArray[np.float64]]]:
    """Species and positions around their middle [Å] of molecules of at least three atoms."""
    try:
        from ase.collections import g2
    except ImportError as error:
        raise ImportError(
            f"loss.clash takes molecules from ASE ({error}): pip install 'openmm-mlffd[training]'"
        ) from error
    found = []
    for name in g2.names:
        molecule = g2[name]
        if len(molecule) > 2 and set(molecule.numbers) <= set(numbers):
            species = np.array([numbers.index(z) for z in molecule.numbers])
            found.append((species, molecule.positions - molecule.positions.mean(0)))
    return found


def _squeezed(
    species: NDArray[np.int64],
    shape: NDArray[np.float64],
    hydrogen: NDArray[np.bool_],
    bounds: tuple[float, ...],
    rng: np.random.Generator,
) -> _Clash:
    """Atoms around the middle [Å], nearer to it by a factor within the bounds."""
    size = np.full(len(species), rng.uniform(bounds[0], bounds[1]))
    if rng.random() < 0.5:
        size[hydrogen[species]] = rng.uniform(size[0], 1.0)
    places = size[:, None] * shape
    return _Clash(species, places, shape - places)


def _as_batch(potential: Potential, made: list[_Clash]) -> Clashes:
    device = next(potential.parameters()).device
    n = len(made)
    counts = torch.tensor([len(clash.species) for clash in made], device=device)
    places = np.concatenate([clash.places for clash in made])
    species = np.concatenate([clash.species for clash in made])
    unlabelled = torch.full((n, 3, 3), torch.nan, dtype=torch.float64, device=device)
    graph = build_graph(
        torch.from_numpy(places).to(device),
        torch.from_numpy(species).to(device),
        cutoff=potential.cutoff,
        cell=torch.zeros((n, 3, 3), dtype=torch.float64, device=device),
        pbc=torch.zeros((n, 3), dtype=torch.bool, device=device),
        system=torch.arange(n, device=device).repeat_interleave(counts),
    )
    unknown = torch.full_like(graph.positions, torch.nan)
    batch = Batch(
        graph=graph,
        energy=unlabelled[:, 0, 0],
        forces=unknown,
        virial=unlabelled,
        n_atoms=counts.double(),
        subset=torch.zeros(n, dtype=torch.int64, device=device),
        charges=unknown[:, 0],
        probe=torch.zeros_like(unknown),
        curvature=unknown,
    )
    arms = [clash.ways / np.linalg.norm(clash.ways, axis=1).sum() for clash in made]
    prepared = training_batch(batch, potential)
    return Clashes(prepared, torch.from_numpy(np.concatenate(arms)).to(prepared.vectors))
