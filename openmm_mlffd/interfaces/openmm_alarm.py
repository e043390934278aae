"""The extrapolation alarm: a student in OpenMM that says when it is asked what it does not know."""

import logging
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

try:
    import openmm
except ImportError as error:
    raise ImportError(f"OpenMM is needed ({error}): pip install 'openmm-mlffd[openmm]'") from error

from openmm_mlffd.elements import symbol
from openmm_mlffd.evaluator import StudentSource, resolve_device
from openmm_mlffd.interfaces.openmm_correction import TeacherCorrection
from openmm_mlffd.interfaces.openmm_stored import student_functions
from openmm_mlffd.novelty import Novelty, NoveltyMeter, load_novelty
from openmm_mlffd.units import ANGSTROM_PER_NM

_HEADING = "step,novelty,atom,error bound (eV/Å)\n"
_log = logging.getLogger(__name__)


class ExtrapolationError(RuntimeError):
    """A run was stopped because the student is far from what it was trained on."""


class Sample(NamedTuple):
    """Novelty at one moment."""

    step: int
    """Step of the simulation."""

    novelty: float
    """Of the most novel atom."""

    atom: int
    """Its index in the System."""

    error_bound: float
    """Force error that 90 % of held-out atoms of this novelty stay below [eV/Å]; beyond their
    novelty an extrapolation."""


class NoveltyProbe:
    """Novelty of the atoms of the student in a System.

    Parameters
    ----------
    system
        A System that holds a student, as ``createSystem`` or ``createMixedSystem`` makes it.
    statistics
        File with the statistics of the student; None for the one that lies beside it.

    Attributes
    ----------
    atoms
        Index in the System of each of the student's atoms, shape (n_atoms,).
    numbers
        Their atomic numbers, shape (n_atoms,).
    novelty
        The statistics.

    Raises
    ------
    ValueError
        If the System holds no student, or more than one.
    ModelFileError
        If there are no statistics of this student; says how to make them.

    Notes
    -----
    In a System with interpolation, the student is inside another force and not found.
    """

    def __init__(self, system: openmm.System, statistics: str | Path | None = None) -> None:
        students = [
            function
            for function in student_functions(system).values()
            if not isinstance(function, TeacherCorrection)
        ]
        if len(students) != 1:
            raise ValueError(
                f"the System must hold one student among its forces, but has {len(students)}"
            )
        settings = students[0].settings
        source = StudentSource(
            name=settings["name"], path=settings["path"], sha256=settings["sha256"]
        )
        path = source.locate()
        self.novelty: Novelty = load_novelty(path, statistics)
        self.numbers = np.array(settings["numbers"])
        atoms = settings["atoms"]
        self.atoms = np.arange(len(self.numbers)) if atoms is None else np.array(atoms)
        self._periodic = settings["periodic"]
        self._meter = NoveltyMeter(
            self.numbers,
            path,
            device=resolve_device(settings["device"]),
            novelty=self.novelty,
        )

    def coordinates(
        self, state: openmm.State
    ) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        """Positions of the student's atoms [Å], and the box as rows [Å] if it is periodic."""
        positions = state.getPositions(asNumpy=True)._value[self.atoms] * ANGSTROM_PER_NM
        if not self._periodic:
            return positions, None
        return positions, state.getPeriodicBoxVectors(asNumpy=True)._value * ANGSTROM_PER_NM

    def measure(self, state: openmm.State) -> NDArray[np.float64]:
        """Novelty of each of the student's atoms in a State with positions, shape (n_atoms,)."""
        return self._meter.measure(*self.coordinates(state))

    def sample(self, state: openmm.State, step: int = 0) -> Sample:
        """The most novel atom of a State with positions."""
        return self.summary(self.measure(state), step)

    def summary(self, novelty: NDArray[np.float64], step: int = 0) -> Sample:
        """The most novel of the student's atoms."""
        worst = int(novelty.argmax())
        bound = float(self.novelty.error_bound(novelty[worst]))
        return Sample(step, float(novelty[worst]), int(self.atoms[worst]), bound)


class NoveltyReporter:
    """Watches a simulation, and stops it before it is lost.

    Every so many steps it measures how far the student's atoms are from its training data. Past
    the first threshold it logs a warning, past the second it appends the frame to a file, from
    which `mlffd label` takes it, and ends the run with an `ExtrapolationError`.

    >>> simulation.reporters.append(NoveltyReporter(100, frames='novel.extxyz'))

    Parameters
    ----------
    reportInterval
        Steps between measurements.
    file
        Path or open file for step, largest novelty, its atom and the bound of its force error,
        as CSV; None for none.
    frames
        File to which novel frames are appended, in the extended XYZ format: the student's atoms,
        their positions [Å], the novelty of each, and the box.
    warn, stop
        Thresholds of novelty; None for those that were calibrated, ``float('inf')`` for never.
    system
        The System, where it is not the simulation's, as for a copy.
    statistics
        File with the statistics of the student; None for the one that lies beside it.

    Raises
    ------
    ValueError
        If the interval is not positive.

    Notes
    -----
    A measurement costs as much as the student's energy without its forces, in plain torch. In a
    mixed System only the student's atoms count, and the hydrogens that cap cut bonds.
    """

    def __init__(
        self,
        reportInterval: int = 100,
        file: str | Path | IO[str] | None = None,
        *,
        frames: str | Path = "novel.extxyz",
        warn: float | None = None,
        stop: float | None = None,
        system: openmm.System | None = None,
        statistics: str | Path | None = None,
    ) -> None:
        if reportInterval < 1:
            raise ValueError(f"reportInterval must be positive, got {reportInterval}")
        self.samples: list[Sample] = []
        self._interval = reportInterval
        self._frames = Path(frames)
        self._warn, self._stop = warn, stop
        self._statistics = statistics
        self._file = file
        if isinstance(file, str | Path):
            Path(file).write_text(_HEADING)
        elif file is not None:
            file.write(_HEADING)
        self._probe = None if system is None else NoveltyProbe(system, statistics)

    def describeNextReport(self, simulation: Any) -> dict[str, Any]:
        """When it wants to be called next, and that it needs positions; called by OpenMM."""
        steps = self._interval - simulation.currentStep % self._interval
        # not wrapped: a molecule that is cut at a face of the box is hard to look at
        return {"steps": steps, "periodic": False, "include": ["positions"]}

    def report(self, simulation: Any, state: openmm.State) -> None:
        """Measure; called by OpenMM.

        Raises
        ------
        ExtrapolationError
            If an atom is more novel than the threshold; the frame is on disk by then.
        """
        if self._probe is None:
            self._probe = NoveltyProbe(simulation.system, self._statistics)
        probe = self._probe
        novelty = probe.measure(state)
        sample = probe.summary(novelty, simulation.currentStep)
        self.samples.append(sample)
        self._write(sample)
        header = probe.novelty.header
        warn = header.warn if self._warn is None else self._warn
        stop = header.stop if self._stop is None else self._stop
        if sample.novelty > stop:
            self._write_frame(state, novelty, sample.step)
            raise ExtrapolationError(
                f"step {sample.step}: {self._describe(sample)}, beyond {stop:.1f}; the frame is in "
                f"{self._frames}. Label it (mlffd label {self._frames}) and train on it, or pass a "
                "larger stop"
            )
        if sample.novelty > warn:
            _log.warning("step %d: %s, beyond %.1f", sample.step, self._describe(sample), warn)

    def _describe(self, sample: Sample) -> str:
        return (
            f"atom {sample.atom} has novelty {sample.novelty:.1f} (90 % of known atoms with that "
            f"have force errors below {sample.error_bound:.1f} eV/Å)"
        )

    def _write(self, sample: Sample) -> None:
        line = f"{sample.step},{sample.novelty:.4f},{sample.atom},{sample.error_bound:.4f}\n"
        if isinstance(self._file, str | Path):
            with Path(self._file).open("a") as file:
                file.write(line)
        elif self._file is not None:
            self._file.write(line)

    def _write_frame(self, state: openmm.State, novelty: NDArray[np.float64], step: int) -> None:
        assert self._probe is not None
        positions, cell = self._probe.coordinates(state)
        with self._frames.open("a") as file:
            file.write(extended_xyz(self._probe.numbers, positions, cell, novelty, step))


def extended_xyz(
    numbers: NDArray[np.int64],
    positions: NDArray[np.float64],
    cell: NDArray[np.float64] | None,
    novelty: NDArray[np.float64],
    step: int,
) -> str:
    """A frame in the extended XYZ format, as ASE and `mlffd label` read it.

    Parameters
    ----------
    numbers
        Atomic numbers, shape ``(n_atoms,)``.
    positions
        [Å], shape ``(n_atoms, 3)``.
    cell
        Box vectors as rows [Å], shape ``(3, 3)``; None for no box.
    novelty
        Of each atom, shape ``(n_atoms,)``.
    step
        Of the simulation.
    """
    box = ""
    if cell is not None:
        box = f'Lattice="{" ".join(f"{x:.8f}" for x in cell.ravel())}" '
    periodic = "F F F" if cell is None else "T T T"
    lines = [
        str(len(numbers)),
        f'{box}Properties=species:S:1:pos:R:3:novelty:R:1 step={step} pbc="{periodic}"',
    ]
    for z, position, value in zip(numbers, positions, novelty, strict=True):
        xyz = " ".join(f"{x:15.8f}" for x in position)
        lines.append(f"{symbol(int(z)):2s} {xyz} {min(value, 1e6):12.4f}")
    return "\n".join(lines) + "\n"
