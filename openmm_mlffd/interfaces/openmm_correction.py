"""What a slow teacher says beyond its student: the functions behind the forces of `openmm_mts`.

Imports neither openmm nor openmmml.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from openmm_mlffd.interfaces.openmm_force import (
    ComputationSettings,
    StudentComputation,
    restore_computation,
)
from openmm_mlffd.units import ANGSTROM_PER_NM, KJ_PER_MOL_NM_PER_EV_ANGSTROM, KJ_PER_MOL_PER_EV


class _Answer(NamedTuple):
    positions: NDArray[np.float64]
    cell: NDArray[np.float64] | None
    energy: float
    forces: NDArray[np.float64]


class RememberingStudent(StudentComputation):
    """Keeps its last answer: both force groups ask for the same positions in each outer step.

    It is stored as a plain `StudentComputation`.
    """

    def __init__(self, settings: ComputationSettings) -> None:
        super().__init__(settings)
        self.n_evaluations = 0
        self._last: _Answer | None = None

    def _compute(self, state: Any) -> tuple[float, NDArray[np.float64]]:
        positions, cell = _coordinates(state, self.settings["periodic"])
        last = self._last  # one immutable object: threads may share this one
        if (
            last is not None
            and np.array_equal(last.positions, positions)
            and (cell is None or (last.cell is not None and np.array_equal(last.cell, cell)))
        ):
            return last.energy, last.forces.copy()
        energy, forces = super()._compute(state)
        self.n_evaluations += 1
        self._last = _Answer(positions.copy(), cell, energy, forces.copy())
        return energy, forces


class CalculatorTeacher:
    """Any ASE calculator as the slow force.

    Parameters
    ----------
    calculator
        The calculator.
    numbers
        Atomic number of each atom.
    periodic
        Whether the box is periodic.
    info
        What `atoms.info` shall hold, such as ``{'charge': -1}`` where the calculator reads that.
    """

    def __init__(
        self, calculator: Any, numbers: list[int], periodic: bool, info: dict[str, Any]
    ) -> None:
        try:
            from ase import Atoms
        except ImportError as error:
            raise ImportError(
                f"ASE is needed ({error}): pip install 'openmm-mlffd[ase]'"
            ) from error
        self._atoms = Atoms(numbers, np.zeros((len(numbers), 3)), pbc=periodic, info=info)
        self._calculator = calculator
        self.n_evaluations = 0

    def __call__(self, state: Any) -> tuple[float, NDArray[np.float64]]:
        """Energy [kJ/mol] and forces [kJ/mol/nm] of the State's positions."""
        atoms = self._atoms.copy()  # not shared between threads
        atoms.positions, cell = _coordinates(state, bool(atoms.pbc.all()))
        if cell is not None:
            atoms.cell = cell
        atoms.calc = self._calculator
        self.n_evaluations += 1
        # forces first: some calculators leave them out where only the energy was asked for
        forces = atoms.get_forces(apply_constraint=False) * KJ_PER_MOL_NM_PER_EV_ANGSTROM
        return atoms.get_potential_energy() * KJ_PER_MOL_PER_EV, forces


class TeacherCorrection:
    """Teacher minus student: the function behind the slow `PythonForce`.

    Parameters
    ----------
    fast
        The student.
    slow
        The teacher: another student, or a `CalculatorTeacher`.
    """

    def __init__(
        self, fast: StudentComputation, slow: StudentComputation | CalculatorTeacher
    ) -> None:
        self.fast = fast
        self.slow = slow

    @property
    def all_settings(self) -> list[ComputationSettings]:
        """Settings of the students."""
        return [s.settings for s in (self.fast, self.slow) if isinstance(s, StudentComputation)]

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[ComputationSettings, ...]]:
        if isinstance(self.slow, CalculatorTeacher):
            raise TypeError(
                "a System whose teacher is an ASE calculator cannot be stored or copied: make it "
                "again with respa_system where it is needed"
            )
        return restore_correction, (self.fast.settings, self.slow.settings)

    def __call__(self, state: Any) -> tuple[float, NDArray[np.float64]]:
        """Energy [kJ/mol] and forces [kJ/mol/nm] that the student lacks."""
        try:
            energy, forces = self.slow(state)
        except Exception as error:
            raise RuntimeError(f"the teacher: {type(error).__name__}: {error}") from error
        fast_energy, fast_forces = self.fast(state)
        return energy - fast_energy, np.ascontiguousarray(forces - fast_forces)


def restore_correction(fast: ComputationSettings, slow: ComputationSettings) -> TeacherCorrection:
    """Make the function of a stored slow force; like `restore_computation` it never raises."""
    return TeacherCorrection(restore_computation(fast), restore_computation(slow))


def _coordinates(
    state: Any, periodic: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    positions = state.getPositions(asNumpy=True)._value * ANGSTROM_PER_NM
    if not periodic:
        return positions, None
    return positions, state.getPeriodicBoxVectors(asNumpy=True)._value * ANGSTROM_PER_NM
