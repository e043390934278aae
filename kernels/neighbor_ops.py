"""The operator `torch.ops.mlffd.neighbor_rows`: a padded row of neighbors for each atom."""

import torch
from torch import Tensor

from openmm_mlffd.kernels import neighbor_kernels as kernels
from openmm_mlffd.kernels.launch import launch
from openmm_mlffd.kernels.library import define, require

_CUDA_LANES = 32
_AT_ONCE = 8192  # atoms whose rows are filled by one launch, which needs as many rows of room


class NeighborOverflow(RuntimeError):
    """Atoms have more neighbors than there is room for in a neighbor list."""


def neighbor_rows(
    positions: Tensor,
    cell: Tensor,
    pbc: Tensor,
    system: Tensor,
    first: Tensor,
    width: float,
    capacity: int,
    binned: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Everything closer to each atom than a width, periodic images included.

    The same pairs as of `reference.neighbor_list`, in rows of fixed length.

    Parameters
    ----------
    positions
        Atom positions [Å], finite, inside the box or not, shape ``(n_atoms, 3)``, float64.
    cell
        Box vectors as rows [Å], zero where not periodic, shape ``(n_systems, 3, 3)``, float64.
    pbc
        Whether each box vector is periodic, shape ``(n_systems, 3)``, bool.
    system
        Which system each atom belongs to, ascending, shape ``(n_atoms,)``, int32.
    first
        First atom of each system, then n_atoms, shape ``(n_systems + 1,)``, int32.
    width
        Largest distance [Å], cutoff and skin.
    capacity
        Length of the rows.
    binned
        Sort the atoms into bins first. Without, each is compared with all of its system, which
        is faster for small ones.

    Returns
    -------
    neighbors
        Sender of each edge, sorted, shape ``(n_atoms, capacity)``, int32.
    images
        Image of the sender, packed (see `unpack_images`), shape ``(n_atoms, capacity)``, int64.
    reverse
        Slot of the edge in the other direction in the sender's row, or -1 for empty slots and
        where the other row was too short, shape ``(n_atoms, capacity)``, int32.
    counts
        Number of neighbors, shape ``(n_atoms,)``, int32. Larger than the capacity: the row holds
        only some of them. Callers check.

    Notes
    -----
    Nothing waits for the device. That periodic boxes have a volume is not checked: rows of others
    are unusable.
    """
    shape, device = (positions.shape[0], capacity), positions.device
    neighbors = torch.empty(shape, dtype=torch.int32, device=device)
    images = torch.empty(shape, dtype=torch.int64, device=device)
    reverse = torch.empty_like(neighbors)
    counts = neighbors.new_empty(shape[0])
    neighbor_rows_(
        positions, cell, pbc, system, first, width, binned, neighbors, images, reverse, counts
    )
    return neighbors, images, reverse, counts


def neighbor_rows_(
    positions: Tensor,
    cell: Tensor,
    pbc: Tensor,
    system: Tensor,
    first: Tensor,
    width: float,
    binned: bool,
    neighbors: Tensor,
    images: Tensor,
    reverse: Tensor,
    counts: Tensor,
) -> None:
    """`neighbor_rows`, written to rows that are given."""
    (n_atoms, capacity), device = neighbors.shape, positions.device
    _check(positions, cell, pbc, system, first)
    for name, tensor in (("neighbors", neighbors), ("reverse", reverse)):
        require(name, tensor, torch.int32, (n_atoms, capacity), device)
    require("images", images, torch.int64, (n_atoms, capacity), device)
    require("counts", counts, torch.int32, (n_atoms,), device)
    wraps, grid, bins, order, starts = _bins(positions, cell, pbc, system, first, width, binned)
    lanes, n_at_once = (1 if device.type == "cpu" else _CUDA_LANES), min(n_atoms, _AT_ONCE)
    queue = torch.empty((n_at_once, capacity), dtype=torch.int32, device=device)
    queued_images = torch.empty((n_at_once, capacity), dtype=torch.int64, device=device)
    for start in range(0, n_atoms, _AT_ONCE):
        n_threads = min(_AT_ONCE, n_atoms - start) * lanes
        launch(
            kernels.fill_rows, n_threads, device, start, capacity, width, positions, cell, pbc,
            system, wraps, grid, bins, order, starts, queue, queued_images, neighbors, images,
            counts,
        )  # fmt: skip
    launch(
        kernels.find_reverse, n_atoms * capacity, device, capacity, neighbors, images, counts,
        reverse,
    )  # fmt: skip


def _bins(
    positions: Tensor,
    cell: Tensor,
    pbc: Tensor,
    system: Tensor,
    first: Tensor,
    width: float,
    binned: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Wraps, grids, bins of the atoms, atoms by bin, and where in that order each bin starts."""
    n_atoms, n_systems, device = positions.shape[0], cell.shape[0], positions.device

    def empty(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    inverse, heights = empty(n_systems, 3, 3), empty(n_systems, 3)
    launch(kernels.complete_boxes, n_systems, device, cell, pbc, inverse, heights)
    wraps, fractions = empty(n_atoms, 3, dtype=torch.int32), empty(n_atoms, 3)
    launch(kernels.wrap_atoms, n_atoms, device, positions, system, pbc, inverse, wraps, fractions)
    if binned:
        low, high = _extent(fractions, system, n_systems)
    else:
        low, high = empty(n_systems, 3), empty(n_systems, 3)  # not read, but written
    grid = empty(n_systems, 7, dtype=torch.int32)
    launch(
        kernels.lay_grids, n_systems, device, int(binned), width, pbc, heights, first, low, high,
        grid,
    )  # fmt: skip
    bins = empty(n_atoms, dtype=torch.int32)
    launch(kernels.find_bins, n_atoms, device, system, fractions, low, high, grid, bins)
    numbers = torch.arange(n_atoms + n_systems + 1, dtype=torch.int32, device=device)
    if binned:
        by_bin, order = torch.sort(bins, stable=True)
    else:  # a bin for each system, and atoms are sorted by system
        by_bin, order = bins, numbers[:n_atoms]
    starts = torch.searchsorted(by_bin, numbers, out_int32=True)
    return wraps, grid, bins, order.to(torch.int32), starts


def unpack_images(images: Tensor) -> Tensor:
    """Images in units of the box vectors, shape ``(..., 3)``, int64, from packed ones."""
    parts = [(images >> bits) & 0x1FFFFF for bits in (0, 21, 42)]
    return torch.stack(parts, dim=-1) - 0x100000


def check_counts(counts: Tensor, capacity: int) -> None:
    """Raise `NeighborOverflow` if a row was too short. Waits for the device."""
    most = int(counts.max()) if counts.numel() else 0
    if most > capacity:
        raise NeighborOverflow(
            f"atom {int(counts.argmax())} has {most} neighbors and the list has room for "
            f"{capacity}: the structure is far denser than it was, or its positions are broken"
        )


def _extent(fractions: Tensor, system: Tensor, n_systems: int) -> tuple[Tensor, Tensor]:
    """Lowest and highest fractional coordinates of each system."""
    if n_systems == 1 and fractions.shape[0]:
        return fractions.amin(0, keepdim=True), fractions.amax(0, keepdim=True)
    zeros = fractions.new_zeros((n_systems, 3))
    index = system.to(torch.int64)[:, None].expand(-1, 3)
    return (
        zeros.scatter_reduce(0, index, fractions, "amin", include_self=False),
        zeros.scatter_reduce(0, index, fractions, "amax", include_self=False),
    )


def _check(positions: Tensor, cell: Tensor, pbc: Tensor, system: Tensor, first: Tensor) -> None:
    n_atoms, n_systems, device = positions.shape[0], cell.shape[0], positions.device
    require("positions", positions, torch.float64, (n_atoms, 3), device)
    require("cell", cell, torch.float64, (n_systems, 3, 3), device)
    require("pbc", pbc, torch.bool, (n_systems, 3), device)
    require("system", system, torch.int32, (n_atoms,), device)
    require("first", first, torch.int32, (n_systems + 1,), device)


def _fake(
    positions: Tensor,
    cell: Tensor,
    pbc: Tensor,
    system: Tensor,
    first: Tensor,
    width: float,
    capacity: int,
    binned: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n_atoms = positions.shape[0]
    rows = positions.new_empty((n_atoms, capacity), dtype=torch.int32)
    return (
        rows,
        rows.new_empty((n_atoms, capacity), dtype=torch.int64),
        torch.empty_like(rows),
        rows.new_empty((n_atoms,)),
    )


define(
    "neighbor_rows(Tensor positions, Tensor cell, Tensor pbc, Tensor system, Tensor first, "
    "float width, int capacity, bool binned) -> (Tensor, Tensor, Tensor, Tensor)",
    neighbor_rows,
    _fake,
)
define(
    "neighbor_rows_(Tensor positions, Tensor cell, Tensor pbc, Tensor system, Tensor first, "
    "float width, bool binned, Tensor(a!) neighbors, Tensor(b!) images, Tensor(c!) reverse, "
    "Tensor(d!) counts) -> ()",
    neighbor_rows_,
    lambda *_: None,
)
