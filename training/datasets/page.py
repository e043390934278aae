"""The page of `mlffd data validate`: one HTML file that needs nothing else."""

import io
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from openmm_mlffd.elements import symbol
from openmm_mlffd.training.datasets.survey import FORCE_BINS, Survey, format_stats

try:
    import jinja2
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError(
        "Jinja2 and Matplotlib are needed to write the page: pip install 'openmm-mlffd[analysis]'"
    ) from error

_SHOWN = 200
_COLOR = "#0072B2"


def write_page(found: Survey, path: str | Path) -> None:
    """Write findings, numbers and histograms of a survey as an HTML file."""
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        files("openmm_mlffd.training.datasets").joinpath("page.html").read_text(encoding="utf-8")
    )
    wrong = {(f.file, f.index) for f in found.findings}
    text = template.render(
        title="Dataset: " + ", ".join(Path(f).name for f in found.files),
        stats=format_stats(found),
        n=len(found),
        wrong=len(wrong),
        kinds=Counter(f.kind for f in found.findings).most_common(),
        findings=found.findings[:_SHOWN],
        left_out=max(0, len(found.findings) - _SHOWN),
        figures=[(caption, figure) for caption, figure in _figures(found) if figure],
    )
    Path(path).write_text(text, encoding="utf-8")


def _figures(found: Survey) -> list[tuple[str, str]]:
    symbols = [symbol(z) for z in found.elements]
    excess = found.excess_energy
    return [
        ("Atoms of each element.", _bars(symbols, found.composition.sum(0))),
        (
            "Structures by number of atoms.",
            _histogram(found.n_atoms, "atoms in a structure", logarithmic=True),
        ),
        ("Forces on the atoms.", _forces(found)),
        (
            "Largest force of each structure.",
            _histogram(found.largest_force, "largest force [eV/Å]", logarithmic=True),
        ),
        (
            "Energy per atom beyond what the elements explain, by least squares.",
            _histogram(excess, "energy [eV/atom]"),
        ),
        ("Temperature of the sampler.", _histogram(found.temperature, "temperature [K]")),
    ]


def _draw(label: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(5.0, 2.6), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(label)
    axes.set_ylabel("count")
    return figure, axes


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def _bars(names: list[str], counts: Any) -> str:
    figure, axes = _draw("element")
    axes.bar(names, counts, color=_COLOR)
    axes.set_yscale("log")
    return _svg(figure)


def _forces(found: Survey) -> str:
    if not found.force_counts.any():
        return ""
    figure, axes = _draw("force on an atom [eV/Å]")
    axes.stairs(found.force_counts, FORCE_BINS, fill=True, color=_COLOR)
    axes.set_xscale("log")
    return _svg(figure)


def _histogram(values: Any, label: str, *, logarithmic: bool = False) -> str:
    values = np.asarray(values, "f8")
    values = values[np.isfinite(values) & ((values > 0) | (not logarithmic))]
    if not len(values):
        return ""
    low, high = values.min(), values.max()
    if logarithmic and high > low:
        bins = np.geomspace(low, high, 41)
    else:
        bins = np.linspace(low - 0.5 * (low == high), high + 0.5 * (low == high), 41)
    figure, axes = _draw(label)
    axes.hist(values, bins, color=_COLOR)
    if logarithmic:
        axes.set_xscale("log")
    return _svg(figure)
