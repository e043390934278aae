"""`torch.ops.mlffd.edge_geometry` and `edge_forces`: from positions to edges, and back."""

import torch
from torch import Tensor

from openmm_mlffd.kernels import edge_kernels as kernels
from openmm_mlffd.kernels.launch import launch
from openmm_mlffd.kernels.library import define, require

_CUDA_LANES = 32


def edge_geometry(
    positions: Tensor,
    cell: Tensor,
    system: Tensor,
    species: Tensor,
    pairs: Tensor,
    limits: Tensor,
    neighbors: Tensor,
    images: Tensor,
    counts: Tensor,
    cutoff: float,
    softening: float,
    shortest: float,
    per_interval: float,
    strength: float,
    softness: float,
    double: bool,
) -> tuple[Tensor, Tensor]:
    """Direction of each edge, its distance in intervals of the filters' table, and crowding.

    Parameters
    ----------
    positions
        Atom positions [Å], shape ``(n_atoms, 3)``, float64.
    cell
        Box vectors as rows [Å], zero where not periodic, shape ``(n_systems, 3, 3)``, float64.
    system, species
        Of each atom, shape ``(n_atoms,)``, int32.
    pairs
        Of two elements: core [Å], reach of the repulsion [Å], inverse of its screening length
        [1/Å], strength [eV Å], length of a bond [Å], distance [Å] where they are free of one
        another; shape ``(n_elements, n_elements, 6)``, float64.
    limits
        Coordination of each element beyond which neighbors repel, shape ``(n_elements,)``,
        float64.
    neighbors, images, counts
        See `neighbor_rows`.
    cutoff, softening
        Of the network [Å].
    shortest
        Distance [Å] of the table's first knot.
    per_interval
        Intervals of the table per Å.
    strength, softness
        Of crowding [eV], in neighbors; see `openmm_mlffd.crowding`.
    double
        Whether the result is float64, else float32. The arithmetic is float64.

    Returns
    -------
    geometry
        Shape ``(n_atoms, capacity, 4)``; the last number is negative beyond the cutoff.
    crowded
        Energy of crowding of each atom [eV] and its derivative by the coordination [eV], shape
        ``(n_atoms, 2)``, float64.
    """
    real = torch.float64 if double else torch.float32
    (n_atoms, capacity), device = neighbors.shape, positions.device
    _check(positions, cell, system, species, pairs, neighbors, images, counts)
    require("limits", limits, torch.float64, (pairs.shape[0],), device)
    geometry = torch.empty((n_atoms, capacity, 4), dtype=real, device=device)
    crowded = torch.empty((n_atoms, 2), dtype=torch.float64, device=device)
    launch(
        kernels.geometry_kernel(real), n_atoms * _lanes(device), device, capacity, pairs.shape[0],
        cutoff, softening, shortest, per_interval, strength, softness, positions, cell, system,
        species, pairs, limits, neighbors, images, counts, geometry, crowded,
    )  # fmt: skip
    return geometry, crowded


def edge_forces(
    positions: Tensor,
    cell: Tensor,
    system: Tensor,
    species: Tensor,
    pairs: Tensor,
    neighbors: Tensor,
    images: Tensor,
    reverse: Tensor,
    counts: Tensor,
    by_slot: Tensor,
    crowded: Tensor,
    cutoff: float,
    softening: float,
    per_interval: float,
    with_virial: bool,
) -> Tensor:
    """Forces from the gradients of the edges, and repulsion and crowding with their forces.

    Arguments as of `edge_geometry`; ``by_slot`` as `message_backward_` leaves it.

    Returns
    -------
    Tensor
        For each atom: force [eV/Å], half the repulsion of its pairs plus its crowding [eV], and
        its part of the virial [eV] xx yy zz yz xz xy (zeros without ``with_virial``), shape
        ``(n_atoms, 10)``, float64.
    """
    (n_atoms, capacity), device = neighbors.shape, positions.device
    _check(positions, cell, system, species, pairs, neighbors, images, counts)
    require("reverse", reverse, torch.int32, (n_atoms, capacity), device)
    require("by_slot", by_slot, by_slot.dtype, (n_atoms, capacity, 4), device)
    require("crowded", crowded, torch.float64, (n_atoms, 2), device)
    totals = torch.empty((n_atoms, 10), dtype=torch.float64, device=device)
    launch(
        kernels.forces_kernel(by_slot.dtype), n_atoms * _lanes(device), device, capacity,
        pairs.shape[0], int(with_virial), cutoff, softening, per_interval, positions, cell,
        system, species, pairs, neighbors, images, reverse, counts, by_slot,
        crowded, totals,
    )  # fmt: skip
    return totals


def _lanes(device: torch.device) -> int:
    return 1 if device.type == "cpu" else _CUDA_LANES


def _check(
    positions: Tensor,
    cell: Tensor,
    system: Tensor,
    species: Tensor,
    pairs: Tensor,
    neighbors: Tensor,
    images: Tensor,
    counts: Tensor,
) -> None:
    (n_atoms, capacity), device = neighbors.shape, positions.device
    n_elements = pairs.shape[0]
    require("positions", positions, torch.float64, (n_atoms, 3), device)
    require("cell", cell, torch.float64, (cell.shape[0], 3, 3), device)
    require("system", system, torch.int32, (n_atoms,), device)
    require("species", species, torch.int32, (n_atoms,), device)
    require("pairs", pairs, torch.float64, (n_elements, n_elements, 6), device)
    require("neighbors", neighbors, torch.int32, (n_atoms, capacity), device)
    require("images", images, torch.int64, (n_atoms, capacity), device)
    require("counts", counts, torch.int32, (n_atoms,), device)


_ATOMS = "Tensor positions, Tensor cell, Tensor system, Tensor species, Tensor pairs, "
define(
    f"edge_geometry({_ATOMS}Tensor limits, Tensor neighbors, Tensor images, Tensor counts, "
    "float cutoff, float softening, float shortest, float per_interval, float strength, "
    "float softness, bool double) -> (Tensor, Tensor)",
    edge_geometry,
    lambda positions, cell, system, species, pairs, limits, neighbors, images, counts, cutoff,
    softening, shortest, per_interval, strength, softness, double: (
        positions.new_empty(
            (*neighbors.shape, 4), dtype=torch.float64 if double else torch.float32
        ),
        positions.new_empty((positions.shape[0], 2)),
    ),
)  # fmt: skip
define(
    f"edge_forces({_ATOMS}Tensor neighbors, Tensor images, Tensor reverse, Tensor counts, "
    "Tensor by_slot, Tensor crowded, float cutoff, float softening, float per_interval, "
    "bool with_virial) -> Tensor",
    edge_forces,
    lambda positions, *_: positions.new_empty((positions.shape[0], 10)),
)
