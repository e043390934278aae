"""Does the student do what its teacher does? The same starts and the same thermostat."""

import math
from collections.abc import Mapping
from typing import Any

from openmm_mlffd.validation import analysis
from openmm_mlffd.validation.conservation import Check
from openmm_mlffd.validation.report import Section
from openmm_mlffd.validation.suite import teacher_report as report
from openmm_mlffd.validation.suite.ensembles import as_mdtraj, equilibrated
from openmm_mlffd.validation.suite.job import Job, SectionResult, named
from openmm_mlffd.validation.suite.likeness import (
    SMALLEST_FRAMES,
    Feature,
    compare_maps,
    compare_radial,
    geometry_features,
    ramachandran,
)
from openmm_mlffd.validation.suite.models import Model
from openmm_mlffd.validation.suite.plan import EnsembleRun
from openmm_mlffd.validation.suite.statistics import block_error
from openmm_mlffd.validation.suite.systems import load_system
from openmm_mlffd.validation.suite.teacher_runs import (
    compare_dimers,
    compare_geometries,
    compare_torsions,
    run_both,
)

GEOMETRY = 0.075
"""Largest RMSD of a relaxed molecule [Å]."""

FREQUENCY = 40.0
"""Largest mean error of wavenumbers [1/cm]."""

BARRIER = 43.4
"""Largest error of a torsion's barrier [meV], 1 kcal/mol."""

INTERACTION = 21.7
"""Largest mean error of interaction energies [meV], half a kcal/mol."""

DISTRIBUTION = 0.1
"""Largest Jensen–Shannon distance, beyond twice the noise of the trajectories."""

DENSITY = 0.02
"""Largest relative difference of densities, beyond three standard errors."""

RADIAL = 0.1
"""Largest mean difference of radial distribution functions, beyond three standard errors."""


def run_teacher(job: Job) -> SectionResult:
    """Everything that needs a teacher.

    Raises
    ------
    ValueError
        If the job has none.
    """
    teacher = job.teacher
    if teacher is None:
        raise ValueError("no teacher was given (--teacher)")
    numbers: dict[str, Any] = {"teacher": teacher.identity}
    checks: list[Check] = []
    geometries = compare_geometries(job, teacher)
    torsions = compare_torsions(job, teacher)
    pairs = compare_dimers(job, teacher)
    checks += _static_checks(geometries, torsions, pairs)
    sections: list[Section] = [report.static_section(geometries, torsions, pairs)]
    numbers |= {"geometries": geometries, "torsions": torsions, "dimers": pairs}
    found, section, more = _molecule_dynamics(job, teacher, job.plan.teacher.peptide)
    numbers["dynamics"] = found
    sections.append(section)
    checks += more
    if job.plan.teacher.water is not None:
        found, section, more = _box_dynamics(job, teacher, job.plan.teacher.water)
        numbers["box"] = found
        sections.append(section)
        checks += more
    return SectionResult(
        numbers=numbers, checks=named(checks, "against the teacher"), sections=sections
    )


def _static_checks(
    geometries: Mapping[str, Any], torsions: Mapping[str, Any], pairs: Mapping[str, Any]
) -> list[Check]:
    def worst(table: Mapping[str, Any], key: str) -> tuple[str, float]:
        name = max(table, key=lambda n: math.inf if math.isnan(v := table[n][key]) else v)
        return name, float(table[name][key])

    checks = []
    for table, key, what, unit, high in (
        (geometries, "rmsd", "relaxed geometry, largest RMSD", "Å", GEOMETRY),
        (geometries, "frequency_mae", "wavenumbers, largest MAE", "1/cm", FREQUENCY),
        (pairs, "mae", "interaction energies, largest MAE", "meV", INTERACTION),
    ):
        if table:
            name, value = worst(table, key)
            checks.append(Check(name=f"{what} ({name})", value=value, unit=unit, high=high))
    if torsions:
        errors = {n: abs(t["barrier"] - t["teacher_barrier"]) for n, t in torsions.items()}
        name = max(errors, key=lambda n: math.inf if math.isnan(errors[n]) else errors[n])
        checks.append(
            Check(
                name=f"height of a torsion's barrier, largest error ({name})",
                value=errors[name],
                unit="meV",
                high=BARRIER,
            )
        )
    return checks


def _molecule_dynamics(
    job: Job, teacher: Model, run: EnsembleRun
) -> tuple[dict[str, Any], Section, list[Check]]:
    mine, reference = run_both(job, teacher, run)
    numbers: dict[str, Any] = {
        "system": run.system, "picoseconds": float(mine.time[-1]) if len(mine.time) else 0.0,
        "planned_picoseconds": run.picoseconds,
        "failure": mine.failure, "teacher_failure": reference.failure,
    }  # fmt: skip
    checks = _ended(numbers)
    system = load_system(run.system)
    parts = [t.positions[equilibrated(t)] for t in (mine, reference)]
    if min(map(len, parts)) < SMALLEST_FRAMES:
        text = f"fewer than {SMALLEST_FRAMES} frames: not compared"
        return numbers, report.short_section(run, numbers, text), checks
    features = geometry_features(system, *parts)
    numbers["features"] = {f.name: f.numbers() for f in features}
    dihedrals = [ramachandran(system, x) for x in parts]
    if dihedrals[0] is not None and dihedrals[1] is not None:
        numbers["ramachandran"] = compare_maps(dihedrals[0], dihedrals[1], run.temperature)
    checks += _distribution_checks(features, numbers["features"])
    section = report.molecule_section(run, numbers, features, dihedrals)
    return numbers, section, checks


def _ended(numbers: Mapping[str, Any]) -> list[Check]:
    value = float(bool(numbers["failure"]))
    return [
        Check(
            name=f"{numbers['system']}: runs that did not reach their end", value=value, unit="",
            high=0.0,
        )
    ]  # fmt: skip


def _distribution_checks(features: list[Feature], numbers: Mapping[str, Any]) -> list[Check]:
    return [
        Check(
            name=f"Jensen–Shannon distance, {feature.name}",
            value=numbers[feature.name]["js"],
            unit="",
            high=DISTRIBUTION + 2 * numbers[feature.name]["js_noise"],
        )
        for feature in features
    ]


def _box_dynamics(
    job: Job, teacher: Model, run: EnsembleRun
) -> tuple[dict[str, Any], Section, list[Check]]:
    mine, reference = run_both(job, teacher, run)
    system = load_system(run.system, run.copies)
    numbers: dict[str, Any] = {
        "system": run.name, "picoseconds": float(mine.time[-1]) if len(mine.time) else 0.0,
        "planned_picoseconds": run.picoseconds, "molecules": len(system.numbers) // 3,
        "failure": mine.failure, "teacher_failure": reference.failure,
    }  # fmt: skip
    checks = _ended(numbers)
    if min(len(mine.time), len(reference.time)) < SMALLEST_FRAMES:
        text = f"fewer than {SMALLEST_FRAMES} frames: not compared"
        return numbers, report.short_section(run, numbers, text), checks
    frames = [as_mdtraj(system, t)[equilibrated(t)] for t in (mine, reference)]
    densities = [1e-3 * analysis.density(f) for f in frames]
    means = [float(d.mean()) for d in densities]
    error = math.hypot(*(block_error(d) for d in densities)) / means[1]
    numbers |= {
        "density": means[0],
        "teacher_density": means[1],
        "density_difference": means[0] / means[1] - 1,
        "density_difference_error": error,
        "radial": compare_radial(*frames),
    }
    checks.append(
        Check(
            name=f"{run.name}: density / the teacher's − 1, size",
            value=abs(numbers["density_difference"]),
            unit="",
            high=DENSITY + 3 * error,
        )
    )
    for pair, found in numbers["radial"].items():
        checks.append(
            Check(
                name=f"{run.name}: g(r) of {pair}, mean difference",
                value=found["mae"],
                unit="",
                high=RADIAL + 3 * found["mae_error"],
            )
        )
    curves = [(t.time, 1e-3 * analysis.density(as_mdtraj(system, t))) for t in (mine, reference)]
    return numbers, report.box_section(run, numbers, curves), checks
