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
    with opposite vectors: backward, one is read for the other. Each of ``n_parts`` groups of lanes
    takes a part of a row: for small systems on large GPUs.

    Differentiable to any order in ``features``, ``table`` and ``geometry``; the first derivatives
    by features and geometry are kernels, what is beyond is computed by the reference.
    Deterministic.
    """
    variant = _variant(features, table, geometry, degree)
    n_atoms, capacity = _check(features, rows, table, geometry, neighbors, counts)
    sums = torch.empty(
        (n_parts, n_atoms, 4, variant.n_channels), dtype=variant.real, device=geometry.device
    )
    launch(
        kernels.forward_kernel(variant), n_parts * n_atoms * _lanes(variant, geometry),
        geometry.device, n_atoms, capacity, table.shape[0] - degree, n_parts, features, rows,
        table, geometry, neighbors, counts, sums,
    )  # fmt: skip
    return sums[0] if n_parts == 1 else sums.sum(0)


def message_backward_(
    gradient: Tensor,
    features: Tensor,
    rows: Tensor,
    table: Tensor,
    geometry: Tensor,
    neighbors: Tensor,
    counts: Tensor,
    by_slot: Tensor,
    degree: int,
    with_features: bool = True,
    n_parts: int = 1,
) -> Tensor:
    """Gradients of Σ gradient · message by features, and by geometry in the senders' slots.

    Parameters
    ----------
    gradient
        By the sums, shape ``(n_atoms, 4, n_channels)``, with the dtype of ``features``.
    features, rows, table, geometry, neighbors, counts, degree, n_parts
        As of `message`.
    by_slot
        To this is added, in the slot (i, s) of a neighbor j, the gradient by direction and
        distance of the edge from i to j, which points along -u; shape
        ``(n_atoms, capacity, 4)``, with the dtype of ``geometry``.
    with_features
        Whether the gradient by the features is wanted.

    Returns
    -------
    Tensor
        Gradient by each atom's features, ``(n_atoms, 2 or 5, n_channels)``; empty if not wanted.
    """
    variant = _variant(features, table, geometry, degree)
    n_atoms, capacity = _check(features, rows, table, geometry, neighbors, counts)
    device = geometry.device
    require("gradient", gradient, features.dtype, (n_atoms, 4, variant.n_channels), device)
    require("by_slot", by_slot, variant.real, (n_atoms, capacity, 4), device)
    shape = (n_parts, n_atoms if with_features else 0, features.shape[1], variant.n_channels)
    by_features = torch.empty(shape, dtype=variant.real, device=device)
    launch(
        kernels.backward_kernel(variant, with_features),
        n_parts * n_atoms * _lanes(variant, geometry), device, n_atoms, capacity,
        table.shape[0] - degree, n_parts, gradient, features, rows, table, geometry, neighbors,
        counts, by_features, by_slot,
    )  # fmt: skip
    return by_features[0] if n_parts == 1 else by_features.sum(0)


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
    by_rows = message_backward_(
        gradient.to(features.dtype).contiguous(), features, rows, table, geometry, neighbors,
        counts, by_slot, degree,
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


def _lanes(variant: kernels.Variant, tensor: Tensor) -> int:
    return 1 if tensor.device.type == "cpu" else variant.lanes


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


def _fake_backward_(
    gradient: Tensor,
    features: Tensor,
    rows: Tensor,
    table: Tensor,
    geometry: Tensor,
    neighbors: Tensor,
    counts: Tensor,
    by_slot: Tensor,
    degree: int,
    with_features: bool = True,
    n_parts: int = 1,
) -> Tensor:
    n_atoms = neighbors.shape[0] if with_features else 0
    return geometry.new_empty((n_atoms, features.shape[1], features.shape[2]))


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
    f"message_backward_(Tensor gradient, {_INPUTS}Tensor counts, Tensor(a!) by_slot, int degree, "
    "bool with_features=True, int n_parts=1) -> Tensor",
    message_backward_,
    _fake_backward_,
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
