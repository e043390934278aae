"""`Evaluator` with the fused kernels; on a GPU, a step is the replay of a captured CUDA graph."""

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from openmm_mlffd.captured import CapturedStep
from openmm_mlffd.evaluator import Evaluator
from openmm_mlffd.fast import FastPotential
from openmm_mlffd.faults import explained
from openmm_mlffd.neighbors import DEFAULT_SKIN
from openmm_mlffd.potential import Potential, Prediction
from openmm_mlffd.rows import VerletRows

REMEMBERED = 4096
"""Systems of more atoms than this are evaluated in little memory, at the price of some time."""

_FREE, _PERIODIC = (False, False, False), (True, True, True)


class FastEvaluator(Evaluator):
    """A student at work on the same atoms again and again, with the fused kernels.

    Gives what `Evaluator` gives; results are on the CPU, and are the caller's to keep.

    Parameters
    ----------
    potential
        The student, best in double precision, so that its weights are not rounded; its device is
        that of the work.
    numbers
        Atomic number of each atom.
    precision
        "single", "mixed" or "double", see `FastPotential`.
    skin
        Margin of the neighbor list [Å].
    labels
        What the caller calls each atom, for error messages; None for 0, 1, …
    capacity
        Neighbors that an atom may have within cutoff and skin; None for what is needed.

    Raises
    ------
    ValueError
        If there are no atoms, the student does not know an element, or the precision is unknown.

    Notes
    -----
    Threads may share an instance; they wait for one another. After an error the next evaluation
    starts with new neighbors, in new memory.
    """

    def __init__(
        self,
        potential: Potential,
        numbers: Sequence[int] | NDArray[np.integer[Any]],
        *,
        precision: str = "single",
        skin: float = DEFAULT_SKIN,
        labels: Sequence[int] | None = None,
        capacity: int | None = None,
    ) -> None:
        super().__init__(potential, numbers, skin=skin, labels=labels)
        with torch.inference_mode(False), torch.no_grad():
            self.fast = FastPotential(
                potential, precision=precision, remember=len(numbers) <= REMEMBERED
            )
        self._skin, self._capacity = skin, capacity
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._steps: dict[tuple[Any, ...], CapturedStep] = {}
        self._earlier_builds = 0

    def with_numbers(self, numbers: Sequence[int] | NDArray[np.integer[Any]]) -> "FastEvaluator":
        """Make an evaluator of other atoms with the same student."""
        other = copy.copy(self)
        Evaluator.__init__(other, self.potential, numbers, skin=self._skin)
        other._start()
        return other

    @property
    def n_builds(self) -> int:
        """How often neighbors were searched."""
        return self._earlier_builds + sum(step.lists.n_builds for step in self._steps.values())

    def predict(
        self,
        positions: ArrayLike,
        cell: ArrayLike | None = None,
        pbc: ArrayLike | None = None,
        *,
        virial: bool = True,
    ) -> Prediction:
        """Energies, forces and virial as float64 tensors on the CPU.

        Arguments and errors as of `Evaluator.predict`; without ``virial``, it is zero.

        Raises
        ------
        ValueError
            See `Evaluator.predict`.
        NeighborOverflow
            If an atom has more neighbors than the capacity.
        OutOfMemory, NotFinite, DeviceLost
            See `faults`.
        """
        array = np.asarray(positions, dtype=np.float64)
        self._check(array)
        if cell is None:
            if pbc is not None and np.any(pbc):
                raise ValueError("periodic directions need a cell")
            return self._run(_FREE, array, None, virial=virial, collect=CapturedStep.prediction)
        periodic = _PERIODIC
        box = np.array(cell, dtype=np.float64)
        if pbc is not None:
            given = np.asarray(pbc, dtype=np.bool_)
            box[~given] = 0.0
            periodic = (bool(given[0]), bool(given[1]), bool(given[2]))
        return self._run(periodic, array, box, virial=virial, collect=CapturedStep.prediction)

    def energy_and_forces(
        self,
        positions: NDArray[np.float64],
        cell: NDArray[np.float64] | None = None,
        *,
        length: float = 1.0,
        energy: float = 1.0,
        force: float = 1.0,
    ) -> tuple[float, NDArray[np.float64]]:
        """What dynamics needs in each step, the short way; see `Evaluator.energy_and_forces`."""
        if positions.shape != self._shape:
            self._check(positions)
        periodic = _FREE if cell is None else _PERIODIC
        return self._run(
            periodic, positions, cell, length=length,
            collect=lambda step: (float(step.tail[0]) * energy, step.forces * force),
        )  # fmt: skip

    def energy_and_forces_there(
        self,
        positions: Tensor,
        cell: NDArray[np.float64] | None = None,
        *,
        length: float = 1.0,
        energy: float = 1.0,
        force: float = 1.0,
    ) -> tuple[float, Tensor]:
        """As of `Evaluator`; positions and forces stay on the device."""
        if not positions.is_cuda:
            return super().energy_and_forces_there(
                positions, cell, length=length, energy=energy, force=force
            )
        if tuple(positions.shape) != self._shape:
            raise ValueError(f"positions of shape {self._shape} are needed, got {positions.shape}")
        periodic = _FREE if cell is None else _PERIODIC
        return self._run(
            periodic, positions, cell, length=length, there=True,
            collect=lambda step: (
                float(step.tail[0]) * energy, step.forces_there(force, positions.dtype)
            ),
        )  # fmt: skip

    def _run(
        self,
        periodic: tuple[bool, bool, bool],
        positions: NDArray[np.float64] | Tensor,
        box: NDArray[np.float64] | None,
        *,
        collect: Callable[[CapturedStep], Any],
        length: float = 1.0,
        virial: bool = False,
        there: bool = False,
    ) -> Any:
        key = (periodic, virial, there)
        with self._lock:
            try:
                step = self._steps.get(key) or self._open(periodic, virial, there)
                self._steps[key] = step
                step(positions, box, length)
                return collect(step)
            except (RuntimeError, MemoryError, FloatingPointError) as error:
                # what is in its memory, and whether all of it is there, is not known
                broken = self._steps.pop(key, None)
                if broken is not None:
                    self._earlier_builds += broken.lists.n_builds
                found = explained(error, len(self.numbers), self.device)
                if found is error:
                    raise
                raise found from error

    @contextlib.contextmanager
    def without_kernels(self) -> Iterator[None]:
        """Leave out the evaluation itself, to time the rest; results are those of the last step.

        Of the steps that were made before: evaluate once first.
        """
        kept = {step: step.replay for step in self._steps.values()}
        for step in kept:
            step.replay = _nothing
        try:
            yield
        finally:
            for step, replay in kept.items():
                step.replay = replay

    def _open(self, periodic: tuple[bool, bool, bool], virial: bool, there: bool) -> CapturedStep:
        with torch.inference_mode(False), torch.no_grad():
            lists = VerletRows(
                self._species, self.potential.cutoff, self._skin,
                periodic=torch.tensor(periodic), capacity=self._capacity,
            )  # fmt: skip
            return CapturedStep(self.fast, lists, virial, there, self._check, self.labels)


def _nothing() -> None:
    """What is evaluated where only the rest is timed."""
