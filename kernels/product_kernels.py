"""Matrix products of few rows: a warp for each column of eight rows, in one round of loads.

For small systems, whose products are all waiting in libraries that are made for large ones. What
comes after a product, a SiLU or its derivative, is done where its result is.
"""

from typing import Any

import warp as wp

from openmm_mlffd.kernels.message_kernels import ROUNDING

ROWS = 8
"""Of each group of lanes."""

ADD, SILU, SILU_BACKWARD, REDUCED = 1, 2, 4, 8
"""What is done with products; the last rounds what comes out of a SiLU or its derivative."""

_PRODUCT = (
    """
#if defined(__CUDA_ARCH__)
    constexpr int LANES = 32;
#else
    constexpr int LANES = 1;
#endif
    constexpr int ROWS = 8;
    struct alignas(16) Pack { float v[4]; };
    const int lane = thread % LANES, task = thread / LANES;
    const int column = task % n_out, first = task / n_out * ROWS;
    const float* w = (const float*)weight_ + (long long)column * n_in;
    const float* x = (const float*)x_;
    float sum[ROWS];
    for (int r = 0; r < ROWS; ++r) sum[r] = 0.0f;
    for (int k = 4 * lane; k < n_in; k += 4 * LANES) {
        const Pack b = *(const Pack*)(w + k);
        for (int r = 0; r < ROWS; ++r) {
            const int row = first + r < n_rows ? first + r : n_rows - 1;
            const Pack a = *(const Pack*)(x + (long long)row * stride + k);
            sum[r] += a.v[0] * b.v[0] + a.v[1] * b.v[1] + a.v[2] * b.v[2] + a.v[3] * b.v[3];
        }
    }
    """
    + ROUNDING
    + """
    auto put = [=](int row, float value) {
        float* out = (float*)out_ + (long long)row * out_stride + column;
        if (mode & 6) {
            const long long at = (long long)row * n_out + column;
            float* hidden = (float*)hidden_;
            const float h = ((mode & 2) ? value : hidden[at]) + ((const float*)bias_)[column];
            const float s = 1.0f / (1.0f + ::expf(-h));
            if (mode & 2) hidden[at] = value;
            value = (mode & 2) ? h * s : value * s * (1.0f + h * (1.0f - s));
            if (mode & 8) value = round_to_10_bits(value);
        }
        if (mode & 1) value += *out;
        *out = value;
    };
#if defined(__CUDA_ARCH__)
    // each step halves the rows of a lane and the lanes of a row
    #pragma unroll
    for (int half = ROWS / 2, o = 16; half > 0; half /= 2, o /= 2) {
        const bool upper = (lane & o) != 0;
        #pragma unroll
        for (int r = 0; r < half; ++r) {
            const float mine = upper ? sum[r + half] : sum[r];
            const float other = upper ? sum[r] : sum[r + half];
            sum[r] = mine + __shfl_xor_sync(~0u, other, o);
        }
    }
    sum[0] += __shfl_xor_sync(~0u, sum[0], 2);
    sum[0] += __shfl_xor_sync(~0u, sum[0], 1);
    const int row = first + ((lane & 16) ? 4 : 0) + ((lane & 8) ? 2 : 0) + ((lane & 4) ? 1 : 0);
    if ((lane & 3) == 0 && row < n_rows) put(row, sum[0]);
#else
    for (int r = 0; r < ROWS; ++r) if (first + r < n_rows) put(first + r, sum[r]);
#endif
"""
)


@wp.func_native(_PRODUCT)
def _column(
    thread: wp.int32,
    n_rows: wp.int32,
    n_in: wp.int32,
    n_out: wp.int32,
    stride: wp.int32,
    out_stride: wp.int32,
    mode: wp.int32,
    x_: wp.uint64,
    weight_: wp.uint64,
    bias_: wp.uint64,
    hidden_: wp.uint64,
    out_: wp.uint64,
): ...


def _product_of_few(
    # in
    n_rows: wp.int32,
    n_in: wp.int32,
    n_out: wp.int32,
    stride: wp.int32,  # from row to row of x
    out_stride: wp.int32,
    mode: wp.int32,
    x: wp.uint64,  # float32 (n_rows, n_in)
    weight: wp.uint64,  # float32 (n_out, n_in)
    bias: wp.uint64,  # float32 (n_out,), with a SiLU
    # in, or out where the SiLU is
    hidden: wp.uint64,  # float32 (n_rows, n_out)
    # out, or in and out
    out: wp.uint64,  # float32 (n_rows, n_out)
):
    _column(wp.tid(), n_rows, n_in, n_out, stride, out_stride, mode, x, weight, bias, hidden, out)


product_of_few: Any = wp.kernel(
    _product_of_few, name="product_of_few", enable_backward=False, module="mlffd_product_of_few"
)
