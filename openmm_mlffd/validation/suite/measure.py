"""Run what a validation measures, without what a report needs: neither Matplotlib nor MDTraj."""

from collections.abc import Callable, Sequence
from functools import partial

import openmm

from openmm_mlffd.validation.suite.job import Job
from openmm_mlffd.validation.suite.nve_runs import measure_run, measure_smoothness
from openmm_mlffd.validation.suite.plan import SECTIONS
from openmm_mlffd.validation.suite.robustness import (
    HOT,
    hot_names,
    measure_distorted,
    measure_hot,
    measure_minimizations,
)
from openmm_mlffd.validation.suite.runs import run_and_keep
from openmm_mlffd.validation.suite.speed import measure_speed
from openmm_mlffd.validation.suite.stability import (
    box_runs,
    measure_box,
    molecule_runs,
    molecules_piece,
)
from openmm_mlffd.validation.suite.store import OutOfTime
from openmm_mlffd.validation.suite.teacher_runs import (
    compare_dimers,
    compare_geometries,
    compare_torsions,
)

Task = Callable[[], object]
"""A part of the work."""


def run_measurements(
    job: Job, sections: Sequence[str] | None = None, only: Sequence[str] = ()
) -> dict[str, str]:
    """Measure sections into the store of a job; a validation with the same store reports them.

    Parameters
    ----------
    job
        The validation.
    sections
        As for `choose_sections`.
    only
        Take the tasks whose names hold one of these texts; all if there is none. So that
        several processes can share the work, and the store.

    Returns
    -------
    dict
        How each task ended: ``finished``, ``unfinished: ...`` or ``failed: ...``.

    Raises
    ------
    ValueError
        If there is no such section, one that was asked for lacks a data set or teacher, or no
        task is left.
    """
    everything = list_tasks(job, sections)
    chosen = {k: v for k, v in everything.items() if not only or any(text in k for text in only)}
    if not chosen:
        raise ValueError(
            f"no task's name holds {' or '.join(map(repr, only))}; there are "
            f"{', '.join(map(repr, everything))}"
        )
    status = {}
    for name, run in chosen.items():
        try:
            run()
            status[name] = "finished"
        except OutOfTime:
            status[name] = "unfinished: out of time; the same command goes on"
        except openmm.OpenMMException as error:
            status[name] = f"failed: {error}"
        job.store.tell(f"{name}: {status[name]}")
    return status


def choose_sections(job: Job, sections: Sequence[str] | None) -> list[str]:
    """Names of the sections that are to be run, in the order of the report.

    Parameters
    ----------
    job
        The validation.
    sections
        Names; None for all for which the job has what they need.

    Raises
    ------
    ValueError
        If there is no such section, or one that was asked for lacks a data set or teacher.
    """
    needs = {"forces": (job.data, "--data"), "teacher": (job.teacher, "--teacher")}
    if sections is None:
        return [s for s in SECTIONS if s not in needs or needs[s][0] is not None]
    for name in sections:
        if name not in SECTIONS:
            raise ValueError(f"there is no section {name!r}; there are {', '.join(SECTIONS)}")
        if name in needs and needs[name][0] is None:
            raise ValueError(f"section {name} needs {needs[name][1]}")
    return [s for s in SECTIONS if s in sections]


def list_tasks(job: Job, sections: Sequence[str] | None = None) -> dict[str, Task]:
    """What the sections measure, in parts that do not need one another, by name."""
    makers: dict[str, Callable[[Job], dict[str, Task]]] = {
        "forces": _forces,
        "nve": _nve,
        "ensembles": _ensembles,
        "stability": _stability,
        "teacher": _teacher,
        "robustness": _robustness,
        "speed": lambda job: {"speed": partial(measure_speed, job)},
    }
    return {
        name: task
        for section in choose_sections(job, sections)
        for name, task in makers[section](job).items()
    }


def _forces(job: Job) -> dict[str, Task]:
    from openmm_mlffd.validation.suite.forces import measure_forces  # needs h5py

    assert job.data is not None  # choose_sections saw to it
    return {"forces": partial(measure_forces, job, job.data)}


def _nve(job: Job) -> dict[str, Task]:
    runs = {
        f"NVE {run.name}, {run.picoseconds:g} ps": partial(measure_run, job, run)
        for run in job.plan.nve
    }
    return {"smoothness": partial(measure_smoothness, job), **runs}


def _ensembles(job: Job) -> dict[str, Task]:
    return {
        f"student {run.name}": partial(run_and_keep, job, job.model, run, "student")
        for run in job.plan.ensembles
    }


def _stability(job: Job) -> dict[str, Task]:
    molecules: dict[str, Task] = {
        f"stability of {len(runs)} molecules, part {k + 1}": partial(molecules_piece, job, k, runs)
        for k, runs in enumerate(molecule_runs(job))
    }
    boxes = {f"stability {run.name}": partial(measure_box, job, run) for run in box_runs(job)}
    return molecules | boxes


def _robustness(job: Job) -> dict[str, Task]:
    hot = {f"{HOT:g} K {name}": partial(measure_hot, job, name) for name in hot_names(job)}
    return {
        "distorted structures": partial(measure_distorted, job),
        "minimisations": partial(measure_minimizations, job),
        "preparations": partial(measure_minimizations, job, prepared=True),
        **hot,
    }


def _teacher(job: Job) -> dict[str, Task]:
    teacher, plan = job.teacher, job.plan.teacher
    assert teacher is not None  # choose_sections saw to it
    tasks: dict[str, Task] = {
        "geometries": partial(compare_geometries, job, teacher),
        "torsions": partial(compare_torsions, job, teacher),
        "dimers": partial(compare_dimers, job, teacher),
    }
    for run in (plan.peptide, plan.water):
        if run is not None:
            for who, model, stem in (
                ("teacher", teacher, f"teacher {teacher.name}"),
                ("student", job.model, "student"),
            ):
                tasks[f"{who} {run.name}"] = partial(run_and_keep, job, model, run, stem)
    return tasks
