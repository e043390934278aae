"""All that happens on an atom between two messages in one kernel, for systems of few atoms.

`node_kernels` and matrix products of a library do the same in fifteen launches, which for small
systems are all waiting. Here a block of threads takes some atoms from one message to the next:
inputs of products lie in shared memory, weights come from the cache, and each product is divided
among the threads by columns, terms of the sums and rows. On the CPU one thread does it all, so
that tests see the same arithmetic; it is not fast there.

Products leave out their bias, which is added where they are read, as in `node_kernels`.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import warp as wp

from openmm_mlffd.kernels.message_kernels import NATIVE_TYPES

THREADS = 512
"""Of a block on CUDA."""

ATOMS = (1, 2, 4, 8)
"""Atoms that a block can take together."""

N_ADDRESSES = 19
"""Of each kernel, used or not: all have the same arguments."""


class Variant(NamedTuple):
    """What a kernel is compiled for."""

    n_channels: int
    """Features of an atom, a multiple of four."""

    width: int
    """Hidden channels of the readout, a multiple of four."""

    stored: torch.dtype
    """Features that neighbors gather."""

    atoms: int
    """Atoms of a block, one of `ATOMS`."""

    @property
    def name(self) -> str:
        """Of the kernel, in letters and digits."""
        stored = str(self.stored).removeprefix("torch.float")
        return f"c{self.n_channels}_w{self.width}_s{stored}_r{self.atoms}"


_COMMON = """
    typedef STORED stored;
    constexpr int C = N_CHANNELS, W = WIDTH, R = N_ROWS;
#if defined(__CUDA_ARCH__)
    constexpr int T = N_THREADS;
    const int t = (int)threadIdx.x;
    __shared__ alignas(16) float X[ROOM];
    #define SYNC __syncthreads()
    #define UNROLL _Pragma("unroll")
    #define UNROLL_SOME _Pragma("unroll (MANY > 5 ? 4 : 8)")
#else
    constexpr int T = 1;
    const int t = 0;
    alignas(16) float X[ROOM];
    #define SYNC
    #define UNROLL
    #define UNROLL_SOME
#endif
    const int start = thread / T * R;
    constexpr int ITEMS = (R * C + T - 1) / T;
    struct alignas(8) Two { float v[2]; };
    struct alignas(16) Four { float v[4]; };
    #define IN(name, k) const float* name = (const float*)p##k##_
    #define OUT(name, k) float* name = (float*)p##k##_
    // for each channel c of an atom i, the r-th of the block, as a thread's item
    #define EACH                                                                    \\
        UNROLL for (int item = 0; item < ITEMS; ++item) {                           \\
            const int at = item * T + t, r = at / C, c = at % C;                    \\
            const long long i = start + r;                                          \\
            if (at < R * C && i < n_atoms) {
    #define END }}
    // rows of NI numbers in X by a matrix of NI rows of NO; sums, in parts, come after them in X
    #define PRODUCT(NR, NI, NO, matrix) {                                           \\
        constexpr int PAIRS = (NO) / 2, SHARES = T / PAIRS > 1 ? T / PAIRS : 1;     \\
        constexpr int KP = SPLIT_OF(SHARES, NR, NI, NO);                            \\
        constexpr int RP = SHARES / KP < (NR) ? SHARES / KP : (NR);                 \\
        constexpr int MANY = ((NR) + RP - 1) / RP, TERMS = (NI) / KP;               \\
        for (int task = t; task < PAIRS * KP * RP; task += T) {                     \\
            const int column = task % PAIRS * 2, share = task / PAIRS;              \\
            const int k_part = share % KP, first = share / KP * MANY;               \\
            float sums[MANY][2];                                                    \\
            UNROLL for (int m = 0; m < MANY; ++m) sums[m][0] = sums[m][1] = 0.0f;   \\
            const float* w = (matrix) + (long long)k_part * TERMS * (NO) + column;  \\
            const float* x = X + k_part * TERMS;                                    \\
            UNROLL_SOME for (int k = 0; k < TERMS; k += 4) {                        \\
                Two m4[4];                                                          \\
                UNROLL for (int q = 0; q < 4; ++q)                                  \\
                    m4[q] = *(const Two*)(w + (long long)(k + q) * (NO));           \\
                UNROLL for (int m = 0; m < MANY; ++m) {                             \\
                    const int its = first + m < (NR) ? first + m : (NR) - 1;        \\
                    const Four f = *(const Four*)(x + its * (NI) + k);              \\
                    UNROLL for (int q = 0; q < 4; ++q) {                            \\
                        sums[m][0] += f.v[q] * m4[q].v[0];                          \\
                        sums[m][1] += f.v[q] * m4[q].v[1];                          \\
                    }                                                               \\
                }                                                                   \\
            }                                                                       \\
            UNROLL for (int m = 0; m < MANY; ++m) if (first + m < (NR)) {           \\
                float* to = X + (NR) * (NI) + (k_part * (NR) + first + m) * (NO) + column; \\
                to[0] = sums[m][0]; to[1] = sums[m][1];                             \\
            }                                                                       \\
        }                                                                           \\
        SYNC; }
    // the largest number of parts that there are threads and room for and that divides the terms
    #define FITS(p, SHARES, NR, NI, NO)                                             \\
        ((SHARES) >= (p) && (NR) * ((NI) + (p) * (NO)) <= ROOM && (NI) % (4 * (p)) == 0)
    #define SPLIT_OF(SHARES, NR, NI, NO)                                            \\
        (FITS(8, SHARES, NR, NI, NO) ? 8 : FITS(4, SHARES, NR, NI, NO) ? 4          \\
         : FITS(2, SHARES, NR, NI, NO) ? 2 : 1)
    // what a product gave: its parts added up
    #define GIVEN(name, NR, NI, NO, row, column)                                    \\
        float name = 0.0f; {                                                        \\
        constexpr int PAIRS = (NO) / 2, SHARES = T / PAIRS > 1 ? T / PAIRS : 1;     \\
        constexpr int KP = SPLIT_OF(SHARES, NR, NI, NO);                            \\
        UNROLL for (int p = 0; p < KP; ++p)                                         \\
            name += X[(NR) * (NI) + (p * (NR) + (row)) * (NO) + (column)]; }
    #define SIGMOID(h) (1.0f / (1.0f + ::expf(-(h))))
    #define SILU(h) ((h) * SIGMOID(h))
    #define SILU_SLOPE(h) (SIGMOID(h) * (1.0f + (h) * (1.0f - SIGMOID(h))))
    // what is read of the sums must be read by all before more than the rows is written over them
    #define ALL_READ END SYNC; EACH
"""

# the state (q, mu) by what `Mixing` makes of it; a is of N_A thirds
_MIX = """
    float uv[ITEMS][6], q_of[ITEMS];
    EACH
        const float* m = mu + i * (3 * C) + c;
        UNROLL for (int k = 0; k < 3; ++k) X[(3 * r + k) * C + c] = m[k * C];
    END
    SYNC;
    PRODUCT(3 * R, C, 2 * C, project)
    EACH
        UNROLL for (int k = 0; k < 3; ++k) {
            GIVEN(u, 3 * R, C, 2 * C, 3 * r + k, c);
            GIVEN(v, 3 * R, C, 2 * C, 3 * r + k, C + c);
            uv[item][k] = u; uv[item][3 + k] = v;
        }
        const float v0 = uv[item][3], v1 = uv[item][4], v2 = uv[item][5];
        q_of[item] = q[i * (2 * C) + c];
        X[r * (2 * C) + c] = q_of[item];
        X[r * (2 * C) + C + c] = ::sqrtf(v0 * v0 + v1 * v1 + v2 * v2 + softening);
    END
    SYNC;
    PRODUCT(R, 2 * C, C, inner)
    EACH
        GIVEN(h, R, 2 * C, C, r, c);
        KEEP_HIDDEN
        X[r * C + c] = SILU(h + inner_bias[c]);
    END
    SYNC;
    PRODUCT(R, C, N_A * C, outer)
"""
_DOT = """
        const float u0 = uv[item][0], u1 = uv[item][1], u2 = uv[item][2], v0 = uv[item][3],
                    v1 = uv[item][4], v2 = uv[item][5], dot = u0 * v0 + u1 * v1 + u2 * v2;
"""

_FORWARD = (
    """
    IN(q, 0); IN(mu, 1); IN(project, 2); IN(inner, 3); IN(inner_bias, 4); IN(outer, 5);
    IN(outer_bias, 6); IN(next_inner, 7); IN(next_inner_bias, 8); IN(next_outer, 9);
    IN(next_outer_bias, 10); OUT(kept_uv, 11); OUT(kept_hidden, 12); OUT(kept_a, 13);
    OUT(kept_inner, 14); OUT(kept_scale, 15); OUT(new_q, 16); OUT(new_mu, 17);
    stored* features = (stored*)p18_;
    const float softening = (float)x0;
    """
    + _MIX.replace("N_A", "3").replace("KEEP_HIDDEN", "kept_hidden[i * C + c] = h;")
    + """
    float mu_of[ITEMS][3];
    EACH
    """
    + _DOT
    + """
        GIVEN(a0, R, C, 3 * C, r, c);
        GIVEN(a1, R, C, 3 * C, r, C + c);
        GIVEN(a2, R, C, 3 * C, r, 2 * C + c);
        float* kept = kept_a + i * (3 * C) + c;
        kept[0] = a0; kept[C] = a1; kept[2 * C] = a2;
        a2 += outer_bias[2 * C + c];
        const float scalar = q_of[item] + (a0 + outer_bias[c]) + (a1 + outer_bias[C + c]) * dot;
        new_q[i * (2 * C) + c] = scalar;
        X[r * C + c] = scalar;
        const float* m = mu + i * (3 * C) + c;
        UNROLL for (int k = 0; k < 3; ++k) {
            mu_of[item][k] = m[k * C] + a2 * uv[item][k];
            new_mu[i * (3 * C) + k * C + c] = mu_of[item][k];
            kept_uv[i * (6 * C) + 2 * k * C + c] = uv[item][k];
            kept_uv[i * (6 * C) + (2 * k + 1) * C + c] = uv[item][3 + k];
        }
    END
    SYNC;
    PRODUCT(R, C, C, next_inner)
    EACH
        GIVEN(h, R, C, C, r, c);
        kept_inner[i * C + c] = h;
        X[r * C + c] = SILU(h + next_inner_bias[c]);
    END
    SYNC;
    PRODUCT(R, C, 3 * C, next_outer)
    EACH
        GIVEN(x, R, C, 3 * C, r, c);
        GIVEN(y, R, C, 3 * C, r, C + c);
        GIVEN(s, R, C, 3 * C, r, 2 * C + c);
        x += next_outer_bias[c]; y += next_outer_bias[C + c]; s += next_outer_bias[2 * C + c];
        stored* to = features + i * (5 * C) + c;
        to[0] = STORE(x); to[C] = STORE(y);
        UNROLL for (int k = 0; k < 3; ++k) to[(2 + k) * C] = STORE(s * mu_of[item][k]);
        kept_scale[i * C + c] = s;
    END
"""
)

# from the gradient by the new scalars in `by_scalar` and by a's values in X to that by the old
# state; BY_VECTOR is what came by the vectors themselves, BY_U that by u
_MIX_BACKWARD = """
    PRODUCT(R, N_A * C, C, outer_back)
    EACH
        GIVEN(g, R, N_A * C, C, r, c);
        const float h = HIDDEN + inner_bias[c];
        X[r * C + c] = g * SILU_SLOPE(h);
    END
    SYNC;
    PRODUCT(R, C, 2 * C, inner_back)
    float by_input[ITEMS][2];
    EACH
        GIVEN(by_q_in, R, C, 2 * C, r, c);
        GIVEN(by_norm_in, R, C, 2 * C, r, C + c);
        by_input[item][0] = by_q_in; by_input[item][1] = by_norm_in;
    ALL_READ
        const float u0 = uv[item][0], u1 = uv[item][1], u2 = uv[item][2], v0 = uv[item][3],
                    v1 = uv[item][4], v2 = uv[item][5];
        const float by_dot = by_scalar[item] * a1_of[item];
        const float by_norm = by_input[item][1]
                              / ::sqrtf(v0 * v0 + v1 * v1 + v2 * v2 + softening);
        by_q[i * C + c] = by_scalar[item] + by_input[item][0];
        float* x = X + 3 * r * (2 * C) + c;
        x[0] = by_dot * v0 + BY_U(0); x[2 * C] = by_dot * v1 + BY_U(1);
        x[4 * C] = by_dot * v2 + BY_U(2);
        x[C] = by_dot * u0 + by_norm * v0; x[3 * C] = by_dot * u1 + by_norm * v1;
        x[5 * C] = by_dot * u2 + by_norm * v2;
    END
    SYNC;
    PRODUCT(3 * R, 2 * C, C, project_back)
    EACH
        UNROLL for (int k = 0; k < 3; ++k) {
            GIVEN(g, 3 * R, 2 * C, C, 3 * r + k, c);
            by_mu[i * (3 * C) + k * C + c] = g + BY_VECTOR(k);
        }
    END
"""

_BACKWARD = (
    """
    IN(mu, 0); IN(project_back, 1); IN(inner_back, 2); IN(inner_bias, 3); IN(outer_back, 4);
    IN(outer_bias, 5); IN(next_inner_back, 6); IN(next_inner_bias, 7); IN(next_outer_back, 8);
    IN(kept_uv, 9); IN(kept_hidden, 10); IN(kept_a, 11); IN(kept_inner, 12); IN(kept_scale, 13);
    IN(by_features, 14); IN(old_q, 15); IN(old_mu, 16); OUT(by_q, 17); OUT(by_mu, 18);
    const float softening = (float)x0;
    float uv[ITEMS][6], by_scalar[ITEMS], by_vector[ITEMS][3], a1_of[ITEMS], a2_of[ITEMS];
    EACH
        const float* from = kept_uv + i * (6 * C) + c;
        UNROLL for (int k = 0; k < 3; ++k) {
            uv[item][k] = from[2 * k * C]; uv[item][3 + k] = from[(2 * k + 1) * C];
        }
        const float* a = kept_a + i * (3 * C) + c;
        a1_of[item] = a[C] + outer_bias[C + c];
        a2_of[item] = a[2 * C] + outer_bias[2 * C + c];
        const float s = kept_scale[i * C + c];
        const float *m = mu + i * (3 * C) + c, *g = old_mu + i * (3 * C) + c;
        const float* b = by_features + i * (5 * C) + c;
        float by_scale = 0.0f;
        UNROLL for (int k = 0; k < 3; ++k) {
            const float b_k = b[(2 + k) * C];
            by_scale += (m[k * C] + a2_of[item] * uv[item][k]) * b_k;
            by_vector[item][k] = g[k * C] + s * b_k;
        }
        by_scalar[item] = old_q[i * C + c];
        X[r * (3 * C) + c] = b[0]; X[r * (3 * C) + C + c] = b[C];
        X[r * (3 * C) + 2 * C + c] = by_scale;
    END
    SYNC;
    PRODUCT(R, 3 * C, C, next_outer_back)
    EACH
        GIVEN(g, R, 3 * C, C, r, c);
        const float h = kept_inner[i * C + c] + next_inner_bias[c];
        X[r * C + c] = g * SILU_SLOPE(h);
    END
    SYNC;
    PRODUCT(R, C, C, next_inner_back)
    EACH
        GIVEN(g, R, C, C, r, c);
        by_scalar[item] += g;
    ALL_READ
    """
    + _DOT
    + """
        const float* b = by_vector[item];
        X[r * (3 * C) + c] = by_scalar[item];
        X[r * (3 * C) + C + c] = by_scalar[item] * dot;
        X[r * (3 * C) + 2 * C + c] = b[0] * u0 + b[1] * u1 + b[2] * u2;
    END
    SYNC;
    """
    + _MIX_BACKWARD.replace("N_A", "3")
    .replace("HIDDEN", "kept_hidden[i * C + c]")
    .replace("BY_U(", "a2_of[item] * BY_VECTOR(")
    .replace("BY_VECTOR(0)", "by_vector[item][0]")
    .replace("BY_VECTOR(1)", "by_vector[item][1]")
    .replace("BY_VECTOR(2)", "by_vector[item][2]")
    .replace("BY_VECTOR(k)", "by_vector[item][k]")
)

# the last mixing, whose vectors are of no use, the energy, and back
_LAST = (
    """
    IN(q, 0); IN(mu, 1); IN(project, 2); IN(inner, 3); IN(inner_bias, 4); IN(outer, 5);
    IN(outer_bias, 6); IN(readout, 7); IN(readout_bias, 8); IN(of_energy, 9);
    IN(readout_back, 10); IN(outer_back, 11); IN(inner_back, 12); IN(project_back, 13);
    double* energies = (double*)p14_; OUT(by_q, 15); OUT(by_mu, 16);
    const float softening = (float)x0;
    float hidden_of[ITEMS], a1_of[ITEMS], by_scalar[ITEMS];
    """
    + _MIX.replace("N_A", "2").replace("KEEP_HIDDEN", "hidden_of[item] = h;")
    + "EACH"
    + _DOT
    + """
        GIVEN(a0, R, C, 2 * C, r, c);
        GIVEN(a1, R, C, 2 * C, r, C + c);
        a1_of[item] = a1 + outer_bias[C + c];
        X[r * C + c] = q_of[item] + (a0 + outer_bias[c]) + a1_of[item] * dot;
    END
    SYNC;
    PRODUCT(R, C, W, readout)
    for (int at = t; at < R * W; at += T) {
        GIVEN(h, R, C, W, at / W, at % W);
        X[at] = h + readout_bias[at % W];
    }
    SYNC;
#if defined(__CUDA_ARCH__)
    const int lane = t % 32;
    constexpr int LANES = 32, GROUPS = T / 32;
#else
    const int lane = 0;
    constexpr int LANES = 1, GROUPS = 1;
#endif
    for (int r = t / LANES; r < R && start + r < n_atoms; r += GROUPS) {
        float* row = X + r * W;
        double sum = 0.0;
        for (int k = lane; k < W; k += LANES) sum += (double)(of_energy[k] * SILU(row[k]));
#if defined(__CUDA_ARCH__)
        for (int o = LANES / 2; o > 0; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
#endif
        const double scale = x1, bound = x2;
        double energy = (sum + (double)of_energy[W]) * scale, slope = scale;
        const double size = energy < 0.0 ? -energy : energy;
        if (bound > 0.0 && !(size < bound)) {
            const double bent = ::tanh((size - bound) / (0.5 * bound));
            energy = (energy < 0.0 ? -1.0 : 1.0) * (bound + 0.5 * bound * bent);
            slope *= 1.0 - bent * bent;
        }
        if (lane == 0) energies[start + r] = energy;
        for (int k = lane; k < W; k += LANES)
            row[k] = (float)slope * of_energy[k] * SILU_SLOPE(row[k]);
    }
    SYNC;
    PRODUCT(R, W, C, readout_back)
    EACH
        GIVEN(g, R, W, C, r, c);
        by_scalar[item] = g;
    ALL_READ
    """
    + _DOT
    + """
        X[r * (2 * C) + c] = by_scalar[item];
        X[r * (2 * C) + C + c] = by_scalar[item] * dot;
    END
    SYNC;
    """
    + _MIX_BACKWARD.replace("N_A", "2")
    .replace("HIDDEN", "hidden_of[item]")
    .replace(" + BY_U(0)", "")
    .replace(" + BY_U(1)", "")
    .replace(" + BY_U(2)", "")
    .replace(" + BY_VECTOR(k)", "")
)

_BODIES = {"forward": _FORWARD, "backward": _BACKWARD, "last": _LAST}
_ROOM = 11 * 1024
"""Numbers that a block can share: less than 48 KB, of which Warp takes some."""


def most_atoms(n_channels: int, width: int) -> int:
    """Atoms that a block has room for; 0 if there is no room for one."""
    c = n_channels
    if c % 4 or width % 4 or width > c:
        return 0
    return max((atoms for atoms in ATOMS if 9 * c * atoms <= _ROOM), default=0)


@cache
def chain_kernel(variant: Variant, name: str) -> Any:
    """Kernel "forward", "backward" or "last" of a variant."""
    half = variant.stored == torch.float16
    values = {
        "N_CHANNELS": variant.n_channels,
        "WIDTH": variant.width,
        "N_ROWS": variant.atoms,
        "N_THREADS": THREADS,
        "ROOM": _ROOM,
        "STORED": NATIVE_TYPES[variant.stored],
        "STORE(": "wp::float_to_half(" if half else "(stored)(",
    }
    text = _COMMON + _BODIES[name]
    for word in sorted(values, key=len, reverse=True):
        text = text.replace(word, str(values[word]))
    return _kernel(text, f"chain_{name}_{variant.name}")


def _kernel(native: str, name: str) -> Any:
    @wp.func_native(native)
    def of_block(
        thread: wp.int32,
        n_atoms: wp.int32,
        x0: wp.float64,
        x1: wp.float64,
        x2: wp.float64,
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
        p10_: wp.uint64,
        p11_: wp.uint64,
        p12_: wp.uint64,
        p13_: wp.uint64,
        p14_: wp.uint64,
        p15_: wp.uint64,
        p16_: wp.uint64,
        p17_: wp.uint64,
        p18_: wp.uint64,
    ): ...

    def chain(
        n_atoms: wp.int32,  # numbers and addresses that the kernel's body names at its start
        x0: wp.float64,
        x1: wp.float64,
        x2: wp.float64,
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
        p10: wp.uint64,
        p11: wp.uint64,
        p12: wp.uint64,
        p13: wp.uint64,
        p14: wp.uint64,
        p15: wp.uint64,
        p16: wp.uint64,
        p17: wp.uint64,
        p18: wp.uint64,
    ):
        of_block(
            wp.tid(), n_atoms, x0, x1, x2, p0, p1, p2, p3, p4, p5, p6, p7, p8, p9, p10, p11, p12,
            p13, p14, p15, p16, p17, p18,
        )  # fmt: skip

    kernel = wp.kernel(
        chain, name=name, enable_backward=False, module=f"mlffd_{name}",
        launch_bounds=(THREADS, 1),
    )  # fmt: skip
    kernel.mlffd_block = THREADS
    return kernel
