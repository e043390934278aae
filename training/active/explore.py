"""Dynamics with the student from many starts, and the frames that it does not know."""

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from openmm_mlffd.engines import open_evaluator
from openmm_mlffd.evaluator import StudentSource, resolve_device
from openmm_mlffd.modelfile import read_header
from openmm_mlffd.novelty import NoveltyMeter, load_novelty
from openmm_mlffd.storage import replacing
from openmm_mlffd.training.active.config import ExploreConfig
from openmm_mlffd.training.active.pulls import PulledForces, choose_pulls
from openmm_mlffd.training.hdf5 import Structures
from openmm_mlffd.training.replicas import EvaluatorForces, Failure, Guard, Replica, Replicas

DISAGREEMENT = 0.3
"""Of a committee's forces [eV/Å], where no threshold is given."""

Array = NDArray[np.float64]


class Students(NamedTuple):
    """The student that moves the atoms, and its committee."""

    paths: list[Path]
    """The first of them moves the atoms."""

    device: str | None
    """Torch device; None for what is there."""


class Score(Protocol):
    """How little the student knows of each atom's surroundings."""

    def __call__(self, positions: Array, cell: Array | None) -> Array:
        """Shape (n_atoms,)."""


class Disagreement:
    """Spread of the forces of several students [eV/Å]."""

    def __init__(self, forces: Sequence[EvaluatorForces]) -> None:
        self._forces = forces

    def __call__(self, positions: Array, cell: Array | None) -> Array:
        """Root of the mean squared distance from the mean force, of each atom."""
        all_forces = np.array([f(positions, cell)[1] for f in self._forces])
        away = all_forces - all_forces.mean(0)
        return np.asarray(np.sqrt((away**2).sum(2).mean(0)))


def threshold_of(config: ExploreConfig, students: Students) -> float:
    """Where frames begin to be collected."""
    if config.threshold is not None:
        return config.threshold
    return DISAGREEMENT if len(students.paths) > 1 else load_novelty(students.paths[0]).header.warn


class Frames(NamedTuple):
    """Collected frames of a batch, one after the other."""

    positions: Array
    """[Å], shape (n_atoms_of_all, 3)."""

    start: NDArray[np.int64]
    """Index of the start of each frame, shape (n,)."""

    temperature: Array
    """[K], shape (n,)."""

    time: Array
    """[ps], shape (n,)."""

    score: Array
    """Largest of its atoms, shape (n,)."""

    failing: NDArray[np.bool_]
    """Whether it was collected for a failure that came after it, shape (n,)."""

    failures: NDArray[np.str_]
    """Start and reason of each run that failed, shape (n_failed, 2)."""


def write_frames(path: Path, frames: Frames) -> None:
    """Write a batch, as a whole or not at all."""
    with replacing(path) as file:
        np.savez_compressed(file, **frames._asdict())


def read_frames(path: Path) -> Frames:
    """Read a batch."""
    with np.load(path, allow_pickle=False) as arrays:
        return Frames(**{name: arrays[name] for name in Frames._fields})


def batches_of(structures: Structures, chosen: Sequence[int], batch_atoms: int) -> list[list[int]]:
    """Starts that are run together: molecules up to so many atoms, boxes alone."""
    batches: list[list[int]] = []
    count = np.diff(structures.offsets)
    size = batch_atoms
    for i in sorted(chosen, key=lambda i: (structures.pbc[i].any(), count[i], i)):
        if structures.pbc[i].any() or size + count[i] > batch_atoms:
            batches.append([])
            size = 0
        batches[-1].append(int(i))
        size = batch_atoms if structures.pbc[i].any() else size + count[i]
    return batches


def explore(
    structures: Structures,
    chosen: Sequence[int],
    config: ExploreConfig,
    students: Students,
    rng: np.random.Generator,
    progress: Callable[[int], object],
) -> Frames:
    """Run one batch to its end.

    Parameters
    ----------
    structures
        Where runs may begin.
    chosen
        Indices of those of this batch.
    config
        How they run.
    students
        What moves the atoms.
    rng
        Of temperatures, velocities and noise.
    progress
        Told the steps that were done since it was told last.
    """
    replicas = []
    for i in chosen:
        part = slice(int(structures.offsets[i]), int(structures.offsets[i + 1]))
        replicas.append(
            Replica(
                structures.atomic_numbers[part].astype(np.int64),
                structures.positions[part].astype(np.float64),
                float(rng.choice(config.temperatures)),
                structures.cell[i] if structures.pbc[i].any() else None,
            )
        )
    numbers = np.concatenate([r.numbers for r in replicas])
    plain, score = _open(students, numbers)
    forces = PulledForces(plain)
    dynamics = Replicas(
        replicas, forces, cutoff=read_header(students.paths[0]).cutoff, rng=rng,
        timestep=config.timestep, friction=config.friction,
    )  # fmt: skip
    if config.pull:
        forces.start(choose_pulls(dynamics, config.pull, rng), dynamics.positions)
    collector = _Collector(
        dynamics, config, threshold_of(config, students), [p.hydrogen for p in forces.pulls]
    )
    n_steps = max(1, round(1e3 * config.picoseconds / config.timestep))
    for done in range(0, n_steps, config.look):
        length = min(config.look, n_steps - done)
        forces.move(done / n_steps)
        collector.look(dynamics.run(length), score)
        progress(length)
        if not dynamics.moving.any():
            progress(n_steps - done - length)
            break
    return collector.frames(np.array(chosen), np.array([r.temperature for r in replicas]))


def _open(students: Students, numbers: NDArray[np.int64]) -> tuple[EvaluatorForces, Score]:
    def forces(path: Path) -> EvaluatorForces:
        source = StudentSource.find(path)
        return EvaluatorForces(open_evaluator(source, numbers.tolist(), device=students.device))

    members = [forces(path) for path in students.paths]
    if len(members) > 1:
        return members[0], Disagreement(members)
    meter = NoveltyMeter(numbers, students.paths[0], device=resolve_device(students.device))
    return members[0], meter.measure


class _Collector:
    """Notes the frames of a batch that are to be kept."""

    def __init__(
        self, dynamics: Replicas, config: ExploreConfig, threshold: float, free: Sequence[int]
    ) -> None:
        self._dynamics, self._config, self._threshold = dynamics, config, threshold
        self._guard = Guard(
            dynamics,
            Failure(closest=config.closest, stretched=config.stretched, energy=config.energy_jump),
            free=free,
        )
        self._recent: list[deque[dict[str, Any]]] = [
            deque(maxlen=config.before_failure) for _ in range(len(dynamics))
        ]
        self._last = np.full(len(dynamics), -np.inf)
        self._kept: list[dict[str, Any]] = []
        self._failures: list[tuple[int, str]] = []

    def look(self, stopped: dict[int, str], score: Score) -> None:
        """Judge where the replicas are now, given those that were stopped meanwhile."""
        dynamics, config = self._dynamics, self._config
        time = 1e-3 * dynamics.steps * config.timestep
        of_atoms = score(dynamics.positions, dynamics.cell)
        largest = np.maximum.reduceat(of_atoms, dynamics.offsets[:-1])
        failed = self._guard.look()
        for i in np.flatnonzero(dynamics.moving).tolist():
            frame = {
                "positions": dynamics.local[dynamics.part(i)].copy(), "replica": i, "time": time,
                "score": float(largest[i]), "failing": False,
            }  # fmt: skip
            due = time - self._last[i] >= config.spacing
            if i in failed or (largest[i] >= self._threshold and due):
                self._keep(frame)
            else:
                self._recent[i].append(frame)
        for i, reason in (failed | stopped).items():
            for frame in [f for f in self._kept if f["replica"] == i and f["time"] == time]:
                frame["failing"] = True
            for frame in self._recent[i]:
                self._kept.append(frame | {"failing": True})
            self._recent[i].clear()
            self._failures.append((i, f"after {time:.3f} ps: {reason}"))
            dynamics.stop(i)

    def _keep(self, frame: dict[str, Any]) -> None:
        if np.isfinite(frame["positions"]).all():
            self._kept.append(frame)
            self._last[frame["replica"]] = frame["time"]

    def frames(self, starts: NDArray[np.int64], temperatures: Array) -> Frames:
        """What was collected, given the start and temperature of each replica."""
        kept = sorted(self._kept, key=lambda f: (f["replica"], f["time"]))
        replica = np.array([f["replica"] for f in kept], int)
        return Frames(
            np.concatenate([np.zeros((0, 3)), *(f["positions"] for f in kept)]),
            starts[replica],
            temperatures[replica],
            np.array([f["time"] for f in kept], float),
            np.array([f["score"] for f in kept], float),
            np.array([f["failing"] for f in kept], bool),
            np.array([(str(starts[i]), reason) for i, reason in self._failures], str).reshape(
                -1, 2
            ),
        )
