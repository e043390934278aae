"""What `mlffd validate` does: all sections, one report, one JSON file, one model card."""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import openmm

import openmm_mlffd
from openmm_mlffd.training.teachers import parse_options
from openmm_mlffd.validation.conservation import Check
from openmm_mlffd.validation.report import Report, Section, TableBlock, number
from openmm_mlffd.validation.suite.card import write_card
from openmm_mlffd.validation.suite.ensemble_section import run_ensembles
from openmm_mlffd.validation.suite.force_section import run_forces
from openmm_mlffd.validation.suite.job import Job, SectionResult
from openmm_mlffd.validation.suite.models import StudentModel, TeacherModel
from openmm_mlffd.validation.suite.nve_section import run_nve_section
from openmm_mlffd.validation.suite.plan import SECTIONS, make_plan
from openmm_mlffd.validation.suite.robustness import run_robustness
from openmm_mlffd.validation.suite.speed import hardware, run_speed
from openmm_mlffd.validation.suite.store import Clock, OutOfTime, Store, write_json
from openmm_mlffd.validation.suite.teacher_section import run_teacher

FORMAT = "mlffd-validation"
FORMAT_VERSION = 1

RUNNERS: dict[str, Callable[[Job], SectionResult]] = {
    "forces": run_forces,
    "nve": run_nve_section,
    "ensembles": run_ensembles,
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


def choose_sections(job: Job, sections: Sequence[str] | None) -> list[str]:
    """Names of the sections that are to be run, in the order of the report."""
    needs = {"forces": (job.data, "--data"), "teacher": (job.teacher, "--teacher")}
    if sections is None:
        return [s for s in SECTIONS if s not in needs or needs[s][0] is not None]
    for name in sections:
        if name not in SECTIONS:
            raise ValueError(f"there is no section {name!r}; there are {', '.join(SECTIONS)}")
        if name in needs and needs[name][0] is None:
            raise ValueError(f"section {name} needs {needs[name][1]}")
    return [s for s in SECTIONS if s in sections]


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
        "hardware": hardware(),
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


def run_validate_command(
    model: str,
    output: Path,
    *,
    level: str,
    data: Path | None,
    split: str,
    training: Path | None,
    teacher: str | None,
    teacher_python: str | None,
    teacher_options: Sequence[str],
    sections: Sequence[str] | None,
    pieces: Path | None,
    speed: Path | None,
    device: str | None,
    max_minutes: float | None,
    run_minutes: float | None,
    echo: Callable[[str], object],
) -> tuple[bool, bool]:
    """`mlffd validate`: see `mlffd validate --help` for the arguments.

    Returns
    -------
    finished, passed : bool
        Whether everything was measured, and whether all of it passed.
    """
    began = time.monotonic()
    output.mkdir(parents=True, exist_ok=True)
    reference = None
    try:
        if teacher is not None:
            reference = TeacherModel.start(
                teacher, parse_options(list(teacher_options)), python=teacher_python
            )
        job = Job(
            model=StudentModel(model, device),
            plan=make_plan(level),
            store=Store(pieces or output / "pieces", clock=Clock(max_minutes), tell=echo),
            output=output,
            teacher=reference,
            data=data,
            split=split,
            training=training,
            speed=speed,
            minutes=run_minutes,
            progress=_progress(echo),
        )
        content = run_validation(job, sections)
    finally:
        if reference is not None:
            reference.close()
    for check in content["checks"]:
        if not check["passed"]:
            value = math.nan if check["value"] is None else check["value"]
            echo(f"FAILED  {check['name']}: {number(value)} {check['unit']}")
    passed = sum(check["passed"] for check in content["checks"])
    echo(
        f"{passed} of {len(content['checks'])} checks passed; {output / 'report.html'} "
        f"({time.monotonic() - began:.0f} s)"
    )
    return content["finished"], content["passed"]


def _progress(echo: Callable[[str], object]) -> Callable[[str, float, float], None]:
    """A line about every ten seconds."""
    last = [time.monotonic()]

    def tell(label: str, done: float, total: float) -> None:
        if time.monotonic() - last[0] > 10:
            last[0] = time.monotonic()
            echo(f"  {label}: {done:.4g} of {total:.4g}")

    return tell
