"""Is energy conserved with multiple time steps, and what do they save? Plain runs beside them."""

import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from openmm import unit

from openmm_mlffd.interfaces.openmm_mts import respa_integrator, respa_system, teacher_system
from openmm_mlffd.modelfile import read_header
from openmm_mlffd.units import KJ_PER_MOL_PER_EV
from openmm_mlffd.validation.conservation import Conservation, EnergyTrace, conservation
from openmm_mlffd.validation.nve import degrees_of_freedom, equilibrate
from openmm_mlffd.validation.structures import read_structure

_EQUILIBRATION = 1.0  # ps, with the student alone


@dataclass(frozen=True, kw_only=True)
class MTSRun:
    """A run at constant energy."""

    name: str
    """The steps, in words."""

    outer: float
    """Time between evaluations of the teacher [fs]."""

    conservation: Conservation
    """How well the energy is conserved."""

    mean_potential: float
    """Mean potential energy, relative to the start [meV/atom]."""

    seconds_per_picosecond: float
    """Wall time, without that of the samples [s]."""


def open_teacher(name: str, options: dict[str, Any]) -> Any:
    """The teacher of a name: an ASE calculator, or the name or path of a student.

    Parameters
    ----------
    name
        ``ase:package.module:factory``, or a student.
    options
        Keywords of the factory.

    Raises
    ------
    ValueError
        If the name makes no sense, or a student is given options.
    """
    if not name.startswith("ase:"):
        if options:
            raise ValueError(f"a student as the teacher has no options, got {', '.join(options)}")
        return name
    module, _, factory = name.removeprefix("ase:").partition(":")
    if not module or not factory:
        raise ValueError(f"an ASE calculator is named ase:package.module:factory, not {name}")
    try:
        make = getattr(importlib.import_module(module), factory)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name}: {error}") from error
    return make(**options)


def run_mts(
    system: openmm.System,
    start: openmm.State,
    *,
    name: str,
    outer: float,
    inner_steps: int,
    picoseconds: float,
    temperature: float = 300.0,
) -> MTSRun:
    """Run at constant energy.

    Parameters
    ----------
    system
        Of `respa_system` or `teacher_system`.
    start
        Positions, velocities and box.
    name
        For the table.
    outer
        Outer time step [fs].
    inner_steps
        Inner steps in an outer one.
    picoseconds
        Length [ps].
    temperature
        Of the kT in kT/ns/dof [K].
    """
    integrator = respa_integrator(outer, inner_steps)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatform("Reference"))
    context.setPeriodicBoxVectors(*start.getPeriodicBoxVectors())
    context.setPositions(start.getPositions())
    context.setVelocities(start.getVelocities())
    energies, seconds = [], 0.0
    n_steps = round(picoseconds * 1e3 / outer)
    for step in range(n_steps + 1):
        state = context.getState(energy=True)
        energies.append((state.getPotentialEnergy()._value, state.getKineticEnergy()._value))
        began = time.perf_counter()
        if step < n_steps:
            integrator.step(1)
        seconds += time.perf_counter() - began
    potential, kinetic = np.array(energies).T / KJ_PER_MOL_PER_EV
    n_atoms = system.getNumParticles()
    trace = EnergyTrace(
        timestep=outer,
        time=np.arange(n_steps + 1, dtype=np.float64) * (outer * 1e-3),
        potential=potential,
        kinetic=kinetic,
        shadow=np.full(n_steps + 1, np.nan),
        n_atoms=n_atoms,
        n_dof=degrees_of_freedom(system),
        end=context.getState(positions=True)
        .getPositions(asNumpy=True)
        .value_in_unit(unit.nanometer),
        seconds_per_step=seconds / n_steps,
    )
    return MTSRun(
        name=name,
        outer=outer,
        conservation=conservation(trace, temperature),
        mean_potential=1e3 * float((potential - potential[0]).mean()) / n_atoms,
        seconds_per_picosecond=1e3 / outer * seconds / n_steps,
    )


def run_mts_command(
    structure: Path,
    teacher: Any,
    *,
    model: str | None,
    inner: float,
    outer: Sequence[int],
    picoseconds: float,
    temperature: float,
    precision: str,
    seed: int,
    echo: Callable[[str], object],
) -> list[MTSRun]:
    """Compare multiple time steps with the teacher alone, at constant energy from one start.

    Parameters
    ----------
    structure
        PDB, CIF or SDF file.
    teacher
        An ASE calculator, or the name or path of a student.
    model
        The student: bundled name or path; None for the default.
    inner
        Time step of the student, and of the teacher alone [fs].
    outer
        Numbers of inner steps in an outer one.
    picoseconds
        Length of each run [ps].
    temperature, seed
        Of the start.
    precision
        Of the student, and of a teacher that is one.
    echo
        Is given the lines of text.
    """
    topology, positions = read_structure(structure)
    keywords: dict[str, Any] = {"precision": precision, "removeCMMotion": False}
    alone = teacher_system(topology, teacher, **keywords)
    both = respa_system(topology, teacher, model=model, **keywords)
    header = read_header(model)
    echo(f"{structure}: {topology.getNumAtoms()} atoms; student {header.name} {header.sha256[:12]}")
    start = equilibrate(
        both, positions, temperature=temperature, picoseconds=_EQUILIBRATION, seed=seed
    )
    energies = [_energy(system, start) for system in (alone, both)]
    echo(f"energy of the start: teacher {energies[0]:.8f} eV, both forces {energies[1]:.8f} eV")
    for line in _HEADS:
        echo(line)
    runs = []
    cases = [(alone, "teacher alone", 1), *((both, "both", n) for n in outer)]
    cases.append((alone, "teacher alone", max(outer)))
    for system, who, n in cases:
        plain = system is alone
        try:
            run = run_mts(
                system, start, name=f"{who}, {inner * n:g} fs" + f" / {inner:g} fs" * (not plain),
                outer=inner * n, inner_steps=1 if plain else n, picoseconds=picoseconds,
                temperature=temperature,
            )  # fmt: skip
        except openmm.OpenMMException as error:
            echo(f"{who}, {inner * n:g} fs: {error}")
            continue
        runs.append(run)
        echo(_row(run, runs[0]))
    return runs


_HEADS = (
    f"{'steps':30s} {'slope':>13s} {'error':>9s} {'rms(E)':>9s} {'mean V':>9s} {'mean T':>7s} "
    f"{'wall':>8s} {'gain':>6s}",
    f"{'':30s} {'meV/atom/ps':>13s} {'':>9s} {'meV/atom':>9s} {'meV/atom':>9s} {'K':>7s} "
    f"{'s/ps':>8s} {'':>6s}",
)


def _row(run: MTSRun, plain: MTSRun) -> str:
    kept = run.conservation
    return (
        f"{run.name:30s} {1e-3 * kept.total_slope:13.4f} ±{1e-3 * kept.total_slope_error:8.4f} "
        f"{kept.rms:9.4f} {run.mean_potential:9.3f} {kept.mean_temperature:7.0f} "
        f"{run.seconds_per_picosecond:8.1f} "
        f"{plain.seconds_per_picosecond / run.seconds_per_picosecond:6.2f}"
    )


def _energy(system: openmm.System, start: openmm.State) -> float:
    context = openmm.Context(
        system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference")
    )
    context.setPeriodicBoxVectors(*start.getPeriodicBoxVectors())
    context.setPositions(start.getPositions())
    energy = context.getState(energy=True).getPotentialEnergy()._value
    return float(energy / KJ_PER_MOL_PER_EV)
