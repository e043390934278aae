"""Molecules with bonds torn or squeezed: what no dynamics shows, and where students have holes."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from openmm_mlffd.elements import COVALENT_RADII
from openmm_mlffd.training.generation.recipe import SamplingConfig

BOND = 1.25
"""Atoms nearer than this multiple of the sum of their covalent radii are bonded."""

CLOSEST = 0.4
"""Atoms are not brought nearer than this multiple of the sum of their radii."""

TOUCHING = 1.2
"""Nor, by turning, atoms without a bond nearer than this multiple."""

TRIES = 20
"""Configurations with nearer atoms, or without any change, are drawn again so often."""

Array = NDArray[np.float64]


def bonds_of(numbers: NDArray[np.int64], positions: Array) -> list[tuple[int, int]]:
    """Pairs of bonded atoms, the lower index first."""
    radii = np.array(COVALENT_RADII)[numbers]
    distance = np.linalg.norm(positions[:, None] - positions, axis=-1)
    first, second = np.nonzero(np.triu(distance < BOND * (radii[:, None] + radii), 1))
    return list(zip(first.tolist(), second.tolist(), strict=True))


def side_of(
    atom: int, other: int, bonds: Sequence[tuple[int, int]], n_atoms: int
) -> NDArray[np.bool_]:
    """The atoms that hang on an atom once its bond with another is cut.

    If the bond is part of a ring, nothing is cut off: then the atom, with those that have no
    other bond than that with it.

    Returns
    -------
    numpy.ndarray
        A mask, shape ``(n_atoms,)``.
    """
    neighbors: list[list[int]] = [[] for _ in range(n_atoms)]
    for i, j in bonds:
        neighbors[i].append(j)
        neighbors[j].append(i)
    reached, front = {atom}, [atom]
    while front:
        here = front.pop()
        for k in neighbors[here]:
            if k not in reached and {here, k} != {atom, other}:
                reached.add(k)
                front.append(k)
    if other in reached:
        reached = {atom, *(k for k in neighbors[atom] if neighbors[k] == [atom])}
    return np.isin(np.arange(n_atoms), list(reached))


def turn(
    positions: Array,
    bonds: Sequence[tuple[int, int]],
    count: int,
    rng: np.random.Generator,
) -> Array:
    """Turn what hangs on some bonds about them, by any angle.

    Parameters
    ----------
    positions
        [Å], shape ``(n_atoms, 3)``.
    bonds
        Pairs of bonded atoms.
    count
        How many bonds; fewer where there are not so many about which something can be turned.
    rng
        Draws bonds and angles.
    """
    n_atoms, moved = len(positions), positions.copy()
    possible = []
    for i, j in bonds:
        side = side_of(j, i, bonds, n_atoms)
        # something must be turned, against something else; of rings nothing was cut off
        if (
            1 < side.sum() < n_atoms - 1
            and side_of(i, j, bonds, n_atoms).sum() == n_atoms - side.sum()
        ):
            possible.append((i, j, side))
    for which in rng.permutation(len(possible))[:count].tolist():
        i, j, side = possible[which]
        axis, angle = moved[j] - moved[i], rng.uniform(-np.pi, np.pi)
        axis, arms = axis / np.linalg.norm(axis), moved[side] - moved[j]
        along = np.outer(arms @ axis, axis)  # Rodrigues' formula
        turned = along + np.cos(angle) * (arms - along) + np.sin(angle) * np.cross(axis, arms)
        moved[side] = moved[j] + turned
    return moved


def _change(
    positions: Array,
    bonds: list[tuple[int, int]],
    config: SamplingConfig,
    rng: np.random.Generator,
    touching: Array,
) -> Array | None:
    """One try; None if atoms come too near to one another by turning."""
    moved = turn(positions, bonds, int(rng.choice(config.turned)), rng)
    if (_distances(moved) < touching).any():
        return None
    count = min(int(rng.choice(config.torn)), len(bonds))
    for which in rng.choice(len(bonds), count, replace=False) if count else ():
        atom, other = bonds[which]
        if rng.random() < 0.5:
            atom, other = other, atom
        side = side_of(atom, other, bonds, len(positions))
        low, high = np.log(config.lengths)
        factor = np.exp(rng.uniform(low, high))
        moved[side] += (factor - 1.0) * (moved[atom] - moved[other])
    return np.asarray(moved * rng.uniform(config.scale[0], config.scale[1]))


def _distances(positions: Array) -> Array:
    """Of all pairs [Å]; of atoms from themselves, none is near."""
    distance = np.linalg.norm(positions[:, None] - positions, axis=-1)
    return np.asarray(distance + 99.0 * np.eye(len(positions)))


def tear(
    positions: Array, numbers: NDArray[np.int64], config: SamplingConfig, rng: np.random.Generator
) -> Array | None:
    """A configuration with some bonds turned, some of another length, and all of it scaled.

    None if there is none in which atoms are far enough apart, or nothing that can be changed.

    Parameters
    ----------
    positions
        A molecule, or several, without a box [Å], shape ``(n_atoms, 3)``.
    numbers
        Atomic numbers, shape ``(n_atoms,)``.
    config
        `turned`, `torn`, `lengths` and `scale`.
    rng
        Draws them.
    """
    bonds = bonds_of(numbers, positions)
    radii = np.array(COVALENT_RADII)[numbers]
    sums = radii[:, None] + radii
    # what was near at the start, as atoms with a common neighbor, may be
    touching = np.minimum(TOUCHING * sums, 0.99 * _distances(positions))
    for _ in range(TRIES):
        moved = _change(positions, bonds, config, rng, touching)
        if moved is None or np.array_equal(moved, positions):
            continue
        if (_distances(moved) > CLOSEST * sums).all():
            return moved
    return None
