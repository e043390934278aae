"""What an OpenMM Topology must be like for a student. Needs no openmm to be imported."""

from collections.abc import Iterable, Sequence
from typing import Any

from openmm_mlffd.elements import symbol

TERMINAL_BONDS = {7: 3, 8: 2, 9: 1, 15: 3, 16: 2, 17: 1, 34: 2, 35: 1, 53: 1}
"""Bonds that an atom without hydrogens makes to its only neighbor, by atomic number."""

SMALLEST_CAGE = 20
"""Carbon atoms in the smallest fullerene."""


def atomic_numbers(atoms: Sequence[Any], known: Sequence[int]) -> list[int]:
    """Atomic number of each atom of a Topology.

    Parameters
    ----------
    atoms
        Atoms of a Topology.
    known
        Atomic numbers that the student knows.

    Raises
    ------
    ValueError
        If an atom has no element, or one that the student does not know.
    """
    for atom in atoms:
        if atom.element is None:
            raise ValueError(
                f"{describe(atom)} has no element: a virtual site or an extra particle, which "
                "the student cannot see. Leave it out of the atoms, or remove it from the Topology"
            )
    numbers = [int(atom.element.atomic_number) for atom in atoms]
    strange = [atom for atom, z in zip(atoms, numbers, strict=True) if z not in known]
    if strange:
        found = sorted({int(atom.element.atomic_number) for atom in strange})
        raise ValueError(
            f"the student does not know {', '.join(symbol(z) for z in found)} "
            f"(first: {describe(strange[0])}); it was trained for "
            f"{', '.join(symbol(z) for z in known)}"
        )
    return numbers


def check_hydrogens(topology: Any, atoms: Sequence[Any]) -> None:
    """Refuse molecules whose hydrogens were forgotten.

    A molecule is what hangs together by bonds or shares a residue. It is refused if it has carbon
    and no hydrogen at all, although its carbons need some. With bonds: every carbon must get to
    four bonds, counting a neighbor at the end of the chain with its usual valence, others once,
    and one of those twice if need be; CO2, CCl4, C60, hexafluorobenzene pass. Without bonds, the
    composition must be that of a cage of carbon, or of molecules that halogens, O, S and N
    saturate.

    Parameters
    ----------
    topology
        The Topology.
    atoms
        Those of its atoms that the student is for; the molecules they belong to are looked at.

    Raises
    ------
    ValueError
        If hydrogens are missing; says how to add them.
    """
    neighbors: dict[Any, list[Any]] = {atom: [] for atom in topology.atoms()}
    for first, second in topology.bonds():
        neighbors[first].append(second)
        neighbors[second].append(first)
    for molecule in _molecules(atoms, neighbors):
        numbers = [atom.element.atomic_number if atom.element else 0 for atom in molecule]
        if 6 not in numbers or 1 in numbers:
            continue
        if any(neighbors[atom] for atom in molecule):
            whole = not any(_needs_hydrogen(a, neighbors) for a in molecule if _is_carbon(a))
        else:
            whole = _saturated(numbers)
        if not whole:
            raise ValueError(_missing_hydrogens(molecule))


def describe(atom: Any) -> str:
    """An atom of a Topology in words."""
    residue = atom.residue
    what = "" if atom.element is None else f" {atom.element.symbol}"
    return f"atom {atom.index} ({atom.name}{what} of residue {residue.name} {residue.id})"


def _molecules(atoms: Iterable[Any], neighbors: dict[Any, list[Any]]) -> Iterable[list[Any]]:
    seen: set[Any] = set()
    for start in atoms:
        if start in seen:
            continue
        seen.add(start)
        molecule, residues = [start], set()
        for atom in molecule:  # grows
            linked = list(neighbors[atom])
            if atom.residue not in residues:
                residues.add(atom.residue)
                linked += atom.residue.atoms()
            for other in linked:
                if other not in seen:
                    seen.add(other)
                    molecule.append(other)
        yield molecule


def _is_carbon(atom: Any) -> bool:
    return atom.element is not None and atom.element.atomic_number == 6


def _needs_hydrogen(carbon: Any, neighbors: dict[Any, list[Any]]) -> bool:
    """Whether a carbon of a molecule without hydrogens cannot get to four bonds, or gets past."""
    missing, inner = 4, 0
    for other in neighbors[carbon]:
        number = other.element.atomic_number if other.element else 0
        if len(neighbors[other]) == 1 and number in TERMINAL_BONDS:
            missing -= TERMINAL_BONDS[number]
        else:
            missing -= 1
            inner += 1
    return not 0 <= missing <= min(inner, 1)


def _saturated(numbers: list[int]) -> bool:
    n_carbon = numbers.count(6)
    if n_carbon == len(numbers):
        return n_carbon >= SMALLEST_CAGE
    if not all(z == 6 or z in TERMINAL_BONDS for z in numbers):
        return True  # salts and metals: no telling
    bonds = sum(TERMINAL_BONDS[z] for z in numbers if z != 6)
    # a chain of n carbons has 2 n + 2 places; there may be one molecule or up to n
    return bonds % 2 == 0 and 2 * n_carbon + 2 <= bonds <= 4 * n_carbon


def _missing_hydrogens(molecule: list[Any]) -> str:
    return (
        f"residue {molecule[0].residue.name} {molecule[0].residue.id} ({len(molecule)} atoms, "
        f"first: {describe(molecule[0])}) has carbon but no hydrogens, and the student treats "
        "atoms as they are. Add the hydrogens: modeller = openmm.app.Modeller(topology, "
        "positions); modeller.addHydrogens(forcefield), or fixer = "
        "pdbfixer.PDBFixer('file.pdb'); fixer.addMissingHydrogens(7.0), or rdkit.Chem.AddHs(mol, "
        "addCoords=True). If there are none to add, pass allowMissingHydrogens=True"
    )
