"""The structures that come with the suite, as OpenMM has them."""

from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from numpy.typing import NDArray
from openmm import app, unit

from openmm_mlffd.units import ANGSTROM_PER_NM
from openmm_mlffd.validation.structures import formal_charge, read_structure
from openmm_mlffd.validation.suite.models import Structure, masses_and_numbers
from openmm_mlffd.validation.suite.plan import DRUG, PEPTIDE, PEPTIDE_IN_WATER, WATER

FOLDER = Path(str(files("openmm_mlffd.validation.suite") / "systems"))
_FILES = {
    PEPTIDE: "alanine-dipeptide.pdb",
    WATER: "water-64.pdb",
    DRUG: "drug.pdb",
    PEPTIDE_IN_WATER: "peptide-in-water.pdb",
}

BOXES = {
    "caffeine in water": "box-caffeine.pdb",
    "molnupiravir in water": "box-molnupiravir.pdb",
    "zwitterion GSA in water": "box-zwitterion-GSA.pdb",
}
"""Boxes whose solutes the bundled student has not seen, and their files."""

UNSEEN = (
    "apixaban", "artemisinin", "caffeine", "camptothecin", "ciprofloxacin", "dimethyl fosfomycin",
    "dolutegravir", "losartan", "molnupiravir", "nirmatrelvir", "remdesivir", "vildagliptin",
    "peptide AAAAAA", "peptide CTNVI", "peptide EWLHC", "peptide MKFQ", "peptide NGPWT",
    "peptide PQGTY", "peptide WGSD", "peptide YPRH",
)  # fmt: skip
"""Molecules that the bundled student has not seen: drugs, and peptides with capped ends."""

TORSIONS = {
    "butane": (0, 1, 2, 3),
    "glycol": (0, 1, 2, 3),
    "N-methylacetamide": (0, 1, 3, 4),
    "ethyl methyl sulfide": (0, 1, 2, 3),
    "styrene": (0, 1, 2, 3),
}
"""Molecules whose torsions are scanned, and the atoms of the torsion."""

MOLECULES = (
    "water", "ammonia", "methanol", "formaldehyde", "chloromethane", "butane", "glycol",
    "acetic acid", "N-methylacetamide", "dimethyl sulfoxide", "ethyl methyl sulfide", "benzene",
    "fluorobenzene", "pyridine", "styrene", "trimethyl phosphate",
)  # fmt: skip
"""The small molecules."""


@dataclass(frozen=True)
class System:
    """Atoms, bonds, box and positions of a system."""

    name: str
    """Its name."""

    topology: app.Topology
    """With bonds, and with a box if it has one."""

    positions: NDArray[np.float64]
    """[Å], shape (n_atoms, 3)."""

    torsion: tuple[int, int, int, int] | None = None
    """Atoms of the torsion that is to be scanned."""

    charge: int = 0
    """Total charge [e]."""

    @property
    def numbers(self) -> NDArray[np.int64]:
        """Atomic numbers, shape ``(n_atoms,)``."""
        return masses_and_numbers(self.topology)[1]

    @property
    def masses(self) -> NDArray[np.float64]:
        """[amu], shape ``(n_atoms,)``."""
        return masses_and_numbers(self.topology)[0]

    @property
    def bonds(self) -> NDArray[np.int64]:
        """Pairs of bonded atoms, shape ``(n_bonds, 2)``."""
        pairs = [(a.index, b.index) for a, b in self.topology.bonds()]
        return np.array(pairs, np.int64).reshape(-1, 2)

    @property
    def cell(self) -> NDArray[np.float64] | None:
        """Box vectors as rows [Å]; None if there is no box."""
        box = self.topology.getPeriodicBoxVectors()
        return None if box is None else np.array(box.value_in_unit(unit.angstrom))

    @property
    def structure(self) -> Structure:
        """Numbers, positions, box and charge."""
        return Structure(self.numbers, self.positions, self.cell, self.charge)

    @property
    def nanometers(self) -> NDArray[np.float64]:
        """Positions as OpenMM takes them [nm], shape ``(n_atoms, 3)``."""
        return self.positions / ANGSTROM_PER_NM


def load_system(
    name: str, copies: tuple[int, int, int] = (1, 1, 1), charge: int | None = None
) -> System:
    """A system of the suite by its name: a molecule, or one of the larger ones.

    Parameters
    ----------
    name
        Its name, or the path of a PDB or SDF file.
    copies
        The box, repeated so often along each of its vectors.
    charge
        Total charge [e] of one copy, if the file does not say it by formal charges of its atoms;
        None is what the file says, or else zero.

    Raises
    ------
    ValueError
        If there is no such system, its file says another charge, or one without a box is to be
        repeated.
    """
    if name in molecules():
        found = molecules()[name]
    elif name in _files() or Path(name).is_file():
        inside = _files().get(name)
        topology, positions = read_structure(name if inside is None else FOLDER / inside)
        found = System(name, topology, _angstrom(positions), charge=formal_charge(topology) or 0)
    else:
        known = ", ".join([*_files(), *molecules()])
        raise ValueError(f"no system and no file is called {name!r}; there are {known}")
    if charge is not None:
        said = formal_charge(found.topology)
        if said is not None and said != charge:
            raise ValueError(
                f"{name}: a total charge of {charge:+d} e was given, but the formal charges in the "
                f"file add up to {said:+d} e"
            )
        found = replace(found, charge=charge)
    return found if copies == (1, 1, 1) else _repeat(found, copies)


def _files() -> dict[str, str]:
    unseen = {name: f"unseen-{name.replace(' ', '-')}.pdb" for name in UNSEEN}
    return _FILES | BOXES | unseen


@cache
def molecules() -> dict[str, System]:
    """The small molecules, by name."""
    found = {}
    for name in MOLECULES:
        # PDB and not SDF: OpenMM reads it with bonds, and the kinds of bonds are not needed
        path = FOLDER / f"molecule-{name.replace(' ', '-')}.pdb"
        topology, positions = read_structure(path)
        charge = formal_charge(topology) or 0
        found[name] = System(name, topology, _angstrom(positions), TORSIONS.get(name), charge)
    return found


@dataclass(frozen=True)
class Dimer:
    """Two molecules, the second of which is moved along the z axis."""

    name: str
    numbers: NDArray[np.int64]
    positions: NDArray[np.float64]
    first: int
    distance: float

    def at(self, distance: float) -> Structure:
        """The pair at another distance [Å] of what is the origin of each molecule."""
        positions = self.positions.copy()
        positions[self.first :, 2] += distance - self.distance
        return Structure(self.numbers, positions)

    def apart(self) -> list[Structure]:
        """The two molecules, each alone."""
        parts = (slice(None, self.first), slice(self.first, None))
        return [Structure(self.numbers[p], self.positions[p]) for p in parts]


def dimers() -> dict[str, Dimer]:
    """The dimers, by name."""
    try:
        from ase.io import read
    except ImportError as error:
        raise ImportError(f"ASE is needed ({error}): pip install openmm-mlffd[ase]") from error
    found = {}
    for atoms in read(FOLDER / "dimers.xyz", ":"):
        info = atoms.info
        found[info["name"]] = Dimer(
            info["name"],
            atoms.numbers.astype(np.int64),
            atoms.positions.copy(),
            int(info["first"]),
            float(info["distance"]),
        )
    return found


def _repeat(system: System, copies: tuple[int, int, int]) -> System:
    if system.cell is None:
        raise ValueError(f"{system.name} has no box, so that it cannot be repeated")
    topology, positions = app.Topology(), []
    shifts = np.stack(np.meshgrid(*map(np.arange, copies), indexing="ij"), -1).reshape(-1, 3)
    for shift in shifts @ system.cell:
        _copy_atoms(system.topology, topology)
        positions.append(system.positions + shift)
    vectors = system.cell * np.array(copies)[:, None] / ANGSTROM_PER_NM
    topology.setPeriodicBoxVectors([openmm.Vec3(*v) for v in vectors] * unit.nanometer)
    charge = system.charge * len(positions)
    return System(system.name, topology, np.concatenate(positions), charge=charge)


def _copy_atoms(source: app.Topology, target: app.Topology) -> None:
    copies = {}
    for chain in source.chains():
        new_chain = target.addChain()
        for residue in chain.residues():
            new_residue = target.addResidue(residue.name, new_chain)
            for atom in residue.atoms():
                copies[atom] = target.addAtom(
                    atom.name, atom.element, new_residue, formalCharge=atom.formalCharge
                )
    for first, second in source.bonds():
        target.addBond(copies[first], copies[second])


def _angstrom(positions: Any) -> NDArray[np.float64]:
    return np.array(positions.value_in_unit(unit.angstrom), np.float64)
