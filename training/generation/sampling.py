"""Configurations around a structure: Langevin dynamics, normal modes, random displacements."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from openmm_mlffd.training.generation.recipe import SamplingConfig
from openmm_mlffd.training.generation.tearing import tear
from openmm_mlffd.units import BOLTZMANN, FEMTOSECONDS_PER_TIME_UNIT

FRICTION = 0.02
"""Of the dynamics [1/fs]: strong, since it is to sample and not to show how atoms move."""

HOTTEST = 10.0
"""Dynamics whose kinetic energy passes that of so many times its temperature are given up."""

_STEP = 0.005  # of the finite differences of the normal modes [Å]
_LARGEST_MODE = 0.25  # standard deviation of an atom's displacement along one mode [Å]


class SamplingError(ValueError):
    """A structure that cannot be sampled; the message has the cause."""


class Forces(Protocol):
    """A force field at work on the same atoms again and again."""

    def __call__(self, positions: NDArray[np.float64]) -> NDArray[np.float64]:
        """Forces [eV/Å] at positions [Å], both of shape (n_atoms, 3)."""


class Sample(NamedTuple):
    """A configuration."""

    positions: NDArray[np.float64]
    """[Å], shape (n_atoms, 3)."""

    temperature: float
    """Of the sampler [K]."""


class Langevin:
    """Langevin dynamics by the splitting BAOAB (Leimkuhler and Matthews).

    Parameters
    ----------
    forces
        The force field.
    positions
        Start, best a minimum [Å], shape ``(n_atoms, 3)``.
    masses
        [amu], shape ``(n_atoms,)``.
    temperature
        [K].
    rng
        Of velocities and noise.
    timestep
        [fs].

    Notes
    -----
    Velocities start at twice the temperature: from a minimum, half of that goes into the
    potential energy.

    References
    ----------
    B. Leimkuhler, C. Matthews, Appl. Math. Res. Express 2013, 34; doi:10.1093/amrx/abs010.
    """

    def __init__(
        self,
        forces: Forces,
        positions: NDArray[np.float64],
        masses: NDArray[np.float64],
        *,
        temperature: float,
        rng: np.random.Generator,
        timestep: float,
    ) -> None:
        self.positions = positions.copy()
        self._forces, self._rng = forces, rng
        self._mass = masses[:, None]
        self._kt = BOLTZMANN * temperature
        self._step = timestep / FEMTOSECONDS_PER_TIME_UNIT
        self._keep = np.exp(-FRICTION * timestep)
        thermal = np.sqrt(self._kt / self._mass)
        self._noise = np.sqrt(1.0 - self._keep**2) * thermal
        self.velocities = np.sqrt(2.0) * thermal * rng.normal(size=positions.shape)
        self.force = forces(self.positions)

    def run(self, n_steps: int) -> None:
        """Move on by so many steps.

        Raises
        ------
        SamplingError
            If the dynamics blow up.
        """
        half = 0.5 * self._step
        for _ in range(n_steps):
            self.velocities += half * self.force / self._mass
            self.positions += half * self.velocities
            noise = self._noise * self._rng.normal(size=self.positions.shape)
            self.velocities = self._keep * self.velocities + noise
            self.positions += half * self.velocities
            self.force = self._forces(self.positions)
            self.velocities += half * self.force / self._mass
        kinetic = float((self._mass * self.velocities**2).mean())
        if not kinetic < HOTTEST * self._kt:
            raise SamplingError(f"the dynamics blew up: {kinetic / self._kt:.0f} times too hot")


def normal_modes(
    forces: Forces, positions: NDArray[np.float64], masses: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Curvatures and directions of the vibrations at a minimum, from central differences.

    Parameters
    ----------
    forces
        The force field.
    positions
        The minimum [Å], shape ``(n_atoms, 3)``.
    masses
        [amu], shape ``(n_atoms,)``.

    Returns
    -------
    tuple
        Squared angular frequencies [eV/Å^2/amu], shape ``(n_modes,)``, and displacements, of norm
        one when weighted with the masses [1/sqrt(amu)], shape ``(n_modes, n_atoms, 3)``. Without
        translation and rotation, which are the six softest.
    """
    n = positions.size
    hessian = np.zeros((n, n))
    for k in range(n):
        shift = np.zeros(positions.shape)
        shift.flat[k] = _STEP
        difference = forces(positions - shift) - forces(positions + shift)
        hessian[k] = difference.ravel() / (2.0 * _STEP)
    root = np.repeat(np.sqrt(masses), 3)
    values, vectors = np.linalg.eigh((0.5 * (hessian + hessian.T)) / np.outer(root, root))
    order = np.argsort(np.abs(values))[6:]
    modes = (vectors[:, order] / root[:, None]).T
    return values[order], modes.reshape(len(order), *positions.shape)


def sample_modes(
    values: NDArray[np.float64],
    modes: NDArray[np.float64],
    temperature: float,
    rng: np.random.Generator,
) -> NDArray[np.float64]:
    """A displacement of the atoms [Å] at a temperature, by independent harmonic vibrations.

    Soft modes, along which a straight line soon leaves the valley, move no atom by more than
    0.25 Å (standard deviation).
    """
    soft = BOLTZMANN * temperature / np.maximum(np.abs(values), 1e-12)
    largest = np.linalg.norm(modes, axis=2).max(1)
    width = np.minimum(np.sqrt(soft), _LARGEST_MODE / largest)
    return np.einsum("k,kij->ij", width * rng.normal(size=len(values)), modes)


def sample(
    forces: Forces,
    positions: NDArray[np.float64],
    numbers: NDArray[np.int64],
    masses: NDArray[np.float64],
    config: SamplingConfig,
    rng: np.random.Generator,
) -> Iterator[Sample]:
    """Configurations around a minimum, by what the configuration asks for.

    Configurations in which the force field has a force above `max_force` are left out.
    """
    temperature = float(rng.choice(config.temperatures))
    if config.method == "none":
        yield Sample(positions, np.nan)
        return
    if config.method == "rattle":
        for _ in range(config.frames):
            yield Sample(positions, np.nan)
        return
    if config.method == "torn":
        torn = [tear(positions, numbers, config, rng) for _ in range(config.frames)]
        changed = [Sample(x, np.nan) for x in torn if x is not None]
        if not changed:
            raise SamplingError("nothing of it can be torn, turned or scaled as it is asked for")
        yield from changed
        return
    if config.method == "modes":
        values, modes = normal_modes(forces, positions, masses)
        for _ in range(config.frames):
            moved = positions + sample_modes(values, modes, temperature, rng)
            if _largest(forces(moved)) < config.max_force:
                yield Sample(moved, temperature)
        return
    dynamics = Langevin(
        forces, positions, masses, temperature=temperature, rng=rng, timestep=config.timestep
    )
    dynamics.run(config.equilibration)
    for _ in range(config.frames):
        dynamics.run(config.interval)
        if _largest(dynamics.force) < config.max_force:
            yield Sample(dynamics.positions.copy(), temperature)


def rattle(
    positions: NDArray[np.float64], widths: list[float], rng: np.random.Generator
) -> NDArray[np.float64]:
    """Positions with normal random displacements of one of these widths [Å]."""
    width = float(rng.choice(widths))
    return positions + width * rng.normal(size=positions.shape) if width else positions


def _largest(forces: NDArray[np.float64]) -> float:
    return float(np.linalg.norm(forces, axis=1).max())
