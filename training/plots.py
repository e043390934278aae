"""Figures of many students: error against time per step, and learning curves."""

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openmm_mlffd.training.sweep import FORMAT, POINT

try:
    import matplotlib
    import matplotlib.axis
    import matplotlib.ticker
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError(
        f"Matplotlib is needed ({error}): pip install 'openmm-mlffd[analysis]'"
    ) from error

AXES = {
    "speed": "time per step [ms]",
    "evaluation": "time per evaluation [ms]",
    "structures": "training structures",
    "minutes": "training time [minutes]",
    "steps": "training steps",
}
"""What errors are drawn against."""

TIMES = {"speed": "step", "evaluation": "bare"}
"""Times, and their names in a benchmark: of a step in OpenMM, of energy and forces alone."""

_STYLE: Any = {
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "mlffd",  # the same figure is the same text
}
_FRONT, _OTHER, _LINE = "#0072B2", "#767676", "#D55E00"


@dataclass(frozen=True)
class Dot:
    """One student in a figure."""

    name: str
    x: float
    force_mae: float
    energy_mae: float
    weights: int
    content: Mapping[str, Any]


def read_points(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Content of all `point.json` in folders and below.

    Raises
    ------
    ValueError
        If there are none, or a file is another one.
    """
    paths = sorted({p for folder in folders for p in Path(folder).rglob(POINT)})
    if not paths:
        raise ValueError(f"no {POINT} in {', '.join(map(str, folders))}; `mlffd sweep` makes them")
    found = []
    for path in paths:
        content = json.loads(path.read_text("utf-8"))
        if (content.get("format"), content.get("version")) != (FORMAT, 1):
            raise ValueError(f"{path}: is not of {FORMAT} version 1")
        found.append(content)
    return found


def dots_of(
    points: Sequence[Mapping[str, Any]], *, against: str, atoms: int, split: str
) -> list[Dot]:
    """Students that have what is drawn, from left to right.

    Parameters
    ----------
    points
        From `read_points`.
    against
        One of `AXES`.
    atoms
        Size whose time per step is taken, or the nearest that was measured.
    split
        Of the errors.

    Raises
    ------
    ValueError
        If no student has it.
    """
    if against not in AXES:
        raise ValueError(f"errors are drawn against {', '.join(AXES)}, got {against!r}")
    dots = []
    for point in points:
        table = point["errors"].get(split)
        x = {
            **{axis: time_of(point, atoms, name) for axis, name in TIMES.items()},
            "structures": point["train_structures"],
            "minutes": point["minutes"],
            "steps": point["steps"],
        }[against]
        if table is None or x is None:
            continue
        errors = table["all"]
        dots.append(
            Dot(point["name"], float(x), errors["force_mae"], errors["energy_mae"],
                point["weights"], point)
        )  # fmt: skip
    if not dots:
        raise ValueError(f"no student has errors on the split {split!r} and its {AXES[against]}")
    return sorted(dots, key=lambda d: (d.x, d.force_mae))


def time_of(point: Mapping[str, Any], atoms: int, name: str) -> float | None:
    """One of `TIMES` [ms] at the nearest number of atoms; None if there is none."""
    rows = [] if point["speed"] is None else point["speed"]["rows"]
    times = {r["atoms"]: 1e3 * r[name] for r in rows if r["engine"] != "none" and name in r}
    if not times:
        return None
    return float(times[min(times, key=lambda n: abs(math.log(n / atoms)))])


def front_of(dots: Sequence[Dot]) -> list[Dot]:
    """Students than which no other is both faster and better."""
    return [
        d
        for d in dots
        if not any(
            o.x <= d.x and o.force_mae <= d.force_mae and (o.x, o.force_mae) != (d.x, d.force_mae)
            for o in dots
        )
    ]


def draw(dots: Sequence[Dot], *, against: str, atoms: int) -> str:
    """Force error against time per step, or against what was learnt from, as SVG."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.6, 4.0), layout="constrained")
        axes = figure.add_subplot()
        front = front_of(dots) if against in TIMES else list(dots)
        axes.plot([d.x for d in front], [d.force_mae for d in front], color=_LINE, lw=1.0, zorder=1)
        for dot in dots:
            color = _FRONT if dot in front else _OTHER
            size = 12.0 + 40.0 * math.sqrt(dot.weights / 1e6)
            axes.scatter(dot.x, dot.force_mae, s=size, color=color, zorder=2)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.margins(0.15)
        for axis in (axes.xaxis, axes.yaxis):
            _label_ticks(axis)
        label = AXES[against] + (f", {atoms:,} atoms" if against in TIMES else "")
        axes.set_xlabel(label)
        axes.set_ylabel("force MAE [meV/Å]")
        for dot, before in zip(dots, [None, *dots], strict=False):
            axes.annotate(
                dot.name, (dot.x, dot.force_mae), textcoords="offset points", fontsize=7,
                color="#333333", **_place(dot, before),
            )  # fmt: skip
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def _label_ticks(axis: matplotlib.axis.Axis) -> None:
    """Numbers at 1, 2 and 5 of each decade; at all of 1 to 9 where there is hardly one decade."""
    low, high = axis.get_view_interval()
    plain = matplotlib.ticker.FuncFormatter(lambda v, _: f"{v:,.0f}" if v >= 1000 else f"{v:g}")
    axis.set_major_formatter(plain)
    if high > 8.0 * low:
        axis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    else:
        axis.set_minor_formatter(plain)
    axis.set_tick_params(which="both", labelsize=8, pad=3, length=3)


def _place(dot: Dot, before: Dot | None) -> dict[str, Any]:
    """Where a name is written: above and right, or below and left of one beside another."""
    if before is None or dot.x > 1.2 * before.x or abs(dot.force_mae / before.force_mae - 1) > 0.03:
        return {"xytext": (4, 4)}
    return {"xytext": (-3, -10), "horizontalalignment": "right"}


def format_dots(dots: Sequence[Dot], *, against: str, atoms: int) -> str:
    """The figure's numbers as a Markdown table."""
    front = front_of(dots) if against in TIMES else []
    heads = ["student", AXES[against], "force MAE [meV/Å]", "energy MAE [meV/atom]", "weights",
             "steps", "minutes", "structures", ""]  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * 7 + "---|"]
    place = "{:,.0f}" if against in ("structures", "steps") else "{:.4g}"
    for d in dots:
        c = d.content
        cells = [
            d.name, place.format(d.x), f"{d.force_mae:.1f}", f"{d.energy_mae:.2f}",
            f"{d.weights:,}", str(c["steps"]), "–" if c["minutes"] is None else f"{c['minutes']:g}",
            str(c["train_structures"]),
            "front" if d in front else "",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    hosts = {json.dumps(d.content["speed"]["host"], sort_keys=True) for d in dots
             if against in TIMES and d.content["speed"]}  # fmt: skip
    if against in TIMES:
        measured = sorted(json.loads(h)["device"] for h in hosts)
        what = AXES[against].removeprefix("time ").removesuffix(" [ms]")
        lines += ["", f"Times {what} at about {atoms:,} atoms on {'; '.join(measured)}."]
    if len(hosts) > 1:
        lines.append("They were measured on different machines or versions: not comparable.")
    return "\n".join(lines) + "\n"


def run_pareto(
    folders: Sequence[Path], output: Path, *, against: str, atoms: int, split: str
) -> str:
    """`mlffd pareto`: writes figure (SVG) and table beside it; returns the table.

    Raises
    ------
    ValueError
        If the figure's name does not end in .svg, or there is nothing to draw.
    """
    if output.suffix != ".svg":
        raise ValueError(f"the figure is written as SVG: a name that ends in .svg, not {output}")
    points = read_points(folders)
    dots = dots_of(points, against=against, atoms=atoms, split=split)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(draw(dots, against=against, atoms=atoms), encoding="utf-8")
    table = format_dots(dots, against=against, atoms=atoms)
    left_out = sorted({p["name"] for p in points} - {d.name for d in dots})
    if left_out:
        table += f"Without {AXES[against]} or errors on the split {split}: {', '.join(left_out)}.\n"
    output.with_suffix(".md").write_text(table, encoding="utf-8")
    return table
