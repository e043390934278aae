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
        """Lanes that share an atom on CUDA: a power of two that divides the channels."""
        lanes = 1
        while (
            self.n_channels % (2 * lanes) == 0
            and lanes < _WARP
            and self.n_channels // (2 * lanes) >= min(_CHANNELS_PER_LANE, self.n_channels // _WARP)
        ):
            lanes *= 2
        return lanes

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


_COMMON = """
    typedef REAL real;
    typedef STORED stored;
    constexpr int C = N_CHANNELS, P = DEGREE, NF = N_FILTERS;
#if defined(__CUDA_ARCH__)
    constexpr int LANES = CUDA_LANES;
#else
    constexpr int LANES = 1;
#endif
    constexpr int CPL = C / LANES;  // channels per lane
    const int lane = thread % LANES, group = thread / LANES;
    const int atom = group / n_parts, part = group % n_parts;
    const int c0 = lane * CPL;
    const long long row = (long long)atom * capacity;
    const real* geometry = (const real*)geometry_;
    const int* neighbors = (const int*)neighbors_;
    const stored* table = (const stored*)table_ + c0;
    const int n_slots = ((const int*)counts_)[atom] < capacity ? ((const int*)counts_)[atom]
                                                                : capacity;
#if defined(__CUDA_ARCH__)
    // a struct of so many bytes is loaded by one instruction
    constexpr int BYTES = CPL * sizeof(stored);
    constexpr int WIDE = BYTES % 16 == 0 ? 16 : BYTES % 8 == 0 ? 8 : BYTES % 4 == 0 ? 4 : 2;
    struct alignas(WIDE) Pack { stored v[CPL]; };
    #define LOAD(to, from) Pack to##_pack = *(const Pack*)(from); const stored* to = to##_pack.v
    struct alignas(4 * sizeof(real) < 16 ? 4 * sizeof(real) : 16) Slot { real v[4]; };
    constexpr unsigned SHARE = LANES == 32 ? ~0u : (1u << (LANES % 32)) - 1u;
    const int lane0 = (int)(threadIdx.x & 31) & ~(LANES - 1);
    const unsigned mask = SHARE << lane0;
    // Each lane looks at a slot of its own; those within the cutoff are then visited by all.
    #define EACH_EDGE(other, look_up)                                               \
        for (int s0 = part; s0 < n_slots; s0 += n_parts * LANES) {                  \
            Slot its; its.v[0] = its.v[1] = its.v[2] = (real)0; its.v[3] = (real)-1;\
            int its_other = 0;                                                      \
            if (s0 + lane * n_parts < n_slots) {                                    \
                const long long at = row + s0 + lane * n_parts;                     \
                its = *(const Slot*)(geometry + 4 * at);                            \
                its_other = look_up(neighbors[at]);                                 \
            }                                                                       \
            unsigned there = (__ballot_sync(mask, its.v[3] >= (real)0) >> lane0) & SHARE;\
            while (there) {                                                         \
                const int l = __ffs((int)there) - 1, s = s0 + l * n_parts;          \
                there &= there - 1;                                                 \
                real u[4];                                                          \
                for (int k = 0; k < 4; ++k) u[k] = __shfl_sync(mask, its.v[k], lane0 + l);\
                const int other = __shfl_sync(mask, its_other, lane0 + l);           \
                (void)s;
#else
    #define LOAD(to, from) const stored* to = (from)
    #define EACH_EDGE(other, look_up)                                               \
        for (int s = part; s < n_slots; s += n_parts) {                             \
            const real* u = geometry + 4 * (row + s);                               \
            if (u[3] >= (real)0) {                                                  \
                const int other = look_up(neighbors[row + s]);
#endif
    #define END_EDGES }}
    #define ITSELF(j) (j)
    #define ITS_SPECIES(j) ((const int*)rows_)[j]
    // basis splines of degree P - 1 in `low`, then of degree P in `w`, and their slopes in `dw`
    #define BASIS_SPLINES(t)                                                        \
        int knot = (int)(t); knot = knot < n_intervals ? knot : n_intervals - 1;    \
        const real a = (t) - (real)knot;                                            \
        real low[P], w[P + 1], dw[P + 1];                                           \
        low[0] = (real)1;                                                           \
        for (int d = 1; d < P; ++d) {                                               \
            real carried = (real)0;                                                 \
            for (int r = 0; r < d; ++r) {                                           \
                const real share = low[r] * ((real)1 / (real)d);                    \
                low[r] = carried + ((real)(r + 1) - a) * share;                     \
                carried = (a + (real)(d - 1 - r)) * share;                          \
            }                                                                       \
            low[d] = carried;                                                       \
        }                                                                           \
        { real carried = (real)0;                                                   \
          for (int r = 0; r < P; ++r) {                                             \
              const real share = low[r] * ((real)1 / (real)P);                      \
              w[r] = carried + ((real)(r + 1) - a) * share;                         \
              carried = (a + (real)(P - 1 - r)) * share;                            \
          }                                                                         \
          w[P] = carried; }                                                         \
        dw[0] = -low[0]; dw[P] = low[P - 1];                                        \
        for (int r = 1; r < P; ++r) dw[r] = low[r - 1] - low[r];                    \
        const stored* knots = table + (long long)knot * (NF * C)
#if defined(__CUDA_ARCH__)
    #define KNOTS(f)                                                                \
        Pack pack[P + 1];                                                           \
        for (int q = 0; q <= P; ++q) pack[q] = *(const Pack*)(knots + q * (NF * C) + (f) * C)
    #define AT_KNOT(q, b) (real)(float_of(pack[q].v[b]))
#else
    #define KNOTS(f) const stored* at = knots + (f) * C
    #define AT_KNOT(q, b) (real)(float_of(at[(q) * (NF * C) + (b)]))
#endif
    #define FILTER(value, f) {                                                      \
        KNOTS(f);                                                                   \
        for (int b = 0; b < CPL; ++b) {                                             \
            real sum_v = (real)0;                                                   \
            for (int q = 0; q <= P; ++q) sum_v += w[q] * AT_KNOT(q, b);             \
            value[b] = sum_v;                                                       \
        } }
    #define FILTER_AND_SLOPE(value, slope, f) {                                     \
        KNOTS(f);                                                                   \
        for (int b = 0; b < CPL; ++b) {                                             \
            real sum_v = (real)0, sum_s = (real)0;                                  \
            for (int q = 0; q <= P; ++q) {                                          \
                const real x_q = AT_KNOT(q, b);                                     \
                sum_v += w[q] * x_q; sum_s += dw[q] * x_q;                          \
            }                                                                       \
            value[b] = sum_v; slope[b] = sum_s;                                     \
        } }
"""

_FORWARD = """
    real sum[4][CPL];
    for (int k = 0; k < 4; ++k) for (int b = 0; b < CPL; ++b) sum[k][b] = (real)0;
#if FIRST
    EACH_EDGE(sender, ITS_SPECIES)
#else
    EACH_EDGE(sender, ITSELF)
#endif
        const stored* x = (const stored*)features_ + (long long)sender * (N_FEATURES * C) + c0;
        BASIS_SPLINES(u[3]);
        (void)dw;
        real f[CPL];
        FILTER(f, 0);
        {
            LOAD(xs, x);
            for (int b = 0; b < CPL; ++b) sum[0][b] += f[b] * (real)(float_of(xs[b]));
        }
        FILTER(f, 1);
        {
            LOAD(xd, x + C);
            for (int b = 0; b < CPL; ++b) {
                const real y = f[b] * (real)(float_of(xd[b]));
                sum[1][b] += y * u[0]; sum[2][b] += y * u[1]; sum[3][b] += y * u[2];
            }
        }
        if (!FIRST) {
            FILTER(f, (NF - 1));
            for (int k = 0; k < 3; ++k) {
                LOAD(xv, x + (2 + k) * C);
                for (int b = 0; b < CPL; ++b) sum[1 + k][b] += f[b] * (real)(float_of(xv[b]));
            }
        }
    END_EDGES
    ROUNDING
    const real* base = FIRST && embedding_ != 0
        ? (const real*)embedding_ + (long long)((const int*)rows_)[atom] * C : nullptr;
    real* scalars = (real*)scalars_ + (long long)atom * scalar_stride;
    real* vectors = (real*)vectors_ + (long long)atom * vector_stride;
    #define PUT(k, c, value) {                                                      \
        real* to = (k) == 0 ? scalars + (c) : vectors + ((k) - 1) * C + (c);        \
        real put = (value);                                                         \
        if (mode & 1) put += *to;                                                   \
        if ((k) == 0 && base) put += base[c];                                       \
        if (mode & 2) put = ROUND(put);                                             \
        *to = put; }
    STORE_SUMS(4)
"""

_BACKWARD = """
    real sum[N_FEATURES][CPL];
    for (int k = 0; k < N_FEATURES; ++k) for (int b = 0; b < CPL; ++b) sum[k][b] = (real)0;
    const int own = FIRST ? ((const int*)rows_)[atom] : atom;
    const stored* x = (const stored*)features_ + (long long)own * (N_FEATURES * C) + c0;
#if defined(__CUDA_ARCH__) && OWN_IN_REGISTERS
    Pack sent[N_FEATURES];  // the atom's own features, for all edges
    for (int k = 0; k < N_FEATURES; ++k) sent[k] = *(const Pack*)(x + k * C);
    #define SENT(k, b) (real)(float_of(sent[k].v[b]))
#else
    #define SENT(k, b) (real)(float_of(x[(k) * C + (b)]))
#endif
    EACH_EDGE(receiver, ITSELF)
        const stored* g = (const stored*)scalars_ + (long long)receiver * C + c0;
        const stored* h = (const stored*)vectors_ + (long long)receiver * (3 * C) + c0;
        BASIS_SPLINES(u[3]);
        real f[CPL], df[CPL], total[4] = {(real)0, (real)0, (real)0, (real)0};
#if defined(__CUDA_ARCH__)
        #define ADD_SLOPE(b, value) total[3] += (value)
        #define SET_DU(k, b, value) total[k] += (value)
#else
        real slope[CPL], du[3][CPL];
        for (int b = 0; b < CPL; ++b) slope[b] = (real)0;
        #define ADD_SLOPE(b, value) slope[b] += (value)
        #define SET_DU(k, b, value) du[k][b] = (value)
#endif
        LOAD(gx, h); LOAD(gy, h + C); LOAD(gz, h + 2 * C);
        {
            LOAD(gs, g);
            FILTER_AND_SLOPE(f, df, 0);
            for (int b = 0; b < CPL; ++b) {
                const real hs = (real)(float_of(gs[b]));
                if (FEATURES) sum[0][b] += f[b] * hs;
                ADD_SLOPE(b, df[b] * SENT(0, b) * hs);
            }
        }
        {
            FILTER_AND_SLOPE(f, df, 1);
            for (int b = 0; b < CPL; ++b) {
                const real hx = (real)(float_of(gx[b])), hy = (real)(float_of(gy[b])),
                           hz = (real)(float_of(gz[b])), y = SENT(1, b);
                const real along = -(u[0] * hx + u[1] * hy + u[2] * hz);  // the edge comes back
                if (FEATURES) sum[1][b] += f[b] * along;
                ADD_SLOPE(b, df[b] * y * along);
                const real fy = f[b] * y;
                SET_DU(0, b, fy * hx); SET_DU(1, b, fy * hy); SET_DU(2, b, fy * hz);
            }
        }
        if (!FIRST) {
            FILTER_AND_SLOPE(f, df, (NF - 1));
            for (int b = 0; b < CPL; ++b) {
                const real hx = (real)(float_of(gx[b])), hy = (real)(float_of(gy[b])),
                           hz = (real)(float_of(gz[b]));
                if (FEATURES) {
                    sum[N_FEATURES - 3][b] += f[b] * hx;
                    sum[N_FEATURES - 2][b] += f[b] * hy;
                    sum[N_FEATURES - 1][b] += f[b] * hz;
                }
                ADD_SLOPE(b, df[b] * (SENT(N_FEATURES - 3, b) * hx + SENT(N_FEATURES - 2, b) * hy
                                      + SENT(N_FEATURES - 1, b) * hz));
            }
        }
        real* to = (real*)slots_ + 4 * (row + s);
#if !defined(__CUDA_ARCH__)
        SUM_CHANNELS
#else
        if (LANES >= 4) {
            // two steps halve the totals of a lane and the lanes of a total, then each has one
            const bool upper = (lane & (LANES / 2)) != 0, odd = (lane & (LANES / 4)) != 0;
            for (int k = 0; k < 2; ++k) {
                const real mine = upper ? total[k + 2] : total[k];
                const real rest = upper ? total[k] : total[k + 2];
                total[k] = mine + __shfl_xor_sync(mask, rest, LANES / 2);
            }
            const real mine = odd ? total[1] : total[0], rest = odd ? total[0] : total[1];
            total[0] = mine + __shfl_xor_sync(mask, rest, LANES / 4);
            for (int o = LANES / 8; o > 0; o /= 2)
                total[0] += __shfl_xor_sync(mask, total[0], o);
            if ((lane & (LANES / 4 - 1)) == 0) to[(upper ? 2 : 0) + (odd ? 1 : 0)] += total[0];
        } else
            for (int o = LANES / 2; o > 0; o /= 2)
                for (int k = 0; k < 4; ++k) total[k] += __shfl_xor_sync(mask, total[k], o);
        if (LANES < 4)
#endif
        if (lane == 0) for (int k = 0; k < 4; ++k) to[k] += total[k];
    END_EDGES
    if (FEATURES) {
        real* out = (real*)out_ + (long long)atom * (N_FEATURES * C);
        #define PUT(k, c, value) out[(k) * C + (c)] = (value);
        STORE_SUMS(N_FEATURES)
    }
"""

# the parts of a row are in one block of threads, and each group of lanes adds up some of the sums
_STORE_SUMS = """
#if defined(__CUDA_ARCH__) && SPLIT
    constexpr int GROUPS = BLOCK / LANES;
    __shared__ real parts[GROUPS][N_SUMS * C];
    const int in_block = (int)threadIdx.x / LANES;
    for (int k = 0; k < N_SUMS; ++k)
        for (int b = 0; b < CPL; ++b) parts[in_block][k * C + c0 + b] = sum[k][b];
    __syncthreads();
    for (int n = part * LANES + lane; n < N_SUMS * C; n += n_parts * LANES) {
        real sum_n = (real)0;
        for (int p = 0; p < n_parts; ++p) sum_n += parts[in_block - part + p][n];
        PUT(n / C, n % C, sum_n);
    }
#else
    for (int k = 0; k < N_SUMS; ++k)
        for (int b = 0; b < CPL; ++b) PUT(k, c0 + b, sum[k][b]);
#endif
"""

# without leave to reorder sums a compiler adds channel by channel: eight sums side by side
_SUM_CHANNELS = """
        {
            constexpr int SIDE = CPL % 8 == 0 ? 8 : 1;
            real side[4][SIDE];
            for (int k = 0; k < 4; ++k) for (int b = 0; b < SIDE; ++b) side[k][b] = (real)0;
            for (int c = 0; c < CPL; c += SIDE)
                for (int b = 0; b < SIDE; ++b) {
                    for (int k = 0; k < 3; ++k) side[k][b] += du[k][c + b];
                    side[3][b] += slope[c + b];
                }
            for (int k = 0; k < 4; ++k) for (int b = 0; b < SIDE; ++b) total[k] += side[k][b];
        }
"""


def snippet(body: str, variant: Variant, split_block: int, **flags: bool) -> str:
    """Native source of a kernel's body for one variant; blocks of threads share rows, or 0."""
    text = (_COMMON + body).replace("SUM_CHANNELS", _SUM_CHANNELS)
    n_sums = re.search(r"STORE_SUMS\((\w+)\)", text)
    assert n_sums
    text = text.replace(n_sums[0], _STORE_SUMS.replace("N_SUMS", n_sums[1]))
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

    @wp.func_native(snippet(_FORWARD, variant, split_block))
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

    @wp.func_native(snippet(_BACKWARD, variant, split_block, FEATURES=with_features))
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
        n_blocks = max(1, (n_blocks - (0 if variant.own_in_registers else 1)) * BLOCK // block)
    kernel = wp.kernel(
        function,
        name=name,
        enable_backward=False,
        module=f"mlffd_{name}",
        launch_bounds=None if variant.real == torch.float64 else (block, n_blocks),
    )
    kernel.mlffd_block = block
    return kernel
