"""Native source of messages; `message_kernels` puts in what kernels are compiled for."""

COMMON = """
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

FORWARD = """
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

BACKWARD = """
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
STORE_SUMS = """
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
SUM_CHANNELS = """
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
