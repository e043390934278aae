"""Langevin and constant-energy runs in segments that are on disk, so that they can go on."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from numpy.typing import NDArray
from openmm import unit

from openmm_mlffd.units import ANGSTROM_PER_NM, KJ_PER_MOL_PER_EV
from openmm_mlffd.validation.conservation import EnergyTrace
from openmm_mlffd.validation.nve import ConstantEnergy, degrees_of_freedom, make_context
from openmm_mlffd.validation.suite.plan import EnsembleRun
from openmm_mlffd.validation.suite.store import Clock, read_arrays, write_arrays
from openmm_mlffd.validation.suite.systems import System

FRICTION = 5.0
"""Of the Langevin thermostat [1/ps]."""

BAROSTAT_INTERVAL = 10
"""Steps between attempts to change the volume."""

SEGMENTS = 200
"""A run is cut into so many at most; an interruption costs one."""

SEGMENT_STEPS = 250
"""Steps of a segment at least, so that the barostat has its turns."""

Stop = Callable[[Sequence[dict[str, NDArray[Any]]]], str]
"""Given segments of a run, says why it should end; empty if it should not."""

Progress = Callable[[str, float, float], None]
"""Told what runs, how many picoseconds are done, and how many there are to do."""


def silent(_label: str, _done: float, _total: float) -> None:
    """No progress."""


@dataclass(frozen=True)
class Trajectory:
    """Frames of a Langevin run and what was measured at each."""

    time: NDArray[np.float64]
    """[ps], shape (n,)."""

    positions: NDArray[np.float32]
    """[Å], molecules not cut by the box, shape (n, n_atoms, 3)."""

    cell: NDArray[np.float64]
    """Box vectors as rows [Å]; zeros without a box, shape (n, 3, 3)."""

    potential: NDArray[np.float64]
    """[eV], shape (n,)."""

    kinetic: NDArray[np.float64]
    """[eV], shape (n,)."""

    n_dof: int
    """Degrees of freedom."""

    seconds_per_step: float
    """Wall time of a step, sampling included [s]."""

    failure: str = ""
    """Why the run ended before its time; empty if it did not."""

    def until(self, picoseconds: float) -> "Trajectory":
        """The frames up to some time."""
        n = int(np.searchsorted(self.time, picoseconds * (1 + 1e-9), side="right"))
        names = ("time", "positions", "cell", "potential", "kinetic")
        return replace(self, **{name: getattr(self, name)[:n] for name in names})


def run_langevin(
    make_system: Callable[[], openmm.System],
    system: System,
    run: EnsembleRun,
    folder: Path,
    *,
    clock: Clock,
    minutes: float = math.inf,
    progress: Progress = silent,
    stop: Stop | None = None,
    segments: int = SEGMENTS,
) -> Trajectory:
    """Minimise, then run at constant temperature, and pressure if the plan has one.

    Parameters
    ----------
    make_system, system
        Makes the OpenMM System of the model; atoms, box and start.
    run
        Length, time step, thermostat and barostat.
    folder
        Where segments are kept; those that are there are not run again.
    minutes
        Wall time after which the run ends as it is, however short; it counts over all commands.
    clock, progress
        Looked at before each segment, and told how far it is after each.
    stop
        Is given the last segments after each, and says why the run should fail, if it should.
    segments
        The run is cut into so many at most.

    Returns
    -------
    Trajectory
        With a `failure` if the run exploded, or was stopped.

    Raises
    ------
    OutOfTime
        If the clock says so; the segments that are finished are kept.

    Notes
    -----
    Each segment has a Context and a seed of its own, so that an interrupted run has the same
    frames as one that was not.
    """
    every, n_frames, segment = _division(run, segments)
    openmm_system = _with_barostat(make_system(), run)
    parts = read_segments(folder, "segment")
    while (left := n_frames - _frames(parts)) > 0 and _may_go_on(parts, minutes):
        length = min(left, segment)
        clock.check(length * _seconds(parts) / _frames(parts) if _frames(parts) else 0.0)
        part = _segment(openmm_system, system, run, parts, every, length)
        _stop_if_told(stop, run, parts, part)
        write_arrays(folder / f"segment-{len(parts):04d}.npz", **part)
        parts.append(part)
        progress(run.name, _frames(parts) * run.frame, run.picoseconds)
    return _trajectory(parts, degrees_of_freedom(openmm_system), every)


def _division(run: EnsembleRun, segments: int) -> tuple[int, int, int]:
    """Steps between frames, frames of the run, and frames of a segment."""
    every = max(1, round(run.frame * 1e3 / run.timestep))
    n_frames = max(1, round(run.picoseconds * 1e3 / run.timestep / every))
    return every, n_frames, max(math.ceil(n_frames / segments), math.ceil(SEGMENT_STEPS / every))


def _with_barostat(openmm_system: openmm.System, run: EnsembleRun) -> openmm.System:
    if run.pressure is not None:
        openmm_system.addForce(
            openmm.MonteCarloBarostat(run.pressure, run.temperature, BAROSTAT_INTERVAL)
        )
    return openmm_system


def _frames(parts: Sequence[dict[str, NDArray[Any]]]) -> int:
    return sum(len(p["time"]) for p in parts)


def _seconds(parts: Sequence[dict[str, NDArray[Any]]]) -> float:
    return sum(float(p["seconds"]) for p in parts)


def _may_go_on(parts: Sequence[dict[str, NDArray[Any]]], minutes: float) -> bool:
    """Whether a run has wall time left, and did not fail."""
    return _seconds(parts) < 60 * minutes and not (parts and str(parts[-1]["failure"]))


def _stop_if_told(
    stop: Stop | None,
    run: EnsembleRun,
    parts: Sequence[dict[str, NDArray[Any]]],
    part: dict[str, NDArray[Any]],
) -> None:
    """Mark a new segment, which follows others, as failed if its run should end."""
    if stop is not None and not str(part["failure"]) and (why := stop([*parts[-1:], part])):
        ends = f"after {_frames([*parts, part]) * run.frame:g} ps: {why}"
        part["failure"] = np.array(ends)


def _trajectory(parts: Sequence[dict[str, NDArray[Any]]], n_dof: int, every: int) -> Trajectory:
    """All segments as one, with so many steps between frames."""
    joined = {
        name: np.concatenate([p[name] for p in parts])
        for name in ("time", "positions", "cell", "potential", "kinetic")
    }
    return Trajectory(
        **joined,
        n_dof=n_dof,
        seconds_per_step=_seconds(parts) / max(1, _frames(parts) * every),
        failure=str(parts[-1]["failure"]),
    )


def read_segments(folder: Path, stem: str) -> list[dict[str, NDArray[Any]]]:
    """What a run has left in its folder so far; ``segment`` or ``nve-0.5fs`` is the stem."""
    parts: list[dict[str, NDArray[Any]]] = []
    while (path := folder / f"{stem}-{len(parts):04d}.npz").is_file():
        parts.append(read_arrays(path))
    return parts


def _segment(
    openmm_system: openmm.System,
    system: System,
    run: EnsembleRun,
    parts: list[dict[str, NDArray[Any]]],
    every: int,
    length: int,
) -> dict[str, NDArray[Any]]:
    """Run so many frames from where the last segment ended, or from the start."""
    seed = 1000 * run.seed + len(parts) + 1
    integrator = openmm.LangevinMiddleIntegrator(
        run.temperature, FRICTION / unit.picosecond, run.timestep * unit.femtosecond
    )
    integrator.setRandomNumberSeed(seed)
    for force in openmm_system.getForces():
        if isinstance(force, openmm.MonteCarloBarostat):
            force.setRandomNumberSeed(seed)
    began = time.perf_counter()
    context = make_context(openmm_system, integrator, None)
    frames: dict[str, list[Any]] = {
        name: [] for name in ("time", "positions", "cell", "potential", "kinetic")
    }
    failure = ""
    start = sum(len(p["time"]) for p in parts)
    try:
        if parts:
            last = parts[-1]
            context.setPeriodicBoxVectors(*(openmm.Vec3(*v) for v in last["end_box"]))
            context.setPositions(last["end_positions"])
            context.setVelocities(last["end_velocities"])
        else:
            context.setPositions(system.nanometers)
            openmm.LocalEnergyMinimizer.minimize(context, maxIterations=run.minimization)
            # at a minimum half of the kinetic energy is about to become potential energy; boxes
            # are not minimised that far
            share = 2 if run.pressure is None else 1
            context.setVelocitiesToTemperature(share * run.temperature, seed)
        for i in range(length):
            integrator.step(every)
            state = context.getState(positions=True, energy=True)
            values = _sample(state, system)
            if not math.isfinite(values["potential"] + values["kinetic"]):
                raise openmm.OpenMMException("the energy is not finite")
            for name, value in values.items():
                frames[name].append(value)
            frames["time"].append((start + i + 1) * every * run.timestep * 1e-3)
    except openmm.OpenMMException as error:
        failure = f"after {(start + len(frames['time'])) * run.frame:g} ps: {error}"
    n = len(frames["time"])
    shapes = {"positions": (n, len(system.numbers), 3), "cell": (n, 3, 3)}
    arrays = {k: np.array(v, float).reshape(shapes.get(k, (n,))) for k, v in frames.items()}
    # rounded to 1/1024 Å, which makes the files half as large
    arrays["positions"] = (np.round(arrays["positions"] * 1024) / 1024).astype(np.float32)
    return arrays | _end(context, failure, time.perf_counter() - began)


def _end(context: openmm.Context, failure: str, seconds: float) -> dict[str, NDArray[Any]]:
    ends: dict[str, NDArray[Any]] = {"failure": np.array(failure), "seconds": np.array(seconds)}
    if failure:
        return ends
    state = context.getState(positions=True, velocities=True)
    return ends | {
        "end_positions": state.getPositions(asNumpy=True)._value,
        "end_velocities": state.getVelocities(asNumpy=True)._value,
        "end_box": state.getPeriodicBoxVectors(asNumpy=True)._value,
    }


def _sample(state: openmm.State, system: System) -> dict[str, Any]:
    cell = np.zeros((3, 3))
    if system.cell is not None:
        cell = state.getPeriodicBoxVectors(asNumpy=True)._value * ANGSTROM_PER_NM
    energies = {"potential": state.getPotentialEnergy(), "kinetic": state.getKineticEnergy()}
    return {
        "positions": state.getPositions(asNumpy=True)._value * ANGSTROM_PER_NM,
        "cell": cell,
        **{k: e.value_in_unit(unit.kilojoule_per_mole) / KJ_PER_MOL_PER_EV
           for k, e in energies.items()},
    }  # fmt: skip


def run_nve_on_disk(
    make_system: Callable[[], openmm.System],
    start: openmm.State,
    folder: Path,
    *,
    timestep: float,
    picoseconds: float,
    sample: float,
    clock: Clock,
    minutes: float = math.inf,
    progress: Progress = silent,
    label: str = "NVE",
) -> EnergyTrace:
    """Run at constant energy in segments that are kept; arguments as for `run_langevin`.

    Returns
    -------
    EnergyTrace
        Of the whole run, however many commands it took; shorter than asked for if it used up
        its minutes.
    """
    system = make_system()
    stem = f"nve-{timestep:g}fs"
    traces = read_segments(folder, stem)
    if traces:
        start = openmm.XmlSerializer.deserialize(str(traces[-1]["state"]))
    done = sum(float(t["length"]) for t in traces)
    spent = sum(float(t["seconds"]) for t in traces)
    grain = 1e-3 * timestep * max(1, round(sample / timestep))  # ps; segments are whole samples
    segment = max(picoseconds / SEGMENTS, 1e-3 * timestep * SEGMENT_STEPS)
    run: ConstantEnergy | None = None
    while done < picoseconds - 0.5 * grain and (spent < 60 * minutes or not traces):
        clock.check(segment * spent / done if done else 0.0)
        length = max(1, round(min(segment, picoseconds - done) / grain)) * grain
        began = time.perf_counter()
        if run is None:
            run = ConstantEnergy(system, start, timestep=timestep, sample=sample)
        trace, start = run.go_on(length)
        part = {
            "potential": trace.potential, "kinetic": trace.kinetic, "shadow": trace.shadow,
            "time": trace.time, "length": np.array(length), "end": trace.end,
            "seconds": np.array(time.perf_counter() - began),
            "seconds_per_step": np.array(trace.seconds_per_step),
            "state": np.array(openmm.XmlSerializer.serialize(start)),
        }  # fmt: skip
        write_arrays(folder / f"{stem}-{len(traces):04d}.npz", **part)
        traces.append(part)
        done, spent = done + length, spent + float(part["seconds"])
        progress(label, done, picoseconds)
    masses = [system.getParticleMass(i)._value for i in range(system.getNumParticles())]
    n_atoms = sum(mass > 0 for mass in masses)
    return join_nve(traces, timestep, n_atoms, degrees_of_freedom(system))


def join_nve(
    parts: Sequence[dict[str, NDArray[Any]]], timestep: float, n_atoms: int, n_dof: int
) -> EnergyTrace:
    """One trace of all segments; the first sample of each is the last of the one before."""
    offsets = np.cumsum([0.0] + [float(p["length"]) for p in parts])
    cuts = [0] + [1] * (len(parts) - 1)

    def join(name: str) -> NDArray[np.float64]:
        return np.concatenate([p[name][cut:] for p, cut in zip(parts, cuts, strict=True)])

    times = [p["time"][c:] + o for p, c, o in zip(parts, cuts, offsets[:-1], strict=True)]
    return EnergyTrace(
        timestep=timestep,
        time=np.concatenate(times),
        potential=join("potential"),
        kinetic=join("kinetic"),
        shadow=join("shadow"),
        n_atoms=n_atoms,
        n_dof=n_dof,
        end=parts[-1]["end"],
        seconds_per_step=float(np.mean([p["seconds_per_step"] for p in parts])),
    )
