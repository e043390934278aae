"""Figure of novelty against force errors, as SVG text."""

import numpy as np
from numpy.typing import NDArray

from openmm_mlffd.novelty import COVERAGE, Novelty
from openmm_mlffd.validation.figures import COLORS, GREY, _axes

_SMALLEST_ERROR = 1e-3
_BINS = 24


def draw_novelty(
    novelty: Novelty,
    scores: NDArray[np.float64],
    errors: NDArray[np.float64],
    limits: tuple[float, ...] = (0.5, 1.0),
) -> str:
    """Force errors of held-out atoms against their novelty, and how well one tells the other.

    Parameters
    ----------
    novelty
        The statistics, with thresholds and bound.
    scores, errors
        Novelty and force error [eV/Å] of each atom, shape ``(n_atoms,)``.
    limits
        Force errors [eV/Å] of the receiver operating characteristics.

    Returns
    -------
    str
        SVG, two panels.
    """
    header = novelty.header
    with _axes(2, width=4.0, height=3.1) as canvas:
        left, right = canvas.axes
        left.hexbin(
            scores, errors.clip(_SMALLEST_ERROR), xscale="log", yscale="log", gridsize=45,
            bins="log", cmap="Greys", mincnt=1, linewidths=0.1,
        )  # fmt: skip
        edges = np.geomspace(scores.min(), scores.max(), _BINS + 1)
        place = np.clip(np.digitize(scores, edges) - 1, 0, _BINS - 1)
        middle = np.sqrt(edges[:-1] * edges[1:])
        full = [b for b in range(_BINS) if (place == b).sum() >= 10]
        for share, color in ((0.5, COLORS[0]), (0.9, COLORS[1])):
            line = [np.quantile(errors[place == b], share) for b in full]
            left.plot(middle[full], line, color=color, label=f"{100 * share:.0f} % of atoms below")
        left.plot(
            edges, novelty.error_bound(edges), color=COLORS[1], ls="--",
            label=f"bound for {100 * COVERAGE:.0f} %",
        )  # fmt: skip
        for value, text, side in ((header.warn, "warn ", "right"), (header.stop, " stop", "left")):
            left.axvline(value, color=GREY, lw=0.8)
            left.text(value, 1.4 * _SMALLEST_ERROR, text, color=GREY, ha=side)
        left.set_xlabel("novelty")
        left.set_ylabel("force error [eV/Å]")
        left.legend(loc="upper left", fontsize=7)
        order = np.argsort(-scores)
        for limit, color in zip(limits, COLORS, strict=False):
            bad = (errors > limit)[order]
            if not 0 < bad.sum() < len(bad):
                continue
            hits, alarms = np.cumsum(bad) / bad.sum(), np.cumsum(~bad) / (~bad).sum()
            area = float(np.trapezoid(hits, alarms))
            keep = np.unique(np.geomspace(1, len(bad), 400).astype(int)) - 1
            label = f"error > {limit:g} eV/Å (area {area:.3f})"
            right.plot(alarms[keep], hits[keep], color=color, label=label)
        right.plot([0, 1], [0, 1], color=GREY, lw=0.8)
        right.set_xlabel("false alarms")
        right.set_ylabel("hits")
        right.legend(loc="lower right", fontsize=7)
        return canvas.svg()
