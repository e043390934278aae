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

TRIES = 20
"""Configurations with nearer atoms are drawn again so often; then the structure itself is given."""

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


def tear(
    positions: Array, numbers: NDArray[np.int64], config: SamplingConfig, rng: np.random.Generator
) -> Array:
    """A configuration with some bonds of another length, and all of it scaled.

    Parameters
    ----------
    positions
        A molecule, or several, without a box [Å], shape ``(n_atoms, 3)``.
    numbers
        Atomic numbers, shape ``(n_atoms,)``.
    config
        `torn`, `lengths` and `scale`.
    rng
        Draws them.
    """
    bonds = bonds_of(numbers, positions)
    radii = np.array(COVALENT_RADII)[numbers]
    nearest = CLOSEST * (radii[:, None] + radii)
    for _ in range(TRIES):
        moved = positions.copy()
        count = min(int(rng.choice(config.torn)), len(bonds))
        for which in rng.choice(len(bonds), count, replace=False) if count else ():
            ends = bonds[which] if rng.random() < 0.5 else bonds[which][::-1]
            side = side_of(*ends, bonds, len(numbers))
            factor = np.exp(rng.uniform(*np.log(config.lengths)))
            moved[side] += (factor - 1.0) * (moved[ends[0]] - moved[ends[1]])
        moved *= rng.uniform(*config.scale)
        distance = np.linalg.norm(moved[:, None] - moved, axis=-1)
        if (distance + 9.0 * np.eye(len(numbers)) > nearest).all():
            return moved
    return positions
