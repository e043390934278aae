"""Rows of neighbors for each atom, and where each edge's other direction is.

Boxes and bins take a thread for each system or atom, rows a group of lanes for each atom, and the
other directions a thread for each slot.

An image (n₀, n₁, n₂) of the sender is packed into one int64, 21 bits each, offset by 2²⁰.
Rows are sorted by sender and image, so that the other direction is found by bisection. Whatever
is computed for r is computed for -r with every sign changed, so that both are in the list or
neither.
"""

from typing import Any

import warp as wp

_BOXES = """
    // vectors of directions that are not periodic are replaced by perpendicular unit vectors
    const double* cell = (const double*)cell_ + 9 * system;
    const unsigned char* pbc = (const unsigned char*)pbc_ + 3 * system;
    double a[3][3];
    int n_periodic = 0, last = 0, free = 0;
    for (int k = 0; k < 3; ++k) {
        n_periodic += pbc[k] ? 1 : 0;
        if (pbc[k]) last = k; else free = k;
        for (int x = 0; x < 3; ++x) a[k][x] = pbc[k] ? cell[3 * k + x] : 0.0;
    }
    #define CROSS(to, u, v)                                                     \\
        to[0] = u[1] * v[2] - u[2] * v[1]; to[1] = u[2] * v[0] - u[0] * v[2];   \\
        to[2] = u[0] * v[1] - u[1] * v[0];
    #define NORMALIZE(u) { const double l = ::sqrt(u[0] * u[0] + u[1] * u[1] + u[2] * u[2]); \\
        for (int x = 0; x < 3; ++x) u[x] = l > 0.0 ? u[x] / l : (x == 0 ? 1.0 : 0.0); }
    if (n_periodic == 0) {
        for (int k = 0; k < 3; ++k) a[k][k] = 1.0;
    } else if (n_periodic == 2) {
        CROSS(a[free], a[(free + 1) % 3], a[(free + 2) % 3]);
        NORMALIZE(a[free]);
    } else if (n_periodic == 1) {
        int thin = 0;
        for (int x = 1; x < 3; ++x) if (::fabs(a[last][x]) < ::fabs(a[last][thin])) thin = x;
        double helper[3] = {0.0, 0.0, 0.0};
        helper[thin] = 1.0;
        CROSS(a[(last + 1) % 3], a[last], helper);
        NORMALIZE(a[(last + 1) % 3]);
        CROSS(a[(last + 2) % 3], a[last], a[(last + 1) % 3]);
        NORMALIZE(a[(last + 2) % 3]);
    }
    double rows[3][3];
    CROSS(rows[0], a[1], a[2]); CROSS(rows[1], a[2], a[0]); CROSS(rows[2], a[0], a[1]);
    const double volume = a[0][0] * rows[0][0] + a[0][1] * rows[0][1] + a[0][2] * rows[0][2];
    double* inverse = (double*)inverse_ + 9 * system;  // column k: the fraction along vector k
    double* heights = (double*)heights_ + 3 * system;
    for (int k = 0; k < 3; ++k) {
        double length = 0.0;
        for (int x = 0; x < 3; ++x) {
            inverse[3 * x + k] = rows[k][x] / volume;
            length += rows[k][x] * rows[k][x];
        }
        heights[k] = ::fabs(volume) / ::sqrt(length);
    }
"""

_FRACTIONS = """
    const int s = ((const int*)system_)[atom];
    const double* inverse = (const double*)inverse_ + 9 * s;
    const unsigned char* pbc = (const unsigned char*)pbc_ + 3 * s;
    const double* x = (const double*)positions_ + 3 * atom;
    for (int k = 0; k < 3; ++k) {
        const double f = x[0] * inverse[k] + x[1] * inverse[3 + k] + x[2] * inverse[6 + k];
        const double image = pbc[k] ? ::floor(f) : 0.0;
        ((int*)wraps_)[3 * atom + k] = (int)image;
        ((double*)fractions_)[3 * atom + k] = f - image;
    }
"""

_GRIDS = """
    // as many bins as are at least `width` high, and not more than there are atoms
    const double* heights = (const double*)heights_ + 3 * system;
    const unsigned char* pbc = (const unsigned char*)pbc_ + 3 * system;
    const int first = ((const int*)first_)[system];
    const int n_atoms = ((const int*)first_)[system + 1] - first;
    int most = 1;
    if (binned) while ((most + 1) * (most + 1) * (most + 1) <= n_atoms) ++most;
    int* grid = (int*)grid_ + 7 * system;
    double* low = (double*)low_ + 3 * system;
    double* extent = (double*)extent_ + 3 * system;  // of all bins, in fractions
    for (int k = 0; k < 3; ++k) {
        if (pbc[k] || !binned) { low[k] = 0.0; extent[k] = 1.0; }
        else extent[k] = n_atoms > 0 ? extent[k] - low[k] + 1e-3 : 1.0;
        const double height = heights[k] * extent[k];
        const double room = ::floor(height / width);
        int bins = most;
        if (room < (double)most) bins = room > 1.0 ? (int)room : 1;
        int reach = (int)::ceil(width * bins / height);
        if (!pbc[k] && reach > bins - 1) reach = bins - 1;
        grid[k] = bins; grid[3 + k] = reach;
    }
    grid[6] = first + system;  // number of the system's first bin: one or more for each system
"""

_BINS = """
    const int s = ((const int*)system_)[atom];
    const int* grid = (const int*)grid_ + 7 * s;
    const double* low = (const double*)low_ + 3 * s;
    const double* extent = (const double*)extent_ + 3 * s;
    int flat = 0;
    for (int k = 0; k < 3; ++k) {
        const double f = (((const double*)fractions_)[3 * atom + k] - low[k]) / extent[k];
        int bin = (int)(f * grid[k]);
        bin = bin < 0 ? 0 : (bin >= grid[k] ? grid[k] - 1 : bin);
        flat = flat * grid[k] + bin;
    }
    ((int*)bins_)[atom] = grid[6] + flat;
"""

_ROWS = """
    // on CUDA a warp owns an atom: each lane tests a candidate, and those that are near queue up
#if defined(__CUDA_ARCH__)
    constexpr int LANES = 32;
#else
    constexpr int LANES = 1;
#endif
    const int lane = thread % LANES, local = thread / LANES, atom = first_atom + local;
    const int s = ((const int*)system_)[atom];
    const int* grid = (const int*)grid_ + 7 * s;
    const unsigned char* pbc = (const unsigned char*)pbc_ + 3 * s;
    const double* box = (const double*)cell_ + 9 * s;
    const double* x = (const double*)positions_;
    const int* wraps = (const int*)wraps_;
    const int* order = (const int*)order_;
    const int* starts = (const int*)starts_;
    int* queue = (int*)queue_ + (long long)local * capacity;
    long long* queued_images = (long long*)queued_images_ + (long long)local * capacity;
    const int flat = ((const int*)bins_)[atom] - grid[6];
    const int b[3] = {flat / (grid[1] * grid[2]), (flat / grid[2]) % grid[1], flat % grid[2]};
    int found = 0;
    int o[3], wrapped[3], shift[3];
    for (o[0] = -grid[3]; o[0] <= grid[3]; ++o[0])
    for (o[1] = -grid[4]; o[1] <= grid[4]; ++o[1])
    for (o[2] = -grid[5]; o[2] <= grid[5]; ++o[2]) {
        bool inside = true;
        for (int k = 0; k < 3; ++k) {
            const int target = b[k] + o[k];
            shift[k] = target >= 0 ? target / grid[k] : -((-target + grid[k] - 1) / grid[k]);
            wrapped[k] = target - shift[k] * grid[k];
            inside = inside && (pbc[k] || shift[k] == 0);
        }
        if (!inside) continue;  // the same for all lanes
        const int bin = grid[6] + (wrapped[0] * grid[1] + wrapped[1]) * grid[2] + wrapped[2];
        const int end = starts[bin + 1];
        for (int from = starts[bin]; from < end; from += LANES) {
            bool near = from + lane < end;
            int j = 0;
            long long image = 0;
            if (near) {
                j = order[from + lane];
                long long n[3];
                for (int k = 0; k < 3; ++k) n[k] = (long long)shift[k] + wraps[3 * atom + k]
                                                   - wraps[3 * j + k];
                double square = 0.0;
                for (int k = 0; k < 3; ++k) {
                    const double r = x[3 * j + k] - x[3 * atom + k]
                        + ((double)n[0] * box[k] + (double)n[1] * box[3 + k]
                           + (double)n[2] * box[6 + k]);
                    square += r * r;
                }
                near = square < width * width
                       && !(j == atom && n[0] == 0 && n[1] == 0 && n[2] == 0);
                image = (n[0] + 0x100000) | ((n[1] + 0x100000) << 21)
                        | ((n[2] + 0x100000) << 42);
            }
#if defined(__CUDA_ARCH__)
            const unsigned all = __ballot_sync(~0u, near);
            const int place = found + __popc(all & ((1u << lane) - 1u)), more = __popc(all);
#else
            const int place = found, more = near ? 1 : 0;
#endif
            if (near && place < capacity) {
                queue[place] = j;
                queued_images[place] = image;
            }
            found += more;
        }
    }
#if defined(__CUDA_ARCH__)
    __syncwarp();
#endif
    // sorted by neighbor and image: the place of each is the number of those before it
    int* neighbors = (int*)neighbors_ + (long long)atom * capacity;
    long long* images = (long long*)images_ + (long long)atom * capacity;
    const int n_kept = found < capacity ? found : capacity;
    for (int e = lane; e < n_kept; e += LANES) {
        const int j = queue[e];
        int place = 0, n_same = 0;
        for (int q = 0; q < n_kept; ++q) {
            place += queue[q] < j ? 1 : 0;
            n_same += queue[q] == j ? 1 : 0;
        }
        const long long image = queued_images[e];
        if (n_same > 1)
            for (int q = 0; q < n_kept; ++q)
                if (queue[q] == j && queued_images[q] < image) ++place;
        neighbors[place] = j;
        images[place] = image;
    }
    if (lane == 0) ((int*)counts_)[atom] = found;  // more than the capacity: overflow
"""

_REVERSE = """
    const int atom = slot / capacity, s = slot - atom * capacity;
    const int* counts = (const int*)counts_;
    int back = -1;
    if (s < counts[atom]) {
        const int j = ((const int*)neighbors_)[slot];
        const long long image = ((const long long*)images_)[slot];
        const long long wanted = (0x200000 - (image & 0x1fffff))
            | ((0x200000 - ((image >> 21) & 0x1fffff)) << 21)
            | ((0x200000 - ((image >> 42) & 0x1fffff)) << 42);
        const int* neighbors = (const int*)neighbors_ + (long long)j * capacity;
        const long long* images = (const long long*)images_ + (long long)j * capacity;
        int low = 0, high = counts[j] < capacity ? counts[j] : capacity;
        while (low < high) {
            const int middle = (low + high) / 2;
            if (neighbors[middle] < atom
                || (neighbors[middle] == atom && images[middle] < wanted)) low = middle + 1;
            else high = middle;
        }
        const int n = counts[j] < capacity ? counts[j] : capacity;
        if (low < n && neighbors[low] == atom && images[low] == wanted) back = low;
    }
    ((int*)reverse_)[slot] = back;
"""


def _kernel(function: Any) -> Any:
    return wp.kernel(function, enable_backward=False, module="mlffd_neighbors")


@wp.func_native(_BOXES)
def _box(
    system: wp.int32, cell_: wp.uint64, pbc_: wp.uint64, inverse_: wp.uint64, heights_: wp.uint64
): ...


@_kernel
def complete_boxes(
    # in
    cell: wp.uint64,  # float64 (n_systems, 3, 3)
    pbc: wp.uint64,  # bool (n_systems, 3)
    # out
    inverse: wp.uint64,  # float64 (n_systems, 3, 3)
    heights: wp.uint64,  # float64 (n_systems, 3)
):
    """Inverse of each system's box, made complete where it is not periodic, and its heights."""
    _box(wp.tid(), cell, pbc, inverse, heights)


@wp.func_native(_FRACTIONS)
def _fraction(
    atom: wp.int32,
    positions_: wp.uint64,
    system_: wp.uint64,
    pbc_: wp.uint64,
    inverse_: wp.uint64,
    wraps_: wp.uint64,
    fractions_: wp.uint64,
): ...


@_kernel
def wrap_atoms(
    # in
    positions: wp.uint64,  # float64 (n_atoms, 3)
    system: wp.uint64,  # int32 (n_atoms,)
    pbc: wp.uint64,  # bool (n_systems, 3)
    inverse: wp.uint64,  # float64 (n_systems, 3, 3)
    # out
    wraps: wp.uint64,  # int32 (n_atoms, 3)
    fractions: wp.uint64,  # float64 (n_atoms, 3)
):
    """Fractional coordinates, and the box vectors between an atom and the box."""
    _fraction(wp.tid(), positions, system, pbc, inverse, wraps, fractions)


@wp.func_native(_GRIDS)
def _grid(
    system: wp.int32,
    binned: wp.int32,
    width: wp.float64,
    pbc_: wp.uint64,
    heights_: wp.uint64,
    first_: wp.uint64,
    low_: wp.uint64,
    extent_: wp.uint64,
    grid_: wp.uint64,
): ...


@_kernel
def lay_grids(
    # in
    binned: wp.int32,
    width: wp.float64,
    pbc: wp.uint64,  # bool (n_systems, 3)
    heights: wp.uint64,  # float64 (n_systems, 3)
    first: wp.uint64,  # int32 (n_systems + 1,), first atom of each system
    # in: lowest and highest fraction of the atoms; out: origin and size of the bins
    low: wp.uint64,  # float64 (n_systems, 3)
    extent: wp.uint64,  # float64 (n_systems, 3)
    # out
    grid: wp.uint64,  # int32 (n_systems, 7): bins, reach in bins, number of the first bin
):
    """Bins of each system."""
    _grid(wp.tid(), binned, width, pbc, heights, first, low, extent, grid)


@wp.func_native(_BINS)
def _bin(
    atom: wp.int32,
    system_: wp.uint64,
    fractions_: wp.uint64,
    low_: wp.uint64,
    extent_: wp.uint64,
    grid_: wp.uint64,
    bins_: wp.uint64,
): ...


@_kernel
def find_bins(
    # in
    system: wp.uint64,  # int32 (n_atoms,)
    fractions: wp.uint64,  # float64 (n_atoms, 3)
    low: wp.uint64,  # float64 (n_systems, 3)
    extent: wp.uint64,  # float64 (n_systems, 3)
    grid: wp.uint64,  # int32 (n_systems, 7)
    # out
    bins: wp.uint64,  # int32 (n_atoms,)
):
    """Number of the bin of each atom."""
    _bin(wp.tid(), system, fractions, low, extent, grid, bins)


@wp.func_native(_ROWS)
def _row(
    thread: wp.int32,
    first_atom: wp.int32,
    capacity: wp.int32,
    width: wp.float64,
    positions_: wp.uint64,
    cell_: wp.uint64,
    pbc_: wp.uint64,
    system_: wp.uint64,
    wraps_: wp.uint64,
    grid_: wp.uint64,
    bins_: wp.uint64,
    order_: wp.uint64,
    starts_: wp.uint64,
    queue_: wp.uint64,
    queued_images_: wp.uint64,
    neighbors_: wp.uint64,
    images_: wp.uint64,
    counts_: wp.uint64,
): ...


@_kernel
def fill_rows(
    # in
    first_atom: wp.int32,
    capacity: wp.int32,
    width: wp.float64,
    positions: wp.uint64,  # float64 (n_atoms, 3)
    cell: wp.uint64,  # float64 (n_systems, 3, 3), zero where not periodic
    pbc: wp.uint64,  # bool (n_systems, 3)
    system: wp.uint64,  # int32 (n_atoms,)
    wraps: wp.uint64,  # int32 (n_atoms, 3)
    grid: wp.uint64,  # int32 (n_systems, 7)
    bins: wp.uint64,  # int32 (n_atoms,)
    order: wp.uint64,  # int32 (n_atoms,), atoms by bin
    starts: wp.uint64,  # int32 (n_bins + 1,), where in the order each bin starts
    # room for the atoms of this launch
    queue: wp.uint64,  # int32 (n, capacity)
    queued_images: wp.uint64,  # int64 (n, capacity)
    # out
    neighbors: wp.uint64,  # int32 (n_atoms, capacity)
    images: wp.uint64,  # int64 (n_atoms, capacity)
    counts: wp.uint64,  # int32 (n_atoms,), neighbors that there are, stored or not
):
    """Everything closer to an atom than the width."""
    _row(
        wp.tid(), first_atom, capacity, width, positions, cell, pbc, system, wraps, grid, bins,
        order, starts, queue, queued_images, neighbors, images, counts,
    )  # fmt: skip


@wp.func_native(_REVERSE)
def _back(
    slot: wp.int32,
    capacity: wp.int32,
    neighbors_: wp.uint64,
    images_: wp.uint64,
    counts_: wp.uint64,
    reverse_: wp.uint64,
): ...


@_kernel
def find_reverse(
    # in
    capacity: wp.int32,
    neighbors: wp.uint64,  # int32 (n_atoms, capacity)
    images: wp.uint64,  # int64 (n_atoms, capacity)
    counts: wp.uint64,  # int32 (n_atoms,)
    # out
    reverse: wp.uint64,  # int32 (n_atoms, capacity), -1 for empty slots
):
    """Slot, in the neighbor's row, of the edge in the other direction."""
    _back(wp.tid(), capacity, neighbors, images, counts, reverse)
