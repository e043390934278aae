"""Langevin runs of any model, kept in the store."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openmm
from openmm import app, unit

from openmm_mlffd.validation.suite.dynamics import SEGMENTS, Stop, Trajectory, run_langevin
from openmm_mlffd.validation.suite.job import Job
from openmm_mlffd.validation.suite.models import Model, charge_settings
from openmm_mlffd.validation.suite.plan import EnsembleRun
from openmm_mlffd.validation.suite.systems import System, load_system


def run_and_keep(
    job: Job,
    model: Model,
    run: EnsembleRun,
    name: str,
    *,
    minutes: float | None = None,
    stop: Stop | None = None,
    segments: int = SEGMENTS,
    told: Callable[[str], object] = lambda _: None,
) -> Trajectory:
    """Trajectory of a Langevin run, now or from before.

    Parameters
    ----------
    job, model, run, name
        What is run, and what it is called.
    minutes
        Wall time at most; None for that of the job.
    stop, segments
        As for `run_langevin`.
    told
        Is told the folder of the piece.
    """
    system = load_system(run.system, run.copies, run.charge)
    settings = {
        "model": model.identity, "system": run.system, "copies": run.copies,
        "picoseconds": run.picoseconds, "frame": run.frame, "pressure": run.pressure,
        "timestep": run.timestep, "temperature": run.temperature, "seed": run.seed,
        "minimization": run.minimization, **charge_settings(model, [system.charge]),
    }  # fmt: skip
    limit = job.limit(minutes)
    held: list[Trajectory] = []

    def go(folder: Path, limit: float) -> Trajectory:
        return run_langevin(
            lambda: model.system(system.topology, charge=system.charge), system, run, folder,
            clock=job.store.clock, minutes=limit, progress=job.progress, stop=stop,
            segments=segments,
        )  # fmt: skip

    def measure(folder: Path) -> dict[str, Any]:
        trajectory = go(folder, limit)
        held.append(trajectory)
        write_trajectory(folder, system, trajectory)
        return {
            "picoseconds": len(trajectory.time) * run.frame,
            "failure": trajectory.failure,
            "seconds_per_step": trajectory.seconds_per_step,
            "minutes": None if math.isinf(limit) else limit,
        }

    def unfinished(known: dict[str, Any]) -> bool:
        short = known["picoseconds"] < 0.999 * run.picoseconds and not known["failure"]
        return short and limit > (known["minutes"] or math.inf)

    piece = job.store.piece(f"{name} {run.name}", settings, measure, unfinished=unfinished)
    told(piece.folder.name)
    return held[0] if held else go(piece.folder, 0.0)


def write_trajectory(folder: Path, system: System, trajectory: Trajectory) -> None:
    """Write the frames for other programs: `trajectory.dcd` and `topology.pdb`."""
    if not len(trajectory.time):
        return
    periodic = system.cell is not None
    step = trajectory.time[1] - trajectory.time[0] if len(trajectory.time) > 1 else 1.0
    with (folder / "trajectory.dcd").open("wb") as file:
        dcd = app.DCDFile(file, system.topology, step * unit.picosecond)
        for positions, cell in zip(trajectory.positions, trajectory.cell, strict=True):
            box = [openmm.Vec3(*v) for v in cell] * unit.angstrom if periodic else None
            dcd.writeModel(positions.astype(float) * unit.angstrom, periodicBoxVectors=box)
    with (folder / "topology.pdb").open("w") as file:
        first = trajectory.positions[0].astype(float) * unit.angstrom
        app.PDBFile.writeFile(system.topology, first, file)
