"""Hydrogens that are drawn from one atom to another while dynamics goes on.

Undisturbed dynamics hardly ever shows what a student must know of bonds that form and break; one
run in thousands meets it, and there the student is lost. A spring on the difference of two
distances, H to the atom that has it and H to the one that is to get it, shows it in each run.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from openmm_mlffd.elements import COVALENT_RADII
from openmm_mlffd.training.replicas import BOND, ForceField, Replicas

STIFFNESS = 30.0
"""Of the spring [eV/Å²]."""

REACH = 3.5
"""A hydrogen is drawn to atoms no farther than this at the start [Å]."""

BEYOND = 0.8
"""Difference of the distances at which the spring ends [Å]: the hydrogen has a new place."""

DRAWN = 0.6
"""Share of a run in which the spring moves; then it is taken off."""

LIKELY = {1: 0.0, 6: 1.0, 7: 4.0, 8: 4.0}
"""How often a hydrogen of, or place at, an element is chosen; others are 2."""

Array = NDArray[np.float64]


class Pull(NamedTuple):
    """One hydrogen on its way, as indices of atoms of all replicas."""

    donor: int
    hydrogen: int
    acceptor: int


class PulledForces:
    """A force field with springs that move; energies are without theirs.

    Parameters
    ----------
    forces
        The force field.

    Attributes
    ----------
    pulls
        Whose springs there are; to be chosen once atoms have places.
    """

    def __init__(self, forces: ForceField) -> None:
        self._forces = forces
        self.pulls: list[Pull] = []
        self._begin = self._target = np.zeros(0)
        self._stiffness = 0.0

    def start(self, pulls: Sequence[Pull], positions: Array) -> None:
        """Fix the springs to where atoms are now [Å], shape ``(n_atoms, 3)``."""
        self.pulls = list(pulls)
        self._begin = self._difference(positions)[0]
        self.move(0.0)

    def move(self, done: float) -> None:
        """Move the springs to where they are when this share of the run is over."""
        share = min(1.0, done / DRAWN)
        self._target = self._begin + share * (BEYOND - self._begin)
        self._stiffness = STIFFNESS if done < DRAWN else 0.0

    def _difference(self, positions: Array) -> tuple[Array, Array, Array]:
        """d(H, donor) - d(H, acceptor) of each, and the unit vectors from both to the hydrogen."""
        donor, hydrogen, acceptor = np.array(self.pulls, int).reshape(-1, 3).T
        from_donor = positions[hydrogen] - positions[donor]
        from_acceptor = positions[hydrogen] - positions[acceptor]
        lengths = [np.linalg.norm(v, axis=1) for v in (from_donor, from_acceptor)]
        return (
            lengths[0] - lengths[1], from_donor / lengths[0][:, None],
            from_acceptor / lengths[1][:, None],
        )  # fmt: skip

    def spring(self, positions: Array) -> tuple[Array, Array]:
        """Energy of each spring [eV], shape ``(n_pulls,)``, and forces [eV/Å] on all atoms."""
        difference, from_donor, from_acceptor = self._difference(positions)
        away = difference - self._target
        strength = -self._stiffness * away[:, None]
        force = np.zeros_like(positions)
        donor, hydrogen, acceptor = np.array(self.pulls, int).reshape(-1, 3).T
        np.add.at(force, hydrogen, strength * (from_donor - from_acceptor))
        np.add.at(force, donor, -strength * from_donor)
        np.add.at(force, acceptor, strength * from_acceptor)
        return 0.5 * self._stiffness * away**2, force

    def __call__(self, positions: Array, cell: Array | None) -> tuple[Array, Array]:
        """Energy of each atom [eV] and forces [eV/Å]."""
        energies, forces = self._forces(positions, cell)
        if self.pulls and self._stiffness:
            forces = forces + self.spring(positions)[1]
        return energies, forces


def choose_pulls(replicas: Replicas, share: float, rng: np.random.Generator) -> list[Pull]:
    """A hydrogen, and where it is to go, of a share of the molecules.

    Parameters
    ----------
    replicas
        At their start.
    share
        Of the molecules; boxes, and molecules without such a pair, have none.
    rng
        Chooses.
    """
    if replicas.cell is not None:
        return []
    drawn = rng.random(len(replicas)) < share
    found = []
    for i in np.flatnonzero(drawn).tolist():
        part = replicas.part(i)
        possible = _possible(replicas.numbers[part], replicas.local[part])
        if possible:
            weights = np.array([w for _, w in possible])
            chosen = possible[int(rng.choice(len(possible), p=weights / weights.sum()))][0]
            found.append(Pull(*(part.start + k for k in chosen)))
    return found


def _possible(numbers: NDArray[np.int64], positions: Array) -> list[tuple[Pull, float]]:
    """Hydrogens with one bond, and heavy atoms near them that they have no bond with."""
    distance = np.linalg.norm(positions[:, None] - positions, axis=-1)
    radii = np.array(COVALENT_RADII)[numbers]
    bonded = (distance < BOND * (radii[:, None] + radii)) & ~np.eye(len(numbers), dtype=bool)
    found = []
    for h in np.flatnonzero((numbers == 1) & (bonded.sum(1) == 1)).tolist():
        donor = int(np.flatnonzero(bonded[h])[0])
        near = (distance[h] < REACH) & ~bonded[h] & (numbers > 1)
        for acceptor in np.flatnonzero(near).tolist():
            weight = LIKELY.get(int(numbers[donor]), 2.0) * LIKELY.get(int(numbers[acceptor]), 2.0)
            if weight:
                found.append((Pull(donor, h, acceptor), weight))
    return found
