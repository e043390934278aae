"""The benchmark as a figure: time of a step and simulated time in a day, against atoms."""

import math
from pathlib import Path
from typing import Any

FEMTOSECONDS = 1.0
"""Step that the simulated time is for."""

_NS_PER_DAY = 86_400e-6 * FEMTOSECONDS  # of a step of one second


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw steps and evaluations of a benchmark.

    Parameters
    ----------
    results
        What `mlffd bench` stores; its section "speed" is drawn.
    path
        File to write; its ending says the format.

    Raises
    ------
    ValueError
        If nothing of it was measured.
    """
    from matplotlib.figure import Figure

    rows = [row for row in results.get("speed", []) if "step" in row or "bare" in row]
    if not rows:
        raise ValueError("no speed was measured, so there is nothing to draw")
    figure = Figure(figsize=(10.0, 5.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    labels = list(dict.fromkeys(_label(row) for row in rows))
    for number, label in enumerate(labels):
        own = sorted((r for r in rows if _label(r) == label), key=lambda r: r["atoms"])
        color = "0.7" if own[0]["engine"] == "none" else f"C{number}"
        style: dict[str, Any] = {"color": color, "marker": "o", "markersize": 4}
        steps = [(r["atoms"], r["step"]) for r in own if "step" in r]
        bare = [(r["atoms"], r["bare"]) for r in own if "bare" in r]
        if steps:
            left.plot(*zip(*((n, 1e3 * s) for n, s in steps), strict=True), label=label, **style)
            right.plot(*zip(*((n, _NS_PER_DAY / s) for n, s in steps), strict=True), **style)
        if bare:
            dashed = style | {"marker": "x", "linestyle": "--", "linewidth": 1.0}
            name = None if steps else label
            left.plot(*zip(*((n, 1e3 * s) for n, s in bare), strict=True), label=name, **dashed)
    _draw_floors(left, rows)
    left.set_ylabel("time [ms]")
    left.set_title("step in OpenMM (dashed: evaluation alone)", fontsize=10)
    right.set_ylabel(f"ns/day at {FEMTOSECONDS:g} fs")
    right.set_title(results["host"]["device"], fontsize=10)
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", xlabel="atoms")
        sizes = sorted({r["atoms"] for r in rows})
        axes.set_xticks(sizes, [f"{n:,}" for n in sizes], rotation=30)
        axes.set_xticks([], minor=True)
        axes.grid(which="major", alpha=0.3)
    figure.legend(fontsize=8, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=150)


def _draw_floors(axes: Any, rows: list[dict[str, Any]]) -> None:
    for key, label, line in (
        ("floor_bytes", "floor: bytes", ":"), ("floor_operations", "floor: operations", "-."),
    ):  # fmt: skip
        of_size: dict[int, float] = {}  # that of the precision which needs least
        for row in rows:
            if row.get(key):
                of_size[row["atoms"]] = min(row[key], of_size.get(row["atoms"], math.inf))
        points = [(n, 1e3 * of_size[n]) for n in sorted(of_size)]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, color="0.5", linestyle=line)


def _label(row: dict[str, Any]) -> str:
    if row["engine"] == "none":
        return "OpenMM without a force"
    return " ".join(str(row[key]) for key in ("engine", "precision") if key in row)
