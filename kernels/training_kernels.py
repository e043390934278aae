"""PaiNN's messages for training: values, first and second derivatives on a list of edges.

Per edge nothing is stored but its geometry, (u, t): the unit vector from receiver to sender and the
distance in intervals of the filters' spline. With the filters (a, c, b) = F(t), the features
(x, y, m) of the sender and the gradient (g, h) by the receiver's sums, an edge adds

    ψ = g a x + c y h·u + b m·h

to what is differentiated. First derivatives are those of ψ; second ones those of its tangent, the
derivative of ψ along a change of features and geometry. Sums belong to a group of lanes: that of
the receiver (sums of messages, and derivatives by the gradient), of the sender (by features and,
edge by edge, by geometry) or of a part of the edges in the order of their intervals (by the table).
No atomics, and every bit the same at each launch.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import warp as wp

from openmm_mlffd.kernels.message_kernels import lanes_for
from openmm_mlffd.kernels.training_native import BODIES, COMMON

CHUNK = 64
"""Edges whose derivatives by the table one group of lanes adds up."""

_REAL = {torch.float32: "float", torch.float64: "double"}


class Variant(NamedTuple):
    """What a kernel is compiled for."""

    n_channels: int
    """Features of an atom."""

    first: bool
    """The first block: no vectors to pass on."""

    degree: int
    """Of the spline, odd."""

    real: torch.dtype
    """Of everything."""

    @property
    def lanes(self) -> int:
        """Lanes that share an owner on CUDA."""
        return lanes_for(self.n_channels)

    @property
    def alignment(self) -> int:
        """Bytes to which a lane's channels are aligned: of a power of two, no more than 16."""
        size = self.n_channels // self.lanes * self.real.itemsize
        return min(16, size & -size)

    @property
    def name(self) -> str:
        """Of the kernel, in letters and digits."""
        block = "first" if self.first else "later"
        bits = 8 * self.real.itemsize
        return f"{block}_c{self.n_channels}_p{self.degree}_f{bits}"


def snippet(what: str, variant: Variant, **flags: bool) -> str:
    """Native source of a kernel's body for one variant."""
    values = {
        "N_CHANNELS": variant.n_channels,
        "N_FEATURES": 2 if variant.first else 5,
        "N_FILTERS": 2 if variant.first else 3,
        "ALIGNMENT": variant.alignment,
        "CHUNK": CHUNK,
        "CUDA_LANES": variant.lanes,
        "DEGREE": variant.degree,
        "FIRST": int(variant.first),
        "REAL_TYPE": _REAL[variant.real],
    } | {flag: int(value) for flag, value in flags.items()}
    text = COMMON + BODIES[what]
    for word in sorted(values, key=len, reverse=True):
        text = text.replace(word, str(values[word]))
    return text


@cache
def training_kernel(
    what: str, variant: Variant, tangent: bool = False, geometry: bool = False
) -> Any:
    """One of the kernels: all have the same arguments, of which they use some.

    Parameters
    ----------
    what
        "forward" sums messages on receivers; "backward" sums derivatives on senders; "table"
        sums derivatives by the table on chunks of edges, "collect" on intervals, and "overlap"
        on the rows of the table.
    variant
        Sizes and precision.
    tangent
        The same of the change along ``d_features`` and ``d_geometry``.
    geometry
        Backward, also by the geometry.
    """

    @wp.func_native(snippet(what, variant, TANGENT=tangent, GEOMETRY=geometry))
    def body(
        thread: wp.int32,
        n_atoms: wp.int32,
        n_edges: wp.int32,
        n_intervals: wp.int32,
        gradient_: wp.uint64,
        features_: wp.uint64,
        d_features_: wp.uint64,
        table_: wp.uint64,
        geometry_: wp.uint64,
        d_geometry_: wp.uint64,
        plan_: wp.uint64,
        out_: wp.uint64,
        slots_: wp.uint64,
    ): ...

    def training(
        # in
        n_atoms: wp.int32,
        n_edges: wp.int32,
        n_intervals: wp.int32,
        gradient: wp.uint64,  # real (n_atoms, 4, n_channels), by the sums
        features: wp.uint64,  # real (n_atoms, 2 or 5, n_channels)
        d_features: wp.uint64,
        table: wp.uint64,  # real (n_intervals + degree, 2 or 3, n_channels)
        geometry: wp.uint64,  # real (n_edges, 4)
        d_geometry: wp.uint64,
        plan: wp.uint64,  # int32, see `training_ops.edge_plan`
        # out
        out: wp.uint64,  # real, sums of the owners
        slots: wp.uint64,  # real, derivatives by geometry, or by the table
    ):
        body(
            wp.tid(), n_atoms, n_edges, n_intervals, gradient, features, d_features, table,
            geometry, d_geometry, plan, out, slots,
        )  # fmt: skip

    name = f"training_{what}_{variant.name}" + "_tangent" * tangent + "_geometry" * geometry
    return wp.kernel(training, name=name, enable_backward=False, module=f"mlffd_{name}")
