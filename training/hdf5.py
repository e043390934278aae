"""Dataset files, labelled or not, schema version 1 (docs/dataset.md): reader and writer."""

import hashlib
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray

FORMAT = "mlffd-dataset"
UNLABELLED = "mlffd-structures"
"""Format of files of structures without labels, which are otherwise the same."""

VERSION = 1
LABELS = ("energy", "forces", "stress", "partial_charges")
UNITS = {
    "positions": "Å",
    "cell": "Å",
    "energy": "eV",
    "forces": "eV/Å",
    "stress": "eV/Å^3",
    "partial_charges": "e",
    "total_charge": "e",
    "temperature": "K",
}
SPLITS = ("train", "val", "test")
_CHUNK = 4096
_ROUNDED = ("positions", "forces", "partial_charges")  # rounded decimals pack better unshuffled

# name: (type, row shape, per atom or per structure)
_FIELDS: dict[str, tuple[str, tuple[int, ...], str]] = {
    "atomic_numbers": ("u1", (), "atom"),
    "positions": ("f4", (3,), "atom"),
    "forces": ("f4", (3,), "atom"),
    "partial_charges": ("f4", (), "atom"),
    "energy": ("f8", (), "structure"),
    "stress": ("f4", (3, 3), "structure"),
    "cell": ("f8", (3, 3), "structure"),
    "pbc": ("?", (3,), "structure"),
    "total_charge": ("i2", (), "structure"),
    "temperature": ("f4", (), "structure"),
    "group": ("i4", (), "structure"),
    "subset": ("u1", (), "structure"),
    "split": ("u1", (), "structure"),
}


class DatasetError(ValueError):
    """A dataset file that cannot be used; the message names the file and the cause."""


class Structures(NamedTuple):
    """Labelled structures as flat arrays; structure i has the atom rows offsets[i]:offsets[i+1].

    Labels that are not known are NaN.
    """

    offsets: NDArray[np.int64]
    """First atom of each structure, then the number of atoms, shape (n + 1,)."""

    atomic_numbers: NDArray[np.uint8]
    """Shape (n_atoms,)."""

    positions: NDArray[np.float32]
    """[Å], shape (n_atoms, 3)."""

    forces: NDArray[np.float32]
    """[eV/Å], shape (n_atoms, 3)."""

    partial_charges: NDArray[np.float32]
    """The teacher's [e], shape (n_atoms,)."""

    energy: NDArray[np.float64]
    """[eV], shape (n,)."""

    stress: NDArray[np.float32]
    """dE/dε / V, ASE's sign [eV/Å^3]; NaN where not periodic, shape (n, 3, 3)."""

    cell: NDArray[np.float64]
    """Box vectors as rows [Å], zeros where not periodic, shape (n, 3, 3)."""

    pbc: NDArray[np.bool_]
    """Periodic box vectors, shape (n, 3)."""

    total_charge: NDArray[np.int16]
    """[e], shape (n,)."""

    temperature: NDArray[np.float32]
    """Of the sampler [K], shape (n,)."""

    group: NDArray[np.int32]
    """Index into the group names; structures of one group are never split, shape (n,)."""

    subset: NDArray[np.uint8]
    """Index into the subset names, shape (n,)."""

    split: NDArray[np.uint8]
    """Index into SPLITS, shape (n,)."""


@dataclass(frozen=True)
class SplitRule:
    """Assigns whole groups to train, val and test by a seeded hash of the group's name.

    The hash depends on nothing else, so that a group keeps its place when data are added, and
    has the same place in every file.
    """

    val: float = 0.02
    """Fraction of the groups for validation."""

    test: float = 0.03
    """Fraction of the groups for testing."""

    seed: int = 0
    """Another seed gives another split."""

    def __post_init__(self) -> None:
        if self.val < 0 or self.test < 0 or self.val + self.test >= 1:
            raise ValueError(
                "val and test must be fractions that leave something to train on, "
                f"got val={self.val}, test={self.test}"
            )

    def __call__(self, group: str) -> int:
        """Index into SPLITS of a group's name."""
        digest = hashlib.sha256(f"{self.seed}:{group}".encode()).digest()
        x = int.from_bytes(digest[:8], "big") / 2**64
        if x < self.test:
            return SPLITS.index("test")
        return SPLITS.index("val" if x < self.test + self.val else "train")


class _Stream(io.FileIO):
    """A file that notes that it cannot be written; HDF5 crashes when it is told of a full disk."""

    error: OSError | None = None

    def write(self, data: Any, /) -> int:
        rest = memoryview(data).cast("B")
        length = len(rest)
        try:
            while self.error is None and len(rest):
                rest = rest[super().write(rest) :]
        except OSError as error:
            self.error = error
        return length

    def truncate(self, size: int | None = None, /) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = self.error or error
            return size or 0


class DatasetWriter:
    """Writes a dataset file, block by block; use as a context manager.

    The file has a temporary name until the manager is left without an exception, and all of it
    is on the disk.

    Parameters
    ----------
    path
        File to write; must not exist.
    teacher
        What made the labels: name, version, settings. None for a file without labels.
    subsets
        Names of the subsets.
    split
        How groups are split; stored in the file, with the result.
    origin
        What made the structures.

    Raises
    ------
    FileExistsError
        If the file is there already.
    OSError
        If it cannot be written: of every method, and of leaving the manager.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        teacher: str | None,
        subsets: Sequence[str],
        split: SplitRule,
        origin: str = "",
    ) -> None:
        self._path = Path(path)
        self._labels = teacher is not None
        self._fields = [f for f in _FIELDS if self._labels or f not in LABELS]
        self._split = split
        self._subsets = list(subsets)
        self._groups: dict[str, int] = {}
        if self._path.exists():
            raise FileExistsError(f"{self._path} exists; remove it or choose another name")
        self._temporary = self._path.with_name(self._path.name + ".tmp")
        self._stream = _Stream(self._temporary, "w+")
        self._file = h5py.File(self._stream, "w")
        attributes = {
            "format": FORMAT if self._labels else UNLABELLED,
            "version": VERSION,
            "split_seed": split.seed,
            "split_val": split.val,
            "split_test": split.test,
        }
        attributes |= {"teacher": teacher} if teacher is not None else {}
        attributes |= {"origin": origin} if origin else {}
        self._file.attrs.update(attributes)
        self._file.create_dataset(
            "offsets", data=np.zeros(1, "i8"), maxshape=(None,), chunks=(_CHUNK,), fletcher32=True
        )
        for name in self._fields:
            dtype, row, _ = _FIELDS[name]
            dataset = self._file.create_dataset(
                name,
                shape=(0, *row),
                maxshape=(None, *row),
                dtype=dtype,
                chunks=(_CHUNK, *row),
                compression="gzip",
                compression_opts=4,
                shuffle=name not in _ROUNDED,
                fletcher32=True,
            )
            if name in UNITS:
                dataset.attrs["units"] = UNITS[name]
        self._file["subset"].attrs["names"] = self._subsets
        self._file["split"].attrs["names"] = list(SPLITS)

    def append(self, structures: Structures, groups: Sequence[str]) -> None:
        """Append structures; their `group` and `split` are made from the names of their groups.

        Raises
        ------
        DatasetError
            If arrays disagree in length, a label that must be finite is not, or a subset is
            unknown.
        """
        n = len(structures.energy)
        index = np.array([self._groups.setdefault(g, len(self._groups)) for g in groups], "i4")
        split = np.array([self._split(g) for g in groups], "u1")
        structures = structures._replace(group=index, split=split)
        self._check(structures, n)
        offsets = self._file["offsets"]
        first = int(offsets[-1])
        for name in self._fields:
            rows = getattr(structures, name)
            dataset = self._file[name]
            start = dataset.shape[0]
            dataset.resize(start + len(rows), axis=0)
            dataset[start:] = rows
        start = offsets.shape[0]
        offsets.resize(start + n, axis=0)
        offsets[start:] = first + structures.offsets[1:]
        self._raise_if_full()

    def _raise_if_full(self) -> None:
        if self._stream.error is not None:
            raise self._stream.error

    def _check(self, structures: Structures, n: int) -> None:
        offsets = structures.offsets
        if len(offsets) != n + 1 or offsets[0] != 0 or (np.diff(offsets) < 1).any():
            raise DatasetError(
                f"{self._path}: offsets must be {n + 1} numbers that rise from 0, "
                "since every structure has an atom"
            )
        n_atoms = int(offsets[-1])
        for name, (_, row, kind) in _FIELDS.items():
            shape = ((n_atoms if kind == "atom" else n), *row)
            if getattr(structures, name).shape != shape:
                raise DatasetError(
                    f"{self._path}: {name} must have shape {shape}, "
                    f"got {getattr(structures, name).shape}"
                )
        for name in ("positions", "energy", "forces") if self._labels else ("positions",):
            values = getattr(structures, name).reshape(len(getattr(structures, name)), -1)
            bad = ~np.isfinite(values).all(1)
            if bad.any():
                raise DatasetError(
                    f"{self._path}: {name} holds values that are not finite, "
                    f"first in row {int(bad.argmax())} of the block"
                )
        if n and structures.subset.max() >= len(self._subsets):
            raise DatasetError(f"{self._path}: subset {structures.subset.max()} has no name")

    def __enter__(self) -> "DatasetWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                names = np.array(list(self._groups), dtype=h5py.string_dtype())
                self._file.create_dataset("group_names", data=names, compression="gzip")
            self._file.close()
            if kind is None:
                self._raise_if_full()
                os.fsync(self._stream.fileno())
                self._stream.close()
                os.replace(self._temporary, self._path)
        finally:
            self._stream.close()
            self._temporary.unlink(missing_ok=True)


class Dataset:
    """Reads a dataset file, a part at a time.

    Parameters
    ----------
    path
        File written by `DatasetWriter`.
    unlabelled
        Whether a file without labels will do; they are read as NaN, and its teacher is "".

    Raises
    ------
    DatasetError
        If the file is missing, damaged, of another format, version or unit.
    """

    def __init__(self, path: str | Path, *, unlabelled: bool = False) -> None:
        self.path = Path(path)
        self._unlabelled_will_do = unlabelled
        try:
            self._file = h5py.File(self.path, "r")
        except OSError as error:
            raise DatasetError(f"{self.path}: not a readable HDF5 file ({error})") from error
        self._check()
        self.offsets: NDArray[np.int64] = self._rows("offsets", slice(None))
        self.teacher: str = str(self._file.attrs["teacher"]) if self.labelled else ""
        self.origin: str = str(self._file.attrs.get("origin", ""))
        self.subsets: list[str] = [str(s) for s in self._file["subset"].attrs["names"]]
        self.split: NDArray[np.uint8] = self._rows("split", slice(None))
        self.subset: NDArray[np.uint8] = self._rows("subset", slice(None))

    def _check(self) -> None:
        attrs = self.attributes
        found = attrs.get("format"), attrs.get("version")
        self.labelled = found[0] == FORMAT
        self._fields = [f for f in _FIELDS if self.labelled or f not in LABELS]
        formats = (FORMAT, UNLABELLED) if self._unlabelled_will_do else (FORMAT,)
        if found[0] not in formats or found[1] != VERSION:
            hint = ""
            if found == (UNLABELLED, VERSION):
                hint = "; it has no labels, which `mlffd label` makes"
            if str(attrs.get("schema", "")).startswith("so3lr-starter"):
                hint = "; convert it with `mlffd data import`"
            raise DatasetError(
                f"{self.path}: has format {found[0]!r} version {found[1]!r}, "
                f"{FORMAT!r} version {VERSION} is needed{hint}"
            )
        missing = [n for n in ("offsets", "group_names", *self._fields) if n not in self._file]
        if missing:
            raise DatasetError(f"{self.path}: lacks {', '.join(missing)}; was its writing cut off?")
        n, n_atoms = len(self._file["offsets"]) - 1, len(self._file["positions"])
        for name in self._fields:
            _, row, kind = _FIELDS[name]
            shape = ((n_atoms if kind == "atom" else n), *row)
            if self._file[name].shape != shape:
                raise DatasetError(
                    f"{self.path}: {name} must have shape {shape}, it has {self._file[name].shape}"
                )
        for name, unit in UNITS.items():
            if name not in self._fields:
                continue
            if self._file[name].attrs.get("units") != unit:
                raise DatasetError(
                    f"{self.path}: {name} must be in {unit}, "
                    f"the file says {self._file[name].attrs.get('units')!r}"
                )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __enter__(self) -> "Dataset":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def attributes(self) -> dict[str, Any]:
        """Attributes of the file: format, version, teacher, split."""
        return {k: v.item() if hasattr(v, "item") else v for k, v in self._file.attrs.items()}

    @property
    def n_atoms(self) -> NDArray[np.int64]:
        """Atoms of each structure, shape ``(n,)``."""
        return np.diff(self.offsets)

    def group_names(self) -> list[str]:
        """Name of each group: for molecules, their SMILES."""
        return [g.decode() for g in self._file["group_names"][:]]

    def in_split(self, name: str) -> NDArray[np.int64]:
        """Indices of the structures of "train", "val", "test" or "all".

        Raises
        ------
        ValueError
            If there is no such split.
        """
        if name == "all":
            return np.arange(len(self))
        if name not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)} or all, got {name!r}")
        return np.flatnonzero(self.split == SPLITS.index(name))

    def read(self, start: int, stop: int) -> Structures:
        """Structures start … stop - 1, read in one piece.

        Raises
        ------
        DatasetError
            If the data on disk fail their checksum.
        """
        first, last = int(self.offsets[start]), int(self.offsets[stop])
        arrays = {}
        for name, (dtype, row, kind) in _FIELDS.items():
            rows = slice(first, last) if kind == "atom" else slice(start, stop)
            if name in self._fields:
                arrays[name] = self._rows(name, rows)
            else:
                arrays[name] = np.full((rows.stop - rows.start, *row), np.nan, dtype)
        return Structures(offsets=self.offsets[start : stop + 1] - first, **arrays)

    def _rows(self, name: str, rows: slice) -> NDArray[Any]:
        try:
            return self._file[name][rows]
        except OSError as error:
            raise DatasetError(f"{self.path}: {name} is damaged ({error})") from error

    def blocks(self, size: int = 1024) -> Iterator[Structures]:
        """All structures in order, `size` at a time."""
        for start in range(0, len(self), size):
            yield self.read(start, min(start + size, len(self)))


def take(structures: Structures, indices: NDArray[np.integer]) -> Structures:
    """The structures with these indices, in this order."""
    count = np.diff(structures.offsets)[indices]
    offsets = np.concatenate([[0], np.cumsum(count)])
    rows = np.repeat(structures.offsets[indices] - offsets[:-1], count) + np.arange(offsets[-1])
    arrays = {
        name: getattr(structures, name)[rows if kind == "atom" else indices]
        for name, (_, _, kind) in _FIELDS.items()
    }
    return Structures(offsets=offsets, **arrays)


def concatenate(parts: Iterable[Structures]) -> Structures:
    """All structures of the parts, in order."""
    parts = list(parts)
    offsets = np.concatenate([[0], np.cumsum(np.concatenate([np.diff(p.offsets) for p in parts]))])
    arrays = {name: np.concatenate([getattr(p, name) for p in parts]) for name in _FIELDS}
    return Structures(offsets=offsets, **arrays)
