"""Geometry of the edges, and forces from what the edges' gradients are.

A group of lanes owns an atom and walks its row; all of it in double precision, from the positions.

Atoms with too many bonded neighbors push them away (`openmm_mlffd.crowding`): the first pass
counts the neighbors, and leaves the energy and its slope for the second.

The network sees softened distances d = √(r² + ε²), and those within the core of a pair of
elements compressed (`radial.compress_core`): d → ρ(d). The chain rule back to positions, with
ρ' and the projection of ∂u/∂r = (1 - u uᵀ) / d, is applied once here, not in each block.
"""

from functools import cache
from typing import Any

import torch
import warp as wp

from openmm_mlffd.kernels.message_kernels import NATIVE_TYPES

_EDGE = """
    typedef REAL real;
#if defined(__CUDA_ARCH__)
    constexpr int LANES = 32;
#else
    constexpr int LANES = 1;
#endif
    const int lane = thread % LANES, atom = thread / LANES;
    const long long row = (long long)atom * capacity;
    const int* neighbors = (const int*)neighbors_;
    const int n_counted = ((const int*)counts_)[atom];
    const int n_slots = n_counted < capacity ? n_counted : capacity;
    const double* x = (const double*)positions_;
    const int* species = (const int*)species_;
    const double* box = (const double*)cell_ + 9 * ((const int*)system_)[atom];
    // a pair of elements: core, reach of the repulsion, 1 / screening length, strength, bond,
    // and how far away a neighbor is free
    const double* pairs = (const double*)pairs_ + 6 * n_elements * species[atom];
    const double x0 = x[3 * atom], x1 = x[3 * atom + 1], x2 = x[3 * atom + 2];
    // of slot s: neighbor j, vector r, softened length d; not `near` beyond the cutoff
    #define EDGE(s)                                                                         \\
        const int j = neighbors[row + (s)];                                                 \\
        const long long image = ((const long long*)images_)[row + (s)];                     \\
        const double n0 = (double)((image & 0x1fffff) - 0x100000),                          \\
                     n1 = (double)(((image >> 21) & 0x1fffff) - 0x100000),                  \\
                     n2 = (double)(((image >> 42) & 0x1fffff) - 0x100000);                  \\
        const double r0 = x[3 * j] - x0 + (n0 * box[0] + n1 * box[3] + n2 * box[6]),        \\
                     r1 = x[3 * j + 1] - x1 + (n0 * box[1] + n1 * box[4] + n2 * box[7]),    \\
                     r2 = x[3 * j + 2] - x2 + (n0 * box[2] + n1 * box[5] + n2 * box[8]);    \\
        const double square = r0 * r0 + r1 * r1 + r2 * r2;                                  \\
        const double d = ::sqrt(square + softening * softening), inverse = 1.0 / d;         \\
        const bool near = square < cutoff * cutoff;                                         \\
        const double* pair = pairs + 6 * species[j]
    // of a neighbor that is not free: how far it is on the way there from a bond
    #define PART(d) ((d) < pair[4] ? 0.0 : ((d) - pair[4]) / (pair[5] - pair[4]))
"""

_GEOMETRY = """
    real* geometry = (real*)geometry_;
    real* by_slot = (real*)by_slot_;
    double counted = 0.0;
    for (int s = lane; s < n_slots; s += LANES) {
        EDGE(s);
        double seen = d;
        if (d < pair[0]) {
            const double t = d / pair[0], t3 = t * t * t;
            seen = pair[0] * (5.0 / 7.0 + t3 * t3 * (1.0 - 5.0 / 7.0 * t));
        }
        real* to = geometry + 4 * (row + s);
        to[0] = (real)(r0 * inverse); to[1] = (real)(r1 * inverse); to[2] = (real)(r2 * inverse);
        to[3] = near && seen < cutoff ? (real)((seen - shortest) * per_interval) : (real)-1;
        for (int k = 0; k < 4; ++k) by_slot[4 * (row + s) + k] = (real)0;
        if (near && d < pair[5]) {
            const double t = PART(d);
            counted += 1.0 - t * t * t * (10.0 + t * (6.0 * t - 15.0));
        }
    }
#if defined(__CUDA_ARCH__)
    for (int o = 16; o > 0; o /= 2) counted += __shfl_xor_sync(~0u, counted, o);
#endif
    if (lane == 0) {
        const double excess = counted - ((const double*)limits_)[species[atom]];
        double energy = 0.0, slope = 0.0;
        if (excess > 0.0) {
            const double square = excess * excess, width = softness * softness + square;
            energy = strength * excess * square / width;
            slope = strength * square * (3.0 * width - 2.0 * square) / (width * width);
        }
        double* out = (double*)crowded_ + 2 * (long long)atom;
        out[0] = energy; out[1] = slope;
    }
"""

_FORCES = """
    const real* by_slot = (const real*)by_slot_;
    const int* reverse = (const int*)reverse_;
    const double* crowded = (const double*)crowded_;
    const double crowding = crowded[2 * (long long)atom];
    const double pushes = crowded[2 * (long long)atom + 1];
    double total[10] = {0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0};
    for (int s = lane; s < n_slots; s += LANES) {
        EDGE(s);
        const int back = reverse[row + s];
        if (!near || back < 0) continue;
        const double u0 = r0 * inverse, u1 = r1 * inverse, u2 = r2 * inverse;
        double chain = per_interval;
        if (d < pair[0]) {
            const double t = d / pair[0], t2 = t * t, t5 = t2 * t2 * t;
            chain *= t5 * (6.0 - 5.0 * t);
        }
        // this slot: the edge that the atom sent, -r; the other: the one that it received, r
        const real* mine = by_slot + 4 * (row + s);
        const real* other = by_slot + 4 * ((long long)j * capacity + back);
        const double m0 = mine[0], m1 = mine[1], m2 = mine[2], o0 = other[0], o1 = other[1],
                     o2 = other[2];
        const double m_along = m0 * u0 + m1 * u1 + m2 * u2,
                     o_along = o0 * u0 + o1 * u1 + o2 * u2;
        const double m_length = -(double)mine[3] * chain, o_length = (double)other[3] * chain;
        double e0 = (o0 - u0 * o_along) * inverse + o_length * u0,
               e1 = (o1 - u1 * o_along) * inverse + o_length * u1,
               e2 = (o2 - u2 * o_along) * inverse + o_length * u2;
        double f0 = e0 - (m0 - u0 * m_along) * inverse - m_length * u0,
               f1 = e1 - (m1 - u1 * m_along) * inverse - m_length * u1,
               f2 = e2 - (m2 - u2 * m_along) * inverse - m_length * u2;
        if (d < pair[1]) {  // the repulsion of Ziegler, Biersack and Littmark
            const double y = d * pair[2], c = d / pair[1], c2 = c * c, c5 = c2 * c2 * c;
            const double a = 0.18175 * ::exp(-3.19980 * y), b = 0.50986 * ::exp(-0.94229 * y),
                         g = 0.28022 * ::exp(-0.40290 * y), h = 0.02817 * ::exp(-0.20162 * y);
            const double phi = a + b + g + h;
            const double dphi = -pair[2] * (3.19980 * a + 0.94229 * b + 0.40290 * g + 0.20162 * h);
            const double cut = 1.0 + c5 * c * (-28.0 + c * (48.0 - 21.0 * c));
            const double dcut = c5 * (-168.0 + c * (336.0 - 168.0 * c)) / pair[1];
            const double bare = pair[3] * inverse;
            const double slope = bare * (dphi * cut + phi * dcut - phi * cut * inverse);
            total[3] += 0.5 * bare * phi * cut;
            f0 += slope * u0; f1 += slope * u1; f2 += slope * u2;
            e0 += 0.5 * slope * u0; e1 += 0.5 * slope * u1; e2 += 0.5 * slope * u2;
        }
        const double pushed = pushes + crowded[2 * (long long)j + 1];
        if (pushed > 0.0 && d < pair[5]) {
            const double t = PART(d), gone = t * (1.0 - t);
            const double slope = pushed * -30.0 * gone * gone / (pair[5] - pair[4]);
            f0 += slope * u0; f1 += slope * u1; f2 += slope * u2;
            e0 += 0.5 * slope * u0; e1 += 0.5 * slope * u1; e2 += 0.5 * slope * u2;
        }
        total[0] += f0; total[1] += f1; total[2] += f2;
        if (with_virial) {
            total[4] += r0 * e0; total[5] += r1 * e1; total[6] += r2 * e2;
            total[7] += 0.5 * (r1 * e2 + r2 * e1);
            total[8] += 0.5 * (r0 * e2 + r2 * e0);
            total[9] += 0.5 * (r0 * e1 + r1 * e0);
        }
    }
    const int n_totals = with_virial ? 10 : 4;
#if defined(__CUDA_ARCH__)
    for (int o = 16; o > 0; o /= 2)
        for (int k = 0; k < n_totals; ++k) total[k] += __shfl_xor_sync(~0u, total[k], o);
#endif
    if (lane == 0) {
        double* forces = (double*)forces_ + 3 * (long long)atom;
        double* terms = (double*)terms_ + atom;
        for (int k = 0; k < 3; ++k) forces[k] = total[k];
        terms[0] = ((const double*)learned_)[atom] + total[3] + crowding
                   + ((const double*)references_)[species[atom]];
        for (int k = 4; k < n_totals; ++k) terms[(long long)(k - 3) * n_atoms] = total[k];
    }
"""


@cache
def geometry_kernel(real: torch.dtype) -> Any:
    """geometry[i, s] = (u, intervals of ρ(d) from the shortest), or -1 beyond the cutoff."""

    @wp.func_native((_EDGE + _GEOMETRY).replace("REAL", NATIVE_TYPES[real]))
    def geometry_row(
        thread: wp.int32,
        capacity: wp.int32,
        n_elements: wp.int32,
        cutoff: wp.float64,
        softening: wp.float64,
        shortest: wp.float64,
        per_interval: wp.float64,
        strength: wp.float64,
        softness: wp.float64,
        positions_: wp.uint64,
        cell_: wp.uint64,
        system_: wp.uint64,
        species_: wp.uint64,
        pairs_: wp.uint64,
        limits_: wp.uint64,
        neighbors_: wp.uint64,
        images_: wp.uint64,
        counts_: wp.uint64,
        geometry_: wp.uint64,
        by_slot_: wp.uint64,
        crowded_: wp.uint64,
    ): ...

    def edge_geometry(
        # in
        capacity: wp.int32,
        n_elements: wp.int32,
        cutoff: wp.float64,
        softening: wp.float64,
        shortest: wp.float64,
        per_interval: wp.float64,
        strength: wp.float64,
        softness: wp.float64,
        positions: wp.uint64,  # float64 (n_atoms, 3)
        cell: wp.uint64,  # float64 (n_systems, 3, 3)
        system: wp.uint64,  # int32 (n_atoms,)
        species: wp.uint64,  # int32 (n_atoms,)
        pairs: wp.uint64,  # float64 (n_elements, n_elements, 6)
        limits: wp.uint64,  # float64 (n_elements,)
        neighbors: wp.uint64,  # int32 (n_atoms, capacity)
        images: wp.uint64,  # int64 (n_atoms, capacity)
        counts: wp.uint64,  # int32 (n_atoms,)
        # out
        geometry: wp.uint64,  # real (n_atoms, capacity, 4)
        by_slot: wp.uint64,  # real (n_atoms, capacity, 4), zero where there are neighbors
        crowded: wp.uint64,  # float64 (n_atoms, 2): energy of crowding, its slope by neighbors
    ):
        geometry_row(
            wp.tid(), capacity, n_elements, cutoff, softening, shortest, per_interval, strength,
            softness, positions, cell, system, species, pairs, limits, neighbors, images, counts,
            geometry, by_slot, crowded,
        )  # fmt: skip

    return _kernel(edge_geometry, f"edge_geometry_{NATIVE_TYPES[real]}")


@cache
def forces_kernel(real: torch.dtype) -> Any:
    """Force on each atom, its energy, and its share of the virial, without atomics.

    F_i = Σ_s (gradient by the edge it received) - (gradient by the edge it sent).
    """

    @wp.func_native((_EDGE + _FORCES).replace("REAL", NATIVE_TYPES[real]))
    def forces_row(
        thread: wp.int32,
        n_atoms: wp.int32,
        capacity: wp.int32,
        n_elements: wp.int32,
        with_virial: wp.int32,
        cutoff: wp.float64,
        softening: wp.float64,
        per_interval: wp.float64,
        positions_: wp.uint64,
        cell_: wp.uint64,
        system_: wp.uint64,
        species_: wp.uint64,
        pairs_: wp.uint64,
        neighbors_: wp.uint64,
        images_: wp.uint64,
        reverse_: wp.uint64,
        counts_: wp.uint64,
        by_slot_: wp.uint64,
        crowded_: wp.uint64,
        learned_: wp.uint64,
        references_: wp.uint64,
        forces_: wp.uint64,
        terms_: wp.uint64,
    ): ...

    def edge_forces(
        # in
        n_atoms: wp.int32,
        capacity: wp.int32,
        n_elements: wp.int32,
        with_virial: wp.int32,
        cutoff: wp.float64,
        softening: wp.float64,
        per_interval: wp.float64,
        positions: wp.uint64,  # float64 (n_atoms, 3)
        cell: wp.uint64,  # float64 (n_systems, 3, 3)
        system: wp.uint64,  # int32 (n_atoms,)
        species: wp.uint64,  # int32 (n_atoms,)
        pairs: wp.uint64,  # float64 (n_elements, n_elements, 6)
        neighbors: wp.uint64,  # int32 (n_atoms, capacity)
        images: wp.uint64,  # int64 (n_atoms, capacity)
        reverse: wp.uint64,  # int32 (n_atoms, capacity)
        counts: wp.uint64,  # int32 (n_atoms,)
        by_slot: wp.uint64,  # real (n_atoms, capacity, 4), as the message kernels leave it
        crowded: wp.uint64,  # float64 (n_atoms, 2), as edge_geometry leaves it
        learned: wp.uint64,  # float64 (n_atoms,)
        references: wp.uint64,  # float64 (n_elements,)
        # out
        forces: wp.uint64,  # float64 (n_atoms, 3)
        terms: wp.uint64,  # float64 (1 or 7, n_atoms): energy, virial xx yy zz yz xz xy
    ):
        forces_row(
            wp.tid(), n_atoms, capacity, n_elements, with_virial, cutoff, softening, per_interval,
            positions, cell, system, species, pairs, neighbors, images, reverse, counts, by_slot,
            crowded, learned, references, forces, terms,
        )  # fmt: skip

    return _kernel(edge_forces, f"edge_forces_{NATIVE_TYPES[real]}")


_RANGE_SUMS = """
    // of numbers k (n,): their sum over each range of so many, or over each system
#if defined(__CUDA_ARCH__)
    constexpr int LANES = 32;
#else
    constexpr int LANES = 1;
#endif
    const int lane = thread % LANES, task = thread / LANES, k = task % n_terms;
    const int group = task / n_terms;
    const double* x = (const double*)terms_ + (long long)k * n;
    int begin = 0, end = n;
    if (length > 0) {
        begin = group * length;
        end = n - begin < length ? n : begin + length;
    } else if (system_ != 0) {  // systems ascend
        const int* system = (const int*)system_;
        for (int low = 0, high = n; ; ) {
            if (low < high) {
                const int middle = (low + high) / 2;
                if (system[middle] < group) low = middle + 1; else high = middle;
            } else { begin = low; break; }
        }
        for (int low = begin, high = n; ; ) {
            if (low < high) {
                const int middle = (low + high) / 2;
                if (system[middle] <= group) low = middle + 1; else high = middle;
            } else { end = low; break; }
        }
    }
    double sum = 0.0;
    for (int i = begin + lane; i < end; i += LANES) sum += x[i];
#if defined(__CUDA_ARCH__)
    for (int o = LANES / 2; o > 0; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
#endif
    if (lane == 0) {
        if (length > 0) {
            ((double*)sums_)[(long long)k * n_groups + group] = sum;
        } else {
            double* virial = (double*)virial_ + 9 * group;
            if (k == 0) ((double*)sums_)[group] = sum;
            else if (k < 4) virial[4 * (k - 1)] = sum;
            else {  // yz xz xy
                const int a = k == 4 ? 1 : 0, b = k == 6 ? 1 : 2;
                virial[3 * a + b] = sum; virial[3 * b + a] = sum;
            }
            if (n_terms == 1) for (int m = 0; m < 9; ++m) virial[m] = 0.0;
        }
    }
"""


@wp.func_native(_RANGE_SUMS)
def _sum(
    thread: wp.int32,
    n: wp.int32,
    n_terms: wp.int32,
    n_groups: wp.int32,
    length: wp.int32,
    terms_: wp.uint64,
    system_: wp.uint64,
    sums_: wp.uint64,
    virial_: wp.uint64,
): ...


def _sum_terms(
    # in
    n: wp.int32,
    n_terms: wp.int32,
    n_groups: wp.int32,
    length: wp.int32,  # of the ranges to be summed; 0: systems
    terms: wp.uint64,  # float64 (n_terms, n)
    system: wp.uint64,  # int32 (n,), or 0 for one system
    # out
    sums: wp.uint64,  # float64 (n_terms, n_groups) of ranges; energies (n_groups,) of systems
    virial: wp.uint64,  # float64 (n_groups, 3, 3) of systems
):
    _sum(wp.tid(), n, n_terms, n_groups, length, terms, system, sums, virial)


_MOVES = """
    // positions that are no numbers are infinitely far; squares compare like their bits
    const double *x = (const double*)positions_, *y = (const double*)since_;
    double largest = 0.0;
#if defined(__CUDA_ARCH__)
    constexpr int EACH = 4;
#else
    const int EACH = n;
#endif
    for (int m = 0; m < EACH; ++m) {
        const long long i = 3 * ((long long)thread + (long long)m * n_threads);
        if (i >= 3 * (long long)n) break;
        const double a = x[i] - y[i], b = x[i + 1] - y[i + 1], c = x[i + 2] - y[i + 2];
        const double square = a * a + b * b + c * c;
        if (!(square <= largest)) largest = square == square ? square : 1e300 * 1e300;
    }
#if defined(__CUDA_ARCH__)
    for (int o = 16; o > 0; o /= 2) {  // whole warps, see the operator
        const double other = __shfl_xor_sync(~0u, largest, o);
        if (other > largest) largest = other;
    }
    if (thread % 32 == 0)
        atomicMax((unsigned long long*)largest_, (unsigned long long)__double_as_longlong(largest));
#else
    if (largest > *(double*)largest_) *(double*)largest_ = largest;
#endif
"""


@wp.func_native(_MOVES)
def _move(
    thread: wp.int32,
    n: wp.int32,
    n_threads: wp.int32,
    positions_: wp.uint64,
    since_: wp.uint64,
    largest_: wp.uint64,
): ...


def _largest_move(
    # in
    n: wp.int32,
    n_threads: wp.int32,
    positions: wp.uint64,  # float64 (n, 3)
    since: wp.uint64,  # float64 (n, 3)
    # in and out
    largest: wp.uint64,  # float64, square of the largest distance
):
    _move(wp.tid(), n, n_threads, positions, since, largest)


def _kernel(function: Any, name: str) -> Any:
    return wp.kernel(function, name=name, enable_backward=False, module=f"mlffd_{name}")


sum_terms = _kernel(_sum_terms, "sum_terms")
largest_move = _kernel(_largest_move, "largest_move")
