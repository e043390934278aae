"""Students in ASE."""

from typing import Any

import numpy as np

try:
    import ase
    from ase.calculators.calculator import (
        Calculator,
        PropertyNotImplementedError,
        all_changes,
    )
    from ase.stress import full_3x3_to_voigt_6_stress
except ImportError as error:
    raise ImportError(f"ASE is needed ({error}): pip install 'openmm-mlffd[ase]'") from error

from openmm_mlffd.engines import PRECISIONS, open_evaluator
from openmm_mlffd.evaluator import Evaluator, StudentSource, resolve_device

SMALLEST_CHARGE = 0.1
"""A sum of initial charges [e], or a magnetic moment [μB], below this is rounding."""


class MLFFDCalculator(Calculator):
    """A student as an ASE calculator.

    Any number of periodic directions. The stress is there where all three are periodic.

    Parameters
    ----------
    model
        Name of a bundled student, or path of a student file; None is the bundled default.
    device
        Torch device, such as ``'cpu'`` or ``'cuda:1'``; None is CUDA if there is any, else the
        CPU.
    precision
        ``'single'`` (also None) or ``'double'``: the arithmetic of the network. Energies and
        forces are summed in double either way.

    Raises
    ------
    ValueError
        If there is no such student, device or precision.

    Notes
    -----
    A copied, pickled or stored calculator holds the student's name, path and SHA-256, not its
    weights. Atoms that are said to be charged or magnetic (`atoms.info`, initial charges and
    magnetic moments) are refused when a property is asked for: the student cannot be told of a
    charge, it sees that of protonated and deprotonated groups from their hydrogens, and it knows
    closed shells only.
    """

    name = "mlffd"
    implemented_properties = ["energy", "free_energy", "energies", "forces", "stress"]  # noqa: RUF012
    default_parameters = {"model": None, "device": None, "precision": "single"}  # noqa: RUF012
    nolabel = True

    def __init__(
        self, model: str | None = None, device: str | None = None, precision: str | None = None
    ) -> None:
        self._evaluator: Evaluator | None = None
        super().__init__(model=model, device=device, precision=precision or "single")

    def set(self, **kwargs: Any) -> dict[str, Any]:
        """Change parameters; what was computed is forgotten.

        Raises
        ------
        TypeError
            If there is no such parameter.
        ValueError
            If there is no such student, device or precision.
        """
        for key, value in kwargs.items():
            if key not in self.default_parameters:
                raise TypeError(f"there is no parameter {key!r}")
            if value is not None:
                kwargs[key] = str(value)
        changed: dict[str, Any] = super().set(**kwargs)
        precision = self.parameters["precision"]
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        resolve_device(self.parameters["device"])
        self.student = StudentSource.find(self.parameters["model"])
        self._evaluator = None
        self.reset()
        return changed

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_evaluator": None}

    def get_property(
        self, name: str, atoms: ase.Atoms | None = None, allow_calculation: bool = True
    ) -> Any:
        """A property of the atoms, computed if need be; see ASE."""
        # not in calculate: ASE does not notice when atoms.info changes
        if atoms is not None:
            _refuse_charge_and_spin(atoms)
        return super().get_property(name, atoms, allow_calculation)

    def calculate(
        self,
        atoms: ase.Atoms | None = None,
        properties: list[str] | None = None,
        system_changes: list[str] = all_changes,
    ) -> None:
        """Compute everything that can be computed for the atoms; called by ASE.

        Raises
        ------
        PropertyNotImplementedError
            If the stress of atoms that are not periodic in all directions is asked for.
        ValueError
            If there are no atoms, the student does not know an element, positions are not
            finite, or the atoms are charged or magnetic.
        """
        super().calculate(atoms, properties, system_changes)
        atoms = self.atoms
        if atoms is None:
            raise ValueError("there are no atoms to evaluate")
        _refuse_charge_and_spin(atoms)
        periodic = bool(atoms.pbc.all())
        if "stress" in (properties or []) and not periodic:
            raise PropertyNotImplementedError(
                f"stress needs atoms that are periodic in all directions, but pbc is "
                f"{atoms.pbc.tolist()}"
            )
        cell = atoms.cell.array if atoms.pbc.any() else None
        found = self._evaluator_for(atoms.numbers).compute(
            atoms.positions, cell, None if cell is None else atoms.pbc
        )
        self.results = {
            "energy": found.energy,
            "free_energy": found.energy,
            "energies": found.atom_energies,
            "forces": found.forces,
        }
        if periodic:
            self.results["stress"] = full_3x3_to_voigt_6_stress(found.virial) / atoms.get_volume()

    def _evaluator_for(self, numbers: np.ndarray) -> Evaluator:
        evaluator = self._evaluator
        if evaluator is not None and np.array_equal(evaluator.numbers, numbers):
            return evaluator
        if evaluator is not None:
            self._evaluator = evaluator.with_numbers(numbers)
        else:
            self._evaluator = open_evaluator(
                self.student,
                numbers.tolist(),
                precision=self.parameters["precision"],
                device=self.parameters["device"],
            )
        return self._evaluator


def _refuse_charge_and_spin(atoms: ase.Atoms) -> None:
    found = ""
    if atoms.info.get("charge"):
        found = f"atoms.info['charge'] is {atoms.info['charge']}"
    elif atoms.info.get("spin", 0) not in (0, 1, None):  # multiplicity to some, 2S to others
        found = f"atoms.info['spin'] is {atoms.info['spin']}"
    elif atoms.info.get("multiplicity", 1) not in (1, None):
        found = f"atoms.info['multiplicity'] is {atoms.info['multiplicity']}"
    elif abs(charge := atoms.get_initial_charges().sum()) > SMALLEST_CHARGE:
        found = f"the initial charges add up to {charge:g}"
    elif (np.abs(atoms.get_initial_magnetic_moments()) > SMALLEST_CHARGE).any():
        found = "there are initial magnetic moments"
    if found:
        raise ValueError(
            f"{found}, but the student can be told of neither charge nor spin: what is charged "
            "follows from the atoms (an ammonium has one hydrogen more than an amine), and all "
            "shells are closed. Check the protonation states, and leave this out"
        )
