"""What a `PythonForce` calls and what it stores. Imports neither openmm nor openmmml."""

import itertools
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, NotRequired, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openmm_mlffd.engines import open_evaluator
from openmm_mlffd.evaluator import Evaluator, StudentSource
from openmm_mlffd.interfaces.openmm_selftest import SelfTest, self_test_evaluator
from openmm_mlffd.units import ANGSTROM_PER_NM, KJ_PER_MOL_NM_PER_EV_ANGSTROM, KJ_PER_MOL_PER_EV

VERSION = 2
"""Version of the settings that are stored with a System. Version 1 had no `kernels`."""


_UNITS = {
    "length": ANGSTROM_PER_NM,
    "energy": KJ_PER_MOL_PER_EV,
    "force": KJ_PER_MOL_NM_PER_EV_ANGSTROM,
}
_Latest = tuple[NDArray[np.float64] | Tensor, NDArray[np.float64] | None, float, int, int]
_order = itertools.count()
_alive: "weakref.WeakSet[StudentComputation]" = weakref.WeakSet()


class LastGood(NamedTuple):
    """The last configuration that a student could evaluate."""

    positions: NDArray[np.float64]
    """Positions of the student's atoms [nm], shape (n_atoms, 3)."""

    box: NDArray[np.float64] | None
    """Box vectors as rows [nm], shape (3, 3); None for no box."""

    energy: float
    """The student's energy [kJ/mol]."""

    step: int
    """OpenMM's number of the step; -1 with engine='torchscript', which is not told."""


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
        self._follows = False
        self._by_thread: dict[int, Evaluator] = {}
        self._by_device: dict[str, Evaluator] = {}
        self._box: tuple[Any, NDArray[np.float64]] | None = None
        self._latest: _Latest | None = None
        _alive.add(self)

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
            raise RuntimeError(self._explanation(error)) from error

    @property
    def last_good(self) -> LastGood | None:
        """The last configuration that was evaluated; None if there was none."""
        if self._latest is None:
            return None
        found, box, energy, step, _ = self._latest
        positions = found.double().cpu().numpy() if isinstance(found, Tensor) else found
        return LastGood(positions.copy(), None if box is None else box.copy(), energy, step)

    def start(self) -> Evaluator:
        """Load the student, if that is not done; where it cannot be used, this says so."""
        if self._evaluator is None:
            device = self.settings["device"]
            self._evaluator = self._open(device)
            self._follows = device is None and torch.cuda.device_count() > 1
        return self._evaluator

    def _open(self, device: str | None) -> Evaluator:
        settings = _upgraded(self.settings)
        return open_evaluator(
            self._source(),
            settings["numbers"],
            kernels=settings["kernels"],
            precision=settings["precision"],
            device=device,
            labels=settings["atoms"],
        )

    def _source(self) -> StudentSource:
        settings = self.settings
        return StudentSource(
            name=settings["name"], path=settings["path"], sha256=settings["sha256"]
        )

    def _compute(self, state: Any) -> tuple[float, NDArray[np.float64]]:
        evaluator = self._evaluator or self.start()
        if self._follows:
            evaluator = self._by_thread.get(threading.get_ident()) or self._follow(state)
        positions = positions_of(state)
        cell = self._cell_of(state) if self.settings["periodic"] else None
        energy, forces = evaluator.energy_and_forces(positions, cell, **_UNITS)
        if not self._tested:
            self._test(evaluator, positions, cell, energy, forces)
        # an exception must not cost the state before it: OpenMM may have moved on by then
        self._latest = positions, cell, energy, state.getStepCount(), next(_order)
        return energy, forces

    def of_tensors(self, positions: Tensor, box: Tensor | None) -> tuple[Tensor, Tensor]:
        """Energy and forces where the positions are: the way of a `TorchForce`.

        Parameters
        ----------
        positions
            Positions of all particles of the System [nm], shape ``(n_particles, 3)``.
        box
            Box vectors as rows [nm], shape ``(3, 3)``; None if it is not periodic.

        Returns
        -------
        Tensor, Tensor
            Energy [kJ/mol], a scalar on the CPU, and forces [kJ/mol/nm] of all particles, with
            the device and dtype of the positions.
        """
        given = positions.detach()
        atoms = self.settings["atoms"]
        index = None if atoms is None else torch.tensor(atoms, device=given.device)
        chosen = given.clone() if index is None else given.index_select(0, index)
        periodic = self.settings["periodic"] and box is not None
        cell = box.detach().double().cpu().numpy() if box is not None and periodic else None
        try:
            evaluator = self._on(given.device)
            energy, forces = evaluator.energy_and_forces_there(chosen, cell, **_UNITS)
            if not self._tested:
                on_host = chosen.double().cpu().numpy()
                self._test(evaluator, on_host, cell, energy, forces.double().cpu().numpy())
        except Exception as error:
            raise RuntimeError(self._explanation(error)) from error
        self._latest = chosen, cell, energy, -1, next(_order)
        if index is not None:
            forces = torch.zeros_like(given).index_copy_(0, index, forces)
        return torch.tensor(energy, dtype=torch.float64), forces

    def _on(self, device: torch.device) -> Evaluator:
        """The evaluator on a device."""
        key = str(device)
        if key not in self._by_device:
            self._by_device[key] = self._open(key)
        return self._by_device[key]

    def _explanation(self, error: Exception) -> str:
        text = f"{type(error).__name__} in the mlffd potential: {error}"
        if self._latest is not None:
            text += ". The last state before: openmm_mlffd.last_good(system)"
        return text

    def _follow(self, state: Any) -> Evaluator:
        """The evaluator on the GPU of the Context; remembered for the thread."""
        from openmm_mlffd.interfaces.openmm_device import device_of, running_contexts

        index = device_of(
            running_contexts(), len(self.settings["numbers"]), state.getStepCount(),
            state.getTime()._value,
        )  # fmt: skip
        evaluator = self.start()
        if index is not None:
            device = torch.device("cuda", index)
            known = [e for e in (evaluator, *self._by_thread.values()) if _is_on(e, device)]
            evaluator = known[0] if known else self._open(str(device))
        self._by_thread[threading.get_ident()] = evaluator
        return evaluator

    def _cell_of(self, state: Any) -> NDArray[np.float64]:
        """Box vectors [nm]; the same array as long as the box is the same."""
        vectors = state.getPeriodicBoxVectors()._value
        known = self._box  # one immutable object: threads may share this one
        if known is None or known[0] != vectors:
            known = self._box = (vectors, np.array(vectors, dtype=np.float64))
        return known[1]

    def _test(
        self,
        evaluator: Evaluator,
        positions: NDArray[np.float64],
        cell: NDArray[np.float64] | None,
        energy: float,
        forces: NDArray[np.float64],
    ) -> None:
        if self.settings.get("self_test", True):
            self.self_test = self_test_evaluator(
                evaluator,
                self._source(),
                self.settings["precision"],
                positions * ANGSTROM_PER_NM,
                None if cell is None else cell * ANGSTROM_PER_NM,
                first=(energy / KJ_PER_MOL_PER_EV, forces / KJ_PER_MOL_NM_PER_EV_ANGSTROM),
            )
        self._tested = True


def last_good(settings: ComputationSettings) -> LastGood | None:
    """The last configuration evaluated with these settings in this process, in any Context."""
    found = [c for c in list(_alive) if c.settings == settings and c._latest is not None]
    latest = max(found, key=lambda c: c._latest[4] if c._latest else -1, default=None)
    return None if latest is None else latest.last_good


def _is_on(evaluator: Evaluator, device: torch.device) -> bool:
    return evaluator.device.type == device.type and (evaluator.device.index or 0) == device.index


def positions_of(state: Any) -> NDArray[np.float64]:
    """Positions of a State [nm], shape ``(n_atoms, 3)``, the caller's to keep."""
    try:
        read = state._getVectorAsNumpy
    except AttributeError:
        return np.array(state.getPositions(asNumpy=True)._value)
    # what getPositions(asNumpy=True) does, without units: a tenth of its time
    positions = np.empty((state._getNumParticles(), 3))
    read(state.Positions, positions)
    return positions


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
