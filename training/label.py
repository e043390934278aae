"""`mlffd label`: structures in, a labelled dataset out, with nothing lost on the way.

The folder of a run holds shards of some structures each, which are dataset files themselves, and
a manifest that counts them (`shards`).
"""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from openmm_mlffd.training.hdf5 import Structures, take
from openmm_mlffd.training.parallel import WorkerLost, Workers, run_all
from openmm_mlffd.training.shards import (
    MANIFEST,
    FolderError,
    Kind,
    Manifest,
    Writing,
    locked,
    merge_shards,
    remove_leftovers,
    write_shard,
)
from openmm_mlffd.training.sources import Source
from openmm_mlffd.training.teacher_worker import Batch, Labels, insert, select, unknown_labels
from openmm_mlffd.training.teachers import Teacher, WorkerTeacher

KIND = Kind("mlffd-labels", "dataset.h5", "labelled", "labelling")
LabelError = FolderError
_REASONS_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class TeacherChoice:
    """Which teacher, and how it is run."""

    name: str
    """Of `WorkerTeacher`."""

    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the teacher."""

    python: str | None = None
    """Python that has the teacher; None for the one that runs."""

    timeout: float = 600.0
    """Time to start, and to answer a batch [s]."""

    batch_atoms: int | None = None
    """Atoms given to the teacher at a time; None for what it likes."""

    def start(self) -> WorkerTeacher:
        """The teacher, ready."""
        return WorkerTeacher(self.name, self.options, python=self.python, timeout=self.timeout)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Labels beyond these are taken for failures of the teacher or of the structure."""

    max_force: float = 100.0
    """Force on an atom [eV/Å]."""

    max_net_force: float = 0.1
    """Sum of the forces of a structure [eV/Å], which nothing but rounding moves from zero."""


class Summary(NamedTuple):
    """What a run came to."""

    dataset: Path | None
    """The merged file; None if no structure was labelled."""

    labelled: int
    """Structures with labels."""

    failures: list[tuple[int, str]]
    """Index in the source of each structure without, and why."""

    new: int = 0
    """How many were given to the teacher in this run; the others were done before."""

    starting: float = 0.0
    """Until the teacher was ready [s]; 0 on a cluster."""


class TeacherPool:
    """Teachers of one choice, each used by one thread at a time; started when they are needed."""

    def __init__(self, choice: TeacherChoice) -> None:
        self._choice = choice
        self._idle: list[WorkerTeacher] = []
        self._all: list[WorkerTeacher] = []
        self._lock = threading.Lock()

    @contextmanager
    def borrow(self) -> Iterator[WorkerTeacher]:
        """A teacher that is at nobody else's work.

        Raises
        ------
        TeacherError
            If it cannot be started.
        """
        with self._lock:
            teacher = self._idle.pop() if self._idle else None
        if teacher is None:
            teacher = self._choice.start()
            with self._lock:
                self._all.append(teacher)
        yield teacher
        with self._lock:
            self._idle.append(teacher)

    def close(self) -> None:
        """End all processes; whoever waits for one gets an error."""
        with self._lock:
            for teacher in self._all:
                teacher.close()


class Part(NamedTuple):
    """Structures of one shard."""

    name: str
    start: int
    structures: Structures
    groups: list[str]


_POOLS: dict[str, TeacherPool] = {}  # of a worker of a cluster; they end with it


def label_part(
    part: Part,
    choice: TeacherChoice,
    pool: TeacherPool | None = None,
    done: Callable[[int], object] | None = None,
) -> tuple[Labels, str]:
    """Labels of a part, and what their teacher says of itself; on a cluster, without a pool."""
    if pool is None:
        key = json.dumps(asdict(choice), sort_keys=True)
        pool = _POOLS.setdefault(key, TeacherPool(choice))
    with pool.borrow() as teacher:
        labels = label_in_batches(teacher, part.structures, choice.batch_atoms, done)
        return labels, teacher.describe()


def label(
    source: Source,
    folder: str | Path,
    choice: TeacherChoice,
    *,
    limits: Limits | None = None,
    shard_size: int = 1000,
    workers: Workers | None = None,
    progress: bool = True,
) -> Summary:
    """Label all structures of a source; goes on where an earlier run of the folder stopped.

    Parameters
    ----------
    source
        Structures.
    folder
        Where shards, manifest and, in the end, ``dataset.h5`` are written.
    choice
        The teacher.
    limits
        Beyond which labels are failures; None for the defaults.
    shard_size
        Structures per shard, at most 1000: what can be lost when the process is ended.
    workers
        How many teachers, and where; None for one. The result does not depend on it.
    progress
        Show a progress bar.

    Raises
    ------
    LabelError
        If the folder holds other labels, or cannot be written, or workers are lost.
    TeacherError
        If the teacher cannot be started.
    """
    if not 1 <= shard_size <= 1000:
        raise ValueError(f"a shard has 1 to 1000 structures, got {shard_size}")
    limits, folder = limits or Limits(), Path(folder)
    identity = {
        "input": source.identity,
        "structures": len(source),
        "teacher": choice.name,
        "options": choice.options,
        "limits": asdict(limits),
        "shard_size": shard_size,
    }
    with locked(folder, KIND):
        manifest = Manifest(KIND, folder, source.name, identity)
        remove_leftovers(folder, KIND)
        names = {
            f"shard-{i:05d}.h5": (start, min(start + shard_size, len(source)))
            for i, start in enumerate(range(0, len(source), shard_size))
        }
        todo = {name: part for name, part in names.items() if not manifest.is_done(name)}
        new, starting = sum(stop - start for start, stop in todo.values()), 0.0
        if todo:
            work = _Work(source, manifest, choice, limits, workers or Workers())
            starting = work.label(todo, progress=progress)
        dataset = merge_shards(manifest, _common(source, manifest))
    failures = manifest.failures()
    return Summary(dataset, len(source) - len(failures), failures, new, starting)


def _common(source: Source, manifest: Manifest) -> Writing:
    return Writing(
        manifest.content["description"], source.subsets, source.split, origin=source.origin
    )


class _Work(NamedTuple):
    source: Source
    manifest: Manifest
    choice: TeacherChoice
    limits: Limits
    workers: Workers

    def label(self, todo: dict[str, tuple[int, int]], *, progress: bool) -> float:
        """Label them; gives the time that the teacher took to start [s]."""
        began, starting = time.perf_counter(), 0.0
        n, missing = len(self.source), sum(stop - start for start, stop in todo.values())
        parts = (
            Part(name, start, *self.source.read(start, stop))
            for name, (start, stop) in todo.items()
        )
        far = self.workers.cluster is not None
        pool = TeacherPool(self.choice)
        with tqdm(
            total=n, initial=n - missing, unit=" structures", disable=None if progress else True
        ) as bar:
            try:
                if far:
                    function = partial(label_part, choice=self.choice)
                else:
                    with pool.borrow() as teacher:  # before any work, since it may be another one
                        self.manifest.describe(teacher.describe())
                    starting = time.perf_counter() - began
                    function = partial(label_part, choice=self.choice, pool=pool, done=bar.update)
                outcomes = run_all(function, parts, self.workers, threads=True, stop=pool.close)
                with closing(outcomes):
                    for part, outcome in outcomes:
                        if isinstance(outcome.error, WorkerLost):
                            raise LabelError(
                                f"{part.name}: {outcome.error}; the same command goes on"
                            ) from outcome.error
                        if outcome.error is not None:
                            raise outcome.error
                        self._keep(part, *outcome.result)
                        if far:
                            bar.update(len(part.groups))
                        bar.set_postfix(failed=len(self.manifest.failures()))
            finally:
                pool.close()
        return starting

    def _keep(self, part: Part, labels: Labels, description: str) -> None:
        self.manifest.describe(description)
        reasons = judge(part.structures, labels, self.limits)
        keep = np.flatnonzero([not r for r in reasons])
        fields = {k: v for k, v in labels._asdict().items() if k != "failure"}
        entry = write_shard(
            self.manifest,
            part.name,
            _common(self.source, self.manifest),
            take(part.structures._replace(**fields), keep),
            [part.groups[i] for i in keep],
        )
        entry["failures"] = [[part.start + i, r] for i, r in enumerate(reasons) if r]
        entry |= {"start": part.start, "stop": part.start + len(reasons)}
        self.manifest.add(part.name, entry)


def label_in_batches(
    teacher: Teacher,
    structures: Structures,
    batch_atoms: int | None = None,
    done: Callable[[int], object] | None = None,
) -> Labels:
    """Label structures, those of similar size together, and put them back in order."""
    batch = Batch(
        offsets=structures.offsets,
        atomic_numbers=structures.atomic_numbers,
        positions=structures.positions.astype("f8"),
        cell=structures.cell,
        pbc=structures.pbc,
        total_charge=structures.total_charge,
    )
    labels = unknown_labels(batch)
    for part in _parts(np.diff(structures.offsets), batch_atoms or teacher.batch_atoms):
        insert(labels, teacher.label(select(batch, part)), batch, part)
        if done is not None:
            done(len(part))
    return labels


def _parts(count: np.ndarray, batch_atoms: int) -> Iterator[np.ndarray]:
    part: list[int] = []
    n_atoms = 0
    for i in np.argsort(count, kind="stable").tolist():
        if part and n_atoms + count[i] > batch_atoms:
            yield np.array(part)
            part, n_atoms = [], 0
        part.append(i)
        n_atoms += count[i]
    if part:
        yield np.array(part)


def judge(structures: Structures, labels: Labels, limits: Limits) -> list[str]:
    """Why each structure has no labels that can be used; empty where it has."""
    reasons = []
    for i, reason in enumerate(labels.failure):
        forces = labels.forces[structures.offsets[i] : structures.offsets[i + 1]]
        with np.errstate(invalid="ignore", over="ignore"):  # judged below
            largest = np.linalg.norm(forces, axis=1).max()
            net = float(np.linalg.norm(forces.sum(0)))
        if not reason and not np.isfinite(labels.energy[i]):
            reason = f"energy is {labels.energy[i]}"
        if not reason and not np.isfinite(forces).all():
            reason = "forces are not finite"
        if not reason and largest > limits.max_force:
            reason = f"force of {largest:.1f} eV/Å, above {limits.max_force:g}"
        if not reason and net > limits.max_net_force:
            reason = f"net force of {net:.3f} eV/Å, above {limits.max_net_force:g}"
        reasons.append(str(reason))
    return reasons


def format_summary(summary: Summary) -> str:
    """A summary as text: how many, and how often each reason of failure came."""
    lines = [f"{summary.dataset or 'nothing was written'}: {summary.labelled} structures labelled"]
    if summary.failures:
        lines.append(f"{len(summary.failures)} failed ({MANIFEST} lists them):")
        counts = Counter(reason for _, reason in summary.failures).most_common(_REASONS_SHOWN)
        lines += [f"  {n} × {reason}" for reason, n in counts]
    return "\n".join(lines)
