"""How far the surroundings of atoms are from those of a training set; needs no student."""

import numpy as np
import torch
from numpy.typing import NDArray

from openmm_mlffd.graph import build_graph
from openmm_mlffd.potential import edge_vectors
from openmm_mlffd.training.teacher_worker import Batch, select
from openmm_mlffd.validation.suite.models import portions

CUTOFF = 5.0
"""Neighbors that are seen [Å]."""

CENTERS = np.linspace(0.9, 4.9, 9)
"""Of the radial functions [Å]."""

WIDTH = 0.3
"""Of the radial functions [Å]."""

_CHUNK = 2048


def describe_surroundings(batch: Batch, elements: NDArray[np.int64]) -> NDArray[np.float32]:
    """Smooth counts of the neighbors of each atom, by element and distance.

    Σ_j exp(-(r_ij - R_k)² / 2w²) over the neighbors of each element, faded out at the cutoff:
    the radial symmetry functions of Behler and Parrinello.

    Parameters
    ----------
    batch
        The structures.
    elements
        Atomic numbers that are told apart; others are not seen.

    Returns
    -------
    ndarray
        Shape ``(n_atoms, n_elements * n_centers)``.

    References
    ----------
    Behler, Parrinello 2007, doi:10.1103/PhysRevLett.98.146401.
    """
    table = np.full(256, -1)
    table[elements] = np.arange(len(elements))
    rows = [np.zeros((0, len(elements) * len(CENTERS)), np.float32)]
    for part in portions(batch, 4000):
        own = select(batch, part)
        count = torch.from_numpy(np.diff(own.offsets))
        graph = build_graph(
            torch.from_numpy(np.asarray(own.positions, np.float64)),
            torch.from_numpy(table[own.atomic_numbers.astype(np.int64)]),
            cutoff=CUTOFF,
            cell=torch.from_numpy(np.asarray(own.cell, np.float64)),
            pbc=torch.from_numpy(own.pbc),
            system=torch.repeat_interleave(torch.arange(len(part)), count),
        )
        r = edge_vectors(graph).norm(dim=1)
        fade = 0.5 * (1 + torch.cos(torch.pi * r / CUTOFF))
        basis = torch.exp(-0.5 * ((r[:, None] - torch.from_numpy(CENTERS)) / WIDTH) ** 2)
        receiver, sender = graph.edge_index
        seen = graph.species[sender] >= 0
        place = receiver[seen] * len(elements) + graph.species[sender][seen]
        found = torch.zeros((len(graph.species) * len(elements), len(CENTERS)), dtype=r.dtype)
        found.index_add_(0, place, (basis * fade[:, None])[seen])
        rows.append(found.reshape(len(graph.species), -1).float().numpy())
    return np.concatenate(rows)


def distances_to(
    numbers: NDArray[np.integer],
    features: NDArray[np.float32],
    reference_numbers: NDArray[np.integer],
    reference_features: NDArray[np.float32],
) -> NDArray[np.float64]:
    """Distance of each atom's surroundings to the nearest ones of the same element.

    In standard deviations: each feature is divided by its spread among the reference atoms of
    the element, and the distance by the root of the number of features. NaN where the reference
    has no atom of the element.
    """
    distances = np.full(len(numbers), np.nan)
    for z in np.unique(numbers):
        known = reference_features[reference_numbers == z]
        mine = np.flatnonzero(numbers == z)
        if not len(known):
            continue
        spread = np.maximum(known.std(0), 0.05)
        reference = torch.from_numpy(known / spread)
        for part in np.split(mine, range(_CHUNK, len(mine), _CHUNK)):
            found = torch.cdist(torch.from_numpy(features[part] / spread), reference)
            distances[part] = found.min(1).values.numpy()
    return distances / np.sqrt(max(1, features.shape[1]))
