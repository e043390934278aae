"""What `mlffd validate` does. Report and figures are imported only where they are made."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from openmm_mlffd.training.teachers import parse_options
from openmm_mlffd.validation.report import range_text, value_text
from openmm_mlffd.validation.suite.job import Job
from openmm_mlffd.validation.suite.measure import run_measurements
from openmm_mlffd.validation.suite.models import Model, StudentModel, TeacherModel
from openmm_mlffd.validation.suite.plan import StabilityPlan, make_plan
from openmm_mlffd.validation.suite.speed import hardware
from openmm_mlffd.validation.suite.stability import measure_stability
from openmm_mlffd.validation.suite.stability_section import result as stability_result
from openmm_mlffd.validation.suite.stability_section import stability_checks
from openmm_mlffd.validation.suite.store import Clock, OutOfTime, Store, write_json
from openmm_mlffd.validation.suite.stored_model import StoredModel
from openmm_mlffd.validation.suite.systems import load_system


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
    teacher_from_pieces: bool,
    sections: Sequence[str] | None,
    pieces: Path | None,
    speed: Path | None,
    device: str | None,
    max_minutes: float | None,
    run_minutes: float | None,
    measure_only: bool,
    only: Sequence[str],
    echo: Callable[[str], object],
) -> tuple[bool, bool]:
    """`mlffd validate`: see `mlffd validate --help` for the arguments.

    Returns
    -------
    finished, passed : bool
        Whether everything was measured, and whether all of it passed. Where nothing but
        measuring was asked for, all passes that raised no error.

    Raises
    ------
    ValueError
        If tasks were chosen for a report, which always has all of them, or the pieces hold
        nothing of the teacher.
    """
    if only and not measure_only:
        raise ValueError("--only needs --measure-only: a report has all tasks of its sections")
    output.mkdir(parents=True, exist_ok=True)
    stored = (pieces or output / "pieces") if teacher_from_pieces else None
    with _teacher(teacher, teacher_options, teacher_python, stored) as reference:
        job = Job(
            model=StudentModel(model, device),
            plan=make_plan(level),
            store=Store(
                pieces or output / "pieces",
                clock=Clock(max_minutes),
                tell=echo,
                machine=hardware(device),
            ),
            output=output,
            teacher=reference,
            data=data,
            split=split,
            training=training,
            speed=speed,
            minutes=run_minutes,
            progress=_progress(echo),
        )
        if measure_only:
            status = run_measurements(job, sections, only).values()
            finished = not any(s.startswith("unfinished") for s in status)
            return finished, not any(s.startswith("failed") for s in status)
        return _report(job, sections, echo)


def run_stability_command(
    model: str,
    output: Path,
    *,
    picoseconds: float,
    box_picoseconds: float,
    temperatures: Sequence[float],
    structures: Sequence[Path],
    charges: Sequence[str],
    timestep: float,
    teacher: str | None,
    teacher_python: str | None,
    teacher_options: Sequence[str],
    pieces: Path | None,
    device: str | None,
    max_minutes: float | None,
    echo: Callable[[str], object],
) -> tuple[bool, bool]:
    """`mlffd stability`: see `mlffd stability --help` for the arguments.

    Returns
    -------
    finished, passed : bool
        Whether everything was measured, and whether all of it passed.

    Raises
    ------
    ValueError
        If a charge is not of the form FILE=CHARGE, names no structure, or contradicts its file.
    """
    plan = replace(
        make_plan("full"),
        run_minutes=math.inf,
        stability=_stability_plan(
            picoseconds, box_picoseconds, tuple(temperatures), structures, charges, timestep
        ),
    )
    output.mkdir(parents=True, exist_ok=True)
    with _teacher(teacher, teacher_options, teacher_python) as reference:
        store = Store(
            pieces or output / "pieces", clock=Clock(max_minutes), tell=echo,
            machine=hardware(device),
        )  # fmt: skip
        job = Job(
            model=StudentModel(model, device), plan=plan, store=store, output=output,
            teacher=reference, progress=_progress(echo),
        )  # fmt: skip
        try:
            numbers = measure_stability(job)
        except OutOfTime as error:
            echo(str(error))
            return False, True
    return True, _report_stability(job, numbers, echo)


def _report_stability(job: Job, numbers: Mapping[str, Any], echo: Callable[[str], object]) -> bool:
    """Write stability.json and say what is in it; whether all checks are passed."""
    checks = stability_checks(numbers)
    content = {
        "student": {"name": job.model.name, "sha256": job.model.identity},
        "teacher": None if job.teacher is None else job.teacher.identity,
        "hardware": "; ".join(sorted(job.store.machines)),
        "checks": [{**asdict(c), "passed": c.passed} for c in checks],
        **numbers,
    }
    write_json(job.output / "stability.json", content)
    for name, run in (numbers["molecules"] | numbers["boxes"]).items():
        echo(f"{name:45s} {run['picoseconds']:8.3g} ps  {stability_result(run)}")
    for check in checks:
        verdict = "passed" if check.passed else "FAILED"
        echo(f"{verdict}  {check.name}: {value_text(check.value, check.high, check.unit)}")
    return all(check.passed for check in checks)


def parse_charges(pairs: Sequence[str], structures: Sequence[Path]) -> dict[str, int]:
    """Total charges [e] given as FILE=CHARGE, by the names of the structures.

    Raises
    ------
    ValueError
        If there is no equals sign, a charge is not whole, or a file is none of the structures or
        is named twice.
    """
    charges: dict[str, int] = {}
    for pair in pairs:
        file, equals, value = pair.rpartition("=")
        try:
            charge = int(value)
        except ValueError:
            equals = ""
        if not equals:
            raise ValueError(f"a charge is given as FILE=CHARGE with a whole number, got {pair!r}")
        name = str(Path(file))
        if name not in map(str, structures):
            known = ", ".join(map(str, structures)) or "none"
            raise ValueError(f"--charge {pair}: no --structure is called so; there is {known}")
        if name in charges:
            raise ValueError(f"--charge {pair}: {name} was given a charge before")
        charges[name] = charge
    return charges


def _stability_plan(
    picoseconds: float,
    box_picoseconds: float,
    temperatures: tuple[float, ...],
    structures: Sequence[Path],
    charges: Sequence[str],
    timestep: float,
) -> StabilityPlan:
    given = parse_charges(charges, structures)
    molecules, boxes = None, None
    if structures:
        named = {name: load_system(name, charge=given.get(name)) for name in map(str, structures)}
        molecules = tuple(name for name, system in named.items() if system.cell is None)
        boxes = tuple(name for name, system in named.items() if system.cell is not None)
    return StabilityPlan(
        picoseconds=picoseconds, box_picoseconds=box_picoseconds, temperatures=temperatures,
        molecules=molecules if picoseconds else (), boxes=boxes if box_picoseconds else (),
        timestep=timestep, charges=given,
    )  # fmt: skip


def _report(
    job: Job, sections: Sequence[str] | None, echo: Callable[[str], object]
) -> tuple[bool, bool]:
    from openmm_mlffd.validation.suite.assemble import run_validation

    began = time.monotonic()
    content = run_validation(job, sections)
    for check in content["checks"]:
        if not check["passed"]:
            value = value_text(check["value"], check["high"], check["unit"])
            limit = range_text(check["low"], check["high"], check["unit"])
            echo(f"FAILED  {check['name']}: {value} ({limit})")
    passed = sum(check["passed"] for check in content["checks"])
    echo(
        f"{passed} of {len(content['checks'])} checks passed; {job.output / 'report.html'} "
        f"({time.monotonic() - began:.0f} s)"
    )
    return content["finished"], content["passed"]


@contextmanager
def _teacher(
    name: str | None, options: Sequence[str], python: str | None, stored: Path | None = None
) -> Iterator[Model | None]:
    """The teacher, if there is one, in a process that ends with the block, or from pieces."""
    if name is None:
        yield None
        return
    if stored is not None:
        yield StoredModel.of_pieces(stored, name)
        return
    teacher = TeacherModel.start(name, parse_options(list(options)), python=python)
    try:
        yield teacher
    finally:
        teacher.close()


def _progress(echo: Callable[[str], object]) -> Callable[[str, float, float], None]:
    """A line about every ten seconds."""
    last = [time.monotonic()]

    def tell(label: str, done: float, total: float) -> None:
        if time.monotonic() - last[0] > 10:
            last[0] = time.monotonic()
            echo(f"  {label}: {done:.4g} of {total:.4g}")

    return tell
