"""Whether forces belong to the energy, are smooth, and conserve it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from numpy.typing import NDArray

from openmm_mlffd.units import BOLTZMANN
from openmm_mlffd.validation import figures
from openmm_mlffd.validation.conservation import (
    Check,
    Conservation,
    EnergyTrace,
    conservation,
    halving_ratio,
)
from openmm_mlffd.validation.nve import NVEResult, equilibrate
from openmm_mlffd.validation.report import (
    FigureBlock,
    Section,
    TableBlock,
    conservation_table,
    number,
)
from openmm_mlffd.validation.suite.dynamics import run_nve_on_disk
from openmm_mlffd.validation.suite.job import Job, SectionResult, named
from openmm_mlffd.validation.suite.models import Structure, label
from openmm_mlffd.validation.suite.plan import NVERun
from openmm_mlffd.validation.suite.systems import System, load_system

TEMPERATURE = 300.0
"""Of the starts, and of the kT in kT/ns/dof [K]."""

ATOMIZATION = 5.0
"""Energy that takes an organic molecule apart, typically [eV/atom]; drifts are given in it, too."""

GRADIENT_ERROR = 1e-4
"""Largest difference of forces and differences of energies [eV/Å], in double precision."""

FORCE_JUMP = 5e-4
"""Largest jump of a force [eV/Å] within `RAMP_STEP` while an atom passes through the cutoff."""

RAMP_STEP = 5e-4
"""[Å]."""

LARGEST_SAMPLES = 100_000
"""Samples of a trace; longer runs are sampled more rarely."""

_DIFFERENCE = 2e-4  # Å, of central differences of fourth order
_EQUILIBRATION = 1.0  # ps


def run_nve_section(job: Job) -> SectionResult:
    """Smoothness, then constant-energy runs of all systems of the plan."""
    smooth, checks = measure_smoothness(job)
    sections = [_smoothness_section(smooth)]
    numbers: dict[str, Any] = {"smoothness": smooth, "runs": {}}
    for run in job.plan.nve:
        traces = measure_run(job, run)
        found = run_numbers(run, traces)
        numbers["runs"][run.name] = found
        result = NVEResult(
            traces=traces,
            runs=[conservation(t, TEMPERATURE) for t in traces],
            halving_ratios=found["halving_ratios"],
        )
        if run.judged:
            checks.extend(named(result.checks, f"NVE, {run.name}"))
        sections.append(_run_section(run, result, found))
    return SectionResult(numbers=numbers, checks=checks, sections=sections)


def measure_run(job: Job, run: NVERun) -> list[EnergyTrace]:
    """Traces of a run with each of its time steps, from one start."""
    system = load_system(run.system, run.copies)

    def make() -> openmm.System:
        return job.model.system(system.topology, precision=run.precision)

    picoseconds = _EQUILIBRATION if job.plan.level == "full" else min(0.5, run.picoseconds)
    start_settings = {
        "model": job.model.identity, "system": run.system, "copies": run.copies,
        "picoseconds": picoseconds, "temperature": TEMPERATURE,
    }  # fmt: skip

    def equilibrated(folder: Path) -> dict[str, Any]:
        # single precision: the same start for all precisions
        made = job.model.system(system.topology)
        state = equilibrate(
            made, system.nanometers, temperature=TEMPERATURE, picoseconds=picoseconds
        )
        (folder / "state.xml").write_text(openmm.XmlSerializer.serialize(state))
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


def run_numbers(run: NVERun, traces: Sequence[EnergyTrace]) -> dict[str, Any]:
    """All numbers of the runs of one system."""
    shortest = min(float(t.time[-1]) for t in traces)
    rows = []
    for trace in traces:
        result = conservation(trace, TEMPERATURE)
        rows.append(asdict(result) | relative_slopes(result, trace))
    return {
        "system": run.system,
        "precision": run.precision,
        "atoms": traces[0].n_atoms,
        "degrees_of_freedom": traces[0].n_dof,
        "picoseconds": shortest,
        "runs": rows,
        "halving_ratios": [halving_ratio(fine, coarse) for fine, coarse in pairwise(traces)],
        "judged": run.judged,
    }


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
    structures = [Structure(system.numbers, base)] + [
        Structure(system.numbers, base + step * direction)
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
        return Structure(numbers, np.concatenate([system.positions, moved]))

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


def _smoothness_section(numbers: Mapping[str, Any]) -> Section:
    rows = [
        [name, *(_scientific(found[key]) for key in ("gradient", "jump"))]
        for name, found in numbers.items()
    ]
    return Section(
        title="Do forces belong to the energy?",
        paragraphs=[
            "In double precision: forces against central differences of the energy, for each "
            "atom of a distorted molecule; and the largest jump of any force while a methane "
            f"moves away from the molecule in steps of {1e3 * RAMP_STEP:g} mÅ, through the cutoff."
        ],
        tables=[
            TableBlock(
                caption="Gradient and smoothness",
                columns=["molecule", "forces − differences [eV/Å]", "jump of a force [eV/Å]"],
                rows=rows,
            )
        ],
    )


def _scientific(value: float | None) -> str:
    return "–" if value is None else number(value, 2)


def _run_section(run: NVERun, result: NVEResult, found: Mapping[str, Any]) -> Section:
    finest = found["runs"][0]
    precision = {
        "single": "the network in float32, energies and the integrator in float64 (mixed)",
        "double": "everything in float64",
    }[run.precision]
    paragraphs = [
        f"{found['atoms']} atoms, from one equilibrated start at {TEMPERATURE:g} K; velocity "
        f"Verlet, no constraints; {precision}."
    ]
    if found["picoseconds"] < 0.999 * run.picoseconds:
        paragraphs.append(
            f"{run.picoseconds:g} ps were planned; the time allowed "
            f"{number(found['picoseconds'])} ps."
        )
    if not run.judged:
        paragraphs.append("Reported without a pass mark.")
    rows = [
        ["kinetic energy", _percent(finest, "slope_of_kinetic")],
        [
            f"{ATOMIZATION:g} eV/atom, a typical atomisation energy",
            _percent(finest, "slope_of_atomization"),
        ],
    ]
    return Section(
        title=f"Constant energy: {run.name}",
        paragraphs=paragraphs,
        tables=[
            conservation_table(result.runs, result.halving_ratios),
            TableBlock(
                caption=f"The slope at {finest['timestep']:g} fs, relative to other energies",
                columns=["relative to", "slope [%/ns]"],
                rows=rows,
            ),
        ],
        figures=[
            FigureBlock(
                svg=figures.draw_energies([_thinned(t) for t in result.traces]),
                caption="Left: potential and kinetic energy are exchanged while their sum stays "
                "(smallest time step). Right: the sum, magnified. kT of one degree of freedom is "
                f"{number(1e3 * BOLTZMANN * TEMPERATURE)} meV.",
                alt=f"Energies of {run.name} at constant energy.",
            )
        ],
    )


def _percent(row: Mapping[str, Any], key: str) -> str:
    return f"{number(row[key])} ± {number(row[key + '_error'], 2)}"


def _thinned(trace: EnergyTrace, most: int = 4000) -> EnergyTrace:
    """Every nth sample of a long trace, for drawing."""
    step = max(1, len(trace.time) // most)
    names = ("time", "potential", "kinetic", "shadow")
    return replace(trace, **{name: getattr(trace, name)[::step] for name in names})
