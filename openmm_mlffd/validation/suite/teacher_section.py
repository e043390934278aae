"""Does the student do what its teacher does? The same starts and the same thermostat."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from openmm_mlffd.validation import analysis
from openmm_mlffd.validation.conservation import Check
from openmm_mlffd.validation.report import Section
from openmm_mlffd.validation.suite import teacher_report as report
from openmm_mlffd.validation.suite.dynamics import Trajectory
from openmm_mlffd.validation.suite.ensembles import as_mdtraj, equilibrated, run_and_keep
from openmm_mlffd.validation.suite.job import Job, SectionResult, named
from openmm_mlffd.validation.suite.likeness import (
    SMALLEST_FRAMES,
    Feature,
    compare_maps,
    compare_radial,
    geometry_features,
    ramachandran,
)
from openmm_mlffd.validation.suite.models import Model, Structure, label
from openmm_mlffd.validation.suite.plan import EnsembleRun
from openmm_mlffd.validation.suite.static import (
    bond_lengths_and_angles,
    dimer_piece,
    frequencies,
    geometry_piece,
    relax,
    rmsd,
    torsion_piece,
)
from openmm_mlffd.validation.suite.statistics import block_error
from openmm_mlffd.validation.suite.store import write_arrays
from openmm_mlffd.validation.suite.systems import dimers, load_system, molecules

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
    geometries = _geometries(job, teacher)
    torsions = _torsions(job, teacher)
    pairs = _dimers(job, teacher)
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


def _geometries(job: Job, teacher: Model) -> dict[str, Any]:
    names = job.plan.teacher.molecules
    found = {}
    for name in molecules() if names is None else names:
        system = load_system(name)
        reference = geometry_piece(job.store, teacher, name).arrays()
        start = reference["positions"]

        def measure(folder: Any, system: Any = system, start: Any = start) -> dict[str, Any]:
            # from the teacher's minimum: what is compared is one minimum, not two conformers
            positions = relax(job.model, system, start)
            write_arrays(
                folder / "arrays.npz", positions=positions,
                frequencies=frequencies(job.model, system, positions),
            )  # fmt: skip
            return {}

        settings = {"model": job.model.identity, "teacher": teacher.identity, "name": name}
        mine = job.store.piece(f"geometry of {name}", settings, measure).arrays()
        lengths, angles = zip(
            *(bond_lengths_and_angles(system, x) for x in (mine["positions"], start)), strict=True
        )
        difference = mine["frequencies"] - reference["frequencies"]
        found[name] = {
            "atoms": len(system.numbers),
            "rmsd": rmsd(mine["positions"], start),
            "bond_mae": float(np.abs(lengths[0] - lengths[1]).mean()),
            "angle_mae": float(np.abs(angles[0] - angles[1]).mean()) if angles[0].size else 0.0,
            "frequency_mae": float(np.abs(difference).mean()),
            "frequency_largest": float(np.abs(difference).max()),
            "frequencies": mine["frequencies"],
            "teacher_frequencies": reference["frequencies"],
        }
    return found


def _torsions(job: Job, teacher: Model) -> dict[str, Any]:
    names = job.plan.teacher.torsions
    everything = [name for name, system in molecules().items() if system.torsion]
    found = {}
    for name in everything if names is None else names:
        scan = torsion_piece(job.store, teacher, name, job.plan.teacher.scan_step).arrays()
        numbers = load_system(name).numbers
        structures = [Structure(numbers, x) for x in scan["positions"]]
        # at the teacher's geometries: two curves at the same points
        mine = np.array([e for e, _ in label(job.model, structures, precision="double")])
        mine -= mine.min()
        reference = scan["energies"] - scan["energies"].min()
        shift = (mine - reference).mean()
        found[name] = {
            "angles": scan["angles"],
            "student": 1e3 * mine,
            "teacher": 1e3 * reference,
            "mae": 1e3 * float(np.abs(mine - reference - shift).mean()),
            "barrier": 1e3 * float(mine.max()),
            "teacher_barrier": 1e3 * float(reference.max()),
        }
    return found


def _dimers(job: Job, teacher: Model) -> dict[str, Any]:
    names = job.plan.teacher.dimers
    found = {}
    for name, dimer in dimers().items():
        if names is not None and name not in names:
            continue
        curves = [dimer_piece(job.store, model, dimer).arrays() for model in (job.model, teacher)]
        mine, reference = (1e3 * c["energies"] for c in curves)
        # the wall is far from what dynamics visits
        soft = reference < 500.0
        found[name] = {
            "distances": curves[0]["distances"],
            "student": mine,
            "teacher": reference,
            "mae": float(np.abs(mine - reference)[soft].mean()),
            "deepest": float(mine.min()),
            "teacher_deepest": float(reference.min()),
        }
    return found


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
        name = max(errors, key=lambda n: errors[n])
        checks.append(
            Check(
                name=f"height of a torsion's barrier, largest error ({name})",
                value=errors[name],
                unit="meV",
                high=BARRIER,
            )
        )
    return checks


def _both(job: Job, teacher: Model, run: EnsembleRun) -> tuple[Trajectory, Trajectory]:
    """Trajectories of both over the same time."""
    reference = run_and_keep(job, teacher, run, f"teacher {teacher.name}")
    mine = run_and_keep(job, job.model, run, "student")
    last = min(float(t.time[-1]) if len(t.time) else 0.0 for t in (mine, reference))
    return mine.until(last), reference.until(last)


def _molecule_dynamics(
    job: Job, teacher: Model, run: EnsembleRun
) -> tuple[dict[str, Any], Section, list[Check]]:
    mine, reference = _both(job, teacher, run)
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
    mine, reference = _both(job, teacher, run)
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
