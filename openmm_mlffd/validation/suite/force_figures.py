"""The panels of the force analysis, one figure each."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from numpy.typing import NDArray

from openmm_mlffd.elements import COVALENT_RADII
from openmm_mlffd.validation.figures import COLORS, GREY, Canvas, legend_above, new_canvas
from openmm_mlffd.validation.suite.models import Structure
from openmm_mlffd.validation.suite.statistics import quantile_bins

ATOM_COLORS = {1: "#E6E6E6", 6: "#555555", 7: "#3050F8", 8: "#E0301E", 9: "#70C040",
               15: "#FF8000", 16: "#D8B800", 17: "#1FA01F"}  # fmt: skip
_BONDED = 1.25  # times the sum of the covalent radii


def draw_parity(
    label: NDArray[np.float64],
    found: NDArray[np.float64],
    quantity: str,
    *,
    diagonal: bool = True,
) -> str:
    """Student against teacher, as a density of points.

    Parameters
    ----------
    label, found
        Values of teacher and student, shape ``(n,)``.
    quantity
        Name and unit.
    diagonal
        Draw the line where they are equal.

    Returns
    -------
    str
        SVG.
    """
    with new_canvas(width=3.9, height=3.3) as canvas:
        (axes,) = canvas.axes
        low, high = float(min(label.min(), found.min())), float(max(label.max(), found.max()))
        margin = 0.03 * max(high - low, 1e-9)
        limits = (low - margin, high + margin)
        if len(label) > 400:
            _density(canvas, axes, label, found, limits, limits)
        else:
            axes.plot(
                label, found, "o", markersize=3, alpha=0.6, markeredgewidth=0, rasterized=True
            )
        if diagonal:
            axes.plot(limits, limits, color=GREY, linewidth=0.8, linestyle="--")
        axes.set(xlim=limits, ylim=limits, aspect="equal")
        axes.locator_params(nbins=6)
        axes.set_xlabel(f"teacher, {quantity}")
        axes.set_ylabel(f"student, {quantity}")
        return canvas.svg()


def draw_errors(
    errors: NDArray[np.float64], quantity: str, *, quantile: float = 0.995, signed: bool = True
) -> str:
    """Histogram of errors; beyond a quantile, or 15 medians, they share the last bins."""
    with new_canvas() as canvas:
        (axes,) = canvas.axes
        size = np.abs(errors)
        limit = max(min(float(np.quantile(size, quantile)), 15 * float(np.median(size))), 1e-9)
        edges = np.linspace(-limit if signed else 0.0, limit, 61)
        axes.hist(np.clip(errors, edges[0], edges[-1]), edges.tolist(), color=COLORS[0])
        axes.set_yscale("log")
        if signed:
            axes.axvline(0.0, color=GREY, linewidth=0.8)
        axes.set_xlabel(quantity)
        axes.set_ylabel("count")
        return canvas.svg()


def draw_cumulative(errors: NDArray[np.float64], quantity: str) -> str:
    """Share of values that is below each value."""
    with new_canvas() as canvas:
        (axes,) = canvas.axes
        share = np.linspace(0, 1, 201)
        axes.plot(np.quantile(errors, share), 100 * share)
        for level in (0.5, 0.9, 0.99):
            value = float(np.quantile(errors, level))
            axes.plot([value], [100 * level], "o", color=COLORS[1], markersize=4)
            axes.annotate(
                f"{100 * level:g} %: {value:.3g}", (value, 100 * level),
                xytext=(6, -9), textcoords="offset points", fontsize=8,
            )  # fmt: skip
        if errors.min() < errors.max():
            axes.set_xscale("log")
            axes.set_xlim(max(float(np.quantile(errors, 0.01)), 1e-6), float(errors.max()) * 1.5)
        axes.set(ylim=(0, 103))
        axes.set_xlabel(quantity)
        axes.set_ylabel("share below [%]")
        return canvas.svg()


def draw_trend(
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    xlabel: str,
    ylabel: str,
    *,
    n_bins: int = 15,
    logarithmic: bool = False,
) -> str:
    """Median and spread of y along x, in bins of equally many points, the last ones of fewer."""
    with new_canvas() as canvas:
        (axes,) = canvas.axes
        if len(x) > 400:
            _cloud(axes, x, y)
        else:
            axes.plot(
                x,
                y,
                "o",
                color=COLORS[4],
                markersize=2.5,
                alpha=0.5,
                markeredgewidth=0,
                rasterized=True,
            )
        bins = max(1, min(n_bins, len(x) // 5))
        centers, (low, middle, high) = quantile_bins(x, y, bins, (0.1, 0.5, 0.9), tail=10)
        axes.plot(centers, middle, color=COLORS[0], marker="o", markersize=3, label="median")
        axes.plot(centers, low, color=COLORS[0], linewidth=0.8, linestyle=":")
        axes.plot(
            centers, high, color=COLORS[0], linewidth=0.8, linestyle=":", label="10 % and 90 %"
        )
        if logarithmic:
            axes.set_xscale("log")
            axes.set_xlim(max(float(np.quantile(x, 0.002)), 1e-9), 1.2 * float(x.max()))
        top = max(1.6 * float(high.max()), 1e-9)
        if low.min() > 0 and high.max() > 5 * np.median(middle):
            axes.set_yscale("log")
            axes.set_ylim(0.5 * float(low.min()), top)
        else:
            axes.set_ylim(0, top)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        legend_above(axes)
        return canvas.svg()


def draw_bars(
    names: list[str],
    values: NDArray[np.float64],
    low: NDArray[np.float64],
    high: NDArray[np.float64],
    quantity: str,
) -> str:
    """Values with their confidence intervals, one row for each name."""
    with new_canvas(width=4.4, height=0.9 + 0.24 * len(names)) as canvas:
        (axes,) = canvas.axes
        rows = np.arange(len(names))[::-1]
        axes.barh(rows, values, color=COLORS[4], height=0.65)
        errors = np.nan_to_num(np.array([values - low, high - values]).clip(min=0))
        axes.errorbar(values, rows, xerr=errors, fmt="none", ecolor="#333333", elinewidth=1)
        axes.set_yticks(rows, names)
        axes.set_xlabel(quantity)
        axes.tick_params(axis="y", length=0)
        return canvas.svg()


def draw_molecule(
    structure: Structure, teacher: NDArray[np.float64], student: NDArray[np.float64]
) -> str:
    """A molecule with the forces of both as arrows, its atoms coloured by the error.

    Seen along the axis in which it is thinnest; 0.4 Å are 1 eV/Å, and longer arrows are cut.
    """
    with new_canvas(width=4.8, height=3.8) as canvas:
        (axes,) = canvas.axes
        x = structure.positions - structure.positions.mean(0)
        plane = np.linalg.svd(x, full_matrices=False)[2][:2] if len(x) > 2 else np.eye(3)[:2]
        flat = x @ plane.T
        radii = np.array([COVALENT_RADII[z] for z in structure.numbers])
        distances = np.linalg.norm(x[:, None] - x, axis=2)
        bonded = np.triu(distances < _BONDED * (radii[:, None] + radii), 1)
        for i, j in np.argwhere(bonded):
            axes.plot(*flat[[i, j]].T, color="#BBBBBB", linewidth=1.4, zorder=1)
        error = np.linalg.norm(student - teacher, axis=1)
        points = axes.scatter(
            flat[:, 0], flat[:, 1], s=160 * radii, c=error, cmap="magma_r", vmin=0,
            edgecolors=[ATOM_COLORS.get(z, "#888888") for z in structure.numbers.tolist()],
            linewidths=1.6, zorder=2,
        )  # fmt: skip
        for forces, color, width in ((teacher, "#1b1b1b", 0.006), (student, COLORS[1], 0.004)):
            length = np.maximum(np.linalg.norm(forces, axis=1, keepdims=True), 1e-9)
            arrows = 0.4 * forces * np.minimum(1.0, 5.0 / length) @ plane.T
            axes.quiver(
                *flat.T, *arrows.T, angles="xy", scale_units="xy", scale=1, color=color,
                width=width, zorder=3,
            )  # fmt: skip
            axes.update_datalim(flat + arrows)  # a quiver counts its tails only
        axes.set(aspect="equal", xticks=[], yticks=[])
        axes.margins(0.12)
        for spine in axes.spines.values():
            spine.set_visible(False)
        bar = canvas.figure.colorbar(points, ax=axes, shrink=0.7)
        bar.set_label("error of the force [eV/Å]")
        bar.outline.set_visible(False)
        return canvas.svg()


def _density(
    canvas: Canvas,
    axes: Axes,
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    xlim: tuple[float, float],
    ylim: tuple[float, float],
) -> None:
    counts, xedges, yedges = np.histogram2d(x, y, bins=140, range=(xlim, ylim))
    mesh = axes.pcolormesh(
        xedges, yedges, np.where(counts > 0, counts, np.nan).T, norm=LogNorm(1, counts.max()),
        cmap="viridis", rasterized=True,
    )  # fmt: skip
    bar = canvas.figure.colorbar(mesh, ax=axes, shrink=0.7)
    bar.set_label("count")
    bar.outline.set_visible(False)


def _cloud(axes: Axes, x: NDArray[np.float64], y: NDArray[np.float64]) -> None:
    if len(x) > 20000:
        chosen = np.random.default_rng(0).choice(len(x), 20000, replace=False)
        x, y = x[chosen], y[chosen]
    size, alpha = (1.5, 0.25) if len(x) > 5000 else (2.0, 0.5)
    axes.plot(
        x, y, ".", color=COLORS[4], markersize=size, alpha=alpha, markeredgewidth=0,
        rasterized=True,
    )  # fmt: skip
