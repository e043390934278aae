"""`torch.ops.mlffd.message` and its derivatives: PaiNN's messages with tabulated filters."""

from typing import Any

import torch
from torch import Tensor

from openmm_mlffd.kernels import message_kernels as kernels
from openmm_mlffd.kernels import reference
from openmm_mlffd.kernels.launch import launch
from openmm_mlffd.kernels.library import LIBRARY, define, require


def message(
    features: Tensor,
    rows: Tensor,
    table: Tensor,
    geometry: Tensor,
    neighbors: Tensor,
    reverse: Tensor,
    counts: Tensor,
    degree: int,
    n_parts: int = 1,
) -> Tensor:
    """Filter the neighbors' features by tabulated filters and sum them on each atom.

    Arguments and result as of `reference.message`. ``features`` and ``table`` may be float16,
    where ``geometry`` and the sums are float32. Both directions of an edge must be in the rows,
    with opposite vectors: backward, one is read for the other. On CUDA up to ``n_parts`` groups
    of lanes share a row: for small systems on large GPUs.

    Differentiable to any order in ``features``, ``table`` and ``geometry``; the first derivatives
    by features and geometry are kernels, what is beyond is computed by the reference.
    Deterministic.
    """
    n_atoms, n_channels = neighbors.shape[0], features.shape[2]
    sums = geometry.new_empty((n_atoms, 4, n_channels))
    _forward(
        features, rows, table, geometry, neighbors, counts, degree, n_parts, None, 0,
        (sums, 4 * n_channels), (sums.flatten()[n_channels:], 4 * n_channels),
    )  # fmt: skip
    return sums


def message_(
    features: Tensor,
    rows: Tensor,
    table: Tensor,
    geometry: Tensor,
    neighbors: Tensor,
    counts: Tensor,
    embedding: Tensor,
    scalars: Tensor,
    vectors: Tensor,
    degree: int,
    n_parts: int = 1,
) -> None:
    """`message`, added to the state of the atoms.

    Where features are float16 the state is rounded to as many bits, for `product_`.

    Parameters
    ----------
    features, rows, table, geometry, neighbors, counts, degree, n_parts
        As of `message`.
    embedding
        Of the first block, scalars of each element, ``(n_rows, n_channels)``: the state is
        written, not added to.
    scalars
        Of the atoms, the first columns of ``(n_atoms, 2 n_channels)``.
    vectors
        Of the atoms, ``(n_atoms, 3, n_channels)``.
    """
    n_atoms, c, device = neighbors.shape[0], features.shape[2], geometry.device
    first, rounded = features.shape[1] == 2, features.dtype == torch.float16
    if first:
        require("embedding", embedding, geometry.dtype, (features.shape[0], c), device)
    require("scalars", scalars, geometry.dtype, (n_atoms, 2 * c), device)
    require("vectors", vectors, geometry.dtype, (n_atoms, 3, c), device)
    _forward(
        features, rows, table, geometry, neighbors, counts, degree, n_parts,
        embedding if first else None, (0 if first else 1) + (2 if rounded else 0),
        (scalars, 2 * c), (vectors, 3 * c),
    )  # fmt: skip


def _forward(
    features: Tensor,
    rows: Tensor,
    table: Tensor,
    geometry: Tensor,
    neighbors: Tensor,
    counts: Tensor,
    degree: int,
    n_parts: int,
    embedding: Tensor | None,
    mode: int,
    scalars: tuple[Tensor, int],
    vectors: tuple[Tensor, int],
) -> None:
    """Launch; scalars and vectors each with the distance from one atom's to the next one's."""
    variant = _variant(features, table, geometry, degree)
    n_atoms, capacity = _check(features, rows, table, geometry, neighbors, counts)
    lanes, n_parts = _shares(variant, geometry, n_parts)
    launch(
        kernels.forward_kernel(variant, _split(variant, n_parts)),
        n_atoms * n_parts * lanes, geometry.device,
        capacity, table.shape[0] - degree, n_parts, mode, scalars[1], vectors[1], features, rows,
        table, geometry, neighbors, counts, 0 if embedding is None else embedding,
        scalars[0], vectors[0],
    )  # fmt: skip


def message_backward_(
    by_scalars: Tensor,
    by_vectors: Tensor,
    features: Tensor,
    rows: Tensor,
    table: Tensor,
    geometry: Tensor,
    neighbors: Tensor,
    counts: Tensor,
    by_slot: Tensor,
    by_features: Tensor,
    degree: int,
    n_parts: int = 1,
) -> None:
    """Gradients of Σ gradient · message by features, and by geometry in the senders' slots.

    Parameters
    ----------
    by_scalars, by_vectors
        Gradient by the sums of all atoms, shapes ``(n_all, n_channels)`` and
        ``(n_all, 3, n_channels)``, with the dtype of ``features``.
    features, rows, table, geometry, neighbors, counts, degree, n_parts
        As of `message`, of all atoms or of some: neighbors are counted among all of them.
    by_slot
        To this is added, in the slot (i, s) of a neighbor j, the gradient by direction and
        distance of the edge from i to j, which points along -u; shape
        ``(n_atoms, capacity, 4)``, with the dtype of ``geometry``.
    by_features
        For the gradient by each atom's features, ``(n_atoms, 2 or 5, n_channels)``, with the
        dtype of ``geometry``; no atoms if not wanted.
    """
    variant = _variant(features, table, geometry, degree)
    n_atoms, capacity = _check(features, rows, table, geometry, neighbors, counts)
    device, c = geometry.device, variant.n_channels
    n_all = by_scalars.shape[0]
    require("by_scalars", by_scalars, features.dtype, (n_all, c), device)
    require("by_vectors", by_vectors, features.dtype, (n_all, 3, c), device)
    require("by_slot", by_slot, variant.real, (n_atoms, capacity, 4), device)
    wanted = by_features.shape[0] > 0
    shape = (n_atoms if wanted else 0, features.shape[1], c)
    require("by_features", by_features, variant.real, shape, device)
    lanes, n_parts = _shares(variant, geometry, n_parts)
    launch(
        kernels.backward_kernel(variant, wanted, _split(variant, n_parts) if wanted else 0),
        n_atoms * n_parts * lanes, device, capacity, table.shape[0] - degree, n_parts, by_scalars,
        by_vectors, features, rows, table, geometry, neighbors, counts, by_features, by_slot,
    )  # fmt: skip


def message_backward(
    gradient: Tensor,
    features: Tensor,
    rows: Tensor,
    table: Tensor,
    geometry: Tensor,
    neighbors: Tensor,
    reverse: Tensor,
    counts: Tensor,
    degree: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of Σ gradient · message by features, table and geometry, as tensors of their own.

    The gradient by the table is computed by the reference.
    """
    by_slot = torch.zeros_like(geometry)
    by_rows = geometry.new_empty((len(counts), *features.shape[1:]))
    gradient = gradient.to(features.dtype)
    message_backward_(
        gradient[:, 0].contiguous(), gradient[:, 1:].contiguous(), features, rows, table, geometry,
        neighbors, counts, by_slot, by_rows, degree,
    )  # fmt: skip
    by_features = by_rows.to(features.dtype)
    if features.shape[1] == 2:
        by_features = torch.zeros_like(features).index_add(0, rows, by_features)
    there = (reverse >= 0) & (geometry[:, :, 3] >= 0)
    flat = neighbors.long() * neighbors.shape[1] + reverse.long()
    by_geometry = by_slot.flatten(0, 1)[torch.where(there, flat, 0)]
    by_geometry = torch.where(there[:, :, None], by_geometry, 0.0)
    by_table = reference.message_table_gradient(
        gradient, features, rows, table, geometry, neighbors, counts, degree
    )
    return by_features, by_table, by_geometry


def _variant(features: Tensor, table: Tensor, geometry: Tensor, degree: int) -> kernels.Variant:
    real, stored = geometry.dtype, features.dtype
    if (real, stored) not in (
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.float32, torch.float16),
    ):
        raise TypeError(
            f"features of {stored} with a geometry of {real} are not supported: both float32 or "
            "float64, or float16 with float32"
        )
    if degree not in (3, 5, 7) or table.shape[0] <= degree:
        raise ValueError(f"a spline of degree 3, 5 or 7 with an interval is needed, got {degree}")
    return kernels.Variant(features.shape[2], features.shape[1] == 2, degree, real, stored)


def _shares(variant: kernels.Variant, tensor: Tensor, n_parts: int) -> tuple[int, int]:
    """Lanes of a group, and groups of a row: a power of two."""
    if tensor.device.type == "cpu":
        return 1, 1
    n_parts = max(1, min(n_parts, variant.most_parts))
    return variant.lanes, 1 << (n_parts.bit_length() - 1)


def _split(variant: kernels.Variant, n_parts: int) -> int:
    return variant.split_block(n_parts) if n_parts > 1 else 0


def _check(
    features: Tensor,
    rows: Tensor,
    table: Tensor,
    geometry: Tensor,
    neighbors: Tensor,
    counts: Tensor,
) -> tuple[int, int]:
    (n_atoms, capacity), device = neighbors.shape, geometry.device
    n_features, n_channels = features.shape[1:]
    if n_features not in (2, 5):
        raise ValueError(f"features must have 2 or 5 parts, got the shape {tuple(features.shape)}")
    n_rows = features.shape[0] if n_features == 2 else n_atoms
    require("features", features, features.dtype, (n_rows, n_features, n_channels), device)
    n_filters = 2 if n_features == 2 else 3
    require("table", table, features.dtype, (table.shape[0], n_filters, n_channels), device)
    require("geometry", geometry, geometry.dtype, (n_atoms, capacity, 4), device)
    require("neighbors", neighbors, torch.int32, (n_atoms, capacity), device)
    require("counts", counts, torch.int32, (n_atoms,), device)
    require("rows", rows, torch.int32, (n_atoms,), device)
    return n_atoms, capacity


def _fake_message(
    features: Tensor,
    rows: Tensor,
    table: Tensor,
    geometry: Tensor,
    neighbors: Tensor,
    reverse: Tensor,
    counts: Tensor,
    degree: int,
    n_parts: int = 1,
) -> Tensor:
    return geometry.new_empty((neighbors.shape[0], 4, features.shape[2]))


def _fake_nothing(*arguments: Any) -> None:
    """Operators that write to what they are given."""


def _fake_backward(gradient: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    features, _, table, geometry = arguments[:4]
    return torch.empty_like(features), torch.empty_like(table), torch.empty_like(geometry)


_INPUTS = "Tensor features, Tensor rows, Tensor table, Tensor geometry, Tensor neighbors, "
define(
    f"message({_INPUTS}Tensor reverse, Tensor counts, int degree, int n_parts=1) -> Tensor",
    message,
    _fake_message,
)
define(
    f"message_({_INPUTS}Tensor counts, Tensor embedding, Tensor(a!) scalars, Tensor(b!) vectors, "
    "int degree, int n_parts=1) -> ()",
    message_,
    _fake_nothing,
)
define(
    f"message_backward_(Tensor by_scalars, Tensor by_vectors, {_INPUTS}Tensor counts, "
    "Tensor(a!) by_slot, Tensor(b!) by_features, int degree, int n_parts=1) -> ()",
    message_backward_,
    _fake_nothing,
)
define(
    f"message_backward(Tensor gradient, {_INPUTS}Tensor reverse, Tensor counts, int degree) "
    "-> (Tensor, Tensor, Tensor)",
    message_backward,
    _fake_backward,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.degree = inputs[7]


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    by_features, by_table, by_geometry = torch.ops.mlffd.message_backward(
        gradient, *ctx.saved_tensors, ctx.degree
    )
    return by_features, None, by_table, by_geometry, None, None, None, None, None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.degree = inputs[8]


def _differentiate_backward(ctx: Any, *by: Tensor) -> tuple[Any, ...]:
    """Second derivatives, by the reference."""
    gradient, features, rows, table, geometry, neighbors, _, counts = ctx.saved_tensors
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (gradient, features, table, geometry)]
        sums = reference.message(
            leaves[1], rows, leaves[2], leaves[3], neighbors, counts, ctx.degree
        )
        first = torch.autograd.grad(
            sums, leaves[1:], leaves[0].to(sums.dtype), create_graph=True, materialize_grads=True
        )
        second = torch.autograd.grad(first, leaves, by, allow_unused=True, materialize_grads=True)
    return second[0], second[1], None, second[2], second[3], None, None, None, None


torch.library.register_autograd("mlffd::message", _differentiate, setup_context=_save, lib=LIBRARY)
torch.library.register_autograd(
    "mlffd::message_backward", _differentiate_backward, setup_context=_save_backward, lib=LIBRARY
)
