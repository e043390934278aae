"""Bad starts and high temperatures: checks, table and figures."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from openmm_mlffd.validation.conservation import Check
from openmm_mlffd.validation.report import FigureBlock, Section, TableBlock, number
from openmm_mlffd.validation.suite.curves import draw_lines
from openmm_mlffd.validation.suite.force_figures import draw_cumulative
from openmm_mlffd.validation.suite.job import Job, SectionResult, named
from openmm_mlffd.validation.suite.robustness import (
    CONVERGED,
    HOLE,
    HOT,
    TORN,
    measure_robustness,
)
from openmm_mlffd.validation.suite.store import read_arrays


def run_robustness(job: Job) -> SectionResult:
    """Distorted structures, minimisations, hot runs."""
    numbers = measure_robustness(job)
    distorted, minimised, hot = (numbers[k] for k in ("distorted", "minimizations", "hot"))
    checks = [
        Check(name="distorted structures without finite forces", unit="", high=0.0,
              value=float(distorted["not_finite"])),
        Check(name="distorted structures in a hole", unit="", high=0.0,
              value=float(distorted["holes"])),
        Check(name="minimisations that failed in silence", unit="", high=0.0,
              value=float(minimised["silent"])),
        Check(name="preparations that failed in silence", unit="", high=0.0,
              value=float(numbers["preparations"]["silent"])),
        Check(name="sound molecules whose minimisation failed in silence", unit="", high=0.0,
              value=float(numbers["relaxations"]["silent"])),
        Check(name=f"runs at {HOT:g} K that did not end well", unit="", high=0.0,
              value=float(sum(bool(h["failure"]) for h in hot.values()))),
        Check(name=f"frames at {HOT:g} K in a hole", unit="", high=0.0,
              value=float(sum(h["holes"] for h in hot.values()))),
    ]  # fmt: skip
    sections = [_section(job, numbers)]
    return SectionResult(
        numbers=numbers,
        checks=named(checks, "robustness"),
        sections=sections,
    )


def _section(job: Job, numbers: Mapping[str, Any]) -> Section:
    distorted, minimised, hot = (numbers[k] for k in ("distorted", "minimizations", "hot"))
    arrays = read_arrays(job.store.folder / distorted["folder"] / "arrays.npz")
    prepared, relaxed = numbers["preparations"], numbers["relaxations"]
    rows = [
        ["distorted structures", f"{distorted['structures']:,}"],
        ["shortest distance in them [Å]", _text(distorted["shortest_distance"])],
        ["without finite energy and forces", str(distorted["not_finite"])],
        [f"more than {HOLE} eV below the minimum", _list(distorted, "holes", "hole_of")],
        ["largest force [eV/Å]", _text(distorted["largest_force"])],
        ["minimisations from such starts", str(minimised["structures"])],
        ["their ends", _ends(minimised)],
        ["failed in silence", _list(minimised, "silent", "silent_of")],
        ["ends of `prepare` from the same starts", _ends(prepared)],
        ["failed in silence there", _list(prepared, "silent", "silent_of")],
        ["sound molecules that failed in silence", _list(relaxed, "silent", "silent_of")],
        [
            f"molecules at {HOT:g} K, length of each run [ps]",
            f"{len(hot)}, {job.plan.robustness.hot_picoseconds:g}",
        ],
        ["that did not end well", ", ".join(n for n, h in hot.items() if h["failure"]) or "none"],
    ]
    above = arrays["above"][arrays["finite"]]
    drawn = []
    if len(above):
        shown = np.maximum(above, 1e-3)
        drawn.append(
            FigureBlock(
                svg=draw_cumulative(shown, "energy above the minimum [eV]"),
                caption="Energy of the distorted structures above that of the relaxed molecule. "
                "None may be below it; very high energies are what clashes should have.",
                alt="Cumulative distribution of the energies of distorted structures.",
            )
        )
    lines = {
        name: (np.array(h["time"], float), np.array(h["above"], float))
        for name, h in list(hot.items())[:5]
        if h["time"]
    }
    if lines:
        drawn.append(
            FigureBlock(
                svg=draw_lines(lines, "time [ps]", "energy above the minimum [eV]"),
                caption=f"Potential energy of molecules at {HOT:g} K (the first five).",
                alt="Potential energies of molecules at high temperature along time.",
            )
        )
    return Section(
        title="Bad starts and high temperatures",
        paragraphs=[
            "Molecules of the suite with atoms displaced, moved onto one another, squeezed, or "
            "pushed into a copy of themselves. A minimisation “converged” if the largest force "
            f"is below {CONVERGED} eV/Å, is “slow” if it is not yet, and “loud” if there was an "
            "exception. What must not be: atoms that are fused, a bond longer than "
            f"{TORN} times the sum of the covalent radii, or an energy below the minimum, without "
            "an error. OpenMM's minimiser is asked directly, and by `prepare`, which pushes atoms "
            "apart first and refuses what came apart or is like nothing known. The minimiser's "
            "first trial moves the atoms by 10 Å in all, and may so find holes far away."
        ],
        tables=[TableBlock(caption="Robustness", columns=["quantity", "value"], rows=rows)],
        figures=drawn,
    )


def _text(value: float | None) -> str:
    return "–" if value is None else number(value)


def _ends(numbers: Mapping[str, Any]) -> str:
    return ", ".join(f"{k}: {v}" for k, v in numbers["outcomes"].items())


def _list(numbers: Mapping[str, Any], count: str, names: str) -> str:
    found: Sequence[str] = numbers[names]
    return f"{numbers[count]}" + (f" ({'; '.join(found[:5])})" if found else "")
