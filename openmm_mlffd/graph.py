"""The data that a potential is evaluated on."""

from typing import NamedTuple

import torch
from torch import Tensor

from openmm_mlffd.kernels import reference


class Graph(NamedTuple):
    """Atoms of one or more systems with their neighbor list. Immutable."""

    positions: Tensor
    """Atom positions [Å], shape (n_atoms, 3), float64."""

    species: Tensor
    """Index of each atom's element in the model's element list, shape (n_atoms,), int64."""

    system: Tensor
    """Index of each atom's system, ascending, shape (n_atoms,), int64."""

    cell: Tensor
    """Box vectors as rows [Å], zero where not periodic, shape (n_systems, 3, 3), float64."""

    edge_index: Tensor
    """Receiver and sender of each directed edge, sorted by receiver, (2, n_edges), int64."""

    edge_shift: Tensor
    """Image of the sender in units of the box vectors, shape (n_edges, 3), float64."""


def build_graph(
    positions: Tensor,
    species: Tensor,
    *,
    cutoff: float,
    cell: Tensor | None = None,
    pbc: Tensor | None = None,
    system: Tensor | None = None,
) -> Graph:
    """Make the graph of one system, or of several at once.

    Parameters
    ----------
    positions
        Atom positions [Å], shape ``(n_atoms, 3)``.
    species
        Index of each atom's element in the model's element list, shape ``(n_atoms,)``.
    cutoff
        Neighbor cutoff [Å].
    cell
        Box vectors as rows [Å], shape ``(3, 3)`` or ``(n_systems, 3, 3)``; None for no box.
    pbc
        Which box vectors are periodic, shape ``(3,)`` or ``(n_systems, 3)``, bool; None means
        all where a cell is given and none otherwise.
    system
        Index of each atom's system, ascending, shape ``(n_atoms,)``; None for one system.

    Returns
    -------
    Graph
        Positions and cell are converted to float64.
    """
    positions = positions.to(torch.float64)
    device = positions.device
    if system is None:
        system = torch.zeros(positions.shape[0], dtype=torch.int64, device=device)
    if cell is None:
        n_systems = 1 if positions.shape[0] == 0 else int(system[-1]) + 1
        cell = torch.zeros((n_systems, 3, 3), dtype=torch.float64, device=device)
        pbc = torch.zeros((n_systems, 3), dtype=torch.bool, device=device)
    cell = cell.to(torch.float64).reshape(-1, 3, 3)
    if pbc is None:
        pbc = torch.ones((cell.shape[0], 3), dtype=torch.bool, device=device)
    pbc = pbc.reshape(-1, 3)
    cell = torch.where(pbc[:, :, None], cell, 0.0)
    edge_index, edge_shift = reference.neighbor_list(positions, system, cell, pbc, cutoff=cutoff)
    return Graph(positions, species, system, cell, edge_index, edge_shift)
