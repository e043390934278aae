"""A neighbor list that outlives a step."""

from typing import NamedTuple

import torch
from torch import Tensor

from openmm_mlffd.graph import Graph
from openmm_mlffd.kernels import reference

DEFAULT_SKIN = 1.0
"""Margin of the list [Å] where none is given."""


class _Candidates(NamedTuple):
    """Pairs that may come closer than the cutoff while no atom has moved far. Immutable."""

    positions: Tensor  # where the atoms were
    system: Tensor
    cell: Tensor | None  # as given, to notice a change
    pbc: Tensor | None
    box: Tensor  # (1, 3, 3), rows of directions that are not periodic are zero
    periodic: bool
    edge_index: Tensor
    edge_shift: Tensor


class VerletList:
    """Neighbors of one system as its atoms move.

    Pairs closer than cutoff + skin are found once and used until an atom has moved more than
    half the skin, or until the box, the periodicity, the number of atoms or the device changes.
    The edges handed out are those closer than the cutoff, the same as of a fresh list. A lattice
    vector added to an atom counts as a move.

    Parameters
    ----------
    cutoff
        Neighbor cutoff [Å].
    skin
        Margin [Å]. Larger means fewer builds and more candidates; 0 builds at every move.

    Raises
    ------
    ValueError
        If the cutoff is not positive or the skin is negative.

    Notes
    -----
    Threads may share an instance: each call works with the one immutable set of candidates that
    it found or made.
    """

    def __init__(self, cutoff: float, skin: float = DEFAULT_SKIN) -> None:
        if not cutoff > 0.0 or not skin >= 0.0:
            raise ValueError(
                f"the cutoff must be positive and the skin not negative, got {cutoff} and {skin} Å"
            )
        self.cutoff = cutoff
        self.skin = skin
        self.n_builds = 0
        self._candidates: _Candidates | None = None

    def graph(
        self,
        positions: Tensor,
        species: Tensor,
        *,
        cell: Tensor | None = None,
        pbc: Tensor | None = None,
    ) -> Graph:
        """Make the graph of the atoms where they are now.

        Parameters
        ----------
        positions
            Atom positions [Å], inside the box or not, finite, shape ``(n_atoms, 3)``, float64.
        species
            Index of each atom's element in the model's element list, shape ``(n_atoms,)``.
        cell
            Box vectors as rows [Å], shape ``(3, 3)``, on any device; None for no box.
        pbc
            Which box vectors are periodic, shape ``(3,)``, bool, on any device; None means all
            where a cell is given and none otherwise.

        Returns
        -------
        Graph
            The same as of `build_graph`.

        Raises
        ------
        ValueError
            If directions are periodic and there is no cell, or the periodic box has no volume.

        Notes
        -----
        Waits for the device.
        """
        candidates = self._candidates
        if candidates is None or not self._holds(candidates, positions, cell, pbc):
            candidates = self._build(positions, cell, pbc)
            self._candidates = candidates
        receiver, sender = candidates.edge_index[0], candidates.edge_index[1]
        vectors = positions.index_select(0, sender) - positions.index_select(0, receiver)
        if candidates.periodic:
            vectors = vectors + candidates.edge_shift @ candidates.box[0]
        near = (vectors.square().sum(1) < self.cutoff**2).nonzero()[:, 0]
        return Graph(
            positions,
            species,
            candidates.system,
            candidates.box,
            candidates.edge_index.index_select(1, near),
            candidates.edge_shift.index_select(0, near),
        )

    def _holds(
        self, built: _Candidates, positions: Tensor, cell: Tensor | None, pbc: Tensor | None
    ) -> bool:
        if positions.shape != built.positions.shape or positions.device != built.positions.device:
            return False
        if not _equal(cell, built.cell) or not _equal(pbc, built.pbc):
            return False
        moved = (positions - built.positions).square().sum(1)
        return bool((moved <= (0.5 * self.skin) ** 2).all())

    def _build(self, positions: Tensor, cell: Tensor | None, pbc: Tensor | None) -> _Candidates:
        device = positions.device
        if cell is None:
            if pbc is not None and bool(pbc.any()):
                raise ValueError("periodic directions need a cell")
            box = torch.zeros((1, 3, 3), dtype=torch.float64, device=device)
            directions = torch.zeros((1, 3), dtype=torch.bool, device=device)
        else:
            directions = (torch.ones(3, dtype=torch.bool) if pbc is None else pbc).to(device)[None]
            box = cell.to(device, torch.float64)[None]
            box = torch.where(directions[:, :, None], box, 0.0)
        system = torch.zeros(positions.shape[0], dtype=torch.int64, device=device)
        edge_index, edge_shift = reference.neighbor_list(
            positions, system, box, directions, cutoff=self.cutoff + self.skin
        )
        self.n_builds += 1
        return _Candidates(
            positions.clone(),
            system,
            None if cell is None else cell.clone(),
            None if pbc is None else pbc.clone(),
            box,
            bool(directions.any()),
            edge_index,
            edge_shift,
        )


def _equal(new: Tensor | None, old: Tensor | None) -> bool:
    if new is None or old is None:
        return new is old
    return new.device == old.device and torch.equal(new, old)
