"""Is energy conserved? Constant-energy runs of any OpenMM System, and what they say."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import openmm
from numpy.typing import NDArray
from openmm import unit

from openmm_mlffd.units import KJ_PER_MOL_PER_EV
from openmm_mlffd.validation.conservation import (
    DRIFT_OVER_KINETIC_STD,
    HALVING_RATIO,
    SLOPE_ERRORS,
    SLOPE_KT,
    SLOPE_KT_DURATION,
    Check,
    Conservation,
    EnergyTrace,
    conservation,
    halving_ratio,
)

Progress = Callable[[int, int], None]
"""Told the steps done and the steps to do."""


@dataclass(frozen=True, kw_only=True)
class NVEResult:
    """Constant-energy runs from one start, over the same time, with several time steps."""

    traces: list[EnergyTrace]
    """One for each time step, the smallest first."""

    runs: list[Conservation]
    """What each trace says."""

    halving_ratios: list[float]
    """Of each time step and the next larger one; see `halving_ratio`."""

    @property
    def checks(self) -> list[Check]:
        """The marks that the runs should pass; drift counts for the smallest time step only."""
        checks = []
        for (fine, coarse), ratio in zip(pairwise(self.runs), self.halving_ratios, strict=True):
            low, high = HALVING_RATIO
            name = (
                f"rms(E) ratio for a halved time step, {coarse.timestep:g} to {fine.timestep:g} fs"
            )
            checks.append(Check(name=name, value=ratio, unit="", low=low, high=high))
        finest = self.runs[0]
        where = f"at {finest.timestep:g} fs over {finest.duration:g} ps"
        if finest.duration < SLOPE_KT_DURATION:
            checks.append(
                Check(
                    name=f"drift / std(kinetic energy) {where}",
                    value=finest.drift_over_kinetic_std,
                    unit="",
                    high=DRIFT_OVER_KINETIC_STD,
                )
            )
        else:  # a drift that may be seen in a long run is one of its time
            checks.append(
                Check(
                    name=f"size of the slope {where}",
                    value=abs(finest.slope_kt),
                    unit="kT/ns/dof",
                    high=SLOPE_KT + SLOPE_ERRORS * finest.slope_kt_error,
                )
            )
        return checks

    @property
    def passed(self) -> bool:
        """Whether all checks are passed."""
        return all(check.passed for check in self.checks)


def velocity_verlet(timestep: float) -> openmm.CustomIntegrator:
    """Make a velocity-Verlet integrator that knows the energies of each step.

    Its global variables ``potential`` and ``kinetic`` [kJ/mol] belong to the same time, that of
    the positions; OpenMM's `VerletIntegrator` is a leapfrog, whose velocities are half a step
    away. ``shadow`` is the shadow energy one step earlier, see `EnergyTrace.shadow`; it is right
    from the second step on, without constraints. The context is never updated: thermostats,
    barostats and the removal of the center of mass motion that a System may hold stay out of
    the run.

    Parameters
    ----------
    timestep
        [fs].
    """
    integrator = openmm.CustomIntegrator(timestep * unit.femtosecond)
    for name in ("potential", "kinetic", "shadow", "square", "v0", "v1", "k1", "s1"):
        integrator.addGlobalVariable(name, 0)
    integrator.addPerDofVariable("x1", 0)
    # v0, v1: potential energy two steps and one step back; k1, s1: kinetic and square one back
    integrator.addComputeGlobal("v0", "v1")
    integrator.addComputeGlobal("v1", "potential")
    integrator.addComputeGlobal("k1", "kinetic")
    integrator.addComputeGlobal("s1", "square")
    integrator.addComputePerDof("v", "v + 0.5*dt*f/m")
    integrator.addComputePerDof("x", "x + dt*v")
    integrator.addComputePerDof("x1", "x")
    integrator.addConstrainPositions()
    integrator.addComputePerDof("v", "v + 0.5*dt*f/m + (x-x1)/dt")
    integrator.addConstrainVelocities()
    integrator.addComputeGlobal("potential", "energy")
    integrator.addComputeSum("kinetic", "0.5*m*v*v")
    integrator.addComputeSum("square", "f*f/m")
    integrator.addComputeGlobal("shadow", "v1 + k1 + (potential - 2*v1 + v0)/12 + dt*dt*s1/24")
    return integrator


def degrees_of_freedom(system: openmm.System) -> int:
    """Three for each particle with a mass, less constraints and, if it is removed, the drift.

    The convention of OpenMM's `StateDataReporter`.
    """
    massive = [system.getParticleMass(i) > 0 * unit.dalton for i in range(system.getNumParticles())]
    count = 3 * sum(massive)
    for i in range(system.getNumConstraints()):
        first, second, _ = system.getConstraintParameters(i)
        count -= massive[first] or massive[second]
    if any(isinstance(force, openmm.CMMotionRemover) for force in system.getForces()):
        count -= 3
    return count


def equilibrate(
    system: openmm.System,
    positions: Any,
    *,
    temperature: float = 300.0,
    picoseconds: float = 1.0,
    timestep: float = 1.0,
    seed: int = 1,
    platform: str | None = None,
    progress: Progress | None = None,
) -> openmm.State:
    """Minimise, then bring to a temperature by Langevin dynamics.

    Parameters
    ----------
    system
        The System; not changed.
    positions
        Where to start; anything that OpenMM takes.
    temperature
        [K].
    picoseconds
        Length of the dynamics [ps]; friction 5/ps.
    timestep
        [fs].
    seed
        Of the velocities and of the noise; OpenMM takes 0 for a seed that always differs.
    platform
        As for `run_nve`.
    progress
        Told how far it is.

    Returns
    -------
    openmm.State
        Positions, velocities and box.
    """
    integrator = openmm.LangevinMiddleIntegrator(
        temperature * unit.kelvin, 5 / unit.picosecond, timestep * unit.femtosecond
    )
    integrator.setRandomNumberSeed(seed)
    context = make_context(system, integrator, platform)
    context.setPositions(positions)
    openmm.LocalEnergyMinimizer.minimize(context, maxIterations=200)
    context.setVelocitiesToTemperature(temperature * unit.kelvin, seed)
    for _ in _steps(integrator, _count(picoseconds, timestep), 50, progress):
        pass
    return context.getState(positions=True, velocities=True)


def run_nve(
    system: openmm.System,
    start: openmm.State,
    *,
    timestep: float = 0.5,
    picoseconds: float = 2.0,
    sample: float = 1.0,
    platform: str | None = None,
    progress: Progress | None = None,
) -> EnergyTrace:
    """Run at constant energy and record the energies.

    Parameters
    ----------
    system
        The System; not changed.
    start
        Positions, velocities and box, as `equilibrate` gives them.
    timestep
        [fs].
    picoseconds
        Length [ps].
    sample
        Time between samples [fs]; at least one step.
    platform
        Name of an OpenMM platform; None for OpenMM's choice. Platforms that have a choice of
        precision run in double. The CPU platform computes OpenMM's own forces in single
        precision; name "Reference" to validate those.
    progress
        Told how far it is.

    Returns
    -------
    EnergyTrace
        Energies in double precision, each pair of one time.

    Raises
    ------
    ValueError
        If the run is shorter than a sample.
    openmm.OpenMMException
        If the run explodes.
    """
    run = ConstantEnergy(system, start, timestep=timestep, sample=sample, platform=platform)
    return run.go_on(picoseconds, progress)[0]


class ConstantEnergy:
    """A run at constant energy that goes on in one Context; arguments as for `run_nve`.

    From a State that `go_on` gave, another instance follows the trajectory of one long run to
    rounding; only the shadow energy of its first three steps is not known.
    """

    def __init__(
        self,
        system: openmm.System,
        start: openmm.State,
        *,
        timestep: float = 0.5,
        sample: float = 1.0,
        platform: str | None = None,
    ) -> None:
        self._system, self._timestep = system, timestep
        self._every = max(1, round(sample / timestep))
        self._integrator = velocity_verlet(timestep)
        self._context = make_context(system, self._integrator, platform)
        _set_start(self._context, start)
        self._last: list[float] | None = None

    def go_on(
        self, picoseconds: float, progress: Progress | None = None
    ) -> tuple[EnergyTrace, openmm.State]:
        """The next picoseconds: their energies, from the last sample on, and the State at the end.

        Raises
        ------
        ValueError
            If they are shorter than a sample.
        openmm.OpenMMException
            If the run explodes.
        """
        every, integrator = self._every, self._integrator
        n_steps = _count(picoseconds, self._timestep) // every * every
        if n_steps == 0:
            raise ValueError(
                f"a run of {picoseconds} ps has no sample; sample every "
                f"{every * self._timestep:g} fs or less"
            )
        names = ("potential", "kinetic", "shadow")
        begins = self._last is None
        energies = [self._first() if self._last is None else self._last]
        began = time.perf_counter()
        energies.extend(
            [integrator.getGlobalVariableByName(name) for name in names]
            for _ in _steps(integrator, n_steps, every, progress)
        )
        seconds = time.perf_counter() - began
        self._last = energies[-1]
        state = self._context.getState(positions=True, velocities=True)
        potential, kinetic, shadow = np.array(energies).T / KJ_PER_MOL_PER_EV
        if begins:
            shadow[: math.ceil(3 / every)] = math.nan  # it looks two steps back
        if self._system.getNumConstraints():
            shadow[:] = math.nan
        particles = range(self._system.getNumParticles())
        trace = EnergyTrace(
            timestep=self._timestep,
            time=np.arange(len(energies), dtype=np.float64) * (every * self._timestep * 1e-3),
            potential=potential,
            kinetic=kinetic,
            shadow=shadow,
            n_atoms=sum(self._system.getParticleMass(i) > 0 * unit.dalton for i in particles),
            n_dof=degrees_of_freedom(self._system),
            end=_nanometers(state),
            seconds_per_step=seconds / n_steps,
        )
        return trace, state

    def _first(self) -> list[float]:
        """Energies of the start [kJ/mol]; the shadow energy is not known."""
        state = self._context.getState(energy=True)
        known = (state.getPotentialEnergy(), state.getKineticEnergy())
        return [*(e.value_in_unit(unit.kilojoule_per_mole) for e in known), math.nan]


def measure_nve(
    system: openmm.System,
    start: openmm.State,
    *,
    timesteps: Sequence[float] = (0.5, 1.0),
    picoseconds: float = 2.0,
    temperature: float = 300.0,
    platform: str | None = None,
    progress: Progress | None = None,
) -> NVEResult:
    """Run at constant energy from one start with several time steps.

    Parameters
    ----------
    system
        The System; not changed.
    start
        Positions, velocities and box, as `equilibrate` gives them.
    timesteps
        [fs], in any order.
    picoseconds
        Length of each run [ps].
    temperature
        Of the kT in kT/ns/dof [K].
    platform
        As for `run_nve`.
    progress
        Told how far all runs together are.

    Returns
    -------
    NVEResult
        All runs are sampled at the same times.
    """
    ordered = sorted(set(timesteps))
    traces, done_before = [], 0
    total = sum(_count(picoseconds, timestep) for timestep in ordered)
    for timestep in ordered:

        def tell(done: int, _: int, before: int = done_before) -> None:
            if progress is not None:
                progress(before + done, total)

        traces.append(
            run_nve(
                system,
                start,
                timestep=timestep,
                picoseconds=picoseconds,
                sample=ordered[-1],
                platform=platform,
                progress=tell,
            )
        )
        done_before += _count(picoseconds, timestep)
    return NVEResult(
        traces=traces,
        runs=[conservation(trace, temperature) for trace in traces],
        halving_ratios=[halving_ratio(fine, coarse) for fine, coarse in pairwise(traces)],
    )


def time_reversal_error(
    system: openmm.System,
    start: openmm.State,
    *,
    timestep: float = 0.5,
    steps: int = 200,
    platform: str | None = None,
) -> float:
    """How far atoms end from where they began after so many steps and as many back [nm].

    Parameters
    ----------
    system
        The System; not changed.
    start
        Positions, velocities and box.
    timestep
        [fs].
    steps
        Steps until the velocities are turned round.
    platform
        As for `run_nve`.
    """
    integrator = velocity_verlet(timestep)
    context = make_context(system, integrator, platform)
    _set_start(context, start)
    integrator.step(steps)
    context.setVelocities(-context.getState(velocities=True).getVelocities(asNumpy=True))
    integrator.step(steps)
    difference = _nanometers(context.getState(positions=True)) - _nanometers(start)
    return float(np.linalg.norm(difference, axis=1).max())


def _nanometers(state: openmm.State) -> NDArray[np.float64]:
    return np.array(state.getPositions(asNumpy=True).value_in_unit(unit.nanometer))


def _set_start(context: openmm.Context, start: openmm.State) -> None:
    context.setPeriodicBoxVectors(*start.getPeriodicBoxVectors())
    context.setPositions(start.getPositions())
    context.setVelocities(start.getVelocities())


def _count(picoseconds: float, timestep: float) -> int:
    return round(picoseconds * 1e3 / timestep)


def _steps(integrator: Any, n_steps: int, every: int, progress: Progress | None) -> Iterator[int]:
    """Step in portions of ``every`` steps; gives the steps done after each."""
    done = 0
    while done < n_steps:
        portion = min(every, n_steps - done)
        integrator.step(portion)
        done += portion
        yield done
        if progress is not None:
            progress(done, n_steps)


def make_context(
    system: openmm.System, integrator: Any, platform: str | None = None
) -> openmm.Context:
    """A Context in double precision, where the platform has a choice; None is OpenMM's choice."""
    if platform is None:
        # what OpenMM would choose, to know whether it has a choice of precision
        probe = openmm.System()
        probe.addParticle(1)
        platform = openmm.Context(probe, openmm.VerletIntegrator(0.001)).getPlatform().getName()
    chosen = openmm.Platform.getPlatform(platform)
    properties = {"Precision": "double"} if "Precision" in chosen.getPropertyNames() else {}
    return openmm.Context(system, integrator, chosen, properties)
