"""Molecules and waters put into contact."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rdkit import Chem
from rdkit.Geometry import Point3D

from openmm_mlffd.elements import COVALENT_RADII
from openmm_mlffd.training.generation.molecules import numbers_of

WATER = "O"
_RADII = np.array(COVALENT_RADII)
_FAR = 60.0  # where molecules come from [Å]
_STRIDE = 0.1  # of the search for the contact [Å]


def random_rotation(rng: np.random.Generator) -> NDArray[np.float64]:
    """A rotation matrix, uniformly distributed, shape ``(3, 3)``."""
    q, r = np.linalg.qr(rng.normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    return q * np.sign(np.linalg.det(q))


def contact(
    fixed: tuple[NDArray[np.float64], NDArray[np.float64]],
    moving: tuple[NDArray[np.float64], NDArray[np.float64]],
    direction: NDArray[np.float64],
    gap: float,
) -> float:
    """How far along a direction a molecule touches what is there.

    Parameters
    ----------
    fixed, moving
        Positions around the origin [Å], shape ``(n, 3)``, and radii [Å], shape ``(n,)``.
    direction
        Of norm one, shape ``(3,)``.
    gap
        Between the surfaces of the nearest atoms [Å].

    Returns
    -------
    float
        Smallest shift [Å], in steps of 0.1 Å, from which on no two atoms are nearer.
    """
    (x, r), (y, s) = fixed, moving
    difference = (y[None] - x[:, None]).reshape(-1, 3)
    wanted = (r[:, None] + s[None] + gap).ravel()
    # |difference + t direction| = wanted has its larger root where the pair parts
    along = difference @ direction
    across = (difference**2).sum(1) - along**2
    room = wanted**2 - across
    roots = np.where(room > 0, -along + np.sqrt(np.maximum(room, 0.0)), 0.0)
    return float(np.ceil(max(roots.max(), 0.0) / _STRIDE) * _STRIDE)


def assemble(
    molecules: Sequence[Any], gap: Sequence[float], rng: np.random.Generator
) -> NDArray[np.float64]:
    """Positions of molecules in contact, each put next to those before it.

    Parameters
    ----------
    molecules
        With conformers.
    gap
        Range of the distance between surfaces [Å].
    rng
        Of orientations and distances.

    Returns
    -------
    numpy.ndarray
        Positions of all atoms [Å], shape ``(n_atoms, 3)``.
    """
    positions = np.zeros((0, 3))
    radii = np.zeros(0)
    for molecule in molecules:
        own = np.array(molecule.GetConformer().GetPositions())
        own = (own - own.mean(0)) @ random_rotation(rng).T
        size = _RADII[numbers_of(molecule)]
        if len(positions):
            direction = rng.normal(size=3)
            direction /= np.linalg.norm(direction)
            # towards a random atom, so that the cluster grows round
            aim = positions[rng.integers(len(positions))]
            fixed = (positions - aim, radii)
            shift = contact(fixed, (own, size), direction, float(rng.uniform(gap[0], gap[1])))
            own = own + aim + shift * direction
        positions = np.concatenate([positions, own])
        radii = np.concatenate([radii, size])
    return positions - positions.mean(0)


def combine(molecules: Sequence[Any], positions: NDArray[np.float64]) -> Any:
    """One RDKit molecule of several, with these positions."""
    whole = Chem.Mol()
    for molecule in molecules:
        whole = Chem.CombineMols(whole, molecule)
    Chem.SanitizeMol(whole)
    whole.RemoveAllConformers()
    conformer = Chem.Conformer(whole.GetNumAtoms())
    for i, (x, y, z) in enumerate(positions.tolist()):
        conformer.SetAtomPosition(i, Point3D(x, y, z))
    whole.AddConformer(conformer)
    return whole
