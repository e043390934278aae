"""PaiNN's messages with tabulated filters. A group of lanes owns an atom and walks its row.

On CUDA a lane has up to four channels of 128 and gathers them with one wide load; on the CPU one
lane has them all, and the loops over channels become vector instructions. Sums stay with their
owner: no atomics, and every bit the same at each launch.

A slot of the geometry holds the unit vector from the row's atom to its neighbor and the distance
in units of the spline's intervals; a negative one is beyond the cutoff. Backward, the row's atom
is the sender of what its neighbors received, so that sums stay in its row again: the slot then
belongs to the edge in the other direction.
"""

import re
from functools import cache
from typing import Any, NamedTuple

import torch
import warp as wp

from openmm_mlffd.kernels import message_native as native

NATIVE_TYPES = {torch.float16: "wp::half", torch.float32: "float", torch.float64: "double"}
ROUNDING = """
    // to the nearest of 10 bits of mantissa, ties to even
    auto round_to_10_bits = [](float x) -> float {
        unsigned bits = __builtin_bit_cast(unsigned, x);
        bits = (bits + 0xfffu + ((bits >> 13) & 1u)) & ~0x1fffu;
        return __builtin_bit_cast(float, bits);
    };
"""

BLOCK = 256
"""Threads of a block on CUDA: Warp's default."""

_SPLIT_BLOCKS = (256, 512)
_CHANNELS_PER_LANE = 4
_WARP = 32
_SHARED = 46 * 1024  # bytes of a block; Warp takes some of 48


def lanes_for(n_channels: int) -> int:
    """Lanes that share so many channels on CUDA: a power of two that divides them."""
    lanes = 1
    while (
        n_channels % (2 * lanes) == 0
        and lanes < _WARP
        and n_channels // (2 * lanes) >= min(_CHANNELS_PER_LANE, n_channels // _WARP)
    ):
        lanes *= 2
    return lanes


class Variant(NamedTuple):
    """What a kernel is compiled for."""

    n_channels: int
    """Features of an atom."""

    first: bool
    """The first block: no vectors to pass on, and rows are looked up by species."""

    degree: int
    """Of the spline, odd."""

    real: torch.dtype
    """Arithmetic and sums."""

    stored: torch.dtype
    """Features that are gathered, and the table."""

    @property
    def lanes(self) -> int:
        """Lanes that share an atom on CUDA."""
        return lanes_for(self.n_channels)

    def split_block(self, n_parts: int) -> int:
        """Threads of a block whose groups share rows; 0 if the sums of so many have no room."""
        size = (4 if self.first else 5) * self.n_channels * self.real.itemsize
        fitting = [
            n
            for n in _SPLIT_BLOCKS
            if n // self.lanes * size <= _SHARED and n_parts <= n // self.lanes
        ]
        return min(fitting, default=0)

    @property
    def most_parts(self) -> int:
        """Groups of lanes that can share a row on CUDA: those of a block."""
        return max((n for n in (1, 2, 4, 8, 16) if self.split_block(n)), default=1)

    @property
    def own_in_registers(self) -> bool:
        """Whether a row's own features stay in registers on the way back.

        That spares loads, and costs registers and so threads that are at work together. On an
        H100 it is faster by 8 % with float32 features, and slower by 4 % with float16.
        """
        return self.stored == torch.float32

    def blocks(self, backward: bool) -> int:
        """Blocks that shall have room on a multiprocessor: registers are few then."""
        return (2 if backward else 3) if self.own_in_registers else (3 if backward else 4)

    @property
    def name(self) -> str:
        """Of the kernel, in letters and digits."""
        real, stored = (str(t).removeprefix("torch.float") for t in (self.real, self.stored))
        block = "first" if self.first else "later"
        return f"{block}_c{self.n_channels}_p{self.degree}_f{real}_s{stored}"


def snippet(body: str, variant: Variant, split_block: int, **flags: bool) -> str:
    """Native source of a kernel's body for one variant; blocks of threads share rows, or 0."""
    text = (native.COMMON + body).replace("SUM_CHANNELS", native.SUM_CHANNELS)
    n_sums = re.search(r"STORE_SUMS\((\w+)\)", text)
    assert n_sums
    text = text.replace(n_sums[0], native.STORE_SUMS.replace("N_SUMS", n_sums[1]))
    half = variant.stored == torch.float16
    values: dict[str, Any] = {
        "float_of": "wp::half_to_float" if half else "",
        "N_CHANNELS": variant.n_channels,
        "N_FEATURES": 2 if variant.first else 5,
        "N_FILTERS": 2 if variant.first else 3,
        "BLOCK": split_block,
        "SPLIT": int(split_block > 0),
        "OWN_IN_REGISTERS": int(variant.own_in_registers),
        "ROUNDING": ROUNDING if half else "",
        "ROUND(": "round_to_10_bits(" if half else "(",
        "CUDA_LANES": variant.lanes,
        "DEGREE": variant.degree,
        "FIRST": int(variant.first),
        "REAL": NATIVE_TYPES[variant.real],
        "STORED": NATIVE_TYPES[variant.stored],
    } | {flag: int(value) for flag, value in flags.items()}
    # longer words first: FEATURES is the end of N_FEATURES
    for word in sorted(values, key=len, reverse=True):
        text = text.replace(word, str(values[word]))
    return text


@cache
def forward_kernel(variant: Variant, split_block: int) -> Any:
    """Σ_s messages of neighbor s to atom i: scalars and vectors.

    Written, added to what is there, or for the first block to the embedding of the atom's species.
    """

    @wp.func_native(snippet(native.FORWARD, variant, split_block))
    def message_row(
        thread: wp.int32,
        capacity: wp.int32,
        n_intervals: wp.int32,
        n_parts: wp.int32,
        mode: wp.int32,
        scalar_stride: wp.int32,
        vector_stride: wp.int32,
        features_: wp.uint64,
        rows_: wp.uint64,
        table_: wp.uint64,
        geometry_: wp.uint64,
        neighbors_: wp.uint64,
        counts_: wp.uint64,
        embedding_: wp.uint64,
        scalars_: wp.uint64,
        vectors_: wp.uint64,
    ): ...

    def message_forward(
        # in
        capacity: wp.int32,
        n_intervals: wp.int32,
        n_parts: wp.int32,
        mode: wp.int32,  # 1: added to what is there; 2: rounded, see ROUNDING
        scalar_stride: wp.int32,  # from atom to atom
        vector_stride: wp.int32,
        features: wp.uint64,  # stored (n_rows, 2 or 5, n_channels)
        rows: wp.uint64,  # int32 (n_atoms,), the first block's
        table: wp.uint64,  # stored (n_intervals + degree, 2 or 3, n_channels)
        geometry: wp.uint64,  # real (n_atoms, capacity, 4)
        neighbors: wp.uint64,  # int32 (n_atoms, capacity)
        counts: wp.uint64,  # int32 (n_atoms,)
        embedding: wp.uint64,  # real (n_rows, n_channels), or 0
        # out, or in and out
        scalars: wp.uint64,  # real (n_atoms, n_channels)
        vectors: wp.uint64,  # real (n_atoms, 3, n_channels)
    ):
        message_row(
            wp.tid(), capacity, n_intervals, n_parts, mode, scalar_stride, vector_stride, features,
            rows, table, geometry, neighbors, counts, embedding, scalars, vectors,
        )  # fmt: skip

    name = f"message_forward_{variant.name}"
    return _kernel(message_forward, name, variant, split_block, False)


@cache
def backward_kernel(variant: Variant, with_features: bool, split_block: int) -> Any:
    """Gradients by an atom's features, and by direction and distance of what it sent."""

    @wp.func_native(snippet(native.BACKWARD, variant, split_block, FEATURES=with_features))
    def message_row(
        thread: wp.int32,
        capacity: wp.int32,
        n_intervals: wp.int32,
        n_parts: wp.int32,
        scalars_: wp.uint64,
        vectors_: wp.uint64,
        features_: wp.uint64,
        rows_: wp.uint64,
        table_: wp.uint64,
        geometry_: wp.uint64,
        neighbors_: wp.uint64,
        counts_: wp.uint64,
        out_: wp.uint64,
        slots_: wp.uint64,
    ): ...

    def message_backward(
        # in
        capacity: wp.int32,
        n_intervals: wp.int32,
        n_parts: wp.int32,
        scalars: wp.uint64,  # stored (all atoms, n_channels), gradient by the sums
        vectors: wp.uint64,  # stored (all atoms, 3, n_channels)
        features: wp.uint64,  # stored (n_rows, 2 or 5, n_channels)
        rows: wp.uint64,  # int32 (n_atoms,), the first block's
        table: wp.uint64,  # stored (n_intervals + degree, 2 or 3, n_channels)
        geometry: wp.uint64,  # real (n_atoms, capacity, 4)
        neighbors: wp.uint64,  # int32 (n_atoms, capacity)
        counts: wp.uint64,  # int32 (n_atoms,)
        # out
        by_features: wp.uint64,  # real (n_atoms, 2 or 5, n_channels)
        # in and out
        by_slot: wp.uint64,  # real (n_atoms, capacity, 4), added to
    ):
        message_row(
            wp.tid(), capacity, n_intervals, n_parts, scalars, vectors, features, rows, table,
            geometry, neighbors, counts, by_features, by_slot,
        )  # fmt: skip

    name = f"message_backward_{variant.name}{'' if with_features else '_geometry'}"
    return _kernel(message_backward, name, variant, split_block, True)


def _kernel(function: Any, name: str, variant: Variant, split_block: int, backward: bool) -> Any:
    """A kernel in a module of its own: what is not used is not compiled."""
    block, n_blocks = split_block or BLOCK, variant.blocks(backward)
    if split_block:
        name += f"_split{split_block}"
    if variant.real == torch.float64:
        n_blocks = 1  # what a launch needs; more would cost more than it gives
    elif split_block:
        n_blocks = max(1, (n_blocks - (0 if variant.own_in_registers else 1)) * BLOCK // block)
    kernel = wp.kernel(
        function,
        name=name,
        enable_backward=False,
        module=f"mlffd_{name}",
        launch_bounds=(block, n_blocks),
    )
    kernel.mlffd_block = block
    return kernel
