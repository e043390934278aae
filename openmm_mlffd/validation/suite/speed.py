"""Time of a step and memory; and what a file of a speed measurement says."""

import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import openmm
import torch
from openmm import unit

from openmm_mlffd.validation.nve import make_context
from openmm_mlffd.validation.report import Section, TableBlock, number
from openmm_mlffd.validation.suite.job import Job, SectionResult
from openmm_mlffd.validation.suite.plan import DRUG, PEPTIDE, WATER
from openmm_mlffd.validation.suite.systems import load_system

_TABLE_KEYS = ("results", "rows", "runs", "measurements")
_MOST_COLUMNS = 10


def run_speed(job: Job) -> SectionResult:
    """Speed of whole steps here, and the table of the job's file, if there is one."""
    numbers = measure_speed(job)
    tables = [_table(numbers["systems"])]
    paragraphs = [
        f"Whole Langevin steps of 0.5 fs in OpenMM on {numbers['hardware']}: good to some ten "
        "percent. Memory is the largest that the process, or PyTorch on the GPU, has held so far."
    ]
    if job.speed is not None:
        context, rows = read_speed(job.speed)
        numbers["file"] = {"name": job.speed.name, "context": context, "rows": rows}
        tables.append(_file_table(job.speed.name, context, rows))
    section = Section(title="Speed and memory", paragraphs=paragraphs, tables=tables)
    return SectionResult(numbers=numbers, sections=[section])


def measure_speed(job: Job) -> dict[str, Any]:
    """Time of steps on this machine, and what the machine is."""

    def measure(_: Path) -> dict[str, Any]:
        return {"hardware": hardware(), "systems": _time_steps(job)}

    # measured once: a report made elsewhere shows what this machine did
    settings = {"model": job.model.identity, "level": job.plan.level}
    return dict(job.store.piece("speed", settings, measure).numbers)


def _time_steps(job: Job) -> list[dict[str, Any]]:
    plans = {
        "tiny": [("methanol", (1, 1, 1))],
        "smoke": [(PEPTIDE, (1, 1, 1)), (DRUG, (1, 1, 1))],
        "full": [
            (PEPTIDE, (1, 1, 1)), (DRUG, (1, 1, 1)), (WATER, (1, 1, 1)), (WATER, (2, 2, 1)),
            (WATER, (4, 2, 2)),
        ],
    }  # fmt: skip
    rows = []
    for name, copies in plans[job.plan.level]:
        job.store.clock.check()
        system = load_system(name, copies)
        made = job.model.system(system.topology, charge=system.charge)
        integrator = openmm.LangevinMiddleIntegrator(
            300 * unit.kelvin, 1 / unit.picosecond, 0.5 * unit.femtosecond
        )
        integrator.setRandomNumberSeed(1)
        context = make_context(made, integrator)
        context.setPositions(system.nanometers)
        openmm.LocalEnergyMinimizer.minimize(context, maxIterations=5)
        context.setVelocitiesToTemperature(300 * unit.kelvin, 1)
        integrator.step(max(2, job.plan.speed_steps // 10))
        began = time.perf_counter()
        integrator.step(job.plan.speed_steps)
        context.getState(energy=True)
        seconds = (time.perf_counter() - began) / job.plan.speed_steps
        rows.append(
            {
                "system": name, "atoms": len(system.numbers), "ms_per_step": 1e3 * seconds,
                "ns_per_day": 0.5e-6 / seconds * 86400, "memory_mb": memory(),
                "platform": context.getPlatform().getName(),
            }
        )  # fmt: skip
    return rows


def memory() -> dict[str, float | None]:
    """Largest memory so far [MB]: of the process, and of PyTorch on the GPU."""
    host = None
    if sys.platform != "win32":
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        host = peak / (1e6 if sys.platform == "darwin" else 1e3)
    gpu = torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else None
    return {"process": host, "gpu": gpu}


def hardware(device: str | None = None) -> str:
    """Processor and GPU, in words; the GPU only if it is used.

    Parameters
    ----------
    device
        Torch device that is used; None is CUDA if there is any.
    """
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        name = models[0].split(":", 1)[1].strip() if models else name
    used = torch.cuda.is_available() and not str(device or "").startswith("cpu")
    gpu = f" and {torch.cuda.get_device_name(0)}" if used else ""
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} PyTorch threads{gpu}"


def read_speed(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Context and rows of a JSON file of speeds.

    Parameters
    ----------
    path
        A list of objects, or an object with such a list under ``results``, ``rows``, ``runs`` or
        ``measurements``; its other plain values are the context. Of the rows plain values are
        taken, whatever their names.

    Raises
    ------
    ValueError
        If it is not JSON, or holds no such list.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no JSON that can be read ({error})") from error
    context = {}
    rows = content
    if isinstance(content, dict):
        context = {k: v for k, v in content.items() if _is_plain(v)}
        rows = next((content[k] for k in _TABLE_KEYS if isinstance(content.get(k), list)), None)
    if not isinstance(rows, list) or not all(isinstance(r, dict) for r in rows):
        raise ValueError(
            f"{path}: a list of objects is needed, or an object with one under "
            f"{', '.join(_TABLE_KEYS)}"
        )
    return context, [{k: v for k, v in row.items() if _is_plain(v)} for row in rows]


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool)


def _table(rows: Sequence[Mapping[str, Any]]) -> TableBlock:
    def megabytes(value: float | None) -> str:
        return "–" if value is None else f"{value:.0f}"

    return TableBlock(
        caption="Speed of Langevin dynamics, 0.5 fs",
        columns=[
            "system", "atoms", "platform", "ms/step", "ns/day", "memory [MB]", "on the GPU [MB]",
        ],
        rows=[
            [
                row["system"], str(row["atoms"]), row["platform"], number(row["ms_per_step"]),
                number(row["ns_per_day"]), megabytes(row["memory_mb"]["process"]),
                megabytes(row["memory_mb"]["gpu"]),
            ]
            for row in rows
        ],
    )  # fmt: skip


def _file_table(
    name: str, context: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> TableBlock:
    columns = list(dict.fromkeys(key for row in rows for key in row))[:_MOST_COLUMNS]
    said = ", ".join(f"{k}: {v}" for k, v in context.items())

    def cell(value: Any) -> str:
        return number(value) if isinstance(value, float) else "–" if value is None else str(value)

    return TableBlock(
        caption=f"As {name} records it" + (f" ({said})" if said else ""),
        columns=columns,
        rows=[[cell(row.get(key)) for key in columns] for row in rows],
    )
