"""Figures that several sections share: lines, histograms, maps."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from openmm_mlffd.validation.figures import COLORS, GREY, legend_above, new_canvas

Line = tuple[NDArray[np.float64], NDArray[np.float64]]
"""x and y of a curve."""


def draw_lines(
    lines: Mapping[str, Line],
    xlabel: str,
    ylabel: str,
    *,
    ylim: tuple[float, float] | None = None,
    zero: bool = False,
    points: bool = False,
) -> str:
    """Curves with names.

    Parameters
    ----------
    lines
        Label to curve; the second is drawn with dashes, since it may hide the first.
    xlabel, ylabel
        Names and units.
    ylim
        Range of the axis; None for that of the values.
    zero
        Draw a line at zero.
    points
        Mark the points.

    Returns
    -------
    str
        SVG.
    """
    with new_canvas(width=4.0) as canvas:
        (axes,) = canvas.axes
        if zero:
            axes.axhline(0.0, color=GREY, linewidth=0.7)
        for i, (name, (x, y)) in enumerate(lines.items()):
            axes.plot(
                x, y, label=name, color=COLORS[i % len(COLORS)], linestyle="-" if i % 2 == 0
                else "--", marker="o" if points else None, markersize=2.5,
            )  # fmt: skip
        if ylim is not None:
            axes.set_ylim(*ylim)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        if len(lines) > 1:
            legend_above(axes)
        return canvas.svg()


def draw_histograms(
    values: Mapping[str, NDArray[np.float64]],
    edges: NDArray[np.float64],
    xlabel: str,
    *,
    expected: Line | None = None,
    expected_label: str = "expected",
) -> str:
    """Densities of values, as steps.

    Parameters
    ----------
    values
        Label to values, shape ``(n,)`` each.
    edges
        Of the bins.
    xlabel
        Name and unit.
    expected
        A density to compare with.
    expected_label
        What it is.

    Returns
    -------
    str
        SVG.
    """
    with new_canvas(width=4.0) as canvas:
        (axes,) = canvas.axes
        for i, (name, found) in enumerate(values.items()):
            heights, _ = np.histogram(found, edges, density=True)
            axes.stairs(
                heights, edges, label=name, color=COLORS[i], fill=i == 0, alpha=0.35 if i == 0
                else 1.0, linewidth=1.2,
            )  # fmt: skip
        if expected is not None:
            axes.plot(*expected, color="#333333", linestyle="--", label=expected_label)
        axes.set_xlabel(xlabel)
        axes.set_ylabel("density")
        axes.set_ylim(bottom=0)
        axes.set_yticks([])
        if len(values) > 1 or expected is not None:
            legend_above(axes)
        return canvas.svg()


def draw_map(
    values: NDArray[np.float64],
    edges: NDArray[np.float64],
    labels: Sequence[str],
    bar_label: str,
    *,
    centered: bool = False,
) -> str:
    """A quantity of two angles, as colours.

    Parameters
    ----------
    values
        Shape ``(n, n)``, the first axis along x; NaN stays white.
    edges
        Of the bins of both axes [degrees].
    labels
        Of the axes.
    bar_label
        Name and unit of the quantity.
    centered
        Whether zero is the middle of the colours.

    Returns
    -------
    str
        SVG.
    """
    with new_canvas(width=4.0, height=3.3) as canvas:
        (axes,) = canvas.axes
        size = float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 1.0
        low = -size if centered else 0.0
        mesh = axes.pcolormesh(
            edges, edges, values.T, cmap="RdBu_r" if centered else "viridis_r", rasterized=True,
            vmin=low, vmax=size,
        )  # fmt: skip
        axes.set(aspect="equal", xticks=np.arange(-180, 181, 90), yticks=np.arange(-180, 181, 90))
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        bar = canvas.figure.colorbar(mesh, ax=axes, shrink=0.8)
        bar.set_label(bar_label)
        bar.outline.set_visible(False)
        return canvas.svg()
