"""Structures to be labelled, from dataset files, SDF, and whatever ASE reads."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from openmm_mlffd.training.hdf5 import Dataset, SplitRule, Structures, concatenate, take

DATASET_SUFFIXES = (".h5", ".hdf5")
WHOLE_CHARGE = 0.01
"""A sum of initial charges [e] further than this from an integer is an error."""


class SourceError(ValueError):
    """A file of structures that cannot be used; the message names the file and the cause."""


class Source(Protocol):
    """Structures in a fixed order, read a part at a time; their labels are unknown."""

    name: str
    """Name of the file, without its folder."""

    identity: dict[str, Any]
    """What tells this source from another: SHA-256 of the file, settings of the reader."""

    subsets: list[str]
    """Names of the subsets."""

    split: SplitRule
    """How groups are split."""

    origin: str
    """What made the structures, if that is known."""

    def __len__(self) -> int:
        """Number of structures."""

    def read(self, start: int, stop: int) -> tuple[Structures, list[str]]:
        """Structures start … stop - 1, and the names of their groups."""


@dataclass(frozen=True)
class Frame:
    """One structure."""

    numbers: np.ndarray
    """Atomic numbers, shape (n_atoms,)."""

    positions: np.ndarray
    """[Å], shape (n_atoms, 3)."""

    charge: int
    """Total charge [e]."""

    group: str
    """Structures of one group are never split."""

    subset: str
    """Name of the subset."""

    cell: np.ndarray | None = None
    """Box vectors as rows [Å]; None if not periodic."""

    pbc: tuple[bool, bool, bool] = (False, False, False)
    """Periodic box vectors."""

    temperature: float = np.nan
    """Of the sampler [K]."""


def open_source(path: str | Path, *, charge: int = 0, add_hydrogens: bool = False) -> Source:
    """Structures of a file.

    Parameters
    ----------
    path
        Dataset file (`.h5`, whose labels are not looked at), SDF with explicit hydrogens, or
        any file that ASE reads, such as extended XYZ.
    charge
        Total charge [e] of structures of which the file does not say it.
    add_hydrogens
        Add the implicit hydrogens of an SDF instead of refusing it; other atoms keep their places.

    Raises
    ------
    SourceError
        If the file is missing, empty or not readable, or an SDF has implicit hydrogens.
    """
    path = Path(path)
    if not path.is_file():
        raise SourceError(f"{path}: there is no such file")
    if path.suffix in DATASET_SUFFIXES:
        return DatasetSource(path)
    identity: dict[str, Any] = {"sha256": sha256(path), "charge": charge}
    if path.suffix.lower() in (".sdf", ".mol"):
        frames = [frame for frame, _ in read_sdf(path, add_hydrogens=add_hydrogens)]
        identity |= {"add_hydrogens": True} if add_hydrogens else {}
    else:
        frames = read_ase(path, charge)
    return MemorySource(frames, path.name, identity)


def sha256(path: Path) -> str:
    """Hash of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class DatasetSource:
    """Structures of a dataset file, with its groups, subsets and split; labels are left out."""

    def __init__(self, path: Path) -> None:
        self._dataset = Dataset(path, unlabelled=True)
        if not len(self._dataset):
            raise SourceError(f"{path}: holds no structures")
        self._groups = self._dataset.group_names()
        self.name = path.name
        self.identity = {"sha256": sha256(path)}
        self.subsets = self._dataset.subsets
        self.origin = self._dataset.origin
        attributes = self._dataset.attributes
        self.split = SplitRule(
            val=attributes["split_val"],
            test=attributes["split_test"],
            seed=attributes["split_seed"],
        )

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, start: int, stop: int) -> tuple[Structures, list[str]]:
        """Structures start … stop - 1, and the names of their groups."""
        structures = self._dataset.read(start, stop)
        return without_labels(structures), [self._groups[g] for g in structures.group]


class FirstOf:
    """The first structures of a source.

    Parameters
    ----------
    source
        All of them.
    count
        How many to take; all if there are not so many.

    Raises
    ------
    SourceError
        If `count` is not positive.
    """

    def __init__(self, source: Source, count: int) -> None:
        if count < 1:
            raise SourceError(f"{source.name}: of its structures at least 1 is taken, not {count}")
        self._source, self._count = source, min(count, len(source))
        self.name, self.identity = source.name, source.identity | {"first": self._count}
        self.subsets, self.split, self.origin = source.subsets, source.split, source.origin

    def __len__(self) -> int:
        return self._count

    def read(self, start: int, stop: int) -> tuple[Structures, list[str]]:
        """Structures start … stop - 1, and the names of their groups."""
        return self._source.read(start, min(stop, self._count))


class MemorySource:
    """Structures that are held in memory."""

    def __init__(self, frames: Iterable[Frame], name: str, identity: dict[str, Any]) -> None:
        frames = list(frames)
        if not frames:
            raise SourceError(f"{name}: holds no structures")
        self.name, self.identity = name, identity
        self.subsets = sorted({frame.subset for frame in frames})
        self.split = SplitRule()
        self.origin = ""
        self._groups = [frame.group for frame in frames]
        self._structures = concatenate(pack(frame, self.subsets) for frame in frames)

    def __len__(self) -> int:
        return len(self._groups)

    def read(self, start: int, stop: int) -> tuple[Structures, list[str]]:
        """Structures start … stop - 1, and the names of their groups."""
        return take(self._structures, np.arange(start, stop)), self._groups[start:stop]


def pack(frame: Frame, subsets: list[str]) -> Structures:
    """A frame as structures, one of them, with labels that are unknown."""
    n = len(frame.numbers)
    return Structures(
        offsets=np.array([0, n]),
        atomic_numbers=frame.numbers.astype("u1"),
        positions=frame.positions.astype("f4"),
        forces=np.full((n, 3), np.nan, "f4"),
        partial_charges=np.full(n, np.nan, "f4"),
        energy=np.full(1, np.nan),
        stress=np.full((1, 3, 3), np.nan, "f4"),
        cell=np.zeros((1, 3, 3)) if frame.cell is None else frame.cell.reshape(1, 3, 3),
        pbc=np.array([frame.pbc]),
        total_charge=np.array([frame.charge], "i2"),
        temperature=np.array([frame.temperature], "f4"),
        group=np.zeros(1, "i4"),
        subset=np.array([subsets.index(frame.subset)], "u1"),
        split=np.zeros(1, "u1"),
    )


def without_labels(structures: Structures) -> Structures:
    """The same structures with labels that are unknown."""
    return structures._replace(
        energy=np.full_like(structures.energy, np.nan),
        forces=np.full_like(structures.forces, np.nan),
        stress=np.full_like(structures.stress, np.nan),
        partial_charges=np.full_like(structures.partial_charges, np.nan),
    )


def read_sdf(path: Path, *, add_hydrogens: bool = False) -> list[tuple[Frame, Any]]:
    """Molecules of an SDF file, with what RDKit made of them; their group is their SMILES.

    Parameters
    ----------
    path
        The file.
    add_hydrogens
        Add hydrogens that are not written out, where they belong; other atoms keep their places.

    Raises
    ------
    SourceError
        If an entry is not readable, flat, or has hydrogens that are not written out: a molecule
        without its hydrogens is another one.
    """
    from rdkit import Chem

    if not path.stat().st_size:
        raise SourceError(f"{path}: is empty")
    found = []
    # by default the supplier removes even the hydrogens that are in the file
    with Chem.SDMolSupplier(str(path), removeHs=False) as supplier:
        for i, molecule in enumerate(supplier):
            if molecule is None:
                raise SourceError(f"{path}: entry {i} is not a molecule that RDKit can read")
            if not molecule.GetNumAtoms():
                raise SourceError(f"{path}: entry {i} has no atoms")
            if not molecule.GetConformer().Is3D():
                raise SourceError(f"{path}: entry {i} has no three-dimensional coordinates")
            missing = sum(atom.GetTotalNumHs() for atom in molecule.GetAtoms())
            if missing and not add_hydrogens:
                raise SourceError(
                    f"{path}: entry {i} has {missing} implicit hydrogens; write them out, with "
                    "coordinates (RDKit: Chem.AddHs(molecule, addCoords=True)), or let them be "
                    "added"
                )
            if missing:
                molecule = Chem.AddHs(molecule, addCoords=True)
            frame = Frame(
                numbers=np.array([a.GetAtomicNum() for a in molecule.GetAtoms()]),
                positions=molecule.GetConformer().GetPositions(),
                charge=Chem.GetFormalCharge(molecule),
                group=Chem.MolToSmiles(Chem.RemoveHs(molecule)),
                subset=path.stem,
            )
            found.append((frame, molecule))
    return found


def read_ase(path: Path, charge: int) -> list[Frame]:
    """Frames of a file that ASE reads.

    Of `atoms.info` these names are understood: ``charge`` or ``total_charge`` [e], ``group`` or
    ``smiles``, ``subset``, ``temperature`` [K]. Without a group, frames of the same composition
    are one, so that no molecule is trained on and tested at the same time.

    Raises
    ------
    SourceError
        If ASE cannot read the file, or a frame is not one of atoms.
    """
    frames = []
    try:
        for i, atoms in enumerate(iterate_ase(path)):
            frames.append(frame_of(atoms, f"{path}: frame {i}", path.stem, charge))
    except SourceError:
        raise
    except Exception as error:  # readers of ASE raise whatever their format makes them
        raise SourceError(
            f"{path}: ASE cannot read it ({type(error).__name__}: {error})"
        ) from error
    return frames


def iterate_ase(path: Path) -> Iterator[Any]:
    """Atoms of a file that ASE reads, one after the other; of a database with all it has."""
    if path.suffix.lower() == ".db":
        from ase.db import connect

        for row in connect(path, type="db").select():
            yield row.toatoms(add_additional_information=True)
        return
    from ase.io import iread

    yield from iread(path, ":")


def frame_of(atoms: Any, where: str, stem: str, charge: int) -> Frame:
    """A frame from ASE's atoms; names in `atoms.info` are those of `read_ase`.

    Parameters
    ----------
    atoms
        `ase.Atoms`.
    where
        File and place, for messages.
    stem
        Subset of frames that name none.
    charge
        Total charge [e] of frames that do not say it.

    Raises
    ------
    SourceError
        If it has no atoms, an unknown element, positions that are not finite, or a total charge
        that is not whole.
    """
    # rows of ASE databases have what else is known under these two names
    info = atoms.info | atoms.info.get("key_value_pairs", {}) | atoms.info.get("data", {})
    numbers = atoms.get_atomic_numbers()
    if not len(numbers):
        raise SourceError(f"{where} has no atoms")
    if numbers.min() < 1 or not np.isfinite(atoms.positions).all():
        raise SourceError(f"{where} has an unknown element or a position that is not finite")
    said = info.get("charge", info.get("total_charge"))
    if said is None:
        said = atoms.get_initial_charges().sum() if atoms.has("initial_charges") else charge
    if abs(said - round(said)) > WHOLE_CHARGE:
        raise SourceError(f"{where} has a total charge of {said:g} e, which is not whole")
    a, b, c = (bool(p) for p in atoms.pbc)
    return Frame(
        numbers=numbers,
        positions=atoms.positions,
        charge=round(said),
        group=str(info.get("group", info.get("smiles", composition(atoms)))),
        subset=str(info.get("subset", stem)),
        cell=np.array(atoms.cell) if a or b or c else None,
        pbc=(a, b, c),
        temperature=float(info.get("temperature", np.nan)),
    )


def composition(atoms: Any) -> str:
    """Numbers of atoms by element, such as ``C2 H6 O1``."""
    counts = Counter(atoms.get_chemical_symbols())
    return " ".join(f"{symbol}{counts[symbol]}" for symbol in sorted(counts))
