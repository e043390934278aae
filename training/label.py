"""`mlffd label`: structures in, a labelled dataset out, with nothing lost on the way.

The folder of a run holds shards of some structures each, which are dataset files themselves, and
a manifest that counts them. A file gets its name when it is complete and on the disk, so that a
run can be ended at any moment, and goes on with the first shard that is not there or damaged.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from openmm_mlffd.training.hdf5 import Dataset, DatasetError, DatasetWriter, Structures, take
from openmm_mlffd.training.sources import Source, sha256
from openmm_mlffd.training.teacher_worker import Batch, Labels, insert, select, unknown_labels
from openmm_mlffd.training.teachers import Teacher, WorkerTeacher

FORMAT = "mlffd-labels"
VERSION = 1
MANIFEST = "manifest.json"
DATASET = "dataset.h5"
_REASONS_SHOWN = 10


class LabelError(ValueError):
    """Labelling that cannot go on; the message has the cause and what to do."""


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


class Manifest:
    """What a folder of shards holds, as a JSON file that is replaced as a whole.

    Parameters
    ----------
    folder
        Made if it is not there.
    input_name
        Noted for people; the file may be moved and renamed.
    identity
        What the labels depend on: input, teacher, limits, size of the shards.

    Raises
    ------
    LabelError
        If the folder holds labels that depend on something else, or a damaged manifest.
    """

    def __init__(self, folder: Path, input_name: str, identity: dict[str, Any]) -> None:
        self.folder = folder
        self._path = folder / MANIFEST
        folder.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            self._load(identity)
            return
        others = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
        if others:
            raise LabelError(
                f"{folder}: holds {others[0]}, but no {MANIFEST}; choose a new or empty folder"
            )
        self.content: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "input": input_name,
            "identity": identity,
            "description": None,
            "shards": {},
            "dataset": None,
        }
        self.save()

    def _load(self, identity: dict[str, Any]) -> None:
        try:
            self.content = json.loads(self._path.read_text())
        except ValueError as error:
            raise LabelError(f"{self._path}: is damaged ({error}); choose a new folder") from error
        if (self.content.get("format"), self.content.get("version")) != (FORMAT, VERSION):
            raise LabelError(f"{self._path}: is not of {FORMAT} version {VERSION}")
        there, wanted = self.content["identity"], json.loads(json.dumps(identity))
        for key in sorted(there.keys() | wanted.keys()):
            if there.get(key) != wanted.get(key):
                raise LabelError(
                    f"{self.folder}: was labelled with {key} {there.get(key)}, "
                    f"not {wanted.get(key)}; choose another folder"
                )

    def save(self) -> None:
        """Replace the file; what was there before stays until the new one is on the disk."""
        temporary = self._path.with_name(f".{MANIFEST}.tmp")
        with writing(self._path):
            text = json.dumps(self.content, indent=1, ensure_ascii=False) + "\n"
            temporary.write_text(text, encoding="utf-8")
            publish(temporary, self._path)

    def describe(self, description: str) -> None:
        """Note what the teacher says of itself, or refuse a teacher that says another thing.

        Raises
        ------
        LabelError
            If the shards that are there were labelled by a teacher that said another thing.
        """
        known = self.content["description"]
        if known not in (None, description):
            raise LabelError(
                f"{self.folder}: was labelled by {known!r}, the teacher now is {description!r}; "
                "choose another folder"
            )
        self.content["description"] = description

    def is_done(self, name: str) -> bool:
        """Whether a shard is listed, there, and whole."""
        entry = self.content["shards"].get(name)
        return entry is not None and (
            entry["sha256"] is None or is_whole(self.folder / name, entry["sha256"])
        )

    def add(self, name: str, entry: dict[str, Any]) -> None:
        """List a shard that is on the disk."""
        self.content["shards"] = dict(sorted((self.content["shards"] | {name: entry}).items()))
        self.content["dataset"] = None
        self.save()

    def failures(self) -> list[tuple[int, str]]:
        """Index in the source of each structure without labels, and why."""
        shards = self.content["shards"].values()
        return [(int(i), reason) for entry in shards for i, reason in entry["failures"]]


def is_whole(path: Path, digest: str) -> bool:
    """Whether a file is there and has this SHA-256."""
    return path.is_file() and sha256(path) == digest


def publish(temporary: Path, path: Path) -> None:
    """Give a complete file its name, once its bytes are on the disk."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if os.name == "posix":  # the name is on the disk when its folder is
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say what to do where a file cannot be written.

    Raises
    ------
    LabelError
        Instead of the OSError or the RuntimeError by which HDF5 says that a disk is full.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise LabelError(
            f"{path}: cannot be written ({error}); is the disk full? What was labelled before is "
            "safe, and the same command goes on from there"
        ) from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second run out of a folder; the lock ends with the process, however that ends.

    Raises
    ------
    LabelError
        If another process is labelling there.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise LabelError(f"{folder}: another process is labelling here") from error
        yield


def label(
    source: Source,
    folder: str | Path,
    choice: TeacherChoice,
    *,
    limits: Limits | None = None,
    shard_size: int = 1000,
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
    progress
        Show a progress bar.

    Raises
    ------
    LabelError
        If the folder holds other labels, or cannot be written.
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
    with locked(folder):
        manifest = Manifest(folder, source.name, identity)
        for leftover in (*folder.glob(".shard-*"), *folder.glob(f".{DATASET}*")):
            leftover.unlink()
        names = {
            f"shard-{i:05d}.h5": (start, min(start + shard_size, len(source)))
            for i, start in enumerate(range(0, len(source), shard_size))
        }
        todo = {name: part for name, part in names.items() if not manifest.is_done(name)}
        if todo:
            _label_shards(source, manifest, choice, limits, todo, progress=progress)
        dataset = merge(source, manifest)
    failures = manifest.failures()
    return Summary(dataset, len(source) - len(failures), failures)


def _label_shards(
    source: Source,
    manifest: Manifest,
    choice: TeacherChoice,
    limits: Limits,
    todo: dict[str, tuple[int, int]],
    *,
    progress: bool,
) -> None:
    done = len(source) - sum(stop - start for start, stop in todo.values())
    with (
        choice.start() as teacher,
        tqdm(
            total=len(source), initial=done, unit=" structures", disable=None if progress else True
        ) as bar,
    ):
        manifest.describe(teacher.describe())
        failed = len(manifest.failures())
        for name, (start, stop) in todo.items():
            structures, groups = source.read(start, stop)
            labels = label_in_batches(teacher, structures, choice.batch_atoms, bar)
            reasons = judge(structures, labels, limits)
            entry = write_shard(source, manifest, name, structures, groups, labels, reasons)
            entry["failures"] = [[start + i, r] for i, r in enumerate(reasons) if r]
            entry |= {"start": start, "stop": stop}
            manifest.add(name, entry)
            failed += len(entry["failures"])
            bar.set_postfix(failed=failed)


def label_in_batches(
    teacher: Teacher, structures: Structures, batch_atoms: int | None = None, bar: Any = None
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
        if bar is not None:
            bar.update(len(part))
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


def write_shard(
    source: Source,
    manifest: Manifest,
    name: str,
    structures: Structures,
    groups: list[str],
    labels: Labels,
    reasons: list[str],
) -> dict[str, Any]:
    """Write the structures without a reason against them; returns count and SHA-256.

    Raises
    ------
    LabelError
        If the disk is full.
    """
    keep = np.flatnonzero([not r for r in reasons])
    if not len(keep):
        return {"count": 0, "sha256": None}
    labelled = take(
        structures._replace(**{k: v for k, v in labels._asdict().items() if k != "failure"}), keep
    )
    path, temporary = manifest.folder / name, manifest.folder / f".{name}"
    with writing(path):
        with DatasetWriter(
            temporary,
            teacher=manifest.content["description"],
            subsets=source.subsets,
            split=source.split,
        ) as writer:
            writer.append(labelled, [groups[i] for i in keep])
        digest = sha256(temporary)
        publish(temporary, path)
    return {"count": len(keep), "sha256": digest}


def merge(source: Source, manifest: Manifest) -> Path | None:
    """Write all shards as one dataset file, one shard at a time; None if they are empty.

    Raises
    ------
    LabelError
        If a shard is damaged, or the disk is full.
    """
    path = manifest.folder / DATASET
    digest = manifest.content["dataset"]
    if digest is not None and is_whole(path, digest):
        return path
    shards = [name for name, entry in manifest.content["shards"].items() if entry["count"]]
    if not shards:
        return None
    temporary = manifest.folder / f".{DATASET}"
    with writing(path):
        with DatasetWriter(
            temporary,
            teacher=manifest.content["description"],
            subsets=source.subsets,
            split=source.split,
        ) as writer:
            for name in shards:
                try:
                    with Dataset(manifest.folder / name) as shard:
                        structures, groups = shard.read(0, len(shard)), shard.group_names()
                except DatasetError as error:
                    raise LabelError(f"{error}; the same command labels it again") from error
                writer.append(structures, [groups[g] for g in structures.group])
        digest = sha256(temporary)
        publish(temporary, path)
    manifest.content["dataset"] = digest
    manifest.save()
    return path


def format_summary(summary: Summary) -> str:
    """A summary as text: how many, and how often each reason of failure came."""
    lines = [f"{summary.dataset or 'nothing was written'}: {summary.labelled} structures labelled"]
    if summary.failures:
        lines.append(f"{len(summary.failures)} failed ({MANIFEST} lists them):")
        counts = Counter(reason for _, reason in summary.failures).most_common(_REASONS_SHOWN)
        lines += [f"  {n} × {reason}" for reason, n in counts]
    return "\n".join(lines)
