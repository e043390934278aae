"""Pairs of atoms closer than any data: what training asks of a student there."""

import itertools

import torch
from torch import Tensor

from openmm_mlffd.elements import COVALENT_RADII
from openmm_mlffd.graph import build_graph
from openmm_mlffd.potential import Potential
from openmm_mlffd.training.batches import Batch
from openmm_mlffd.training.targets import TrainingBatch, training_batch

DISTANCES = (0.3, 0.72)
"""Range of the distances, in units of the sum of the covalent radii: no bond is that short."""

N_DISTANCES = 22
"""Distances of each pair of elements in that range."""

PUSH = 3.0
"""The atoms should push one another apart with at least this force [eV/Å]."""


def clashing_pairs(potential: Potential) -> TrainingBatch:
    """Two atoms of each pair of elements at each distance, along x; labels are not known.

    Parameters
    ----------
    potential
        Gives elements, repulsion, precision and device; its network is not evaluated.
    """
    device = next(potential.parameters()).device
    pairs = list(itertools.combinations_with_replacement(range(len(potential.numbers)), 2))
    radii = [COVALENT_RADII[z] for z in potential.numbers]
    bonds = torch.tensor([radii[a] + radii[b] for a, b in pairs], dtype=torch.float64)
    distances = (bonds[:, None] * torch.linspace(*DISTANCES, N_DISTANCES).double()).flatten()
    n = len(distances)
    positions = torch.zeros((n, 2, 3), dtype=torch.float64)
    positions[:, 1, 0] = distances
    graph = build_graph(
        positions.view(-1, 3).to(device),
        torch.tensor(pairs).repeat_interleave(N_DISTANCES, 0).flatten().to(device),
        cutoff=potential.cutoff,
        cell=torch.zeros((n, 3, 3), dtype=torch.float64, device=device),
        pbc=torch.zeros((n, 3), dtype=torch.bool, device=device),
        system=torch.arange(n, device=device).repeat_interleave(2),
    )
    unknown = torch.full_like(graph.positions, torch.nan)
    batch = Batch(
        graph=graph,
        energy=torch.full((n,), torch.nan, dtype=torch.float64, device=device),
        forces=unknown,
        virial=torch.full((n, 3, 3), torch.nan, dtype=torch.float64, device=device),
        n_atoms=torch.full((n,), 2.0, dtype=torch.float64, device=device),
        subset=torch.zeros(n, dtype=torch.int64, device=device),
        charges=unknown[:, 0],
        probe=torch.zeros_like(unknown),
        curvature=unknown,
    )
    return training_batch(batch, potential)


def lack_of_push(forces: Tensor) -> Tensor:
    """Mean of log(1 + what a pair's force lacks of `PUSH`), of forces on `clashing_pairs`, ().

    The logarithm, because forces that close are anything up to hundreds of eV/Å.
    """
    apart = 0.5 * (forces[1::2, 0] - forces[0::2, 0])
    return torch.log1p((PUSH - apart).clamp(min=0.0)).mean()
