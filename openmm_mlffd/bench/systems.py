"""Structures to measure on: water of any size at liquid density."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from openmm_mlffd.evaluator import Evaluator

_VOLUME = 29.9  # Å³ of a water molecule at 300 K and 1 bar
_OH, _ANGLE = 0.96, math.radians(104.5)
_LARGEST_MOVE = 0.1  # Å, of an atom in one step of `relaxed`


class Structure(NamedTuple):
    """Atoms at a place."""

    numbers: NDArray[np.int64]
    """Atomic numbers, shape (n_atoms,)."""

    positions: NDArray[np.float64]
    """Positions [Å], shape (n_atoms, 3)."""

    cell: NDArray[np.float64] | None = None
    """Box vectors as rows [Å], shape (3, 3); None for no box."""


def water(n_atoms: int, *, seed: int = 0) -> Structure:
    """Water molecules on a lattice, turned at random, in a periodic box of liquid density.

    Parameters
    ----------
    n_atoms
        How many atoms, rounded to whole molecules.
    seed
        Of the random orientations.

    Raises
    ------
    ValueError
        If that is less than a molecule.
    """
    n = round(n_atoms / 3)
    if n < 1:
        raise ValueError(f"{n_atoms} atoms are less than a water molecule")
    m = int((n + 0.5) ** (1 / 3))
    shapes = [(m, m, m), (m, m, m + 1), (m, m + 1, m + 1), (m + 1, m + 1, m + 1)]
    shape = np.array(next(s for s in shapes if math.prod(s) >= n))
    spacing = (n * _VOLUME / math.prod(shape)) ** (1 / 3)
    rng = np.random.default_rng(seed)
    points = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1).reshape(-1, 3)
    # what is left over is taken out everywhere, not at an end
    points = points[np.sort(rng.permutation(len(points))[:n])]
    molecule = _OH * np.array(
        [[0, 0, 0], [1, 0, 0], [math.cos(_ANGLE), math.sin(_ANGLE), 0]], dtype=np.float64
    )
    q = rng.normal(size=(n, 4))
    positions = points[:, None] * spacing + _turned(
        molecule, q / np.linalg.norm(q, axis=1)[:, None]
    )
    return Structure(
        np.tile(np.array([8, 1, 1]), n), positions.reshape(-1, 3), np.diag(shape * spacing)
    )


def _turned(vectors: NDArray[np.float64], q: NDArray[np.float64]) -> NDArray[np.float64]:
    """Vectors (k, 3) turned by each of the unit quaternions (n, 4): (n, k, 3)."""
    w, u = q[:, None, :1], q[:, None, 1:]
    t = 2.0 * np.cross(u, vectors[None])
    return vectors[None] + w * t + np.cross(u, t)


def relaxed(
    evaluator: Evaluator, positions: ArrayLike, cell: ArrayLike | None, *, n_steps: int = 60
) -> NDArray[np.float64]:
    """Positions [Å] after steps along the forces, so that a simulation can start."""
    x = np.array(positions, dtype=np.float64)
    length, last = 0.02, math.inf
    for _ in range(n_steps):
        found = evaluator.predict(x, cell, virial=False)
        forces = found.forces.cpu().numpy()
        energy = found.energy.item()
        length = min(0.05, 1.2 * length) if energy < last else 0.5 * length
        last = energy
        move = length * forces
        sizes = np.linalg.norm(move, axis=1, keepdims=True)
        x += move * np.minimum(1.0, _LARGEST_MOVE / np.maximum(sizes, 1e-12))
    return x
