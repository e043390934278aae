"""`torch.ops.mlffd.edge_geometry` and `edge_forces`: from positions to edges, and back."""

from typing import Any

import torch
from torch import Tensor

from openmm_mlffd.kernels import edge_kernels as kernels
from openmm_mlffd.kernels.launch import launch
from openmm_mlffd.kernels.library import define, require

_CUDA_LANES = 32
_RANGE = 1024  # atoms that a group of lanes sums up


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
) -> tuple[Tensor, Tensor, Tensor]:
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
    by_slot
        Zeros where there are neighbors, of the same shape: for `message_backward_`.
    crowded
        Energy of crowding of each atom [eV] and its derivative by the coordination [eV], shape
        ``(n_atoms, 2)``, float64.
    """
    real = torch.float64 if double else torch.float32
    (n_atoms, capacity), device = neighbors.shape, positions.device
    _check(positions, cell, system, species, pairs, neighbors, images, counts)
    require("limits", limits, torch.float64, (pairs.shape[0],), device)
    geometry = torch.empty((n_atoms, capacity, 4), dtype=real, device=device)
    by_slot = torch.empty_like(geometry)
    crowded = torch.empty((n_atoms, 2), dtype=torch.float64, device=device)
    launch(
        kernels.geometry_kernel(real), n_atoms * _lanes(device), device, capacity, pairs.shape[0],
        cutoff, softening, shortest, per_interval, strength, softness, positions, cell, system,
        species, pairs, limits, neighbors, images, counts, geometry, by_slot, crowded,
    )  # fmt: skip
    return geometry, by_slot, crowded


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
    learned: Tensor,
    references: Tensor,
    cutoff: float,
    softening: float,
    per_interval: float,
    with_virial: bool,
) -> tuple[Tensor, Tensor]:
    """Forces from the gradients of the edges, and repulsion and crowding with their forces.

    Parameters
    ----------
    positions, cell, system, species, pairs, neighbors, images, reverse, counts
        As of `edge_geometry`.
    by_slot
        As `message_backward_` leaves it.
    crowded
        As `edge_geometry` leaves it.
    learned
        Energy of each atom [eV], shape ``(n_atoms,)``, float64.
    references
        Added to it, of each element [eV], shape ``(n_elements,)``, float64.
    cutoff, softening, per_interval
        As of `edge_geometry`.
    with_virial
        Whether the virial is wanted.

    Returns
    -------
    forces
        On each atom [eV/Å], shape ``(n_atoms, 3)``, float64.
    terms
        Of each atom: energy [eV], with half the repulsion of its pairs and its crowding, and with
        ``with_virial`` its part of the virial [eV] xx yy zz yz xz xy; shape
        ``(1 or 7, n_atoms)``, float64.
    """
    (n_atoms, capacity), device = neighbors.shape, positions.device
    _check(positions, cell, system, species, pairs, neighbors, images, counts)
    require("reverse", reverse, torch.int32, (n_atoms, capacity), device)
    require("by_slot", by_slot, by_slot.dtype, (n_atoms, capacity, 4), device)
    require("crowded", crowded, torch.float64, (n_atoms, 2), device)
    require("learned", learned, torch.float64, (n_atoms,), device)
    require("references", references, torch.float64, (pairs.shape[0],), device)
    forces = torch.empty((n_atoms, 3), dtype=torch.float64, device=device)
    terms = forces.new_empty((7 if with_virial else 1, n_atoms))
    launch(
        kernels.forces_kernel(by_slot.dtype), n_atoms * _lanes(device), device, n_atoms, capacity,
        pairs.shape[0], int(with_virial), cutoff, softening, per_interval, positions, cell,
        system, species, pairs, neighbors, images, reverse, counts, by_slot, crowded, learned,
        references, forces, terms,
    )  # fmt: skip
    return forces, terms


def system_sums(terms: Tensor, system: Tensor, n_systems: int) -> tuple[Tensor, Tensor]:
    """Energy and virial of each system, always summed in the same order.

    Parameters
    ----------
    terms
        Of the atoms, as `edge_forces` gives them.
    system
        Of each atom, ascending, shape ``(n_atoms,)``, int32.
    n_systems
        Number of systems.

    Returns
    -------
    energy
        Shape ``(n_systems,)``.
    virial
        Shape ``(n_systems, 3, 3)``; zeros if the terms have none.
    """
    (n_terms, n_atoms), device = terms.shape, terms.device
    require("terms", terms, torch.float64, (7 if n_terms > 1 else 1, n_atoms), device)
    require("system", system, torch.int32, (n_atoms,), device)
    energy = terms.new_empty(n_systems)
    virial = terms.new_empty((n_systems, 3, 3))
    lanes, several = _lanes(device), n_systems > 1
    if not several and n_atoms > 2 * _RANGE:
        n_ranges = -(-n_atoms // _RANGE)
        partial = terms.new_empty((n_terms, n_ranges))
        launch(
            kernels.sum_terms, n_ranges * n_terms * lanes, device, n_atoms, n_terms, n_ranges,
            _RANGE, terms, 0, partial, 0,
        )  # fmt: skip
        terms, n_atoms = partial, n_ranges
    launch(
        kernels.sum_terms, n_systems * n_terms * lanes, device, n_atoms, n_terms, n_systems, 0,
        terms, system if several else 0, energy, virial,
    )  # fmt: skip
    return energy, virial


def largest_move(positions: Tensor, since: Tensor) -> Tensor:
    """Square of the largest distance of an atom from where it was, a float64 scalar.

    Infinite if one is not a number. Both ``(n_atoms, 3)``, float64.
    """
    n, device = positions.shape[0], positions.device
    require("positions", positions, torch.float64, (n, 3), device)
    require("since", since, torch.float64, (n, 3), device)
    n_threads = 1 if device.type == "cpu" else 32 * -(-n // (4 * 32))
    largest = positions.new_zeros(())
    if n > 0:
        launch(kernels.largest_move, n_threads, device, n, n_threads, positions, since, largest)
    return largest


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


def _fake_geometry(
    positions: Tensor,
    cell: Tensor,
    system: Tensor,
    species: Tensor,
    pairs: Tensor,
    limits: Tensor,
    neighbors: Tensor,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    real = torch.float64 if arguments[-1] else torch.float32
    geometry = positions.new_empty((*neighbors.shape, 4), dtype=real)
    return geometry, torch.empty_like(geometry), positions.new_empty((positions.shape[0], 2))


def _fake_forces(positions: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    n_terms = 7 if arguments[-1] else 1
    return torch.empty_like(positions), positions.new_empty((n_terms, positions.shape[0]))


def _fake_sums(terms: Tensor, system: Tensor, n_systems: int) -> tuple[Tensor, Tensor]:
    return terms.new_empty(n_systems), terms.new_empty((n_systems, 3, 3))


define(
    f"edge_geometry({_ATOMS}Tensor limits, Tensor neighbors, Tensor images, Tensor counts, "
    "float cutoff, float softening, float shortest, float per_interval, float strength, "
    "float softness, bool double) -> (Tensor, Tensor, Tensor)",
    edge_geometry,
    _fake_geometry,
)
define(
    f"edge_forces({_ATOMS}Tensor neighbors, Tensor images, Tensor reverse, Tensor counts, "
    "Tensor by_slot, Tensor crowded, Tensor learned, Tensor references, float cutoff, "
    "float softening, float per_interval, bool with_virial) -> (Tensor, Tensor)",
    edge_forces,
    _fake_forces,
)
define(
    "system_sums(Tensor terms, Tensor system, int n_systems) -> (Tensor, Tensor)",
    system_sums,
    _fake_sums,
)
define(
    "largest_move(Tensor positions, Tensor since) -> Tensor",
    largest_move,
    lambda positions, since: positions.new_empty(()),
)
