"""What happens on each atom between matrix products: PaiNN's mixing and context, and back.

On CUDA a thread has one channel of an atom, with channels side by side; on the CPU it has all of
an atom's, and the loop over them becomes vector instructions. Nothing is summed over atoms.

Matrix products leave out their bias: it is added where their result is read. Scalars q and norms
|v| of an atom are the halves of a row of 2C numbers, so that both are the input of one product.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import warp as wp

from openmm_mlffd.kernels.message_kernels import NATIVE_TYPES, ROUNDING

N_ADDRESSES = 10
"""Of each kernel, used or not: all have the same arguments."""

READOUT_LANES = 32
"""Threads of an atom on CUDA where its energy is summed over hidden channels."""

_COMMON = """
    typedef REAL real;
    typedef STORED stored;
    constexpr int C = N_CHANNELS;
    constexpr bool LAST = IS_LAST;  // of the blocks: its vectors are of no use
    constexpr int PARTS = LAST ? 2 : 3;
    #define IN(name, k) const real* name = (const real*)p##k##_
    #define OUT(name, k) real* name = (real*)p##k##_
    // what matrix products in reduced precision read has 10 bits of mantissa, whatever they cut
#if REDUCED
    ROUNDING
    #define CUT(x) round_to_10_bits(x)
#else
    #define CUT(x) (x)
#endif
    // projections u and v of an atom's vectors
    #define LOAD_UV                                                             \\
        const real *u = uv + i * (6 * C) + c, *v = u + C;                       \\
        const real u0 = u[0], u1 = u[2 * C], u2 = u[4 * C];                     \\
        const real v0 = v[0], v1 = v[2 * C], v2 = v[4 * C]
"""

_CHANNELS = """
#if defined(__CUDA_ARCH__)
    const long long i = thread / C;
    const int first = thread % C;
    constexpr int STEP = C;
#else
    const long long i = thread;
    constexpr int first = 0, STEP = 1;
    #pragma clang loop vectorize(assume_safety)
#endif
    for (int c = first; c < C; c += STEP)
"""

# arguments, then what is done for channel c of atom i
_BODIES = {
    "norms": (
        "IN(uv, 0); OUT(q, 1); const real softening = (real)x0;",
        """
        LOAD_UV;
        (void)u0; (void)u1; (void)u2;
        q[i * (2 * C) + C + c] = CUT(SQRT(v0 * v0 + v1 * v1 + v2 * v2 + softening));
        """,
    ),
    "silu": (
        "IN(hidden, 0); IN(bias, 1); OUT(out, 2);",
        """
        const real h = hidden[i * C + c] + bias[c];
        out[i * C + c] = CUT(h / ((real)1 + EXP(-h)));
        """,
    ),
    "silu_backward": (
        "IN(hidden, 0); IN(bias, 1); OUT(gradient, 2);",
        """
        const real h = hidden[i * C + c] + bias[c], s = (real)1 / ((real)1 + EXP(-h));
        gradient[i * C + c] = CUT(gradient[i * C + c] * s * ((real)1 + h * ((real)1 - s)));
        """,
    ),
    "mix": (
        "IN(uv, 0); IN(a, 1); IN(bias, 2); IN(q, 3); IN(mu, 4); OUT(new_q, 5); OUT(new_mu, 6);",
        """
        LOAD_UV;
        const real* ai = a + i * (PARTS * C) + c;
        const real dot = u0 * v0 + u1 * v1 + u2 * v2;
        new_q[i * (2 * C) + c] = CUT(q[i * (2 * C) + c] + (ai[0] + bias[c])
                                     + (ai[C] + bias[C + c]) * dot);
        if (!LAST) {
            const real a_vv = ai[(PARTS - 1) * C] + bias[(PARTS - 1) * C + c];
            const real* from = mu + i * (3 * C) + c;
            real* to = new_mu + i * (3 * C) + c;
            to[0] = from[0] + a_vv * u0;
            to[C] = from[C] + a_vv * u1;
            to[2 * C] = from[2 * C] + a_vv * u2;
        }
        """,
    ),
    "features": (
        "IN(phi, 0); IN(bias, 1); IN(mu, 2); stored* to = (stored*)p3_; OUT(scale, 4);",
        """
        const real* from = phi + i * (long long)stride + c;
        const real* m = mu + i * (3 * C) + c;
        const real x = from[0] + bias[c], y = from[C] + bias[C + c],
                   s = from[2 * C] + bias[2 * C + c];
        stored* t = to + i * (5 * C) + c;
        t[0] = STORE(x); t[C] = STORE(y);
        t[2 * C] = STORE(s * m[0]); t[3 * C] = STORE(s * m[C]); t[4 * C] = STORE(s * m[2 * C]);
        scale[i * C + c] = s;
        """,
    ),
    "features_backward": (
        "IN(uv, 0); IN(a, 1); IN(bias, 2); IN(mu, 3); IN(scale, 4); OUT(by_features, 5); "
        "OUT(by_q, 6); OUT(by_mu, 7); const real *old_q = (const real*)p8_, "
        "*old_mu = (const real*)p9_;",
        """
        const real* u = uv + i * (6 * C) + c;
        const real a_vv = a[i * (3 * C) + 2 * C + c] + bias[2 * C + c];
        const real s = scale[i * C + c];
        const real* m = mu + i * (3 * C) + c;
        const real* g = old_mu + i * (3 * C) + c;
        real* b = by_features + i * (5 * C) + c;
        real* to = by_mu + i * (3 * C) + c;
        const real b0 = b[2 * C], b1 = b[3 * C], b2 = b[4 * C];
        b[2 * C] = CUT((m[0] + a_vv * u[0]) * b0 + (m[C] + a_vv * u[2 * C]) * b1
                       + (m[2 * C] + a_vv * u[4 * C]) * b2);
        if (REDUCED) { b[0] = CUT(b[0]); b[C] = CUT(b[C]); }
        const real g0 = g[0] + s * b0, g1 = g[C] + s * b1, g2 = g[2 * C] + s * b2;
        to[0] = g0; to[C] = g1; to[2 * C] = g2;
        by_q[i * C + c] = old_q[i * C + c];
        """,
    ),
    "mix_backward": (
        "IN(uv, 0); IN(by_q, 1); IN(by_mu, 2); OUT(by_a, 3);",
        """
        LOAD_UV;
        const real g = by_q[i * C + c];
        real* to = by_a + i * (PARTS * C) + c;
        to[0] = CUT(g);
        to[C] = CUT(g * (u0 * v0 + u1 * v1 + u2 * v2));
        if (!LAST) {
            const real* m = by_mu + i * (3 * C) + c;
            to[(PARTS - 1) * C] = CUT(m[0] * u0 + m[C] * u1 + m[2 * C] * u2);
        }
        """,
    ),
    "project_backward": (
        "IN(a, 0); IN(bias, 1); IN(by_input, 2); IN(by_mu, 3); OUT(by_q, 4); OUT(uv, 5); "
        "const real softening = (real)x0;",
        """
        LOAD_UV;
        const real* ai = a + i * (PARTS * C) + c;
        const real g = by_q[i * C + c], by_dot = g * (ai[C] + bias[C + c]);
        const real by_norm = by_input[i * (2 * C) + C + c]
                             / SQRT(v0 * v0 + v1 * v1 + v2 * v2 + softening);
        real m0 = (real)0, m1 = (real)0, m2 = (real)0;
        if (!LAST) {
            const real a_vv = ai[(PARTS - 1) * C] + bias[(PARTS - 1) * C + c];
            const real* m = by_mu + i * (3 * C) + c;
            m0 = a_vv * m[0]; m1 = a_vv * m[C]; m2 = a_vv * m[2 * C];
        }
        real *to_u = uv + i * (6 * C) + c, *to_v = to_u + C;
        to_u[0] = CUT(by_dot * v0 + m0);
        to_u[2 * C] = CUT(by_dot * v1 + m1);
        to_u[4 * C] = CUT(by_dot * v2 + m2);
        to_v[0] = CUT(by_dot * u0 + by_norm * v0);
        to_v[2 * C] = CUT(by_dot * u1 + by_norm * v1);
        to_v[4 * C] = CUT(by_dot * u2 + by_norm * v2);
        by_q[i * C + c] = g + by_input[i * (2 * C) + c];
        """,
    ),
    "halves": (
        "IN(q, 0); IN(mu, 1); stored *to_q = (stored*)p2_, *to_mu = (stored*)p3_;",
        """
        to_q[i * C + c] = STORE(q[i * C + c]);
        for (int k = 0; k < 3; ++k) {
            const long long at = i * (3 * C) + k * C + c;
            to_mu[at] = STORE(mu[at]);
        }
        """,
    ),
}

# energy = scale Σ_h w_h silu(hidden_h) + ..., bent beyond the bound; hidden becomes its gradient
_READOUT = """
    OUT(hidden, 0); IN(bias, 1); IN(weight, 2); double* energies = (double*)p3_;
#if defined(__CUDA_ARCH__)
    constexpr int LANES = 32;
#else
    constexpr int LANES = 1;
#endif
    const int lane = thread % LANES, width = stride;
    const long long i = thread / LANES;
    real* row = hidden + i * width;
    double sum = 0.0;
    for (int c = lane; c < width; c += LANES) {
        const real h = row[c] + bias[c];
        sum += (double)(weight[c] * (h / ((real)1 + EXP(-h))));
    }
#if defined(__CUDA_ARCH__)
    for (int o = LANES / 2; o > 0; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
#endif
    const double scale = x0, bound = x1;
    double energy = (sum + (double)weight[width]) * scale, slope = scale;
    const double size = energy < 0.0 ? -energy : energy;
    if (bound > 0.0 && !(size < bound)) {
        const double bent = ::tanh((size - bound) / (0.5 * bound));
        energy = (energy < 0.0 ? -1.0 : 1.0) * (bound + 0.5 * bound * bent);
        slope *= 1.0 - bent * bent;
    }
    if (lane == 0) energies[i] = energy;
    for (int c = lane; c < width; c += LANES) {
        const real h = row[c] + bias[c], s = (real)1 / ((real)1 + EXP(-h));
        row[c] = CUT((real)slope * weight[c] * s * ((real)1 + h * ((real)1 - s)));
    }
"""


class Variant(NamedTuple):
    """What the kernels are compiled for."""

    n_channels: int
    """Features of an atom."""

    real: torch.dtype
    """Arithmetic."""

    reduced: bool
    """What is gathered is float16, and what matrix products read is rounded to as many bits."""

    @property
    def name(self) -> str:
        """Of the module, in letters and digits."""
        bits = str(self.real).removeprefix("torch.float")
        return f"c{self.n_channels}_f{bits}" + "_reduced" * self.reduced


def _native(body: str, variant: Variant, last: bool) -> str:
    float64 = variant.real == torch.float64
    half = variant.reduced
    values = {
        "N_CHANNELS": str(variant.n_channels),
        "IS_LAST": str(last).lower(),
        "REAL": NATIVE_TYPES[variant.real],
        "STORED": NATIVE_TYPES[torch.float16 if half else variant.real],
        "REDUCED": str(int(half)),
        "ROUNDING": ROUNDING,
        "STORE(": "wp::float_to_half(" if half else "(stored)(",
        "SQRT": "::sqrt" if float64 else "::sqrtf",
        "EXP": "::exp" if float64 else "::expf",
    }
    text = _COMMON + body
    for word in sorted(values, key=len, reverse=True):
        text = text.replace(word, values[word])
    return text


def _kernel(native: str, name: str, module: str) -> Any:
    @wp.func_native(native)
    def of_atom(
        thread: wp.int32,
        stride: wp.int32,
        x0: wp.float64,
        x1: wp.float64,
        p0_: wp.uint64,
        p1_: wp.uint64,
        p2_: wp.uint64,
        p3_: wp.uint64,
        p4_: wp.uint64,
        p5_: wp.uint64,
        p6_: wp.uint64,
        p7_: wp.uint64,
        p8_: wp.uint64,
        p9_: wp.uint64,
    ): ...

    def node(
        stride: wp.int32,  # numbers and addresses that the kernel's body names at its start
        x0: wp.float64,
        x1: wp.float64,
        p0: wp.uint64,
        p1: wp.uint64,
        p2: wp.uint64,
        p3: wp.uint64,
        p4: wp.uint64,
        p5: wp.uint64,
        p6: wp.uint64,
        p7: wp.uint64,
        p8: wp.uint64,
        p9: wp.uint64,
    ):
        of_atom(wp.tid(), stride, x0, x1, p0, p1, p2, p3, p4, p5, p6, p7, p8, p9)

    return wp.kernel(node, name=name, enable_backward=False, module=module)


@cache
def readout_kernel(real: torch.dtype, reduced: bool) -> Any:
    """Energy of each atom from hidden channels of any number, and its gradient."""
    native = _native(_READOUT, Variant(1, real, reduced), False)
    suffix = "_reduced" * reduced
    return _kernel(native, "readout", f"mlffd_readout_{NATIVE_TYPES[real]}{suffix}")


@cache
def node_kernels(variant: Variant) -> dict[str, Any]:
    """All kernels of a variant by name, in one module; those of the last block end in ``_last``."""
    module, found = f"mlffd_node_{variant.name}", {}
    for name, (arguments, body) in _BODIES.items():
        text = f"{arguments}\n{_CHANNELS}{{{body}}}"
        found[name] = _kernel(_native(text, variant, False), name, module)
        if "LAST" in body or "PARTS" in body:
            key = f"{name}_last"
            found[key] = _kernel(_native(text, variant, True), key, module)
    return found
