"""All sections, one report, one JSON file, one model card."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import openmm

import openmm_mlffd
from openmm_mlffd.validation.conservation import Check
from openmm_mlffd.validation.report import Report, Section, TableBlock
from openmm_mlffd.validation.suite.card import write_card
from openmm_mlffd.validation.suite.ensemble_section import run_ensembles
from openmm_mlffd.validation.suite.force_section import run_forces
from openmm_mlffd.validation.suite.job import Job, SectionResult
from openmm_mlffd.validation.suite.measure import choose_sections
from openmm_mlffd.validation.suite.nve_section import run_nve_section
from openmm_mlffd.validation.suite.plan import SECTIONS
from openmm_mlffd.validation.suite.robustness_section import run_robustness
from openmm_mlffd.validation.suite.speed import hardware, run_speed
from openmm_mlffd.validation.suite.stability_section import run_stability
from openmm_mlffd.validation.suite.store import OutOfTime, write_json
from openmm_mlffd.validation.suite.teacher_section import run_teacher

FORMAT = "mlffd-validation"
FORMAT_VERSION = 1

RUNNERS: dict[str, Callable[[Job], SectionResult]] = {
    "forces": run_forces,
    "nve": run_nve_section,
    "ensembles": run_ensembles,
    "stability": run_stability,
    "teacher": run_teacher,
    "robustness": run_robustness,
    "speed": run_speed,
}

_PACKAGES = ("openmm", "torch", "numpy", "mdtraj", "physical-validation")


def run_validation(job: Job, sections: Sequence[str] | None = None) -> dict[str, Any]:
    """Run sections, and write report, numbers and model card.

    Parameters
    ----------
    job
        The validation.
    sections
        Names of sections to run and to report; None for all for which the job has what they
        need. What is on disk already is not measured again.

    Returns
    -------
    dict
        The content of `validation.json`: ``finished`` is whether no section ran out of time,
        ``passed`` whether all checks of the sections that were run are passed.

    Raises
    ------
    ValueError
        If there is no such section, or one that was asked for lacks a data set or teacher.
    """
    chosen = choose_sections(job, sections)
    began = time.monotonic()
    results: dict[str, SectionResult] = {}
    status: dict[str, str] = {}
    for name in SECTIONS:
        if name not in chosen:
            status[name] = _why_not(job, name)
            continue
        try:
            results[name] = RUNNERS[name](job)
            status[name] = "finished"
        except OutOfTime:
            status[name] = "unfinished: out of time; the same command goes on"
            job.store.tell(f"{name}: out of time")
        except openmm.OpenMMException as error:
            results[name] = _broken(name, error)
            status[name] = f"failed: {error}"
    content = _content(job, results, status, time.monotonic() - began)
    _write(job, content, results, status)
    return content


def _broken(name: str, error: Exception) -> SectionResult:
    """A section that an exploding simulation ended."""
    check = Check(name=f"{name}: simulations that raised an error", value=1.0, unit="", high=0.0)
    section = Section(title=f"Section {name}", paragraphs=[f"OpenMM raised an error: {error}"])
    return SectionResult(numbers={"error": str(error)}, checks=[check], sections=[section])


def _why_not(job: Job, name: str) -> str:
    if name == "forces" and job.data is None:
        return "not run: no data set was given (--data)"
    if name == "teacher" and job.teacher is None:
        return "not run: no teacher was given (--teacher)"
    return "not run: not among the sections asked for"


def _content(
    job: Job, results: dict[str, SectionResult], status: dict[str, str], seconds: float
) -> dict[str, Any]:
    checks = [check for result in results.values() for check in result.checks]
    header = getattr(job.model, "header", None)
    return {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "student": {
            "name": job.model.name,
            "sha256": job.model.identity,
            "header": None if header is None else asdict(header),
        },
        "teacher": None if job.teacher is None else job.teacher.identity,
        "level": job.plan.level,
        "finished": not any(s.startswith("unfinished") for s in status.values()),
        "passed": all(check.passed for check in checks),
        "status": status,
        "checks": [
            {**asdict(c), "passed": c.passed, "section": name}
            for name, result in results.items()
            for c in result.checks
        ],
        "sections": {name: result.numbers for name, result in results.items()},
        "hardware": "; ".join(sorted(job.store.machines)) or hardware(),
        "versions": {"openmm-mlffd": openmm_mlffd.__version__, **_versions()},
        "seconds": seconds,
    }


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _write(
    job: Job,
    content: dict[str, Any],
    results: dict[str, SectionResult],
    status: dict[str, str],
) -> None:
    path = job.output / "validation.json"
    write_json(path, content)
    checks: list[Check] = [check for result in results.values() for check in result.checks]
    Report(
        title=f"Is the student “{job.model.name}” fit for molecular dynamics?",
        summary=_summary(job, content),
        checks=checks,
        sections=[
            _overview(results, status),
            *(section for result in results.values() for section in result.sections),
            _method(job, content),
        ],
    ).write(job.output / "report.html")
    # from the file, as anybody else would
    write_card(json.loads(path.read_text("utf-8")), job.output / "model_card.md")


def _summary(job: Job, content: dict[str, Any]) -> str:
    levels = {
        "tiny": "Far too short to mean anything: a test of the suite itself.",
        "smoke": "The short form: it tells a broken student from a sound one, and says little of "
        "slow drifts, equilibrium densities and rare events.",
        "full": "The full form.",
    }
    teacher = f" Teacher: {content['teacher']}." if content["teacher"] else ""
    return (
        f"Student {job.model.name}, SHA-256 {job.model.identity[:16]}.{teacher} "
        f"{levels[job.plan.level]}"
    )


def _overview(results: dict[str, SectionResult], status: dict[str, str]) -> Section:
    rows = []
    for name, said in status.items():
        result = results.get(name)
        if result is None:
            rows.append([name, said, ""])
            continue
        failed = sum(not check.passed for check in result.checks)
        verdict = "nothing to pass" if not result.checks else "passed" if not failed else "FAILED"
        text = f"{len(result.checks) - failed} of {len(result.checks)}" if result.checks else ""
        rows.append([name, verdict, text])
    return Section(
        title="Sections",
        tables=[
            TableBlock(
                caption="What was looked at",
                columns=["section", "result", "checks passed"],
                rows=rows,
            )
        ],
    )


def _method(job: Job, content: dict[str, Any]) -> Section:
    versions = ", ".join(f"{k} {v}" for k, v in content["versions"].items() if v)
    return Section(
        title="How this was made",
        paragraphs=[
            f"`mlffd validate` at the level “{job.plan.level}” on {content['hardware']}. "
            f"{versions}.",
            "All numbers are in validation.json; trajectories (.dcd) and energies are in the "
            "folders of pieces/, each with its settings. What a section has to pass, and why, is "
            "in docs/validation.md of the source.",
        ],
    )
