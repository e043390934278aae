"""Langevin dynamics of many systems in one evaluation: replicas too far apart to feel one another.

A student sees no further than its cutoff, so that molecules on a wide grid are molecules alone,
and a step of twenty of them costs what a step of one large molecule does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from openmm_mlffd.elements import COVALENT_RADII, MASSES, SYMBOLS
from openmm_mlffd.evaluator import Evaluator
from openmm_mlffd.graph import build_graph
from openmm_mlffd.units import BOLTZMANN, FEMTOSECONDS_PER_TIME_UNIT

FRICTION = 5.0
"""Of the Langevin thermostat [1/ps]."""

BOND = 1.25
"""Atoms nearer than this multiple of the sum of their covalent radii at the start are bonded."""

FASTEST = 0.5
"""An atom that moves further in one step [Å] has left all that is physical."""

FLOWN = "atoms fly apart"
"""Why a replica fails of which an atom comes near to others."""

_MOST_PAIRS = 2_000_000  # of atoms, up to which all are looked at

_MARGIN = 15.0  # Å by which the radius of a molecule may grow

Array = NDArray[np.float64]


class Replica(NamedTuple):
    """One system at its start."""

    numbers: NDArray[np.int64]
    """Atomic numbers, shape (n_atoms,)."""

    positions: Array
    """[Å], shape (n_atoms, 3)."""

    temperature: float
    """[K]."""

    cell: Array | None = None
    """Box vectors as rows [Å], shape (3, 3); None for no box."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What counts as the end of a replica."""

    closest: float = 0.55
    """Two atoms nearer than this share of the sum of their covalent radii."""

    stretched: float = 1.5
    """A bond longer than this multiple of its length at the start."""

    energy: float = 0.25
    """Potential energy that differs from that of the start by more than this [eV/atom]."""


class ForceField(Protocol):
    """Energies and forces of all replicas at once."""

    def __call__(self, positions: Array, cell: Array | None) -> tuple[Array, Array]:
        """Energy of each atom [eV], shape (n,), and forces [eV/Å], shape (n, 3)."""


class EvaluatorForces:
    """The forces of an evaluator, for `Replicas`."""

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator

    def __call__(self, positions: Array, cell: Array | None) -> tuple[Array, Array]:
        """Energy of each atom [eV] and forces [eV/Å]."""
        found = self._evaluator.predict(positions, cell, virial=False)
        return (
            found.atom_energies.detach().cpu().numpy().astype(np.float64),
            found.forces.detach().cpu().numpy().astype(np.float64),
        )


class Replicas:
    """Several systems that move at the same time, each with its own temperature.

    Parameters
    ----------
    replicas
        Molecules without a box, or one system with a box.
    forces
        Of the atoms of all replicas, one after the other.
    cutoff
        How far the force field sees [Å].
    rng
        Of velocities and noise.
    timestep
        [fs].
    friction
        Of the thermostat [1/ps].

    Raises
    ------
    ValueError
        If there are none, or a box among several.

    Notes
    -----
    BAOAB (Leimkuhler and Matthews, doi:10.1093/amrx/abs010) without the motion of each center of
    mass. A replica that is stopped stands at its start from then on, and the others go on.
    """

    def __init__(
        self,
        replicas: Sequence[Replica],
        forces: ForceField,
        *,
        cutoff: float,
        rng: np.random.Generator,
        timestep: float = 0.5,
        friction: float = FRICTION,
    ) -> None:
        if not replicas or (len(replicas) > 1 and any(r.cell is not None for r in replicas)):
            raise ValueError("several molecules without a box are needed, or one system with one")
        count = [len(r.numbers) for r in replicas]
        self.offsets = np.concatenate([[0], np.cumsum(count)])
        self.system = np.repeat(np.arange(len(replicas)), count)
        self.numbers = np.concatenate([r.numbers for r in replicas]).astype(np.int64)
        self.cell = replicas[0].cell
        self.steps = 0
        self.moving = np.ones(len(replicas), bool)
        self._forces, self._rng = forces, rng
        self._step = timestep / FEMTOSECONDS_PER_TIME_UNIT
        self._keep = float(np.exp(-1e-3 * friction * timestep))
        self._mass = np.array(MASSES)[self.numbers][:, None]
        self._total = np.add.reduceat(self._mass, self.offsets[:-1])
        kt = BOLTZMANN * np.array([r.temperature for r in replicas])[self.system, None]
        self._thermal = np.sqrt(kt / self._mass)
        self.origin, self._reach = _grid(replicas, cutoff)
        self.start = np.concatenate([r.positions for r in replicas]) - self._center(
            np.concatenate([r.positions for r in replicas])
        )
        if self.cell is not None:
            self.start = np.array(replicas[0].positions, np.float64)
        self.positions = self.start + self.origin[self.system]
        self.velocities = self._without_drift(self._thermal * rng.standard_normal(self.start.shape))
        self.energies, self.force = forces(self.positions, self.cell)

    def __len__(self) -> int:
        return len(self.moving)

    def _center(self, values: Array) -> Array:
        """Mean of a value of the atoms, weighted with their masses, for each atom."""
        means = np.add.reduceat(self._mass * values, self.offsets[:-1]) / self._total
        return np.asarray(means[self.system])

    def _without_drift(self, velocities: Array) -> Array:
        free = velocities - self._center(velocities)
        return free if self.moving.all() else self._masked(free)

    def _masked(self, values: Array) -> Array:
        """Zero for what stands still."""
        return np.where(self.moving[self.system, None], values, 0.0)

    @property
    def local(self) -> Array:
        """Positions about the center of each replica's place in the grid [Å], shape (n, 3)."""
        return np.asarray(self.positions - self.origin[self.system])

    def part(self, which: int) -> slice:
        """The atoms of a replica."""
        return slice(int(self.offsets[which]), int(self.offsets[which + 1]))

    def run(self, n_steps: int) -> dict[int, str]:
        """Move on by so many steps.

        Returns
        -------
        dict
            Replicas that lost all sense meanwhile and were stopped, and why.
        """
        half = 0.5 * self._step
        failed: dict[int, str] = {}
        noise = np.sqrt(1.0 - self._keep**2) * self._thermal
        kick = half / self._mass
        for _ in range(n_steps):
            v = self.velocities + kick * self.force
            x = self.positions + half * v
            v = self._keep * v + noise * self._rng.standard_normal(v.shape)
            v = self._without_drift(v)
            x += half * v
            if wrong := self._too_fast(v):
                failed |= wrong
                still = ~self.moving[self.system]
                v[still] = 0.0
                x[still] = (self.start + self.origin[self.system])[still]
            self.positions = x
            self.energies, force = self._forces(x, self.cell)
            self.force = force if self.moving.all() else self._masked(force)
            self.velocities = v + kick * self.force
            self.steps += 1
        return failed

    def _too_fast(self, velocities: Array) -> dict[int, str]:
        if max(velocities.max(), -velocities.min()) * self._step < FASTEST:  # not if one is NaN
            return {}
        speed = np.abs(velocities).max(1) * self._step
        bad = ~(speed < FASTEST)
        if not bad.any():
            return {}
        found = np.unique(self.system[bad])
        self.moving[found] = False
        return {int(i): f"an atom moved by more than {FASTEST:g} Å in a step" for i in found}

    def stop(self, which: int) -> None:
        """Put a replica back to its start and let it stand there."""
        atoms = self.part(which)
        self.moving[which] = False
        self.positions[atoms] = self.start[atoms] + self.origin[which]
        self.velocities[atoms] = self.force[atoms] = 0.0

    def energy(self) -> Array:
        """Potential energy of each replica [eV]."""
        return np.asarray(np.add.reduceat(self.energies, self.offsets[:-1]))

    def kinetic_temperature(self) -> Array:
        """Of each replica, without the motion of its center [K]."""
        twice = np.add.reduceat((self._mass * self.velocities**2).sum(1), self.offsets[:-1])
        dof = np.maximum(3 * np.diff(self.offsets) - 3, 1)
        return np.asarray(twice / (dof * BOLTZMANN))

    def has_flown_apart(self) -> NDArray[np.bool_]:
        """Whether an atom of a replica is on its way to another replica."""
        if self.cell is not None:
            return np.zeros(len(self), bool)
        far = np.linalg.norm(self.local, axis=1) > self._reach
        return np.asarray(np.logical_or.reduceat(far, self.offsets[:-1]))

    def state(self) -> dict[str, Any]:
        """All that the rest of the run depends on but the random numbers, as arrays."""
        return {
            "positions": self.positions, "velocities": self.velocities,
            "moving": self.moving, "steps": np.array(self.steps),
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any], rng: np.random.Generator) -> None:
        """Go on from a state, with new random numbers."""
        self.positions, self.velocities = state["positions"].copy(), state["velocities"].copy()
        self.moving, self.steps, self._rng = state["moving"].copy(), int(state["steps"]), rng
        self.energies, self.force = self._forces(self.positions, self.cell)


def _grid(replicas: Sequence[Replica], cutoff: float) -> tuple[Array, float]:
    """Place of each replica, and how far its atoms may be from there [Å]."""
    if replicas[0].cell is not None:
        return np.zeros((1, 3)), np.inf
    radius = max(
        float(np.linalg.norm(r.positions - r.positions.mean(0), axis=1).max()) for r in replicas
    )
    reach = radius + max(_MARGIN, radius)
    edge = int(np.ceil(len(replicas) ** (1 / 3) - 1e-9))
    points = np.stack(np.meshgrid(*[np.arange(edge)] * 3, indexing="ij"), -1).reshape(-1, 3)
    return (2.0 * reach + 2.0 * cutoff) * points[: len(replicas)].astype(float), reach


class Guard:
    """Looks whether replicas are still molecules.

    Parameters
    ----------
    replicas
        At their start, whose bonds and energies are what they are measured by.
    limits
        What counts as a failure.
    free
        Atoms whose bonds may break.
    """

    def __init__(self, replicas: Replicas, limits: Failure, free: Sequence[int] = ()) -> None:
        self.replicas, self.limits = replicas, limits
        self._radii = np.array(COVALENT_RADII)[replicas.numbers]
        first, second, shift, length = self._pairs(BOND)
        once = (first < second) | ((first == second) & (shift > 0).any(1))
        once &= ~(np.isin(first, free) | np.isin(second, free))
        self.first, self.second = first[once], second[once]
        self._shift = np.zeros((int(once.sum()), 3)) if replicas.cell is None else shift[once]
        self.length = length[once]
        self._energy = replicas.energy()
        self._size = np.diff(replicas.offsets)
        self._all = self._all_pairs()

    def _pairs(self, share: float) -> tuple[NDArray[np.int64], NDArray[np.int64], Array, Array]:
        """Pairs nearer than a share of the sum of their radii, both ways; shift and distance."""
        r = self.replicas
        graph = build_graph(
            torch.from_numpy(r.local), torch.from_numpy(r.numbers),
            cutoff=share * 2.0 * float(self._radii.max()),
            cell=None if r.cell is None else torch.from_numpy(np.asarray(r.cell, np.float64)),
            system=torch.from_numpy(r.system),
        )  # fmt: skip
        first, second = graph.edge_index.numpy()
        shift = graph.edge_shift.numpy()
        distance = np.linalg.norm(self._vectors(first, second, shift), axis=1)
        near = distance < share * (self._radii[first] + self._radii[second])
        return first[near], second[near], shift[near], distance[near]

    def _all_pairs(self) -> tuple[NDArray[np.int64], NDArray[np.int64], Array] | None:
        """All pairs within molecules and how near they may come, if they are few enough."""
        offsets = self.replicas.offsets
        if self.replicas.cell is not None or (self._size**2).sum() > _MOST_PAIRS:
            return None
        parts = [np.stack(np.triu_indices(n, 1)) + first
                 for n, first in zip(self._size, offsets, strict=False)]  # fmt: skip
        first, second = np.concatenate(parts, 1)
        nearest = self.limits.closest * (self._radii[first] + self._radii[second])
        return first, second, nearest**2

    def _clashes(self) -> tuple[NDArray[np.int64], NDArray[np.int64], Array]:
        """Pairs of atoms that are too near, and their distances."""
        if self._all is None:
            first, second, _, distance = self._pairs(self.limits.closest)
            return first, second, distance
        first, second, nearest = self._all
        x = self.replicas.positions
        square = np.zeros(len(first))
        for k in range(3):
            column = np.ascontiguousarray(x[:, k])
            square += np.square(column[second] - column[first])
        near = square < nearest
        return first[near], second[near], np.sqrt(square[near])

    def _vectors(self, first: NDArray[Any], second: NDArray[Any], shift: Array) -> Array:
        x = self.replicas.local
        images = 0.0 if self.replicas.cell is None else shift @ self.replicas.cell
        return np.asarray(x[second] - x[first] + images)

    def stretch(self) -> Array:
        """Length of each bond over its length at the start, shape ``(n_bonds,)``."""
        vectors = self._vectors(self.first, self.second, self._shift)
        return np.asarray(np.linalg.norm(vectors, axis=1) / self.length)

    def longest(self) -> tuple[Array, NDArray[np.int64]]:
        """Largest stretch in each replica, and the index of that bond (-1 if it has no bonds)."""
        stretch, n = self.stretch(), len(self.replicas)
        largest, which = np.zeros(n), np.full(n, -1)
        order = np.argsort(stretch, kind="stable")
        system = self.replicas.system[self.first[order]]
        largest[system], which[system] = stretch[order], order  # the last of each counts
        return largest, which

    def look(self) -> dict[int, str]:
        """Why replicas that still move have failed; those that have not are left out."""
        replicas, limits = self.replicas, self.limits
        found: dict[int, str] = {}
        change = (replicas.energy() - self._energy) / self._size
        stretch, which = self.longest()
        first, second, distance = self._clashes()
        close = np.unique(replicas.system[first])
        flown = replicas.has_flown_apart()
        for i in np.flatnonzero(replicas.moving).tolist():
            if not np.isfinite(change[i]):
                found[i] = "the energy is not finite"
            elif i in close:
                pair = int(np.flatnonzero(replicas.system[first] == i)[0])
                names = self._names(first[pair], second[pair])
                found[i] = f"{names} are {distance[pair]:.2f} Å apart"
            elif stretch[i] > limits.stretched:
                bond = which[i]
                names = self._names(self.first[bond], self.second[bond])
                found[i] = f"the bond of {names} is {stretch[i]:.2f} times as long as at the start"
            elif abs(change[i]) > limits.energy:
                found[i] = f"the energy changed by {change[i]:.2f} eV/atom"
            elif flown[i]:
                found[i] = FLOWN
        return found

    def _names(self, *atoms: Any) -> str:
        numbers, offset = self.replicas.numbers, self.replicas.offsets
        return " and ".join(
            f"{SYMBOLS[numbers[a]]}{int(a - offset[self.replicas.system[a]])}" for a in atoms
        )
