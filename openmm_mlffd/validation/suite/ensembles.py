"""Is the ensemble the right one? Constant temperature, and constant pressure."""

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openmm_mlffd.units import BAR_PER_EV_PER_CUBIC_ANGSTROM, BOLTZMANN
from openmm_mlffd.validation import analysis
from openmm_mlffd.validation.conservation import Check, temperature
from openmm_mlffd.validation.suite.dynamics import Trajectory
from openmm_mlffd.validation.suite.plan import EnsembleRun
from openmm_mlffd.validation.suite.shape import shape_numbers
from openmm_mlffd.validation.suite.statistics import block_error
from openmm_mlffd.validation.suite.systems import System

EQUILIBRATION = 0.2
"""Share of a run that is left out at its start."""

TEMPERATURE_ERROR = 0.01
"""Mean temperature may deviate by this share, and by three standard errors."""

WIDTH_ERROR = 0.05
"""The width of the kinetic energy's distribution may, too."""

DENSITY = (0.8, 1.2)
"""Of a box of water [g/cm^3] that has neither boiled nor collapsed."""

LONGEST_BOND = 1.5
"""Times its length in the minimised structure."""

JUDGED_PICOSECONDS = 1.0
"""Temperatures of shorter runs are not judged: it is five times that of the thermostat [ps]."""

SMALLEST_SAMPLE = 50
"""Frames whose distribution is looked at, at least."""

VOLUME_PICOSECONDS = 20.0
"""Fluctuations of the volume of shorter runs mean nothing [ps]."""


def as_mdtraj(system: System, trajectory: Trajectory) -> Any:
    """The frames as MDTraj has them."""
    box = trajectory.cell if system.cell is not None else None
    return analysis.make_trajectory(
        trajectory.positions, system.topology, cell=box, time=trajectory.time
    )


def equilibrated(trajectory: Trajectory) -> slice:
    """The frames after the equilibration."""
    return slice(int(EQUILIBRATION * len(trajectory.time)), None)


def ensemble_numbers(run: EnsembleRun, system: System, trajectory: Trajectory) -> dict[str, Any]:
    """All numbers of a run."""
    part = equilibrated(trajectory)
    kinetic = trajectory.kinetic[part]
    temperatures = temperature(kinetic, trajectory.n_dof)
    expected = math.sqrt(trajectory.n_dof / 2) * BOLTZMANN * run.temperature
    width = float(kinetic.std(ddof=1)) / expected if len(kinetic) > 1 else math.nan
    numbers: dict[str, Any] = {
        "system": run.system,
        "atoms": len(system.numbers),
        "picoseconds": float(trajectory.time[-1]) if len(trajectory.time) else 0.0,
        "planned_picoseconds": run.picoseconds,
        "failure": trajectory.failure,
        "seconds_per_step": trajectory.seconds_per_step,
        "temperature": float(temperatures.mean()) if len(kinetic) else None,
        "temperature_error": block_error(temperatures),
        "kinetic_width": width,
        "kinetic_width_error": width_error(kinetic) / expected,
        "longest_bond": longest_bond(system, trajectory),
        "physical_validation": physical_validation_numbers(run, system, trajectory),
    }
    if system.cell is not None and len(kinetic):
        numbers |= box_numbers(run, system, trajectory)
    if len(trajectory.time):
        numbers["shape"] = shape_numbers(system, trajectory.positions, trajectory.cell)
    return numbers


def width_error(values: NDArray[np.float64], n_blocks: int = 5) -> float:
    """Standard error of a standard deviation, by a jackknife over blocks."""
    if len(values) < 2 * n_blocks:
        return math.nan
    blocks = np.array_split(values, n_blocks)
    left_out = np.array(
        [np.concatenate(blocks[:i] + blocks[i + 1 :]).std(ddof=1) for i in range(n_blocks)]
    )
    return math.sqrt((n_blocks - 1) * float(((left_out - left_out.mean()) ** 2).mean()))


def box_numbers(run: EnsembleRun, system: System, trajectory: Trajectory) -> dict[str, Any]:
    """Density, and what its fluctuation says of the compressibility."""
    frames = as_mdtraj(system, trajectory)
    density = analysis.density(frames) * 1e-3  # kg/m^3 to g/cm^3
    part = equilibrated(trajectory)
    volume = np.abs(np.linalg.det(trajectory.cell))[part]
    numbers = {
        "density": float(density[part].mean()),
        "density_error": block_error(density[part]),
        "density_start": float(density[0]),
        "density_end": float(density[-1]),
        "volume_relative_std": float(volume.std() / volume.mean()),
    }
    if run.pressure is not None and trajectory.time[-1] >= VOLUME_PICOSECONDS:
        per_ev = float(volume.var() / volume.mean()) / (BOLTZMANN * run.temperature)  # Å^3/eV
        numbers["compressibility"] = per_ev / BAR_PER_EV_PER_CUBIC_ANGSTROM  # 1/bar
    return numbers


def longest_bond(system: System, trajectory: Trajectory) -> float:
    """Longest bond of all frames relative to its length at the start; NaN if there is none."""
    if not len(trajectory.time) or not len(system.bonds):
        return math.nan
    frames = as_mdtraj(system, trajectory)
    reference = analysis.make_frame(system.nanometers, system.topology)
    return analysis.longest_bond(frames, reference).ratio


def physical_validation_numbers(
    run: EnsembleRun, system: System, trajectory: Trajectory
) -> dict[str, Any] | None:
    """Deviation of the kinetic energy's mean and width, in standard errors.

    By the package physical-validation; None without it, or with fewer than 50 frames.

    References
    ----------
    Merz, Shirts 2018, PLoS ONE 13, e0202764, doi:10.1371/journal.pone.0202764.
    """
    kinetic = trajectory.kinetic[equilibrated(trajectory)]
    if len(kinetic) < SMALLEST_SAMPLE:
        return None
    with _quiet():
        try:
            import physical_validation as pv
        except ImportError:
            return None
        data = pv.data.SimulationData(
            units=pv.data.UnitData(
                kb=BOLTZMANN, energy_str="eV", energy_conversion=1.0, length_str="A",
                length_conversion=1.0, volume_str="A^3", volume_conversion=1.0,
                temperature_str="K", temperature_conversion=1.0, pressure_str="bar",
                pressure_conversion=1.0, time_str="ps", time_conversion=1.0,
            ),
            ensemble=pv.data.EnsembleData(
                "NVT", natoms=len(system.numbers), volume=1.0, temperature=run.temperature
            ),
            system=pv.data.SystemData(
                natoms=len(system.numbers), nconstraints=0,
                ndof_reduction_tra=3 * len(system.numbers) - trajectory.n_dof,
                ndof_reduction_rot=0, mass=system.masses,
            ),
            observables=pv.data.ObservableData(kinetic_energy=kinetic),
        )  # fmt: skip
        mean, width = pv.kinetic_energy.distribution(data, verbosity=0, bootstrap_seed=1)
    return {"mean_deviation": float(mean), "width_deviation": float(width)}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings that pymbar logs when it is imported."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def ensemble_checks(run: EnsembleRun, numbers: Mapping[str, Any]) -> list[Check]:
    """What a run has to be."""

    def value(key: str) -> float:
        found = numbers.get(key)
        return math.nan if found is None else float(found)

    def error(key: str) -> float:
        # NaN if there are too few frames: then nothing can be said, and only the rest counts
        return 0.0 if math.isnan(value(key)) else value(key)

    checks = [
        Check(name="runs that did not reach their end", value=float(bool(numbers["failure"])),
              unit="", high=0.0),
        Check(name="longest bond / its length at the start", value=value("longest_bond"), unit="",
              high=LONGEST_BOND),
    ]  # fmt: skip
    inverted = numbers.get("shape", {}).get("inverted_centers")
    if inverted is not None:
        name = "centers of four neighbors that were turned inside out"
        checks.append(Check(name=name, value=float(inverted), unit="", high=0.0))
    long = numbers["picoseconds"] > 0.999 * JUDGED_PICOSECONDS
    if long and not math.isnan(value("temperature_error")):
        allowed = TEMPERATURE_ERROR * run.temperature + 3 * error("temperature_error")
        checks.append(
            Check(
                name="mean temperature, deviation", unit="K", high=allowed,
                value=abs(value("temperature") - run.temperature),
            )
        )  # fmt: skip
    if long and not math.isnan(value("kinetic_width_error")):
        allowed = WIDTH_ERROR + 3 * error("kinetic_width_error")
        checks.append(
            Check(
                name="width of the kinetic energy / expected − 1, size", unit="", high=allowed,
                value=abs(value("kinetic_width") - 1),
            )
        )  # fmt: skip
    if run.pressure is not None:
        low, high = DENSITY
        checks.append(
            Check(name="density", value=value("density"), unit="g/cm³", low=low, high=high)
        )
    return checks
