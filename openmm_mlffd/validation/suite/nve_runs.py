"""Constant-energy runs, and how smooth forces are: measurement."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from numpy.typing import NDArray

from openmm_mlffd.validation.conservation import Check, Conservation, EnergyTrace
from openmm_mlffd.validation.nve import equilibrate
from openmm_mlffd.validation.suite.dynamics import run_nve_on_disk
from openmm_mlffd.validation.suite.job import Job, named
from openmm_mlffd.validation.suite.models import Structure, label
from openmm_mlffd.validation.suite.plan import NVERun
from openmm_mlffd.validation.suite.store import write_text
from openmm_mlffd.validation.suite.systems import System, load_system

TEMPERATURE = 300.0
"""Of the starts, and of the kT in kT/ns/dof [K]."""

GRADIENT_ERROR = 1e-4
"""Largest difference of forces and differences of energies [eV/Å], in double precision."""

FORCE_JUMP = 5e-4
"""Largest jump of a force [eV/Å] within `RAMP_STEP` while an atom passes through the cutoff."""

RAMP_STEP = 5e-4
"""[Å]."""

LARGEST_SAMPLES = 100_000
"""Samples of a trace; longer runs are sampled more rarely."""

ATOMIZATION = 5.0
"""Energy that takes an organic molecule apart, typically [eV/atom]; drifts are given in it, too."""

_DIFFERENCE = 2e-4  # Å, of central differences of fourth order

_EQUILIBRATION = 1.0  # ps


def measure_run(job: Job, run: NVERun) -> list[EnergyTrace]:
    """Traces of a run with each of its time steps, from one start."""
    system = load_system(run.system, run.copies)

    def make() -> openmm.System:
        return job.model.system(system.topology, precision=run.precision, charge=system.charge)

    picoseconds = _EQUILIBRATION if job.plan.level == "full" else min(0.5, run.picoseconds)
    start_settings = {
        "model": job.model.identity, "system": run.system, "copies": run.copies,
        "picoseconds": picoseconds, "temperature": TEMPERATURE,
    }  # fmt: skip

    def equilibrated(folder: Path) -> dict[str, Any]:
        # single precision: the same start for all precisions
        made = job.model.system(system.topology, charge=system.charge)
        state = equilibrate(
            made, system.nanometers, temperature=TEMPERATURE, picoseconds=picoseconds
        )
        write_text(folder / "state.xml", openmm.XmlSerializer.serialize(state))
        return {"temperature": TEMPERATURE}

    piece = job.store.piece(f"start of {run.system}", start_settings, equilibrated)
    start = openmm.XmlSerializer.deserialize((piece.folder / "state.xml").read_text())
    sample = max(max(run.timesteps), 1e3 * run.picoseconds / LARGEST_SAMPLES)
    traces = []
    limit = job.limit(run.minutes)
    for timestep in sorted(run.timesteps):
        settings = start_settings | {
            "precision": run.precision, "length": run.picoseconds, "timestep": timestep,
            "sample": sample,
        }  # fmt: skip
        held: list[EnergyTrace] = []

        def measure(folder: Path, timestep: float = timestep, held: list = held) -> dict[str, Any]:
            trace = _run(job, make, start, run, folder, timestep, sample)
            held.append(trace)
            return {
                "picoseconds": float(trace.time[-1]),
                "minutes": None if math.isinf(limit) else limit,
            }

        def unfinished(known: dict[str, Any]) -> bool:
            short = known["picoseconds"] < 0.999 * run.picoseconds
            return short and limit > (known["minutes"] or math.inf)

        name = f"NVE {run.name} {timestep:g} fs"
        piece = job.store.piece(name, settings, measure, unfinished=unfinished)
        if not held:
            held.append(_run(job, make, start, run, piece.folder, timestep, sample, finished=True))
        traces.append(held[0])
    return traces


def _run(
    job: Job, make: Callable[[], openmm.System], start: openmm.State, run: NVERun, folder: Path,
    timestep: float, sample: float, *, finished: bool = False,
) -> EnergyTrace:  # fmt: skip
    return run_nve_on_disk(
        make,
        start,
        folder,
        timestep=timestep,
        picoseconds=run.picoseconds,
        sample=sample,
        clock=job.store.clock,
        minutes=0.0 if finished else job.limit(run.minutes),
        progress=job.progress,
        label=f"NVE {run.name} {timestep:g} fs",
    )


def relative_slopes(result: Conservation, trace: EnergyTrace) -> dict[str, float]:
    """The slope relative to the kinetic energy and to a typical atomisation energy [%/ns]."""
    kinetic = 1e3 * float(trace.kinetic.mean()) / trace.n_atoms  # meV/atom
    return {
        "slope_of_kinetic": 100 * result.slope / kinetic,
        "slope_of_kinetic_error": 100 * result.slope_error / kinetic,
        "slope_of_atomization": 100 * result.slope / (1e3 * ATOMIZATION),
        "slope_of_atomization_error": 100 * result.slope_error / (1e3 * ATOMIZATION),
    }


def measure_smoothness(job: Job) -> tuple[dict[str, Any], list[Check]]:
    """Forces against differences of energies, and the step of the force at the cutoff."""
    numbers, checks = {}, []
    for name in job.plan.smoothness:
        system = load_system(name)

        def measure(_: Path, system: System = system) -> dict[str, Any]:
            return {"gradient": gradient_error(job, system), "jump": force_jump(job, system)}

        found = job.store.piece(
            f"smoothness of {name}", {"model": job.model.identity}, measure
        ).numbers
        numbers[name] = found
        for key, what, high in (
            ("gradient", "forces − differences of energies", GRADIENT_ERROR),
            ("jump", "jump of a force along a ramp", FORCE_JUMP),
        ):
            value = math.nan if found[key] is None else found[key]
            check = Check(name=f"{what}, {name}", value=value, unit="eV/Å", high=high)
            checks.append(check)
    return numbers, named(checks, "NVE")


def gradient_error(job: Job, system: System) -> float:
    """Largest difference between forces and central differences of the energy [eV/Å].

    Of a distorted molecule, along three random directions of each atom's displacement; in double
    precision.
    """
    rng = np.random.default_rng(0)
    base = system.positions + rng.normal(scale=0.05, size=system.positions.shape)
    directions = rng.normal(size=(3 * len(base), len(base), 3))
    # each direction moves one atom, then all together in the last three
    for k in range(3 * len(base)):
        keep = np.zeros(len(base), bool)
        keep[k // 3] = True
        directions[k, ~keep] = 0.0
    directions = np.concatenate([directions, rng.normal(size=(3, len(base), 3))])
    directions /= np.linalg.norm(directions, axis=(1, 2), keepdims=True)
    steps = _DIFFERENCE * np.array([-2.0, -1.0, 1.0, 2.0])
    weights = np.array([1.0, -8.0, 8.0, -1.0]) / (12 * _DIFFERENCE)
    numbers, charge = system.numbers, system.charge
    structures = [Structure(numbers, base, charge=charge)] + [
        Structure(numbers, base + step * direction, charge=charge)
        for direction in directions
        for step in steps
    ]
    found = label(job.model, structures, precision="double")
    energies = np.array([e for e, _ in found[1:]]).reshape(-1, 4)
    expected = -(energies - found[0][0]) @ weights
    along = np.einsum("kij,ij->k", directions, found[0][1])
    return float(np.abs(along - expected).max())


def force_jump(job: Job, system: System) -> float:
    """Largest change of any force component within a tiny step of a ramp [eV/Å].

    A methane goes away from the molecule, from 2 to 7.5 Å, so that all its distances pass through
    the cutoff. Where forces change fast but smoothly, the change of the step before is the
    expectation: what counts is the deviation from it.
    """
    methane = np.array(
        [[0.0, 0, 0], [0.63, 0.63, 0.63], [-0.63, -0.63, 0.63], [-0.63, 0.63, -0.63],
         [0.63, -0.63, -0.63]]
    )  # fmt: skip
    numbers = np.concatenate([system.numbers, [6, 1, 1, 1, 1]])
    edge = system.positions[:, 0].max()
    ramp = np.arange(2.0, 7.5, 0.04)

    def at(distance: float) -> Structure:
        moved = methane + np.array([edge + distance, 0.1, 0.2])
        positions = np.concatenate([system.positions, moved])
        return Structure(numbers, positions, charge=system.charge)

    # where forces bend most, look closer, and closer again
    places, worst = [(2.0, 7.5)], 0.0
    for step in (0.04, 0.004, RAMP_STEP):
        found: list[tuple[float, float]] = []
        for low, high in places:
            ramp = np.arange(low, high + 0.5 * step, step)
            forces = _forces(job, [at(d) for d in ramp])
            bend = np.abs(forces[2:] - 2 * forces[1:-1] + forces[:-2]).max((1, 2))
            found += [(float(bend[k]), float(ramp[k])) for k in np.argsort(-bend)[:3]]
        found.sort(reverse=True)
        places = [(start, start + 2 * step) for _, start in found[:3]]
        worst = found[0][0]
    return worst


def _forces(job: Job, structures: list[Structure]) -> NDArray[np.float64]:
    return np.array([forces for _, forces in label(job.model, structures, precision="double")])
