"""Native source of `training_kernels`, for CUDA and the CPU; words in capitals are filled in."""

COMMON = """
    typedef REAL_TYPE real;
    constexpr int C = N_CHANNELS, P = DEGREE, NF = N_FILTERS, NX = N_FEATURES;
#if defined(__CUDA_ARCH__)
    constexpr int LANES = CUDA_LANES;
#else
    constexpr int LANES = 1;
#endif
    constexpr int CPL = C / LANES;  // channels per lane
    const int lane = thread % LANES, owner = thread / LANES, c0 = lane * CPL;
    const int* rows = (const int*)plan_;          // first edge of each receiver
    const int* sent = rows + n_atoms + 1;         // first place of each sender in `outgoing`
    const int* bins = sent + n_atoms + 1;         // first place of each interval in `by_knot`
    const int* receivers = bins + n_intervals + 1;
    const int* senders = receivers + n_edges;
    const int* outgoing = senders + n_edges;
    const int* by_knot = outgoing + n_edges;
    const real* geometry = (const real*)geometry_;
    const real* d_geometry = (const real*)d_geometry_;
    const real* features = (const real*)features_ + c0;
    const real* d_features = (const real*)d_features_ + c0;
    const real* gradient = (const real*)gradient_ + c0;
    const real* table = (const real*)table_ + c0;
    real* out = (real*)out_;
    real* slots = (real*)slots_;
    (void)rows; (void)sent; (void)bins; (void)receivers; (void)senders; (void)outgoing;
    (void)by_knot; (void)geometry; (void)d_geometry; (void)features; (void)d_features;
    (void)gradient; (void)table; (void)out; (void)slots; (void)lane; (void)owner;
#if defined(__CUDA_ARCH__)
    struct alignas(ALIGNMENT) Pack { real v[CPL]; };
    struct alignas(16) Four { real v[4]; };
    #define LOAD(to, from) const Pack to##_pack = *(const Pack*)(from); const real* to = to##_pack.v
    #define LOAD_FOUR(to, from) const Four to##_four = *(const Four*)(from); \\
                                const real* to = to##_four.v
#else
    #define LOAD(to, from) const real* to = (from)
    #define LOAD_FOUR(to, from) const real* to = (from)
#endif
    #define CHANNELS for (int b = 0; b < CPL; ++b)
    #define ABSENT(t) (!((t) >= (real)0 && (t) < (real)n_intervals))
    // basis splines of the degrees P - 2, P - 1 and P; slopes and curvatures are their differences
    #define BASIS_SPLINES(t)                                                        \\
        const int knot = (int)(t);                                                  \\
        const real a = (t) - (real)knot;                                            \\
        real w[P + 1], dw[P + 1], ddw[P + 1];                                       \\
        w[0] = (real)1;                                                             \\
        for (int d = 1; d <= P; ++d) {                                              \\
            if (d == P - 1)                                                         \\
                for (int r = 0; r <= P; ++r)                                        \\
                    ddw[r] = (r >= 2 ? w[r - 2] : (real)0)                          \\
                        - (r >= 1 && r < P ? (real)2 * w[r - 1] : (real)0)          \\
                        + (r < P - 1 ? w[r] : (real)0);                             \\
            if (d == P)                                                             \\
                for (int r = 0; r <= P; ++r)                                        \\
                    dw[r] = (r >= 1 ? w[r - 1] : (real)0) - (r < P ? w[r] : (real)0); \\
            real carried = (real)0;                                                 \\
            for (int r = 0; r < d; ++r) {                                           \\
                const real share = w[r] * ((real)1 / (real)d);                      \\
                w[r] = carried + ((real)(r + 1) - a) * share;                       \\
                carried = (a + (real)(d - 1 - r)) * share;                          \\
            }                                                                       \\
            w[d] = carried;                                                         \\
        }                                                                           \\
        (void)dw; (void)ddw;                                                        \\
        const real* knots = table + (long long)knot * (NF * C)
#if defined(__CUDA_ARCH__)
    #define KNOTS(n)                                                                \\
        Pack pack[P + 1];                                                           \\
        for (int q = 0; q <= P; ++q) pack[q] = *(const Pack*)(knots + q * (NF * C) + (n) * C)
    #define AT_KNOT(q, b) pack[q].v[b]
#else
    #define KNOTS(n) const real* at = knots + (n) * C
    #define AT_KNOT(q, b) at[(q) * (NF * C) + (b)]
#endif
    // a filter, and as many of its derivatives as ORDER says, to f, df and ddf
    #define FILTER(n) {                                                             \\
        KNOTS(n);                                                                   \\
        CHANNELS {                                                                  \\
            real v = (real)0, s = (real)0, r = (real)0;                             \\
            for (int q = 0; q <= P; ++q) {                                          \\
                const real x_q = AT_KNOT(q, b);                                     \\
                v += w[q] * x_q;                                                    \\
                if (ORDER >= 1) s += dw[q] * x_q;                                   \\
                if (ORDER >= 2) r += ddw[q] * x_q;                                  \\
            }                                                                       \\
            f[b] = v;                                                               \\
            if (ORDER >= 1) df[b] = s;                                              \\
            if (ORDER >= 2) ddf[b] = r;                                             \\
        } }
"""

_FORWARD = """
    #define ORDER TANGENT
    real sum[4][CPL];
    for (int k = 0; k < 4; ++k) CHANNELS sum[k][b] = (real)0;
    for (int e = rows[owner]; e < rows[owner + 1]; ++e) {
        LOAD_FOUR(u, geometry + 4LL * e);
        if (ABSENT(u[3])) continue;
        const long long sender = (long long)senders[e] * (NX * C);
        const real* x = features + sender;
        BASIS_SPLINES(u[3]);
        real f[CPL], df[CPL], ddf[CPL];
        (void)df; (void)ddf;
#if TANGENT
        const real* dx = d_features + sender;
        LOAD_FOUR(du, d_geometry + 4LL * e);
        const real dt = du[3];
#endif
        LOAD(x0, x); LOAD(x1, x + C);
#if TANGENT
        LOAD(d0, dx); LOAD(d1, dx + C);
        FILTER(0);
        CHANNELS sum[0][b] += f[b] * d0[b] + dt * df[b] * x0[b];
        FILTER(1);
        CHANNELS {
            const real y = f[b] * x1[b], dy = f[b] * d1[b] + dt * df[b] * x1[b];
            for (int k = 0; k < 3; ++k) sum[1 + k][b] += dy * u[k] + y * du[k];
        }
#else
        FILTER(0);
        CHANNELS sum[0][b] += f[b] * x0[b];
        FILTER(1);
        CHANNELS {
            const real y = f[b] * x1[b];
            for (int k = 0; k < 3; ++k) sum[1 + k][b] += y * u[k];
        }
#endif
#if !FIRST
        FILTER(2);
        for (int k = 0; k < 3; ++k) {
            LOAD(m, x + (2 + k) * C);
#if TANGENT
            LOAD(dm, dx + (2 + k) * C);
            CHANNELS sum[1 + k][b] += f[b] * dm[b] + dt * df[b] * m[b];
#else
            CHANNELS sum[1 + k][b] += f[b] * m[b];
#endif
        }
#endif
    }
    for (int k = 0; k < 4; ++k) CHANNELS out[((long long)owner * 4 + k) * C + c0 + b] = sum[k][b];
"""

_BACKWARD = """
    #define ORDER (TANGENT + GEOMETRY)
    real sum[NX][CPL];
    for (int k = 0; k < NX; ++k) CHANNELS sum[k][b] = (real)0;
    const real* x = features + (long long)owner * (NX * C);
    const real* dx = d_features + (long long)owner * (NX * C);
    (void)dx;
    for (int n = sent[owner]; n < sent[owner + 1]; ++n) {
        const int e = outgoing[n];
        LOAD_FOUR(u, geometry + 4LL * e);
        const real* g = gradient + (long long)receivers[e] * (4 * C);
        BASIS_SPLINES(u[3]);
        real f[CPL], df[CPL], ddf[CPL], total[4] = {(real)0, (real)0, (real)0, (real)0};
#if defined(__CUDA_ARCH__)
        #define TOTAL(k) total[k]
#else
        real wide[4][CPL];  // channel by channel, so that loops become vector instructions
        for (int k = 0; k < 4 * GEOMETRY; ++k) CHANNELS wide[k][b] = (real)0;
        #define TOTAL(k) wide[k][b]
#endif
        (void)df; (void)ddf;
        LOAD(gs, g); LOAD(h0, g + C); LOAD(h1, g + 2 * C); LOAD(h2, g + 3 * C);
        LOAD(x0, x); LOAD(x1, x + C);
#if TANGENT
        LOAD_FOUR(du, d_geometry + 4LL * e);
        const real dt = du[3];
        LOAD(d0, dx); LOAD(d1, dx + C);
        FILTER(0);
        CHANNELS {
            sum[0][b] += dt * df[b] * gs[b];
            if (GEOMETRY) TOTAL(3) += gs[b] * (d0[b] * df[b] + dt * ddf[b] * x0[b]);
        }
        FILTER(1);
        CHANNELS {
            const real along = u[0] * h0[b] + u[1] * h1[b] + u[2] * h2[b];
            const real turn = du[0] * h0[b] + du[1] * h1[b] + du[2] * h2[b];
            sum[1][b] += f[b] * turn + dt * df[b] * along;
            if (GEOMETRY) {
                const real y = f[b] * d1[b] + dt * df[b] * x1[b];
                TOTAL(0) += y * h0[b]; TOTAL(1) += y * h1[b]; TOTAL(2) += y * h2[b];
                TOTAL(3) += along * (d1[b] * df[b] + dt * ddf[b] * x1[b]) + df[b] * x1[b] * turn;
            }
        }
#else
        FILTER(0);
        CHANNELS {
            sum[0][b] += f[b] * gs[b];
            if (GEOMETRY) TOTAL(3) += df[b] * x0[b] * gs[b];
        }
        FILTER(1);
        CHANNELS {
            const real along = u[0] * h0[b] + u[1] * h1[b] + u[2] * h2[b];
            sum[1][b] += f[b] * along;
            if (GEOMETRY) {
                const real y = f[b] * x1[b];
                TOTAL(0) += y * h0[b]; TOTAL(1) += y * h1[b]; TOTAL(2) += y * h2[b];
                TOTAL(3) += df[b] * x1[b] * along;
            }
        }
#endif
#if !FIRST
        FILTER(2);
        LOAD(m0, x + 2 * C); LOAD(m1, x + 3 * C); LOAD(m2, x + 4 * C);
#if TANGENT
        LOAD(n0, dx + 2 * C); LOAD(n1, dx + 3 * C); LOAD(n2, dx + 4 * C);
#endif
        CHANNELS {
#if TANGENT
            const real by = dt * df[b];
#else
            const real by = f[b];
#endif
            sum[NX - 3][b] += by * h0[b];
            sum[NX - 2][b] += by * h1[b];
            sum[NX - 1][b] += by * h2[b];
#if GEOMETRY
            const real mh = m0[b] * h0[b] + m1[b] * h1[b] + m2[b] * h2[b];
#if TANGENT
            TOTAL(3) += df[b] * (n0[b] * h0[b] + n1[b] * h1[b] + n2[b] * h2[b])
                + dt * ddf[b] * mh;
#else
            TOTAL(3) += df[b] * mh;
#endif
#endif
        }
#endif
#if GEOMETRY
#if defined(__CUDA_ARCH__)
        constexpr unsigned SHARE = LANES == 32 ? ~0u : (1u << (LANES % 32)) - 1u;
        const unsigned mask = SHARE << ((threadIdx.x & 31) & ~(LANES - 1));
        for (int o = LANES / 2; o > 0; o /= 2)
            for (int k = 0; k < 4; ++k) total[k] += __shfl_xor_sync(mask, total[k], o);
#else
        constexpr int SIDE = CPL % 8 == 0 ? 8 : 1;
        for (int k = 0; k < 4; ++k) {
            real side[SIDE];
            for (int b = 0; b < SIDE; ++b) side[b] = (real)0;
            for (int c = 0; c < CPL; c += SIDE)
                for (int b = 0; b < SIDE; ++b) side[b] += wide[k][c + b];
            for (int b = 0; b < SIDE; ++b) total[k] += side[b];
        }
#endif
        if (lane == 0) for (int k = 0; k < 4; ++k) slots[4LL * e + k] = total[k];
#endif
        (void)total;
    }
    for (int k = 0; k < NX; ++k)
        CHANNELS out[((long long)owner * NX + k) * C + c0 + b] = sum[k][b];
"""

# Each group has one of the filters, so that sums stay in registers. As edges go on, either the
# chunk or the interval is the next one: the sum of both numbers is a place that no other chunk
# writes to, and those of an interval are side by side.
_TABLE = """
    constexpr int SIZE = (P + 1) * NF * C;
    const int n_present = bins[n_intervals], chunk = owner / NF, k = owner % NF;
    const int begin = chunk * CHUNK, end = begin + CHUNK < n_present ? begin + CHUNK : n_present;
    int current = -1;
    real sum[P + 1][CPL], value[CPL], slope[CPL];
    #define PUT_SUMS                                                                \
        for (int q = 0; q <= P; ++q) CHANNELS                                       \
            out[(long long)(chunk + current) * SIZE + (q * NF + k) * C + c0 + b] = sum[q][b]
    for (int n = begin; n < end; ++n) {
        const int e = by_knot[n];
        LOAD_FOUR(u, geometry + 4LL * e);
        const real* g = gradient + (long long)receivers[e] * (4 * C);
        const real* x = features + (long long)senders[e] * (NX * C);
        BASIS_SPLINES(u[3]);
        (void)knots;
        if (knot != current) {
            if (current >= 0) { PUT_SUMS; }
            for (int q = 0; q <= P; ++q) CHANNELS sum[q][b] = (real)0;
            current = knot;
        }
#if TANGENT
        const real* dx = d_features + (long long)senders[e] * (NX * C);
        LOAD_FOUR(du, d_geometry + 4LL * e);
        const real dt = du[3];
#endif
        if (k == 0) {
            LOAD(gs, g); LOAD(x0, x);
#if TANGENT
            LOAD(d0, dx);
            CHANNELS { value[b] = d0[b] * gs[b]; slope[b] = dt * x0[b] * gs[b]; }
#else
            CHANNELS value[b] = x0[b] * gs[b];
#endif
        } else {
            LOAD(h0, g + C); LOAD(h1, g + 2 * C); LOAD(h2, g + 3 * C);
            if (k == 1) {
                LOAD(x1, x + C);
#if TANGENT
                LOAD(d1, dx + C);
#endif
                CHANNELS {
                    const real along = u[0] * h0[b] + u[1] * h1[b] + u[2] * h2[b];
#if TANGENT
                    const real turn = du[0] * h0[b] + du[1] * h1[b] + du[2] * h2[b];
                    value[b] = d1[b] * along + x1[b] * turn;
                    slope[b] = dt * x1[b] * along;
#else
                    value[b] = x1[b] * along;
#endif
                }
            }
#if !FIRST
            else {
                LOAD(m0, x + 2 * C); LOAD(m1, x + 3 * C); LOAD(m2, x + 4 * C);
#if TANGENT
                LOAD(n0, dx + 2 * C); LOAD(n1, dx + 3 * C); LOAD(n2, dx + 4 * C);
#endif
                CHANNELS {
                    const real mh = m0[b] * h0[b] + m1[b] * h1[b] + m2[b] * h2[b];
#if TANGENT
                    value[b] = n0[b] * h0[b] + n1[b] * h1[b] + n2[b] * h2[b];
                    slope[b] = dt * mh;
#else
                    value[b] = mh;
#endif
                }
            }
#endif
        }
        for (int q = 0; q <= P; ++q) CHANNELS
            sum[q][b] += w[q] * value[b] + (TANGENT ? dw[q] * slope[b] : (real)0);
    }
    if (current >= 0) { PUT_SUMS; }
"""

# the places of an interval are added up in the first of them, which nobody else reads
_COLLECT = """
    constexpr int SIZE = (P + 1) * NF * C;
    const int k = thread / SIZE, n = thread % SIZE;
    if (bins[k] < bins[k + 1]) {
        const int begin = bins[k] / CHUNK, end = (bins[k + 1] - 1) / CHUNK;
        real* at = out + (long long)(begin + k) * SIZE + n;
        real sum = (real)0;
        for (int g = 0; g <= end - begin; ++g) sum += at[(long long)g * SIZE];
        *at = sum;
    }
"""

_OVERLAP = """
    constexpr int SIZE = (P + 1) * NF * C;
    const int row = thread / (NF * C), n = thread % (NF * C);
    real sum = (real)0;
    for (int q = 0; q <= P; ++q) {
        const int k = row - q;
        if (k >= 0 && k < n_intervals && bins[k] < bins[k + 1])
            sum += out[(long long)(bins[k] / CHUNK + k) * SIZE + q * (NF * C) + n];
    }
    slots[thread] = sum;
"""

BODIES = {
    "forward": _FORWARD,
    "backward": _BACKWARD,
    "table": _TABLE,
    "collect": _COLLECT,
    "overlap": _OVERLAP,
}
