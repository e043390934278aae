"""Do unseen molecules and boxes stay what they are? Checks and tables."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from openmm_mlffd.validation.conservation import Check
from openmm_mlffd.validation.report import Section, TableBlock, number
from openmm_mlffd.validation.suite.job import Job, SectionResult, named
from openmm_mlffd.validation.suite.stability import (
    HELD,
    STRETCHED,
    measure_stability,
)
from openmm_mlffd.validation.suite.stability_teacher import CLOSED

KINETIC = 0.02
"""Mean kinetic temperature of all molecules, largest deviation beyond three standard errors."""

CORRELATION = 0.5
"""Time over which the kinetic energy forgets itself, for those errors [ps]."""

SHORTEST = 1.0
"""Temperatures of shorter runs [ps] are reported and not judged."""

VOLUME = (0.8, 1.25)
"""Volume at the end over that at the start."""


def run_stability(job: Job) -> SectionResult:
    """Runs of molecules and boxes."""
    numbers = measure_stability(job)
    return SectionResult(
        numbers=numbers,
        checks=named(stability_checks(numbers), "stability"),
        sections=[_section(job, numbers)],
    )


def stability_checks(numbers: Mapping[str, Any]) -> list[Check]:
    """What has to be passed: nothing explodes, and no bond breaks that the teacher keeps."""
    runs = numbers["molecules"] | numbers["boxes"]
    exploded = [name for name, run in runs.items() if run["failure"]]
    broken = [name for name, run in runs.items() if run["broken"] and counts(run)]
    checks = [
        Check(name=f"runs that exploded{_names(exploded)}", value=float(len(exploded)), unit="",
              high=0.0),
        Check(name=f"runs that broke a bond{_names(broken)}", value=float(len(broken)), unit="",
              high=0.0),
    ]  # fmt: skip
    for kelvin in sorted({run["kelvin"] for run in numbers["molecules"].values()}):
        checks += _temperature_check(numbers["molecules"], kelvin)
    for name, run in numbers["boxes"].items():
        if run["volume_ratio"] is not None:
            checks.append(
                Check(name=f"{name}: volume / that at the start", value=run["volume_ratio"],
                      unit="", low=VOLUME[0], high=VOLUME[1])
            )  # fmt: skip
    return checks


def _temperature_check(molecules: Mapping[str, Any], kelvin: float) -> list[Check]:
    """The mean of all molecules at a temperature, each weighted with its degrees of freedom."""
    runs = [
        (3 * run["atoms"] - 3, run["picoseconds"], run["temperature"])
        for run in molecules.values()
        if run["kelvin"] == kelvin
        and run["temperature"] is not None
        and run["picoseconds"] >= SHORTEST
    ]
    if not runs:
        return []
    dof, length, found = (np.array(v, float) for v in zip(*runs, strict=True))
    samples = (dof * length / (2 * CORRELATION)).sum()
    far = (KINETIC + 3 * math.sqrt(2 / samples)) * kelvin
    return [
        Check(
            name=f"mean temperature of the molecules at {kelvin:g} K", unit="K",
            value=float((dof * found).sum() / dof.sum()), low=kelvin - far, high=kelvin + far,
        )
    ]  # fmt: skip


def counts(run: Mapping[str, Any]) -> bool:
    """Whether a broken bond is held against the student: not if its teacher breaks it, too."""
    teacher = run.get("teacher")
    return teacher is None or "refused" in teacher or bool(teacher["keeps"])


def _names(names: list[str]) -> str:
    return f" ({'; '.join(names[:5])}{' …' if len(names) > 5 else ''})" if names else ""


def _section(job: Job, numbers: Mapping[str, Any]) -> Section:
    plan = job.plan.stability
    rows = [_row(name, run) for part in ("molecules", "boxes") for name, run in
            numbers[part].items()]  # fmt: skip
    asked = (
        f"The teacher relaxed what broke; it keeps a bond that comes below {CLOSED:g} times its "
        "first length again."
        if job.teacher is not None
        else "No teacher was asked, so every broken bond counts."
    )
    return Section(
        title="Stability of what no training saw",
        paragraphs=[
            f"Molecules: {plan.picoseconds:g} ps each at constant temperature, all in one "
            "evaluation, far apart (BAOAB, friction 5/ps). Boxes: "
            f"{plan.box_picoseconds:g} ps at 1 bar in OpenMM. {plan.timestep:g} fs. A bond is "
            f"broken that is longer than {STRETCHED:g} times its first length for {HELD:g} ps; a "
            "run exploded if atoms came nearer than 0.55 of the sum of their radii, the energy "
            f"changed by 0.25 eV/atom, or it was not finite. {asked}"
        ],
        tables=[
            TableBlock(
                caption="Runs",
                columns=["run", "atoms", "length [ps]", "temperature [K]", "longest bond / start",
                         "density [g/cm³]", "result"],
                rows=rows,
            )
        ],
    )  # fmt: skip


def _row(name: str, run: Mapping[str, Any]) -> list[str]:
    return [
        name,
        str(run["atoms"]),
        number(run["picoseconds"]),
        _text(run["temperature"]),
        _text(run["longest_bond"]),
        _text(run.get("density")),
        result(run),
    ]


def result(run: Mapping[str, Any]) -> str:
    """What became of a run, in words."""
    if run["failure"]:
        return f"EXPLODED {run['failure']}"
    if not run["broken"]:
        return "whole"
    text = f"BROKE {run['broken'][2]}"
    teacher = run.get("teacher")
    if teacher is None:
        return text
    if "refused" in teacher:
        return f"{text}; not judged by the teacher: {teacher['refused']}"
    keeps = "keeps it" if teacher["keeps"] else "breaks it, too"
    return f"{text}; the teacher {keeps} ({number(teacher['stretch'], 2)} of its first length)"


def _text(value: float | None) -> str:
    return "–" if value is None else number(value)
