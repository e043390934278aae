"""Folders of work that can be ended at any moment: shards, and a manifest that counts them.

A file gets its name when it is complete and on the disk, so that a run goes on with the first
shard that is not there or damaged.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from openmm_mlffd.training.hdf5 import Dataset, DatasetError, DatasetWriter, SplitRule, Structures
from openmm_mlffd.training.sources import sha256

MANIFEST = "manifest.json"
VERSION = 1


class FolderError(ValueError):
    """A folder of work in which it cannot go on; the message has the cause and what to do."""


class Kind(NamedTuple):
    """What a folder holds, and how messages speak of it."""

    format: str
    """Of the manifest."""

    dataset: str
    """Name of the file that the shards are merged into."""

    done: str
    """What was done to the structures, such as "labelled"."""

    doing: str
    """What a process does there, such as "labelling"."""


class Manifest:
    """What a folder of shards holds, as a JSON file that is replaced as a whole.

    Parameters
    ----------
    kind
        What the folder is to hold.
    folder
        Made if it is not there.
    input_name
        Noted for people; the file may be moved and renamed.
    identity
        What the shards depend on.

    Raises
    ------
    FolderError
        If the folder holds shards that depend on something else, or a damaged manifest.
    """

    def __init__(self, kind: Kind, folder: Path, input_name: str, identity: dict[str, Any]) -> None:
        self.kind = kind
        self.folder = folder
        self._path = folder / MANIFEST
        folder.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            self._load(input_name, identity)
            return
        others = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
        if others:
            raise FolderError(
                f"{folder}: holds {others[0]}, but no {MANIFEST}; choose a new or empty folder"
            )
        self.content: dict[str, Any] = self._new(input_name, identity)
        self.save()

    def _new(self, input_name: str, identity: dict[str, Any]) -> dict[str, Any]:
        return {
            "format": self.kind.format,
            "version": VERSION,
            "input": input_name,
            "identity": identity,
            "description": None,
            "shards": {},
            "dataset": None,
        }

    def _load(self, input_name: str, identity: dict[str, Any]) -> None:
        try:
            self.content = json.loads(self._path.read_text())
        except ValueError as error:
            raise FolderError(f"{self._path}: is damaged ({error}); choose a new folder") from error
        if (self.content.get("format"), self.content.get("version")) != (self.kind.format, VERSION):
            raise FolderError(f"{self._path}: is not of {self.kind.format} version {VERSION}")
        if not self.content["shards"]:  # nothing was done that would have to agree
            self.content = self._new(input_name, identity)
            self.save()
            return
        there, wanted = self.content["identity"], json.loads(json.dumps(identity))
        for key in sorted(there.keys() | wanted.keys()):
            if there.get(key) != wanted.get(key):
                raise FolderError(
                    f"{self.folder}: was {self.kind.done} with {key} {there.get(key)}, "
                    f"not {wanted.get(key)}; choose another folder"
                )

    def save(self) -> None:
        """Replace the file; what was there before stays until the new one is on the disk."""
        temporary = self._path.with_name(f".{MANIFEST}.tmp")
        with writing(self._path, self.kind):
            text = json.dumps(self.content, indent=1, ensure_ascii=False) + "\n"
            temporary.write_text(text, encoding="utf-8")
            publish(temporary, self._path)

    def describe(self, description: str) -> None:
        """Note what makes the shards, or refuse a maker that says another thing of itself.

        Raises
        ------
        FolderError
            If the shards that are there were made by one that said another thing.
        """
        known = self.content["description"]
        if known not in (None, description):
            raise FolderError(
                f"{self.folder}: was {self.kind.done} by {known!r}, which now is {description!r}; "
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
        """Index in the input of each structure that failed, and why."""
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
def writing(path: Path, kind: Kind) -> Iterator[None]:
    """Say what to do where a file cannot be written.

    Raises
    ------
    FolderError
        Instead of the OSError or the RuntimeError by which HDF5 says that a disk is full.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise FolderError(
            f"{path}: cannot be written ({error}); is the disk full? What was {kind.done} before "
            "is safe, and the same command goes on from there"
        ) from error


@contextmanager
def locked(folder: Path, kind: Kind, *, wait: bool = False) -> Iterator[None]:
    """Keep a second run out of a folder; the lock ends with the process, however that ends.

    Parameters
    ----------
    folder
        Is made if it is not there.
    kind
        What is done there, for the error.
    wait
        Until the other process is through, rather than to raise.

    Raises
    ------
    FolderError
        If another process is at work there.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            raise FolderError(f"{folder}: another process is {kind.doing} here") from error
        yield


def remove_leftovers(folder: Path, kind: Kind) -> None:
    """Remove what a process that was ended had not finished writing."""
    for leftover in (*folder.glob(".shard-*"), *folder.glob(f".{kind.dataset}*")):
        leftover.unlink()


class Writing(NamedTuple):
    """What all files of a folder have in common, as for `DatasetWriter`."""

    teacher: str | None
    subsets: list[str]
    split: SplitRule
    origin: str = ""


def write_shard(
    manifest: Manifest, name: str, common: Writing, structures: Structures, groups: list[str]
) -> dict[str, Any]:
    """Write one shard; returns count and SHA-256, which is None if there is nothing to write.

    Raises
    ------
    FolderError
        If the disk is full.
    """
    if not groups:
        return {"count": 0, "sha256": None}
    path, temporary = manifest.folder / name, manifest.folder / f".{name}"
    with writing(path, manifest.kind):
        with DatasetWriter(temporary, **common._asdict()) as writer:
            writer.append(structures, groups)
        digest = sha256(temporary)
        publish(temporary, path)
    return {"count": len(groups), "sha256": digest}


def merge_shards(manifest: Manifest, common: Writing) -> Path | None:
    """Write all shards as one dataset file, one shard at a time; None if they are empty.

    Raises
    ------
    FolderError
        If a shard is damaged, or the disk is full.
    """
    kind = manifest.kind
    path = manifest.folder / kind.dataset
    digest = manifest.content["dataset"]
    if digest is not None and is_whole(path, digest):
        return path
    shards = [name for name, entry in manifest.content["shards"].items() if entry["count"]]
    if not shards:
        return None
    temporary = manifest.folder / f".{kind.dataset}"
    with writing(path, kind):
        with DatasetWriter(temporary, **common._asdict()) as writer:
            for name in shards:
                try:
                    with Dataset(manifest.folder / name, unlabelled=True) as shard:
                        structures, groups = shard.read(0, len(shard)), shard.group_names()
                except DatasetError as error:
                    raise FolderError(f"{error}; the same command makes it again") from error
                writer.append(structures, [groups[g] for g in structures.group])
        digest = sha256(temporary)
        publish(temporary, path)
    manifest.content["dataset"] = digest
    manifest.save()
    return path
