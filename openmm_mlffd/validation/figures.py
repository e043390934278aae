"""Figures of a validation report, as SVG text. Uses no global state of Matplotlib."""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler
from numpy.typing import NDArray

from openmm_mlffd.validation.analysis import Dihedrals, RadialDistribution
from openmm_mlffd.validation.conservation import WINDOW, EnergyTrace

# Okabe and Ito: told apart with any colour vision; darkest first
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")
GREY = "#767676"
_SHADES = ("#009E73", "#9BC9BA", "#CFCFCF", "#E4E4E4", "#EFEFEF")  # of runs, the finest darkest

_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.edgecolor": "#444444",
    "axes.prop_cycle": cycler(color=COLORS),
    "lines.linewidth": 1.1,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "mlffd",  # the same figure is the same text
}


class Canvas:
    """Axes side by side, and the SVG of them."""

    figure: Figure
    """All of it."""

    axes: list[Axes]
    """From left to right."""

    def __init__(self, n_columns: int, width: float, height: float) -> None:
        self.figure = Figure(figsize=(width * n_columns, height), layout="constrained")
        self.axes = [self.figure.add_subplot(1, n_columns, i + 1) for i in range(n_columns)]

    def svg(self) -> str:
        """The figure; what is rasterised in it has 160 dots per inch."""
        text = io.StringIO()
        self.figure.savefig(text, format="svg", metadata={"Date": None}, dpi=160)
        return _shorten(text.getvalue())


_COORDINATES = re.compile(r' (?:d|x|y)="[^"]*"')
_DECIMALS = re.compile(r"(\.\d\d)\d+")
_FILLING = re.compile(r"<!--.*?-->|\n\s*(?=<)", re.S)


def _shorten(svg: str) -> str:
    """Half as long: coordinates to hundredths of a point, no comments, no blank space."""
    short = _COORDINATES.sub(lambda found: _DECIMALS.sub(r"\1", found[0]), svg)
    return _FILLING.sub("", short)


@contextmanager
def new_canvas(n_columns: int = 1, *, width: float = 3.6, height: float = 2.7) -> Iterator[Canvas]:
    """Axes of so many inches side by side, in the style of the reports."""
    with matplotlib.rc_context(_STYLE):
        yield Canvas(n_columns, width, height)


def draw_energies(traces: Sequence[EnergyTrace]) -> str:
    """Energies of constant-energy runs from one start.

    On the left potential, kinetic and total energy in the first 0.2 ps of the run with the
    smallest time step, on the right the total energies of all runs, magnified.

    Parameters
    ----------
    traces
        The runs, smallest time step first.

    Returns
    -------
    str
        SVG.
    """
    with new_canvas(2, width=3.8) as canvas:
        exchange, total = canvas.axes
        finest = traces[0]
        energies = {
            "potential": finest.potential,
            "kinetic": finest.kinetic,
            "total": finest.total,
        }
        for label, values in energies.items():
            change = 1e3 * (values - values[0]) / finest.n_atoms
            exchange.plot(finest.time, change, label=label)
        exchange.set_xlim(0, min(WINDOW, finest.time[-1]))
        exchange.set_ylabel("change [meV/atom]")
        for trace, color in zip(reversed(traces), reversed(_SHADES[: len(traces)]), strict=True):
            change = 1e3 * (trace.total - trace.total[0]) / trace.n_atoms
            label = f"total, {trace.timestep:g} fs"
            total.plot(trace.time, change, label=label, color=color, linewidth=0.8)
        total.set_ylabel("change [meV/atom]")
        total.set_xlim(0, finest.time[-1])
        for axes in canvas.axes:
            axes.locator_params(axis="x", nbins=5)
            axes.set_xlabel("time [ps]")
            legend_above(axes)
        return canvas.svg()


def draw_series(
    time: NDArray[np.float64],
    values: Mapping[str, NDArray[np.float64]],
    ylabel: str,
    *,
    target: float | None = None,
    target_label: str = "target",
) -> str:
    """Quantities along time.

    Parameters
    ----------
    time
        [ps], shape ``(n,)``.
    values
        Label to values, shape ``(n,)`` each.
    ylabel
        Name and unit of the quantity.
    target
        Where a dashed line is drawn.
    target_label
        What the dashed line is.

    Returns
    -------
    str
        SVG.
    """
    with new_canvas(width=4.2) as canvas:
        (axes,) = canvas.axes
        for label, series in values.items():
            axes.plot(time, series, label=label)
        if target is not None:
            axes.axhline(target, color=GREY, linestyle="--", linewidth=0.9, label=target_label)
        axes.set_xlabel("time [ps]")
        axes.set_ylabel(ylabel)
        axes.set_xlim(time[0], time[-1])
        if len(values) > 1 or target is not None:
            legend_above(axes)
        return canvas.svg()


def draw_ramachandran(dihedrals: Dihedrals) -> str:
    """Backbone dihedral angles, coloured by time.

    Returns
    -------
    str
        SVG.
    """
    with new_canvas(width=4.2, height=3.4) as canvas:
        (axes,) = canvas.axes
        n_frames, n_residues = dihedrals.phi.shape
        frame = np.repeat(np.arange(n_frames), n_residues)
        points = axes.scatter(
            dihedrals.phi.ravel(), dihedrals.psi.ravel(), c=frame / max(1, n_frames - 1), s=7,
            cmap="viridis", linewidths=0,
        )  # fmt: skip
        for name, phi, psi in (("C5", -155, 160), ("C7eq", -83, 120), ("αR", -75, -45)):
            axes.annotate(name, (phi, psi), color=GREY, ha="center", va="center", fontsize=8)
        axes.set_xlabel("φ [degrees]")
        axes.set_ylabel("ψ [degrees]")
        ticks = np.arange(-180, 181, 60)
        axes.set(xlim=(-180, 180), ylim=(-180, 180), xticks=ticks, yticks=ticks, aspect="equal")
        bar = canvas.figure.colorbar(points, ax=axes, ticks=[0, 1], shrink=0.7)
        bar.ax.set_yticklabels(["start", "end of run"])
        bar.outline.set_visible(False)
        return canvas.svg()


def draw_radial(
    curves: Mapping[str, RadialDistribution], *, marks: Mapping[str, float] | None = None
) -> str:
    """Radial distribution functions.

    Parameters
    ----------
    curves
        Label to function.
    marks
        Label to a distance [Å] that is marked by a dashed line.

    Returns
    -------
    str
        SVG.
    """
    with new_canvas(width=4.2) as canvas:
        (axes,) = canvas.axes
        axes.axhline(1.0, color=GREY, linewidth=0.6)
        for label, curve in curves.items():
            axes.plot(curve.r, curve.g, label=label)
        for label, distance in (marks or {}).items():
            axes.axvline(distance, color=GREY, linestyle="--", linewidth=0.9, label=label)
        axes.set_xlabel("distance [Å]")
        axes.set_ylabel("g(r)")
        axes.set_xlim(left=min(2.0, min(float(c.r[np.argmax(c.g > 0)]) for c in curves.values())))
        axes.set_ylim(bottom=0)
        legend_above(axes)
        return canvas.svg()


def legend_above(axes: Axes) -> None:
    """Put the legend above the axes, in as many columns as there is room for, up to four."""
    longest = max(map(len, axes.get_legend_handles_labels()[1]), default=1)
    room = axes.figure.get_figwidth() / len(axes.figure.axes) - 0.7  # inches
    columns = int(room / (0.08 * longest + 0.35))
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=min(4, max(1, columns)),
        columnspacing=1.2, handlelength=1.4, borderaxespad=0.2,
    )  # fmt: skip
