"""Whether forces belong to the energy, are smooth, and conserve it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any

import numpy as np

from openmm_mlffd.units import BOLTZMANN
from openmm_mlffd.validation import figures
from openmm_mlffd.validation.conservation import (
    SLOPE_KT_DURATION,
    WINDOW,
    EnergyTrace,
    conservation,
    halving_ratio,
)
from openmm_mlffd.validation.nve import NVEResult
from openmm_mlffd.validation.report import (
    FigureBlock,
    Section,
    TableBlock,
    conservation_table,
    number,
)
from openmm_mlffd.validation.suite.job import Job, SectionResult, named
from openmm_mlffd.validation.suite.nve_runs import (
    ATOMIZATION,
    RAMP_STEP,
    TEMPERATURE,
    measure_run,
    measure_smoothness,
    relative_slopes,
)
from openmm_mlffd.validation.suite.plan import NVERun


def run_nve_section(job: Job) -> SectionResult:
    """Smoothness, then constant-energy runs of all systems of the plan."""
    smooth, checks = measure_smoothness(job)
    sections = [_smoothness_section(smooth)]
    numbers: dict[str, Any] = {"smoothness": smooth, "runs": {}}
    for run in job.plan.nve:
        traces = measure_run(job, run)
        found = run_numbers(run, traces)
        numbers["runs"][run.name] = found
        result = NVEResult(
            traces=traces,
            runs=[conservation(t, TEMPERATURE) for t in traces],
            halving_ratios=found["halving_ratios"],
        )
        if run.judged:
            checks.extend(named(result.checks, f"NVE, {run.name}"))
        sections.append(_run_section(run, result, found))
    return SectionResult(numbers=numbers, checks=checks, sections=sections)


def run_numbers(run: NVERun, traces: Sequence[EnergyTrace]) -> dict[str, Any]:
    """All numbers of the runs of one system."""
    shortest = min(float(t.time[-1]) for t in traces)
    rows = []
    for trace in traces:
        result = conservation(trace, TEMPERATURE)
        rows.append(asdict(result) | relative_slopes(result, trace))
    return {
        "system": run.system,
        "precision": run.precision,
        "atoms": traces[0].n_atoms,
        "degrees_of_freedom": traces[0].n_dof,
        "picoseconds": shortest,
        "runs": rows,
        "halving_ratios": [halving_ratio(fine, coarse) for fine, coarse in pairwise(traces)],
        "judged": run.judged,
    }


def _smoothness_section(numbers: Mapping[str, Any]) -> Section:
    rows = [
        [name, *(_scientific(found[key]) for key in ("gradient", "jump"))]
        for name, found in numbers.items()
    ]
    return Section(
        title="Do forces belong to the energy?",
        paragraphs=[
            "In double precision: forces against central differences of the energy, for each "
            "atom of a distorted molecule; and the largest jump of any force while a methane "
            f"moves away from the molecule in steps of {1e3 * RAMP_STEP:g} mÅ, through the cutoff."
        ],
        tables=[
            TableBlock(
                caption="Gradient and smoothness",
                columns=["molecule", "forces − differences [eV/Å]", "jump of a force [eV/Å]"],
                rows=rows,
            )
        ],
    )


def _scientific(value: float | None) -> str:
    return "–" if value is None else number(value, 2)


def _run_section(run: NVERun, result: NVEResult, found: Mapping[str, Any]) -> Section:
    finest = found["runs"][0]
    precision = {
        "single": "the network in float32, energies and the integrator in float64",
        "mixed": "features gathered in float16, the rest of the network in float32, energies and "
        "the integrator in float64",
        "double": "everything in float64",
    }[run.precision]
    paragraphs = [
        f"{found['atoms']} atoms, from one equilibrated start at {TEMPERATURE:g} K; velocity "
        f"Verlet, no constraints; {precision}."
    ]
    if found["picoseconds"] < 0.999 * run.picoseconds:
        paragraphs.append(
            f"{run.picoseconds:g} ps were planned; the time allowed "
            f"{number(found['picoseconds'])} ps."
        )
    if finest["duration"] < SLOPE_KT_DURATION:
        paragraphs.append(
            "Energies wander, so that runs this short say nothing of drift: their slopes are given "
            "and not judged."
        )
    if not run.judged:
        paragraphs.append("Reported without a pass mark.")
    rows = [
        ["kinetic energy", _percent(finest, "slope_of_kinetic")],
        [
            f"{ATOMIZATION:g} eV/atom, a typical atomisation energy",
            _percent(finest, "slope_of_atomization"),
        ],
    ]
    return Section(
        title=f"Constant energy: {run.name} precision",
        paragraphs=paragraphs,
        tables=[
            conservation_table(result.runs, result.halving_ratios),
            TableBlock(
                caption=f"The slope at {finest['timestep']:g} fs, relative to other energies",
                columns=["relative to", "slope [%/ns]"],
                rows=rows,
            ),
        ],
        figures=[
            FigureBlock(
                svg=figures.draw_energies([_thinned(t) for t in result.traces]),
                caption="Left: potential and kinetic energy are exchanged while their sum stays "
                "(smallest time step). Right: the sum, magnified. kT of one degree of freedom is "
                f"{number(1e3 * BOLTZMANN * TEMPERATURE)} meV.",
                alt=f"Energies of {run.name} at constant energy.",
            )
        ],
    )


def _percent(row: Mapping[str, Any], key: str) -> str:
    return f"{number(row[key])} ± {number(row[key + '_error'], 2)}"


def _thinned(trace: EnergyTrace, most: int = 1500) -> EnergyTrace:
    """Every nth sample of a long trace, for drawing, and all of its begin, which is magnified."""
    step = max(1, len(trace.time) // most)
    kept = (trace.time <= WINDOW) | (np.arange(len(trace.time)) % step == 0)
    names = ("time", "potential", "kinetic", "shadow")
    return replace(trace, **{name: getattr(trace, name)[kept] for name in names})
