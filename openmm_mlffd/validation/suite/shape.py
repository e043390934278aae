"""Whether molecules keep their shape along a trajectory, and how far water molecules are apart."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from openmm_mlffd.validation.suite.static import rmsd
from openmm_mlffd.validation.suite.systems import System

WATER_NAMES = ("HOH", "WAT", "SOL")
"""Names of residues that are water."""

RADIAL_BIN = 0.05
"""Width of the bins of radial distribution functions [Å]."""

_LARGEST_RADIUS = 8.0  # Å


def solute(system: System) -> NDArray[np.int64]:
    """Indices of the atoms that are not water."""
    found = [a.index for a in system.topology.atoms() if a.residue.name not in WATER_NAMES]
    return np.array(found, np.int64)


def shape_numbers(
    system: System, positions: NDArray[np.floating[Any]], cells: NDArray[np.float64]
) -> dict[str, Any]:
    """What became of bonds, and of what is not water.

    Parameters
    ----------
    system
        Bonds and start.
    positions
        [Å], shape ``(n_frames, n_atoms, 3)``; molecules are not cut by the box.
    cells
        Box vectors as rows [Å], zeros without a box, shape ``(n_frames, 3, 3)``.

    Returns
    -------
    dict
        ``longest_bond``, relative to the start; with a solute ``largest_rmsd`` and ``last_rmsd``
        of its heavy atoms from the start [Å], ``largest_omega``: how far an amide was turned from
        where it was at the start [degrees], and ``inverted_centers``: atoms with four neighbors
        whose handedness at the end is not that of the start.
    """
    x = np.asarray(positions, np.float64)
    numbers: dict[str, Any] = {}
    bonds = system.bonds
    if len(bonds):
        start = np.linalg.norm(np.subtract(*system.positions[bonds.T]), axis=-1)
        now = np.linalg.norm(x[:, bonds[:, 0]] - x[:, bonds[:, 1]], axis=-1)
        numbers["longest_bond"] = float((now / start).max())
    atoms = solute(system)
    heavy = atoms[system.numbers[atoms] > 1]
    if len(heavy) < 4:
        return numbers
    moved = [rmsd(frame[heavy], system.positions[heavy]) for frame in x]
    numbers |= {"largest_rmsd": max(moved), "last_rmsd": moved[-1], "inverted_centers": 0}
    centers = tetrahedral(system)
    if len(centers):
        before = handedness(system.positions[None], centers)[0]
        numbers["inverted_centers"] = int((handedness(x[-1:], centers)[0] != before).sum())
    amides = amide_torsions(system)
    if len(amides):
        turned = torsion_angles(x, amides) - torsion_angles(system.positions[None], amides)
        numbers["largest_omega"] = float(np.abs((turned + 180.0) % 360.0 - 180.0).max())
    return numbers


def _neighbors(system: System) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for a, b in system.bonds.tolist():
        found.setdefault(a, []).append(b)
        found.setdefault(b, []).append(a)
    return found


def tetrahedral(system: System) -> NDArray[np.int64]:
    """Four neighbors of each atom that has four, shape ``(n_centers, 4)``."""
    found = [sorted(n) for n in _neighbors(system).values() if len(n) == 4]
    return np.array(found, np.int64).reshape(-1, 4)


def handedness(
    positions: NDArray[np.floating[Any]], centers: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """On which side of three neighbors the fourth is, shape ``(n_frames, n_centers)``."""
    a, b, c, d = (positions[:, centers[:, k]] for k in range(4))
    return np.asarray(np.einsum("fci,fci->fc", np.cross(b - a, c - a), d - a) > 0)


def amide_torsions(system: System) -> NDArray[np.int64]:
    """C–C–N–C or like atoms about each amide bond, shape ``(n_amides, 4)``."""
    neighbors, z = _neighbors(system), system.numbers
    found = []
    for pair in system.bonds.tolist():
        for carbon, nitrogen in (pair, pair[::-1]):
            if z[carbon] != 6 or z[nitrogen] != 7:
                continue
            oxygens = [k for k in neighbors[carbon] if z[k] == 8 and len(neighbors[k]) == 1]
            before = [k for k in neighbors[carbon] if z[k] == 6]
            after = [k for k in neighbors[nitrogen] if z[k] == 6 and k != carbon]
            if oxygens and before and after:
                found.append((before[0], carbon, nitrogen, after[0]))
    return np.array(found, np.int64).reshape(-1, 4)


def torsion_angles(
    positions: NDArray[np.floating[Any]], torsions: NDArray[np.int64]
) -> NDArray[np.float64]:
    """[degrees], shape ``(n_frames, n_torsions)``."""
    a, b, c, d = (positions[:, torsions[:, k]] for k in range(4))
    axis = c - b
    first, second = np.cross(b - a, axis), np.cross(axis, d - c)
    y = np.einsum("fti,fti->ft", np.cross(first, second), axis) / np.linalg.norm(axis, axis=-1)
    return np.asarray(np.degrees(np.arctan2(y, np.einsum("fti,fti->ft", first, second))))


def water_distances(
    system: System, positions: NDArray[np.floating[Any]], cells: NDArray[np.float64]
) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Radial distribution functions O–O and O–H between water molecules.

    Parameters
    ----------
    system
        The atoms.
    positions, cells
        As for `shape_numbers`; boxes with right angles.

    Returns
    -------
    dict
        Distance, at the middle of each bin [Å], and density of pairs relative to the mean, by
        name; up to half of the smallest box, and empty if there is no water.
    """
    atoms = [a for a in system.topology.atoms() if a.residue.name in WATER_NAMES]
    if not atoms or not len(positions):
        return {}
    index = np.array([a.index for a in atoms])
    residue = np.array([a.residue.index for a in atoms])
    is_oxygen = system.numbers[index] == 8
    edges = np.arange(0.0, min(_LARGEST_RADIUS, 0.5 * _sides(cells).min()), RADIAL_BIN)
    shells = 4 / 3 * np.pi * np.diff(edges**3)
    found = {}
    for name, chosen in (("O–O", is_oxygen), ("O–H", ~is_oxygen)):
        other = residue[is_oxygen][:, None] != residue[chosen][None, :]
        g = np.zeros(len(shells))
        for frame, side in zip(np.asarray(positions, np.float64), _sides(cells), strict=True):
            x = frame[index]
            vectors = x[is_oxygen][:, None] - x[chosen][None, :]
            vectors -= side * np.round(vectors / side)
            counts, _ = np.histogram(np.linalg.norm(vectors[other], axis=-1), edges)
            g += counts * side.prod() / (other.sum() * shells)
        found[name] = (0.5 * (edges[1:] + edges[:-1]), g / len(positions))
    return found


def _sides(cells: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.diagonal(cells, axis1=1, axis2=2))
