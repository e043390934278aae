"""`torch.ops.mlffd.edge_message` and its derivatives: PaiNN's messages for training on forces.

Six operators, of which the derivatives of each are others of them up to the second order:

- of `edge_message`: `edge_message_backward` by features and geometry, `edge_message_table` by the
  table;
- of `edge_message_backward`: `edge_message_tangent` by the gradient, `edge_message_second` by
  features and geometry, `edge_message_second_table` by the table;
- of `edge_message_table`: `edge_message` and `edge_message_backward` again, since messages are
  linear in the table.

Tangents, `edge_message_second` and `edge_message_second_table` are differentiable as well: where no
kernel has their derivatives, of the third order, by the reference. What is by the table is an
operator of its own, so that it is left out of a graph of operations where nobody asks for it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from openmm_mlffd.kernels import reference
from openmm_mlffd.kernels import training_kernels as kernels
from openmm_mlffd.kernels.launch import launch
from openmm_mlffd.kernels.library import LIBRARY, define, require


def edge_plan(edge_index: Tensor, place: Tensor, n_atoms: int, n_intervals: int) -> Tensor:
    """Edges in the orders in which the kernels walk them; plain torch, waits for nothing.

    Parameters
    ----------
    edge_index
        Receiver and sender of each edge, sorted by receiver, shape ``(2, n_edges)``, int64.
    place
        Distance of each edge in intervals of the table, shape ``(n_edges,)``; edges beyond the
        table's ends are left out.
    n_atoms, n_intervals
        Numbers of atoms and of the table's intervals.

    Returns
    -------
    Tensor
        First edge of each receiver (n_atoms + 1), first place of each sender (n_atoms + 1) and of
        each interval (n_intervals + 1) in the orders below, receivers, senders, edges by
        sender, edges by interval (n_edges each), int32, one after the other.
    """
    device, n_edges = place.device, place.shape[0]
    place = place.detach()
    present = (place >= 0) & (place < n_intervals)
    atoms = torch.arange(n_atoms + 1, dtype=torch.int32, device=device)
    intervals = torch.arange(n_intervals + 1, dtype=torch.int32, device=device)
    # converted one by one: torch 2.11's compiler cannot search in a view
    receiver, sender = (x.to(torch.int32) for x in edge_index.unbind())
    rows = torch.searchsorted(receiver, atoms, out_int32=True)
    # padding is at the end, in the row of the last atom, which need not be walked
    places = torch.arange(1, n_edges + 1, dtype=torch.int32, device=device)
    end = torch.cat([torch.where(present, places, 0), atoms[:1]]).amax()
    sent_key, outgoing = torch.where(present, sender, n_atoms).sort(stable=True)
    sent = torch.searchsorted(sent_key, atoms, out_int32=True)
    knot = torch.where(present, place, n_intervals).to(torch.int32)
    knot_key, by_knot = knot.sort(stable=True)
    bins = torch.searchsorted(knot_key, intervals, out_int32=True)
    lists = [torch.minimum(rows, end), sent, bins, receiver, sender, outgoing, by_knot]
    return torch.cat([x.to(torch.int32) for x in lists])


def edge_message(
    features: Tensor, table: Tensor, geometry: Tensor, plan: Tensor, degree: int
) -> Tensor:
    """Filter the senders' features by tabulated filters and sum them on the receivers.

    Arguments and result as of `reference.edge_message`, with the lists of `edge_plan` for the
    edges; all of float32 or all of float64. Differentiable in ``features``, ``table`` and
    ``geometry``; first and second derivatives are kernels. Deterministic.
    """
    return _forward(features, None, table, geometry, None, plan, degree)


def edge_message_tangent(
    features: Tensor,
    d_features: Tensor,
    table: Tensor,
    geometry: Tensor,
    d_geometry: Tensor,
    plan: Tensor,
    degree: int,
) -> Tensor:
    """Change of `edge_message` along a change of features and geometry."""
    return _forward(features, d_features, table, geometry, d_geometry, plan, degree)


def edge_message_backward(
    gradient: Tensor,
    features: Tensor,
    table: Tensor,
    geometry: Tensor,
    plan: Tensor,
    degree: int,
    with_geometry: bool = True,
) -> tuple[Tensor, Tensor]:
    """Derivatives of Σ gradient · `edge_message` by features and, unless left out, geometry."""
    return _backward(gradient, features, None, table, geometry, None, plan, degree, with_geometry)


def edge_message_second(
    gradient: Tensor,
    features: Tensor,
    d_features: Tensor,
    table: Tensor,
    geometry: Tensor,
    d_geometry: Tensor,
    plan: Tensor,
    degree: int,
    with_geometry: bool = True,
) -> tuple[Tensor, Tensor]:
    """Derivatives of Σ gradient · `edge_message_tangent` by features and geometry."""
    return _backward(
        gradient, features, d_features, table, geometry, d_geometry, plan, degree, with_geometry
    )


def edge_message_table(
    gradient: Tensor,
    features: Tensor,
    geometry: Tensor,
    plan: Tensor,
    degree: int,
    n_intervals: int,
) -> Tensor:
    """Derivative of Σ gradient · `edge_message` by the table."""
    return _table(gradient, features, None, geometry, None, plan, degree, n_intervals)


def edge_message_second_table(
    gradient: Tensor,
    features: Tensor,
    d_features: Tensor,
    geometry: Tensor,
    d_geometry: Tensor,
    plan: Tensor,
    degree: int,
    n_intervals: int,
) -> Tensor:
    """Derivative of Σ gradient · `edge_message_tangent` by the table."""
    return _table(gradient, features, d_features, geometry, d_geometry, plan, degree, n_intervals)


class _Call:
    """Checked tensors of a call, contiguous, and launches with them."""

    def __init__(
        self,
        features: Tensor,
        geometry: Tensor,
        plan: Tensor,
        degree: int,
        n_intervals: int,
        **others: Tensor | None,
    ) -> None:
        self.real, self.device = geometry.dtype, geometry.device
        if self.real not in (torch.float32, torch.float64):
            raise TypeError(f"geometry must be float32 or float64, got {self.real}")
        if degree not in (3, 5, 7) or n_intervals < 1:
            raise ValueError(
                f"a spline of degree 3, 5 or 7 with an interval is needed, got degree {degree} and "
                f"{n_intervals} intervals"
            )
        self.n_atoms, n_features, self.n_channels = features.shape
        if n_features not in (2, 5):
            raise ValueError(
                f"features must have 2 or 5 parts, got the shape {tuple(features.shape)}"
            )
        self.n_edges, self.n_intervals = geometry.shape[0], n_intervals
        self.n_filters = 2 if n_features == 2 else 3
        self.variant = kernels.Variant(self.n_channels, n_features == 2, degree, self.real)
        shapes = {
            "features": features.shape,
            "d_features": features.shape,
            "gradient": (self.n_atoms, 4, self.n_channels),
            "table": (n_intervals + degree, self.n_filters, self.n_channels),
            "geometry": (self.n_edges, 4),
            "d_geometry": (self.n_edges, 4),
        }
        self.tensors: dict[str, Tensor | int] = dict.fromkeys(shapes, 0)
        for name, tensor in {"features": features, "geometry": geometry, **others}.items():
            if tensor is not None:
                self.tensors[name] = tensor = tensor.contiguous()
                require(name, tensor, self.real, shapes[name], self.device)
        self.plan = plan.contiguous()
        size = 2 * (self.n_atoms + 1) + n_intervals + 1 + 4 * self.n_edges
        require("plan", self.plan, torch.int32, (size,), self.device)
        self.tangent = isinstance(self.tensors["d_features"], Tensor)

    def launch(
        self, what: str, n_threads: int, out: Tensor, slots: Tensor | int = 0, **flags: bool
    ) -> None:
        t = self.tensors
        launch(
            kernels.training_kernel(what, self.variant, **flags), n_threads, self.device,
            self.n_atoms, self.n_edges, self.n_intervals, t["gradient"], t["features"],
            t["d_features"], t["table"], t["geometry"], t["d_geometry"], self.plan, out, slots,
        )  # fmt: skip

    @property
    def lanes(self) -> int:
        return 1 if self.device.type == "cpu" else self.variant.lanes


def _forward(
    features: Tensor,
    d_features: Tensor | None,
    table: Tensor,
    geometry: Tensor,
    d_geometry: Tensor | None,
    plan: Tensor,
    degree: int,
) -> Tensor:
    call = _Call(
        features, geometry, plan, degree, table.shape[0] - degree,
        d_features=d_features, table=table, d_geometry=d_geometry,
    )  # fmt: skip
    sums = geometry.new_empty((call.n_atoms, 4, call.n_channels))
    call.launch("forward", call.n_atoms * call.lanes, sums, tangent=call.tangent)
    return sums


def _backward(
    gradient: Tensor,
    features: Tensor,
    d_features: Tensor | None,
    table: Tensor,
    geometry: Tensor,
    d_geometry: Tensor | None,
    plan: Tensor,
    degree: int,
    with_geometry: bool,
) -> tuple[Tensor, Tensor]:
    call = _Call(
        features, geometry, plan, degree, table.shape[0] - degree, gradient=gradient,
        d_features=d_features, table=table, d_geometry=d_geometry,
    )  # fmt: skip
    by_features = geometry.new_empty(features.shape)
    # edges beyond the table have no derivative
    by_geometry = geometry.new_zeros((call.n_edges if with_geometry else 0, 4))
    call.launch(
        "backward", call.n_atoms * call.lanes, by_features, by_geometry,
        tangent=call.tangent, geometry=with_geometry,
    )  # fmt: skip
    return by_features, by_geometry


def _table(
    gradient: Tensor,
    features: Tensor,
    d_features: Tensor | None,
    geometry: Tensor,
    d_geometry: Tensor | None,
    plan: Tensor,
    degree: int,
    n_intervals: int,
) -> Tensor:
    call = _Call(
        features, geometry, plan, degree, n_intervals, gradient=gradient,
        d_features=d_features, d_geometry=d_geometry,
    )  # fmt: skip
    n_chunks = -(-call.n_edges // kernels.CHUNK)
    row = call.n_filters * call.n_channels
    size = (degree + 1) * row
    parts = geometry.new_empty((n_chunks + n_intervals, size))
    by_table = geometry.new_empty((n_intervals + degree, call.n_filters, call.n_channels))
    call.launch("table", n_chunks * call.n_filters * call.lanes, parts, tangent=call.tangent)
    call.launch("collect", n_intervals * size, parts)
    call.launch("overlap", (n_intervals + degree) * row, parts, by_table)
    return by_table


def _fake_sums(features: Tensor, *arguments: Any) -> Tensor:
    return features.new_empty((features.shape[0], 4, features.shape[2]))


def _fake_backward(
    gradient: Tensor,
    features: Tensor,
    table: Tensor,
    geometry: Tensor,
    plan: Tensor,
    degree: int,
    with_geometry: bool = True,
) -> tuple[Tensor, Tensor]:
    n_edges = geometry.shape[0] if with_geometry else 0
    return features.new_empty(features.shape), geometry.new_empty((n_edges, 4))


def _fake_second(
    gradient: Tensor,
    features: Tensor,
    d_features: Tensor,
    table: Tensor,
    geometry: Tensor,
    d_geometry: Tensor,
    plan: Tensor,
    degree: int,
    with_geometry: bool = True,
) -> tuple[Tensor, Tensor]:
    return _fake_backward(gradient, features, table, geometry, plan, degree, with_geometry)


def _fake_table(gradient: Tensor, features: Tensor, *arguments: Any) -> Tensor:
    degree, n_intervals = arguments[-2:]
    n_filters = 2 if features.shape[1] == 2 else 3
    return features.new_empty((n_intervals + degree, n_filters, features.shape[2]))


_D_FEATURES, _D_GEOMETRY = (
    "Tensor features, Tensor d_features, ",
    "Tensor geometry, Tensor d_geometry, ",
)
_REST = "Tensor plan, int degree"
_PAIR = "bool with_geometry=True) -> (Tensor, Tensor)"
for _schema, _function, _fake in (
    (f"edge_message(Tensor features, Tensor table, Tensor geometry, {_REST}) -> Tensor",
     edge_message, _fake_sums),
    (f"edge_message_tangent({_D_FEATURES}Tensor table, {_D_GEOMETRY}{_REST}) -> Tensor",
     edge_message_tangent, _fake_sums),
    (f"edge_message_backward(Tensor gradient, Tensor features, Tensor table, Tensor geometry, "
     f"{_REST}, {_PAIR}", edge_message_backward, _fake_backward),
    (f"edge_message_second(Tensor gradient, {_D_FEATURES}Tensor table, {_D_GEOMETRY}{_REST}, "
     f"{_PAIR}", edge_message_second, _fake_second),
    (f"edge_message_table(Tensor gradient, Tensor features, Tensor geometry, {_REST}, "
     "int n_intervals) -> Tensor", edge_message_table, _fake_table),
    (f"edge_message_second_table(Tensor gradient, {_D_FEATURES}{_D_GEOMETRY}{_REST}, "
     "int n_intervals) -> Tensor", edge_message_second_table, _fake_table),
):  # fmt: skip
    define(_schema, _function, _fake)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*[x for x in inputs if isinstance(x, Tensor)])
    ctx.numbers = [x for x in inputs if not isinstance(x, Tensor)]


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    features, table, geometry, plan = ctx.saved_tensors
    (degree,), ops = ctx.numbers, torch.ops.mlffd
    by_features, by_geometry = ops.edge_message_backward(
        gradient, features, table, geometry, plan, degree
    )
    n_intervals = table.shape[0] - degree
    by_table = ops.edge_message_table(gradient, features, geometry, plan, degree, n_intervals)
    return by_features, by_table, by_geometry, None, None


def _differentiate_backward(
    ctx: Any, d_features: Tensor, d_geometry: Tensor
) -> tuple[Tensor | None, ...]:
    gradient, features, table, geometry, plan = ctx.saved_tensors
    (degree, with_geometry), ops = ctx.numbers, torch.ops.mlffd
    if not with_geometry:
        d_geometry = torch.zeros_like(geometry)
    along = (features, d_features, table, geometry, d_geometry, plan, degree)
    by_gradient = ops.edge_message_tangent(*along)
    by_features, by_geometry = ops.edge_message_second(gradient, *along)
    by_table = ops.edge_message_second_table(
        gradient, features, d_features, geometry, d_geometry, plan, degree, table.shape[0] - degree
    )
    return by_gradient, by_features, by_table, by_geometry, None, None, None


def _differentiate_table(ctx: Any, table: Tensor) -> tuple[Tensor | None, ...]:
    """The messages are linear in the table: with the cotangent in its place."""
    gradient, features, geometry, plan = ctx.saved_tensors
    (degree, _), ops = ctx.numbers, torch.ops.mlffd
    by_gradient = ops.edge_message(features, table, geometry, plan, degree)
    by_features, by_geometry = ops.edge_message_backward(
        gradient, features, table, geometry, plan, degree
    )
    return by_gradient, by_features, by_geometry, None, None, None


def _differentiate_tangent(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Third derivatives, of which those by what is linear are second ones."""
    features, d_features, table, geometry, d_geometry, plan = ctx.saved_tensors
    (degree,), ops = ctx.numbers, torch.ops.mlffd
    by_features, by_geometry = ops.edge_message_second(
        gradient, features, d_features, table, geometry, d_geometry, plan, degree
    )
    by_table = ops.edge_message_second_table(
        gradient, features, d_features, geometry, d_geometry, plan, degree, table.shape[0] - degree
    )
    by_d_features, by_d_geometry = ops.edge_message_backward(
        gradient, features, table, geometry, plan, degree
    )
    return by_features, by_d_features, by_table, by_geometry, by_d_geometry, None, None


def _edges(plan: Tensor, geometry: Tensor, n_atoms: int, n_intervals: int) -> Tensor:
    """Receiver and sender of each edge, of a plan."""
    start, n = 2 * (n_atoms + 1) + n_intervals + 1, geometry.shape[0]
    return plan[start : start + 2 * n].long().view(2, n)


def _third(
    tensors: Sequence[Tensor], plan: Tensor, degree: int, by: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """Derivatives of the second derivatives, weighted, by the six tensors that they are of."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    gradient, features, d_features, table, geometry, d_geometry = leaves
    edge_index = _edges(plan, geometry, gradient.shape[0], table.shape[0] - degree)
    with torch.enable_grad():
        found = reference.edge_message_second(
            gradient, features, d_features, table, geometry, d_geometry, edge_index, degree
        )
        parts = [(f * w).sum() for f, w in zip(found, by, strict=True) if w is not None]
        total = torch.stack(parts).sum()
    return torch.autograd.grad(total, leaves, materialize_grads=True)


def _differentiate_second(
    ctx: Any, by_features: Tensor, by_geometry: Tensor
) -> tuple[Tensor | None, ...]:
    *tensors, plan = ctx.saved_tensors
    degree, with_geometry = ctx.numbers
    weights = [None, by_features, None, by_geometry if with_geometry else None]
    return (*_third(tensors, plan, degree, weights), None, None, None)


def _differentiate_second_table(ctx: Any, by_table: Tensor) -> tuple[Tensor | None, ...]:
    gradient, features, d_features, geometry, d_geometry, plan = ctx.saved_tensors
    degree, _ = ctx.numbers
    # linear in the table: with the cotangent in its place
    ops = torch.ops.mlffd
    along = (features, d_features, by_table, geometry, d_geometry, plan, degree)
    by_gradient = ops.edge_message_tangent(*along)
    by_features_, by_geometry_ = ops.edge_message_second(gradient, *along)
    by_d_features, by_d_geometry = ops.edge_message_backward(
        gradient, features, by_table, geometry, plan, degree
    )
    return by_gradient, by_features_, by_d_features, by_geometry_, by_d_geometry, None, None, None


for _name, _backwards in (
    ("edge_message", _differentiate),
    ("edge_message_backward", _differentiate_backward),
    ("edge_message_table", _differentiate_table),
    ("edge_message_tangent", _differentiate_tangent),
    ("edge_message_second", _differentiate_second),
    ("edge_message_second_table", _differentiate_second_table),
):
    torch.library.register_autograd(f"mlffd::{_name}", _backwards, setup_context=_save, lib=LIBRARY)
