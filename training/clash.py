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

N_DISTANCES = 64
"""Distances of each pair of elements in that range."""

N_CLUSTERS = 96
"""Clusters whose bonds are all too short."""

CLUSTER_SIZES = (3, 12)
"""Smallest and largest number of their atoms."""

CLUSTER_BONDS = (0.55, 0.75)
"""Range of the lengths of their bonds, in the same units."""

CLUSTER_GAP = 0.95
"""Other atoms of a cluster are at least this far apart, in the same units."""

PUSH = 3.0
"""The atoms should push one another apart with at least this force [eV/Å]."""


class Clashes(NamedTuple):
    """Structures whose atoms should push one another apart."""

    batch: TrainingBatch
    """The structures; labels are not known."""

    arms: Tensor
    """Places from the middle over the sum of their lengths, shape ``(n_atoms, 3)``: multiplied
    with the forces and added up they are the mean outward force of a structure."""


def make_clashes(potential: Potential, keep: Tensor | None = None) -> Clashes:
    """Two atoms of each pair of elements at each distance, and clusters of short bonds.

    The clusters are trees of random elements, half of them hydrogens at their ends, like molecules
    that were shrunk: every bond is too short, and no atom need have too many.

    Parameters
    ----------
    potential
        Gives elements, repulsion, precision and device; its network is not evaluated.
    keep
        Which of the structures to make, by a mask of all of them; None for all.
    """
    radii = np.array([COVALENT_RADII[z] for z in potential.numbers])
    found = []
    for a, b in itertools.combinations_with_replacement(range(len(radii)), 2):
        for share in np.linspace(*DISTANCES, N_DISTANCES):
            places = np.array([[0.0, 0.0, 0.0], [share * (radii[a] + radii[b]), 0.0, 0.0]])
            found.append((np.array([a, b]), places))
    rng = np.random.default_rng(0)
    hydrogen = np.array(potential.numbers) == 1
    found += [_cluster(radii, hydrogen, rng) for _ in range(N_CLUSTERS)]
    if keep is not None:
        found = list(itertools.compress(found, keep.tolist()))
    return _as_batch(potential, [s for s, _ in found], [x for _, x in found])


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


def _cluster(
    radii: NDArray[np.float64], hydrogen: NDArray[np.bool_], rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Species and positions [Å] of a tree of short bonds, smaller where there is no more room."""
    size = int(rng.integers(CLUSTER_SIZES[0], CLUSTER_SIZES[1] + 1))
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
        direction *= rng.uniform(*CLUSTER_BONDS) * bonds[near] / np.linalg.norm(direction)
        gaps = np.linalg.norm(places - (places[near] + direction), axis=1) / bonds
        if (np.delete(gaps, near) > CLUSTER_GAP).all():
            places = np.vstack([places, places[near] + direction])
    return species[: len(places)], places


def _as_batch(
    potential: Potential, species: list[NDArray[np.int64]], places: list[NDArray[np.float64]]
) -> Clashes:
    device = next(potential.parameters()).device
    n = len(species)
    counts = torch.tensor([len(s) for s in species], device=device)
    unlabelled = torch.full((n, 3, 3), torch.nan, dtype=torch.float64, device=device)
    graph = build_graph(
        torch.from_numpy(np.concatenate(places)).to(device),
        torch.from_numpy(np.concatenate(species)).to(device),
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
    arms = [x - x.mean(0) for x in places]
    arms = [x / np.linalg.norm(x, axis=1).sum() for x in arms]
    made = training_batch(batch, potential)
    return Clashes(made, torch.from_numpy(np.concatenate(arms)).to(made.vectors))
