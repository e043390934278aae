"""What is wrong with a geometry: clashes, hydrogens, valences; from distances alone."""

from collections import defaultdict

import numpy as np
import torch
from numpy.typing import NDArray

from openmm_mlffd.elements import COVALENT_RADII, SYMBOLS
from openmm_mlffd.kernels.reference import neighbor_list
from openmm_mlffd.training.hdf5 import Structures

CLASH = 0.55
"""Atoms nearer than this fraction of the sum of their covalent radii clash."""

BOND = 1.3
"""Atoms nearer than this multiple of the sum of their covalent radii are bonded."""

STRETCHED = 1.8
"""A hydrogen without such a bond is bonded to the nearest atom, if that is nearer than this
multiple: in hot molecules bonds of 1.5 Å to hydrogen are not rare."""

LARGEST_VALENCE = {1: 1, 6: 4, 7: 4, 8: 3, 9: 1, 15: 6, 16: 6, 17: 4}
"""Most bonds of an atom, charged states included, by atomic number."""

_RADII = torch.tensor(COVALENT_RADII, dtype=torch.float64)
_STRAIGHT = 130.0  # least angle of a carbon that needs no third neighbor [degrees]

Bonds = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]
"""First atom, second atom, vector between them [Å], fraction of the sum of covalent radii."""


def find_bonds(structures: Structures) -> Bonds:
    """Pairs of atoms near enough to be bonded, each in both directions, periodic images too."""
    n = len(structures.energy)
    count = np.diff(structures.offsets)
    system = torch.from_numpy(np.repeat(np.arange(n), count))
    positions = torch.from_numpy(structures.positions.astype("f8"))
    cell = torch.from_numpy(structures.cell)
    pbc = torch.from_numpy(structures.pbc)
    radius = _RADII[torch.from_numpy(structures.atomic_numbers.astype("i8"))]
    cutoff = max(BOND * 2.0 * float(radius.max()), STRETCHED * float(radius.max() + radius.min()))
    edges, shift = neighbor_list(positions, system, cell, pbc, cutoff=cutoff)
    i, j = edges
    vectors = positions[j] + torch.einsum("ei,eij->ej", shift.to(cell.dtype), cell[system[i]])
    vectors -= positions[i]
    fraction = torch.linalg.norm(vectors, dim=1) / (radius[i] + radius[j])
    first, second, ratio = i.numpy(), j.numpy(), fraction.numpy()
    near = (ratio < BOND) | _stretched(structures.atomic_numbers, first, second, ratio)
    return first[near], second[near], vectors.numpy()[near], ratio[near]


def _stretched(
    numbers: NDArray[np.uint8],
    first: NDArray[np.int64],
    second: NDArray[np.int64],
    ratio: NDArray[np.float64],
) -> NDArray[np.bool_]:
    """Which pairs are a hydrogen without a bond and its nearest atom, in either direction."""
    nearest = np.full(len(numbers), np.inf)
    np.minimum.at(nearest, first, ratio)
    free = (numbers == 1) & (nearest >= BOND) & (nearest < STRETCHED)
    return (free[first] & (ratio == nearest[first])) | (free[second] & (ratio == nearest[second]))


def judge_geometry(structures: Structures) -> list[list[str]]:
    """What is wrong with each structure: a list of reasons, empty if nothing is.

    Reasons are: atoms that clash; a hydrogen with no bond or with two; an atom with more bonds
    than its element has; a carbon that lacks hydrogens; an odd number of electrons.
    """
    first, second, vectors, fraction = find_bonds(structures)
    numbers = structures.atomic_numbers.astype(int)
    system = np.repeat(np.arange(len(structures.energy)), np.diff(structures.offsets))
    reasons: list[list[str]] = [[] for _ in structures.energy]

    def note(atoms: NDArray[np.int64], text: str) -> None:
        counts: dict[tuple[int, str], int] = defaultdict(int)
        for atom in atoms.tolist():
            counts[int(system[atom]), SYMBOLS[numbers[atom]]] += 1
        for (which, symbol), times in counts.items():
            reasons[which].append(f"{times} × {symbol} {text}")

    clash = fraction < CLASH
    note(np.unique(first[clash]), "clashes with another atom")
    degree = np.bincount(first, minlength=len(numbers))
    hydrogen = numbers == 1
    note(np.flatnonzero(hydrogen & (degree == 0)), "without a bond")
    note(np.flatnonzero(hydrogen & (degree > 1)), "with more than one bond")
    most = np.array([LARGEST_VALENCE.get(z, 99) for z in range(len(SYMBOLS))])
    note(np.flatnonzero(~hydrogen & (degree > most[numbers])), "with too many bonds")
    note(_lacking(numbers, degree, (first, second, vectors)), "lacks hydrogens")
    electrons = np.bincount(system, numbers, len(reasons)) - structures.total_charge
    for which in np.flatnonzero(electrons.astype(int) % 2):
        reasons[which].append("odd number of electrons")
    return reasons


def _lacking(
    numbers: NDArray[np.int64],
    degree: NDArray[np.int64],
    bonds: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]],
) -> NDArray[np.int64]:
    """Carbons whose neighbors cannot be all of them.

    With three neighbors one must be able to take a double bond; with two they must lie opposite
    to each other; with one it must be nitrogen or oxygen, as in isonitriles and carbon monoxide.
    """
    first, second, vectors = bonds
    # bonds that an atom can still take, beyond the single ones that are there
    most = {6: 4, 7: 4, 8: 2, 15: 6, 16: 6}
    room = np.array([most.get(z, 0) for z in range(len(SYMBOLS))])[numbers] - degree
    partner = np.zeros(len(numbers), int)
    np.maximum.at(partner, first, room[second])
    carbon = numbers == 6
    bad = carbon & (degree == 3) & (partner < 1)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    summed = np.zeros((len(numbers), 3))
    np.add.at(summed, first, unit)
    # |a + b| = 2 cos(angle / 2) of two directions
    straight = np.linalg.norm(summed, axis=1) < 2.0 * np.cos(np.radians(_STRAIGHT) / 2.0)
    bad |= carbon & (degree == 2) & ~straight
    heteroatom = np.zeros(len(numbers), bool)
    np.logical_or.at(heteroatom, first, (numbers[second] == 7) | (numbers[second] == 8))
    bad |= carbon & (degree == 1) & ~heteroatom
    return np.flatnonzero(bad | (carbon & (degree == 0)))
