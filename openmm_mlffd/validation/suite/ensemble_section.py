"""Constant temperature and constant pressure: tables and figures."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from openmm_mlffd.units import BOLTZMANN
from openmm_mlffd.validation import analysis, figures
from openmm_mlffd.validation.conservation import temperature
from openmm_mlffd.validation.report import FigureBlock, Section, TableBlock, number
from openmm_mlffd.validation.suite.curves import draw_histograms
from openmm_mlffd.validation.suite.dynamics import FRICTION, Trajectory
from openmm_mlffd.validation.suite.ensembles import (
    SMALLEST_SAMPLE,
    as_mdtraj,
    ensemble_checks,
    ensemble_numbers,
    equilibrated,
)
from openmm_mlffd.validation.suite.job import Job, SectionResult, named
from openmm_mlffd.validation.suite.plan import EnsembleRun
from openmm_mlffd.validation.suite.runs import run_and_keep
from openmm_mlffd.validation.suite.systems import System, load_system


def run_ensembles(job: Job) -> SectionResult:
    """Langevin runs of all systems of the plan."""
    numbers: dict[str, Any] = {}
    checks, sections = [], []
    for run in job.plan.ensembles:
        system = load_system(run.system, run.copies)
        trajectory = run_and_keep(job, job.model, run, "student")
        found = ensemble_numbers(run, system, trajectory)
        numbers[run.name] = found
        checks.extend(named(ensemble_checks(run, found), run.name))
        sections.append(_section(run, system, trajectory, found))
    return SectionResult(numbers=numbers, checks=checks, sections=sections)


def _section(
    run: EnsembleRun, system: System, trajectory: Trajectory, found: Mapping[str, Any]
) -> Section:
    pressure = "" if run.pressure is None else f" and {run.pressure:g} bar (Monte Carlo barostat)"
    paragraphs = [
        f"{found['atoms']} atoms, {number(found['picoseconds'])} of {run.picoseconds:g} ps at "
        f"{run.temperature:g} K{pressure}: LangevinMiddleIntegrator, friction {FRICTION:g}/ps, "
        f"{run.timestep:g} fs. The first fifth is left out of all means; errors are those of five "
        "blocks, and in runs of a few picoseconds too small."
    ]
    if found["failure"]:
        paragraphs.append(f"The run did not reach its end: {found['failure']}.")
    rows = [
        ["mean temperature [K]", _pm(found, "temperature")],
        ["width of the kinetic energy / expected", _pm(found, "kinetic_width")],
        ["longest bond / its length at the start", _value(found, "longest_bond")],
    ]
    shape = found.get("shape", {})
    for key, what in (
        ("largest_rmsd", "RMSD of the solute's heavy atoms from the start, largest [Å]"),
        ("last_rmsd", "the same, at the end [Å]"),
        ("largest_omega", "amides turned from where they were, at most [degrees]"),
        ("inverted_centers", "centers of four neighbors turned inside out"),
    ):
        if key in shape:
            value = shape[key]
            rows.append([what, str(value) if isinstance(value, int) else number(value)])
    pv = found["physical_validation"]
    if pv is not None:
        deviations = " and ".join(
            "–" if pv[k] is None else f"{number(pv[k], 2)}"
            for k in ("mean_deviation", "width_deviation")
        )
        rows.append(
            ["physical-validation: mean and width deviate by [standard errors]", deviations]
        )
    if "density" in found:
        rows += [
            ["density [g/cm³]", _pm(found, "density")],
            [
                "density of the first and last frame [g/cm³]",
                f"{number(found['density_start'])} and {number(found['density_end'])}",
            ],
            ["standard deviation of the volume / mean", _value(found, "volume_relative_std")],
        ]
    if "compressibility" in found:
        rows.append(["isothermal compressibility [1/bar]", _value(found, "compressibility")])
    drawn = _figures(run, system, trajectory) if len(trajectory.time) > 5 else []
    return Section(
        title=run.name[0].upper() + run.name[1:],
        paragraphs=paragraphs,
        tables=[TableBlock(caption="What the run says", columns=["quantity", "value"], rows=rows)],
        figures=drawn,
    )


def _figures(run: EnsembleRun, system: System, trajectory: Trajectory) -> list[FigureBlock]:
    part = equilibrated(trajectory)
    kinetic = trajectory.kinetic[part]
    n_dof, kt = trajectory.n_dof, BOLTZMANN * run.temperature
    mean, width = (n_dof / 2 * kt, math.sqrt(n_dof / 2) * kt)
    low = max(0.0, min(kinetic.min(), mean - 3.5 * width))
    high = max(kinetic.max(), mean + 3.5 * width)
    found = [
        FigureBlock(
            svg=figures.draw_series(
                trajectory.time,
                {"kinetic temperature": temperature(trajectory.kinetic, n_dof)},
                "temperature [K]",
                target=run.temperature,
                target_label="thermostat",
            ),
            caption="Kinetic temperature along the run.",
            alt=f"Temperature of {run.name} along time.",
        ),
    ]
    if len(kinetic) >= SMALLEST_SAMPLE:
        found.append(
            FigureBlock(
                svg=draw_histograms(
                    {"run": kinetic},
                    np.linspace(low, high, 31),
                    "kinetic energy [eV]",
                    expected=_gamma(n_dof, run.temperature, low, high),
                    expected_label=f"gamma distribution, {run.temperature:g} K",
                ),
                caption=f"Kinetic energy of {n_dof} degrees of freedom, and what it has to be.",
                alt="Histogram of the kinetic energy and the expected distribution.",
            )
        )
    if system.cell is None:
        return found
    frames = as_mdtraj(system, trajectory)
    found.append(
        FigureBlock(
            svg=figures.draw_series(
                trajectory.time,
                {"density": 1e-3 * analysis.density(frames)},
                "density [g/cm³]",
            ),
            caption="Density along the run.",
            alt=f"Density of {run.name} along time.",
        )
    )
    curves = {
        f"O–{s}": analysis.radial_distribution(frames[part], "O", s, bin_width=0.1)
        for s in ("O", "H")
    }
    found.append(
        FigureBlock(
            svg=figures.draw_radial(curves),
            caption="Radial distribution between molecules; the first O–O peak is at "
            f"{number(curves['O–O'].peak[0])} Å, {number(curves['O–O'].peak[1])} high.",
            alt="Radial distribution functions.",
        )
    )
    return found


def _gamma(n_dof: int, kelvin: float, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """Density of the kinetic energy of so many degrees of freedom."""
    x = np.linspace(max(low, 1e-6), high, 200)
    shape, scale = n_dof / 2, BOLTZMANN * kelvin
    log_density = (shape - 1) * np.log(x) - x / scale - math.lgamma(shape) - shape * math.log(scale)
    return x, np.exp(log_density)


def _value(found: Mapping[str, Any], key: str) -> str:
    value = found.get(key)
    return "–" if value is None or math.isnan(value) else number(value)


def _pm(found: Mapping[str, Any], key: str) -> str:
    error = found.get(key + "_error")
    if error is None or math.isnan(error):
        return _value(found, key)
    return f"{_value(found, key)} ± {number(error, 2)}"
