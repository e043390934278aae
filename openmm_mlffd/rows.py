"""Rows of neighbors that outlive a step, in memory that stays where it is."""

import math

import torch
from torch import Tensor

from openmm_mlffd.fast import Rows
from openmm_mlffd.kernels.edge_ops import largest_move
from openmm_mlffd.kernels.neighbor_ops import NeighborOverflow, check_counts, neighbor_rows_
from openmm_mlffd.neighbors import DEFAULT_SKIN

SMALLEST_BINNED = 128
"""Systems of fewer atoms are searched pair by pair."""

MOST_SLOTS = 2**31 - 1  # kernels count slots in int32
DENSITY = 0.11  # atoms per cubic Å in water and proteins, a little more than there are


class VerletRows:
    """Rows of neighbors of one or more systems as their atoms move.

    Neighbors closer than cutoff + skin are found once and hold until an atom has moved more than
    half the skin, or the box changed; what is beyond the cutoff is left out where edges are
    computed. The tensors stay the same as long as the capacity does, so that a captured CUDA graph
    can read them.

    Parameters
    ----------
    species
        Index of each atom's element, shape ``(n_atoms,)``; its device is that of the list.
    cutoff
        Neighbor cutoff [Å].
    skin
        Margin [Å].
    periodic
        Which box vectors are periodic, shape ``(3,)`` or ``(n_systems, 3)``, bool.
    system
        Which system each atom belongs to, ascending, shape ``(n_atoms,)``; None for one system.
    capacity
        Neighbors that an atom may have. None: what is needed, with a margin, growing.

    Raises
    ------
    ValueError
        If the cutoff is not positive or the skin is negative.
    """

    def __init__(
        self,
        species: Tensor,
        cutoff: float,
        skin: float = DEFAULT_SKIN,
        *,
        periodic: Tensor,
        system: Tensor | None = None,
        capacity: int | None = None,
    ) -> None:
        if not cutoff > 0.0 or not skin >= 0.0:
            raise ValueError(
                f"the cutoff must be positive and the skin not negative, got {cutoff} and {skin} Å"
            )
        n_atoms, device = species.shape[0], species.device
        self.cutoff, self.skin = cutoff, skin
        self.n_builds = 0
        self.fixed = capacity is not None
        if system is None:
            system = torch.zeros(n_atoms, dtype=torch.int32, device=device)
        pbc = periodic.to(device).reshape(-1, 3).contiguous()
        numbers = torch.arange(pbc.shape[0] + 1, dtype=torch.int32, device=device)
        system = system.to(device, torch.int32).contiguous()
        self.pbc = pbc
        self.first = torch.searchsorted(system, numbers, out_int32=True)
        largest = int(self.first.diff().max()) if n_atoms else 0
        self.binned = largest > SMALLEST_BINNED
        self._positions = torch.full((n_atoms, 3), math.inf, dtype=torch.float64, device=device)
        expected = 4 / 3 * math.pi * (cutoff + skin) ** 3 * DENSITY
        alone = largest if not bool(pbc.any()) else n_atoms * 27
        self._species, self._system = species.to(torch.int32).contiguous(), system
        self._allocate(capacity if capacity is not None else _rounded(min(expected, alone)))

    def _allocate(self, capacity: int) -> None:
        n_atoms, device = self._species.shape[0], self._species.device
        if n_atoms * capacity > MOST_SLOTS:
            raise NeighborOverflow(
                f"{n_atoms} atoms with up to {capacity} neighbors each are more than a list holds"
            )
        shape = (n_atoms, capacity)
        self.capacity = capacity
        self.rows = Rows(
            torch.zeros((n_atoms, 3), dtype=torch.float64, device=device),
            self._species,
            self._system,
            torch.zeros((self.pbc.shape[0], 3, 3), dtype=torch.float64, device=device),
            torch.zeros(shape, dtype=torch.int32, device=device),
            torch.zeros(shape, dtype=torch.int64, device=device),
            torch.full(shape, -1, dtype=torch.int32, device=device),
            torch.zeros(n_atoms, dtype=torch.int32, device=device),
        )

    def moved(self) -> Tensor:
        """Square of the largest distance [Å²] that an atom moved since the build, a scalar.

        Infinite before the first build, and if a position is not a number.
        """
        return largest_move(self.rows.positions, self._positions)

    def holds(self, moved: float) -> bool:
        """Whether the list is still complete, given what `moved` says."""
        return moved <= (0.5 * self.skin) ** 2

    def fill(self) -> None:
        """Find the neighbors where the atoms are now. Waits for nothing; can be captured."""
        rows = self.rows
        neighbor_rows_(
            rows.positions, rows.cell, self.pbc, rows.system, self.first,
            self.cutoff + self.skin, self.binned, rows.neighbors, rows.images, rows.reverse,
            rows.counts,
        )  # fmt: skip
        self._positions.copy_(rows.positions)

    def make_room(self) -> bool:
        """After `fill`: get longer rows, if these were too short. Waits for the device.

        Returns
        -------
        bool
            Whether `rows` are other tensors now, which have to be filled.

        Raises
        ------
        NeighborOverflow
            If they are too short and the capacity is fixed, or there cannot be so many.
        """
        self.n_builds += 1
        most = int(self.rows.counts.max()) if self.rows.counts.numel() else 0
        if most <= self.capacity:
            return False
        self._positions.fill_(math.inf)  # what is in the rows is of no use
        if self.fixed:
            check_counts(self.rows.counts, self.capacity)
        old = self.rows
        self._allocate(_rounded(most))
        self.rows.positions.copy_(old.positions)
        self.rows.cell.copy_(old.cell)
        return True

    def build(self) -> None:
        """Find the neighbors, with as much room as they need. Waits for the device."""
        self.fill()
        if self.make_room():
            self.fill()


def _rounded(expected: float) -> int:
    """A quarter more, and a multiple of 16."""
    return max(16, 16 * math.ceil(1.25 * expected / 16))


def check_volume(cell: Tensor, periodic: Tensor) -> None:
    """Refuse a box of ``(3, 3)`` whose periodic vectors span nothing. Both on the CPU."""
    vectors = cell[periodic]
    if vectors.shape[0] and not float(torch.linalg.svdvals(vectors).prod()) > 1e-6:
        raise ValueError(f"the periodic box of system 0 has no volume: box vectors {cell.tolist()}")
