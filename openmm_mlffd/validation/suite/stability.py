"""Do molecules that no training saw stay what they are? Long runs of many at once: measurement."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openmm_mlffd.elements import SYMBOLS
from openmm_mlffd.engines import open_evaluator
from openmm_mlffd.evaluator import StudentSource
from openmm_mlffd.training.replicas import (
    FLOWN,
    EvaluatorForces,
    Failure,
    ForceField,
    Guard,
    Replica,
    Replicas,
)
from openmm_mlffd.units import AVOGADRO
from openmm_mlffd.validation.conservation import temperature
from openmm_mlffd.validation.suite.dynamics import Trajectory
from openmm_mlffd.validation.suite.frames import write_xyz
from openmm_mlffd.validation.suite.job import Job
from openmm_mlffd.validation.suite.models import (
    Model,
    Structure,
    StudentModel,
    charge_settings,
    label,
)
from openmm_mlffd.validation.suite.plan import EnsembleRun
from openmm_mlffd.validation.suite.runs import run_and_keep
from openmm_mlffd.validation.suite.stability_teacher import CLOSED, ask_teacher
from openmm_mlffd.validation.suite.store import Piece, read_arrays, write_arrays
from openmm_mlffd.validation.suite.systems import BOXES, UNSEEN, System, load_system

STRETCHED = 1.5
"""A bond is broken while it is longer than this multiple of its length at the start …"""

HELD = 0.5
"""… for longer than this [ps]."""

LOOK = 50
"""Steps between looks at the molecules."""

SEGMENTS = 50
"""An interruption costs one of so many parts of a run."""

BATCH_ATOMS = 4000
"""Molecules of so many atoms together are one evaluation."""

SUSPICIOUS = 20
"""Frames with a bond beyond the limit that are kept of a run."""

_LIMITS = Failure(stretched=math.inf)
_GRAM = 1e24 / AVOGADRO  # g/cm³ of 1 amu/Å³
_CUTOFF = 6.0  # Å, of models that do not say theirs; each molecule is evaluated alone


@dataclass(frozen=True)
class MoleculeRun:
    """One molecule at one temperature."""

    system: System
    temperature: float

    @property
    def name(self) -> str:
        """What the report calls it."""
        return f"{self.system.name}, {self.temperature:g} K"


class _OneByOne:
    """Forces of a model that labels structures; each molecule is a structure of its own."""

    def __init__(self, model: Model, runs: Sequence[MoleculeRun]) -> None:
        self._model = model
        self._systems = [(r.system.numbers, r.system.charge) for r in runs]
        self._cuts = np.cumsum([len(n) for n, _ in self._systems])[:-1]

    def __call__(
        self, positions: NDArray[np.float64], cell: NDArray[np.float64] | None
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The energy of a molecule stands at its first atom."""
        parts = np.split(positions, self._cuts)
        found = label(
            self._model,
            [Structure(n, x, cell, q) for (n, q), x in zip(self._systems, parts, strict=True)],
        )
        energies = np.zeros(len(positions))
        energies[np.concatenate([[0], self._cuts]).astype(int)] = [e for e, _ in found]
        return energies, np.concatenate([f for _, f in found])


def _forces(model: Model, runs: Sequence[MoleculeRun]) -> tuple[ForceField, float]:
    if not isinstance(model, StudentModel):
        return _OneByOne(model, runs), _CUTOFF
    numbers = np.concatenate([r.system.numbers for r in runs]).tolist()
    evaluator = open_evaluator(StudentSource.find(model.path), numbers, device=model.device)
    return EvaluatorForces(evaluator), model.header.cutoff


def measure_stability(job: Job) -> dict[str, Any]:
    """All runs, and what the teacher says of broken bonds, if there is one."""
    found: dict[str, Any] = {"molecules": measure_molecules(job), "boxes": measure_boxes(job)}
    broken = {name: run for part in found.values() for name, run in part.items() if run["broken"]}
    for name, run in broken.items():
        run["teacher"] = None if job.teacher is None else ask_teacher(job, job.teacher, name, run)
    found["criteria"] = {"stretched": STRETCHED, "held": HELD, "closed": CLOSED}
    return found


# molecules


def molecule_runs(job: Job) -> list[list[MoleculeRun]]:
    """Molecules and temperatures of the plan, in parts that are evaluated at once."""
    plan = job.plan.stability
    names = UNSEEN if plan.molecules is None else plan.molecules
    systems = [load_system(name, charge=plan.charges.get(name)) for name in names]
    for system in systems:
        if system.cell is not None:
            raise ValueError(f"{system.name} has a box; boxes and molecules are given apart")
    parts: list[list[MoleculeRun]] = [[]]
    for kelvin in plan.temperatures:
        for system in systems:
            size = sum(len(r.system.numbers) for r in parts[-1])
            if parts[-1] and size + len(system.numbers) > BATCH_ATOMS:
                parts.append([])
            parts[-1].append(MoleculeRun(system, kelvin))
    return [part for part in parts if part]


def measure_molecules(job: Job) -> dict[str, Any]:
    """Runs at constant temperature, many molecules in one evaluation; by molecule."""
    found: dict[str, Any] = {}
    for k, runs in enumerate(molecule_runs(job)):
        piece = molecules_piece(job, k, runs)
        for name, numbers in piece.numbers["runs"].items():
            found[name] = numbers | {
                "planned_picoseconds": job.plan.stability.picoseconds,
                "folder": piece.folder.name,
            }
    return found


def molecules_piece(job: Job, number: int, runs: Sequence[MoleculeRun]) -> Piece:
    """One evaluation's worth of molecules, to its end or as far as its minutes reach."""
    plan = job.plan.stability
    settings = {
        "model": job.model.identity, "runs": [r.name for r in runs],
        "positions": [float(np.abs(r.system.positions).sum()) for r in runs],
        "picoseconds": plan.picoseconds, "timestep": plan.timestep, "look": LOOK,
        "stretched": STRETCHED, "held": HELD,
        **charge_settings(job.model, [r.system.charge for r in runs]),
    }  # fmt: skip
    limit = job.limit()

    def measure(folder: Path) -> dict[str, Any]:
        parts = _run(job, runs, folder, limit)
        return _summary(runs, parts, folder) | {
            "finished": sum(len(p["time"]) for p in parts) >= _looks(job)
            or not parts[-1]["moving"].any(),
            "minutes": None if math.isinf(limit) else limit,
        }

    def unfinished(known: dict[str, Any]) -> bool:
        return not known["finished"] and limit > (known["minutes"] or math.inf)

    name = f"stability of {len(runs)} molecules, part {number + 1}"
    return job.store.piece(name, settings, measure, unfinished=unfinished)


def _looks(job: Job) -> int:
    plan = job.plan.stability
    return max(1, round(1e3 * plan.picoseconds / plan.timestep / LOOK))


def _run(
    job: Job, runs: Sequence[MoleculeRun], folder: Path, minutes: float
) -> list[dict[str, NDArray[Any]]]:
    """Segments that are on disk, and those that are still to be run."""
    plan = job.plan.stability
    forces, cutoff = _forces(job.model, runs)
    replicas = Replicas(
        [Replica(r.system.numbers, r.system.positions, r.temperature) for r in runs],
        forces, cutoff=cutoff, rng=np.random.default_rng(1), timestep=plan.timestep,
    )  # fmt: skip
    watch = _Watch(replicas, plan.timestep)
    n_looks = _looks(job)
    per_segment = math.ceil(n_looks / SEGMENTS)
    parts = list(_segments(folder))
    if parts:
        replicas.restore(parts[-1], np.random.default_rng([1, len(parts)]))
        watch.held = parts[-1]["held"].copy()
    done = sum(len(p["time"]) for p in parts)
    spent = sum(float(p["seconds"]) for p in parts)
    while done < n_looks and (spent < 60 * minutes or not parts) and replicas.moving.any():
        length = min(per_segment, n_looks - done)
        job.store.clock.check(length * spent / done if done else 0.0)
        began = time.perf_counter()
        part = watch.run(length) | {"seconds": np.array(time.perf_counter() - began)}
        write_arrays(folder / f"segment-{len(parts):04d}.npz", **part)
        parts.append(part)
        done, spent = done + length, spent + float(part["seconds"])
        replicas.restore(replicas.state(), np.random.default_rng([1, len(parts)]))
        job.progress("molecules", float(part["time"][-1]), plan.picoseconds)
    return parts


def _segments(folder: Path) -> Iterator[dict[str, NDArray[Any]]]:
    number = 0
    while (path := folder / f"segment-{number:04d}.npz").is_file():
        yield read_arrays(path)
        number += 1


class _Watch:
    """Runs replicas and notes what becomes of their bonds."""

    def __init__(self, replicas: Replicas, timestep: float) -> None:
        self.replicas, self._timestep = replicas, timestep
        self._guard = Guard(replicas, _LIMITS)
        self.held = np.zeros(len(replicas), int)
        """Looks in a row at which a bond was beyond the limit."""

    def run(self, looks: int) -> dict[str, Any]:
        """One segment, as arrays."""
        replicas, n = self.replicas, len(self.replicas)
        rows: dict[str, list[Any]] = {"time": [], "temperature": [], "energy": [], "stretch": []}
        failures, frames = [], []
        patience = HELD * 1e3 / (LOOK * self._timestep)
        for _ in range(looks):
            failed = replicas.run(LOOK)
            stretch, bond = self._guard.longest()
            stretch[~replicas.moving] = np.nan
            failed |= self._guard.look()
            now = 1e-3 * replicas.steps * self._timestep
            beyond = replicas.moving & (stretch > STRETCHED)
            self.held = np.where(beyond, self.held + 1, 0)
            frames += [
                (i, int(bond[i]), now, replicas.local[replicas.part(i)].copy())
                for i in np.flatnonzero(beyond).tolist()
            ]
            rows["time"].append(now)
            rows["temperature"].append(
                np.where(replicas.moving, replicas.kinetic_temperature(), np.nan)
            )
            rows["energy"].append(np.where(replicas.moving, replicas.energy(), np.nan))
            rows["stretch"].append(stretch)
            # a hydrogen that is free may be far away before its time is up
            left = [i for i, reason in failed.items() if reason == FLOWN and beyond[i]]
            for i in {*np.flatnonzero(self.held > patience).tolist(), *left}:
                failed.pop(i, None)
                failures.append((str(i), f"{now:.4f}", "broken", f"{bond[i]}"))
                replicas.stop(i)
            for i, reason in failed.items():
                failures.append((str(i), f"{now:.4f}", "exploded", reason))
                replicas.stop(i)
        kept = frames[: SUSPICIOUS * n]
        return {
            **{k: np.array(v) for k, v in rows.items()},
            "failures": np.array(failures, str).reshape(-1, 4),
            "frame_run": np.array([f[0] for f in kept], int),
            "frame_bond": np.array([f[1] for f in kept], int),
            "frame_time": np.array([f[2] for f in kept], float),
            "frame_positions": np.concatenate([np.zeros((0, 3)), *(f[3] for f in kept)]),
            "bonds": np.stack([self._guard.first, self._guard.second], 1),
            "lengths": self._guard.length,
            "held": self.held,
            **replicas.state(),
        }


def _summary(
    runs: Sequence[MoleculeRun], parts: Sequence[dict[str, NDArray[Any]]], folder: Path
) -> dict[str, Any]:
    joined = {k: np.concatenate([p[k] for p in parts]) for k in ("time", "temperature", "stretch")}
    offsets = np.concatenate([[0], np.cumsum([len(r.system.numbers) for r in runs])])
    failures = {int(i): (float(t), kind, what) for p in parts for i, t, kind, what in p["failures"]}
    found = {}
    for i, run in enumerate(runs):
        alive = np.isfinite(joined["stretch"][:, i])
        temperatures = joined["temperature"][alive, i]
        when, kind, what = failures.get(i, (0.0, "", ""))
        broken = None
        if kind == "broken":
            first, second = parts[-1]["bonds"][int(what)] - offsets[i]
            broken = _bond(run.system, first, second)
        frames = _frames_of(parts, i, offsets)
        if frames:
            write_xyz(folder / f"suspicious-{i:02d}.xyz", run.system, frames, run.name)
        late = temperatures[len(temperatures) // 5 :]
        found[run.name] = {
            "system": run.system.name,
            "atoms": len(run.system.numbers),
            "kelvin": run.temperature,
            "picoseconds": float(joined["time"][alive][-1]) if alive.any() else 0.0,
            "temperature": float(late.mean()) if len(late) else None,
            "longest_bond": float(joined["stretch"][alive, i].max()) if alive.any() else None,
            "failure": f"after {when:g} ps: {what}" if kind == "exploded" else "",
            "broken": broken,
            "suspicious_frames": len(frames),
            "suspicious_file": f"suspicious-{i:02d}.xyz" if frames else None,
        }
    n_steps = len(joined["time"]) * LOOK
    return {
        "runs": found,
        "seconds_per_step": sum(float(p["seconds"]) for p in parts) / max(1, n_steps),
    }


def _frames_of(
    parts: Sequence[dict[str, NDArray[Any]]], run: int, offsets: NDArray[np.int64]
) -> list[tuple[float, NDArray[np.float64]]]:
    count = np.diff(offsets)
    found = []
    for part in parts:
        starts = np.concatenate([[0], np.cumsum(count[part["frame_run"]])])
        for k in np.flatnonzero(part["frame_run"] == run).tolist():
            x = part["frame_positions"][starts[k] : starts[k + 1]]
            found.append((float(part["frame_time"][k]), x))
    # the first ones tell how it begins, the last one where it ends
    return found if len(found) <= SUSPICIOUS else [*found[: SUSPICIOUS - 1], found[-1]]


def _bond(system: System, first: int, second: int) -> list[Any]:
    numbers = system.numbers
    names = [f"{SYMBOLS[numbers[a]]}{a}" for a in (first, second)]
    return [int(first), int(second), " – ".join(names)]


# boxes


def box_runs(job: Job) -> list[EnsembleRun]:
    """Runs at constant pressure of the plan."""
    plan = job.plan.stability
    names = (*plan.more_boxes, *BOXES) if plan.boxes is None else plan.boxes
    return [
        EnsembleRun(
            system=name, picoseconds=plan.box_picoseconds, frame=0.1, pressure=1.0,
            timestep=plan.timestep, temperature=plan.box_temperature, seed=3,
            charge=plan.charges.get(name),
        )
        for name in names
    ]  # fmt: skip


def measure_boxes(job: Job) -> dict[str, Any]:
    """Runs at constant pressure, by name."""
    return {run.name: measure_box(job, run) for run in box_runs(job)}


def measure_box(job: Job, run: EnsembleRun) -> dict[str, Any]:
    """One run at constant pressure."""
    system = load_system(run.system, charge=run.charge)
    judge = BoxJudge(system, run.frame)
    kept: list[str] = []
    trajectory = run_and_keep(
        job, job.model, run, "stability", stop=judge, segments=SEGMENTS, told=kept.append
    )
    return box_numbers(run, system, judge, trajectory, kept[0])


class BoxJudge:
    """Ends a run in which a bond stays broken, or the volume leaves all bounds."""

    def __init__(self, system: System, frame: float) -> None:
        self.system = system
        self._bonds = system.bonds
        self._patience = max(1, round(HELD / frame))
        self._start = self.lengths(system.positions[None], np.asarray(system.cell)[None])[0]

    def lengths(
        self, positions: NDArray[np.floating[Any]], cells: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Length of each bond in each frame [Å], shape ``(n_frames, n_bonds)``."""
        vectors = positions[:, self._bonds[:, 1]] - positions[:, self._bonds[:, 0]]
        inverse = np.linalg.inv(cells)
        images = np.round(np.einsum("fbi,fij->fbj", vectors, inverse))
        return np.asarray(
            np.linalg.norm(vectors - np.einsum("fbi,fij->fbj", images, cells), axis=2)
        )

    def stretch(
        self, positions: NDArray[np.floating[Any]], cells: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """The same, relative to the start."""
        return self.lengths(positions, cells) / self._start

    def broken(
        self, positions: NDArray[np.floating[Any]], cells: NDArray[np.float64]
    ) -> int | None:
        """Index of a bond that was beyond the limit in too many frames in a row."""
        if not len(positions):
            return None
        beyond = self.stretch(positions, cells) > STRETCHED
        held = np.zeros(beyond.shape[1], int)
        for row in beyond:
            held = np.where(row, held + 1, 0)
            if (held > self._patience).any():
                return int(held.argmax())
        return None

    def __call__(self, parts: Sequence[dict[str, NDArray[Any]]]) -> str:
        """Why a run should end, from its last segments; empty if it should not."""
        positions = np.concatenate([p["positions"] for p in parts])
        cells = np.concatenate([p["cell"] for p in parts])
        bond = self.broken(positions, cells)
        if bond is not None:
            first, second = self._bonds[bond]
            return f"the bond {_bond(self.system, first, second)[2]} is broken"
        return ""


def box_numbers(
    run: EnsembleRun, system: System, judge: BoxJudge, trajectory: Trajectory, folder: str
) -> dict[str, Any]:
    """What became of a box."""
    n = len(trajectory.time)
    stretch = judge.stretch(trajectory.positions, trajectory.cell)
    volume = np.abs(np.linalg.det(trajectory.cell))
    start = abs(float(np.linalg.det(np.asarray(system.cell))))
    bond = judge.broken(trajectory.positions, trajectory.cell)
    broken = None if bond is None else _bond(system, *system.bonds[bond])
    late = trajectory.kinetic[n // 5 :]
    return {
        "system": run.system,
        "atoms": len(system.numbers),
        "kelvin": run.temperature,
        "picoseconds": float(trajectory.time[-1]) if n else 0.0,
        "planned_picoseconds": run.picoseconds,
        "temperature": float(temperature(late, trajectory.n_dof).mean()) if n else None,
        "longest_bond": float(stretch.max()) if n else None,
        "volume_ratio": float(volume[-1] / start) if n else None,
        "density": _GRAM * system.masses.sum() / float(volume[n // 5 :].mean()) if n else None,
        "failure": "" if broken else trajectory.failure,
        "broken": broken,
        "suspicious_frames": int((stretch > STRETCHED).any(1).sum()),
        "suspicious_file": None,
        "seconds_per_step": trajectory.seconds_per_step,
        "folder": folder,
    }
