"""What a `PythonForce` calls and what it stores. Imports neither openmm nor openmmml."""

from collections.abc import Callable
from typing import Any, NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray

from openmm_mlffd.engines import open_evaluator
from openmm_mlffd.evaluator import Evaluator, StudentSource
from openmm_mlffd.interfaces.openmm_selftest import SelfTest, self_test_evaluator
from openmm_mlffd.units import ANGSTROM_PER_NM, KJ_PER_MOL_NM_PER_EV_ANGSTROM, KJ_PER_MOL_PER_EV

VERSION = 2
"""Version of the settings that are stored with a System. Version 1 had no `kernels`."""


class ComputationSettings(TypedDict):
    """All that is stored with a System: plain values, never weights."""

    version: int
    """`VERSION` of the package that wrote it."""

    name: str
    """Name of the bundled student; empty for a file of one's own."""

    path: str
    """Where the student's file was; a hint."""

    sha256: str
    """Hash of the student; no other is accepted."""

    numbers: list[int]
    """Atomic number of each atom, in the order in which OpenMM hands them over."""

    atoms: list[int] | None
    """Index of each atom in the System, for messages; None for all."""

    periodic: bool
    """Whether the box is periodic."""

    precision: str
    """Single, mixed or double."""

    device: str | None
    """Torch device; None for whatever is there."""

    kernels: str
    """One of `engines.KERNELS`."""

    self_test: NotRequired[bool]
    """Whether the student is tested at its first use; not there means yes."""


class StudentComputation:
    """Energy and forces of a State: the function behind a `PythonForce`.

    Parameters
    ----------
    settings
        What to compute with what. It is looked at in the first call, not before.

    Notes
    -----
    Contexts made from one System share an instance, from different threads too. It is pickled
    as its settings alone.
    """

    def __init__(self, settings: ComputationSettings) -> None:
        self.settings = settings
        self._evaluator: Evaluator | None = None
        self._tested = False
        self.self_test: SelfTest | None = None

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[ComputationSettings]]:
        return restore_computation, (self.settings,)

    def __call__(self, state: Any) -> tuple[float, NDArray[np.float64]]:
        """Energy [kJ/mol] and forces [kJ/mol/nm] of the State's positions."""
        # OpenMM keeps nothing of an exception but its text
        try:
            return self._compute(state)
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt("stopped from the keyboard (KeyboardInterrupt)") from error
        except Exception as error:
            text = f"{type(error).__name__} in the mlffd potential: {error}"
            raise RuntimeError(text) from error

    def start(self) -> Evaluator:
        """Load the student, if that is not done; where it cannot be used, this says so."""
        if self._evaluator is not None:
            return self._evaluator
        settings = _upgraded(self.settings)
        self._evaluator = open_evaluator(
            self._source(),
            settings["numbers"],
            kernels=settings["kernels"],
            precision=settings["precision"],
            device=settings["device"],
            labels=settings["atoms"],
        )
        return self._evaluator

    def _source(self) -> StudentSource:
        settings = self.settings
        return StudentSource(
            name=settings["name"], path=settings["path"], sha256=settings["sha256"]
        )

    def _compute(self, state: Any) -> tuple[float, NDArray[np.float64]]:
        evaluator = self._evaluator or self.start()
        # _value: the conversion of units costs more than the copy
        positions = state.getPositions(asNumpy=True)._value * ANGSTROM_PER_NM
        cell = None
        if self.settings["periodic"]:
            cell = state.getPeriodicBoxVectors(asNumpy=True)._value * ANGSTROM_PER_NM
        prediction = evaluator.predict(positions, cell, virial=False)
        if not self._tested:
            if self.settings.get("self_test", True):
                precision = self.settings["precision"]
                self.self_test = self_test_evaluator(
                    evaluator, self._source(), precision, positions, cell, first=prediction
                )
            self._tested = True
        forces = prediction.forces * KJ_PER_MOL_NM_PER_EV_ANGSTROM
        return prediction.energy.item() * KJ_PER_MOL_PER_EV, forces.cpu().numpy()


def _upgraded(settings: ComputationSettings) -> ComputationSettings:
    """The settings as the newest version has them."""
    if settings["version"] == 1:
        return settings | ComputationSettings(version=VERSION, kernels="auto")  # type: ignore[typeddict-item]
    if settings["version"] != VERSION:
        raise ValueError(
            f"this System was stored in version {settings['version']} of the format, and this "
            f"openmm-mlffd reads versions 1 and {VERSION}; another openmm-mlffd is needed"
        )
    return settings


def restore_computation(settings: ComputationSettings) -> StudentComputation:
    """Make the function of a stored `PythonForce`.

    Never raises and loads nothing: if unpickling fails while a System is read, OpenMM ends the
    whole process. What is wrong is said in the first evaluation.
    """
    return StudentComputation(settings)
