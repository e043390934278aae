"""Error bars and distances between distributions. Arithmetic only."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

N_BOOTSTRAP = 1000
"""Samples of a bootstrap."""

CONFIDENCE = 0.95
"""Of intervals."""

N_BLOCKS = 5
"""Blocks that a trajectory is cut into for its error bars."""


def bootstrap_ratio(
    numerator: NDArray[np.float64],
    denominator: NDArray[np.float64],
    groups: NDArray[np.integer],
    *,
    finish: Callable[[NDArray[np.float64]], NDArray[np.float64]] = lambda x: x,
    seed: int = 0,
) -> tuple[float, float, float]:
    """A ratio of sums and its 95 % confidence interval, by resampling whole groups.

    Parameters
    ----------
    numerator, denominator
        What each structure adds to the sums, shape ``(n,)``.
    groups
        Group of each structure; structures of one molecule are no independent evidence.
    finish
        Is applied to ratios, such as the root of a mean square.
    seed
        Of the resampling.

    Returns
    -------
    value, low, high : float
        NaN if there is nothing to divide by; the interval is NaN for fewer than two groups.
    """
    _, index = np.unique(groups, return_inverse=True)
    n = int(index.max()) + 1 if len(index) else 0
    top = np.bincount(index, numerator, n)
    bottom = np.bincount(index, denominator, n)
    if not bottom.sum() > 0:
        return math.nan, math.nan, math.nan
    value = float(finish(np.array([top.sum() / bottom.sum()]))[0])
    if n < 2:
        return value, math.nan, math.nan
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(n, np.full(n, 1 / n), size=N_BOOTSTRAP)
    below = weights @ bottom
    ratios = finish((weights @ top)[below > 0] / below[below > 0])
    low, high = np.quantile(ratios, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return value, float(low), float(high)


def block_error(values: NDArray[np.float64], n_blocks: int = N_BLOCKS) -> float:
    """Standard error of the mean of a correlated series, from the means of its blocks.

    NaN if there are fewer values than blocks.
    """
    if len(values) < n_blocks:
        return math.nan
    means = np.array([part.mean() for part in np.array_split(values, n_blocks)])
    return float(means.std(ddof=1) / math.sqrt(n_blocks))


def jensen_shannon(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Jensen–Shannon distance of two histograms: the root of the divergence in bits.

    0 if they are alike, 1 if they have nothing in common.

    References
    ----------
    Endres, Schindelin 2003, IEEE Trans. Inf. Theory 49, 1858, doi:10.1109/TIT.2003.813506.
    """
    p, q = (np.asarray(h, float).ravel() / np.sum(h) for h in (first, second))
    mean = 0.5 * (p + q)

    def divergence(h: NDArray[np.float64]) -> float:
        known = h > 0
        return float((h[known] * np.log2(h[known] / mean[known])).sum())

    return math.sqrt(max(0.0, 0.5 * (divergence(p) + divergence(q))))


def distance_with_noise(
    first: NDArray[np.float64],
    second: NDArray[np.float64],
    histogram: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    n_blocks: int = N_BLOCKS,
) -> tuple[float, float, float]:
    """Jensen–Shannon distance of two trajectories' distributions, its error, and its noise.

    Parameters
    ----------
    first, second
        Values along two trajectories, first axis time.
    histogram
        Makes a histogram of values.
    n_blocks
        Blocks of each trajectory.

    Returns
    -------
    distance, error, noise : float
        The error is the jackknife's over blocks, left out of both at a time. The noise is the
        distance that halves of one trajectory have from one another, averaged over the two and
        over two ways of halving: short runs of one and the same model are as far apart.
    """
    a = np.array([histogram(part) for part in np.array_split(first, n_blocks)])
    b = np.array([histogram(part) for part in np.array_split(second, n_blocks)])
    value = jensen_shannon(a.sum(0), b.sum(0))
    left_out = np.array([jensen_shannon(a.sum(0) - a[i], b.sum(0) - b[i]) for i in range(n_blocks)])
    error = math.sqrt((n_blocks - 1) / n_blocks * ((left_out - left_out.mean()) ** 2).sum())
    noise = [
        jensen_shannon(histogram(half_a), histogram(half_b))
        for values in (first, second)
        for half_a, half_b in (
            np.array_split(values, 2),
            (
                np.concatenate(np.array_split(values, 4)[::2]),
                np.concatenate(np.array_split(values, 4)[1::2]),
            ),
        )
    ]
    return value, error, float(np.mean(noise))


def rank_correlation(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Spearman's correlation; ties are in the order in which they come."""
    if len(x) < 2:
        return math.nan
    first, second = (np.argsort(np.argsort(v, kind="stable")).astype(float) for v in (x, y))
    return float(np.corrcoef(first, second)[0, 1])


def quantile_bins(
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    n_bins: int,
    quantiles: Sequence[float],
    tail: int | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Quantiles of y in bins of x that hold about equally many points; equal x share a bin.

    With `tail` the last bin is halved again and again, as long as that many points are left, so
    that it is seen what becomes of the few with the largest x.

    Returns
    -------
    centers : ndarray
        Mean x of each bin, shape ``(n,)``.
    values : ndarray
        Shape ``(n_quantiles, n)``.
    """
    shares = np.linspace(0, 1, n_bins + 1)[1:-1].tolist()
    rest = 0.5 / n_bins
    while tail is not None and rest * len(x) >= tail:
        shares.append(1 - rest)
        rest /= 2
    edges = np.unique(np.quantile(x, shares))
    bins = np.searchsorted(edges, x, side="left")
    parts = [np.flatnonzero(bins == b) for b in np.unique(bins)]
    centers = np.array([x[p].mean() for p in parts])
    return centers, np.array([np.quantile(y[p], quantiles) for p in parts]).T
