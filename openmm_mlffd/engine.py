"""`Evaluator` with the fused kernels; on a GPU, a step is the replay of a captured CUDA graph.

A step is evaluated with the neighbors that there are, and what comes back tells whether they were
still valid. If not they are found anew and the step is evaluated again, before anyone sees the
result. So there is one wait for the device in a step, and no result is ever that of a stale list.
"""

import copy
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from openmm_mlffd.evaluator import Evaluator
from openmm_mlffd.fast import FastPotential
from openmm_mlffd.neighbors import DEFAULT_SKIN
from openmm_mlffd.potential import Potential, Prediction
from openmm_mlffd.rows import VerletRows, check_volume

_REMEMBERED = 4096
"""Systems of more atoms than this are evaluated in little memory, at the price of some time."""

_WARM_UP = 3  # evaluations before a capture: libraries and allocators set themselves up


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
    Threads may share an instance; they wait for one another.
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
                potential, precision=precision, remember=len(numbers) <= _REMEMBERED
            )
        self._skin, self._capacity = skin, capacity
        self._lock = threading.Lock()
        self._steps: dict[tuple[bool, ...], _Step] = {}

    def with_numbers(self, numbers: Sequence[int] | NDArray[np.integer[Any]]) -> "FastEvaluator":
        """Make an evaluator of other atoms with the same student."""
        other = copy.copy(self)
        Evaluator.__init__(other, self.potential, numbers, skin=self._skin)
        other._lock, other._steps = threading.Lock(), {}
        return other

    @property
    def n_builds(self) -> int:
        """How often neighbors were searched."""
        return sum(step.lists.n_builds for step in self._steps.values())

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
        """
        array = np.asarray(positions, dtype=np.float64)
        self._check(array)
        if cell is None:
            if pbc is not None and np.any(pbc):
                raise ValueError("periodic directions need a cell")
            periodic: tuple[bool, ...] = (False, False, False)
        else:
            given = (True, True, True) if pbc is None else np.asarray(pbc, dtype=np.bool_)
            periodic = tuple(bool(p) for p in given)
        box = np.zeros((3, 3)) if cell is None else np.array(cell, dtype=np.float64)
        box[~np.array(periodic)] = 0.0
        with self._lock, torch.inference_mode(False), torch.no_grad():
            step = self._steps.get((*periodic, virial))
            if step is None:
                lists = VerletRows(
                    self._species, self.potential.cutoff, self._skin,
                    periodic=torch.tensor(periodic), capacity=self._capacity,
                )  # fmt: skip
                step = self._steps[(*periodic, virial)] = _Step(self.fast, lists, virial)
            return step(array, box)


class _Step:
    """One evaluation, with everything that it needs at fixed addresses."""

    def __init__(self, fast: Callable[..., Prediction], lists: VerletRows, virial: bool) -> None:
        self.fast, self.lists, self.virial = fast, lists, virial
        n_atoms, device = lists.rows.positions.shape[0], lists.rows.positions.device
        self.on_gpu = device.type == "cuda"
        self.input = torch.zeros((n_atoms, 3), dtype=torch.float64, pin_memory=self.on_gpu)
        # forces, atom energies, then energy, virial (9) and how far atoms have moved
        self.output = torch.zeros(4 * n_atoms + 11, dtype=torch.float64, device=device)
        self.host = torch.zeros(4 * n_atoms + 11, dtype=torch.float64, pin_memory=self.on_gpu)
        self.box: NDArray[np.float64] | None = None
        self.moved = math.inf
        self.speed = 0.0
        self.replay: Callable[[], None] | None = None
        self.refill: Callable[[], None] | None = None

    def __call__(self, positions: NDArray[np.float64], box: NDArray[np.float64]) -> Prediction:
        self.input.numpy()[:] = positions
        self.lists.rows.positions.copy_(self.input, non_blocking=True)
        if self.box is None or not np.array_equal(box, self.box):
            cell = torch.tensor(box)
            check_volume(cell, self.lists.pbc[0].cpu())
            self.lists.rows.cell.copy_(cell[None])
            self.box, self.moved = box, math.inf
        if not self._looks_valid():
            self._build()
        if not self._evaluate():
            self._build()
            if not self._evaluate():
                raise RuntimeError("atoms are not where their neighbors were just searched")
        return self._prediction()

    def _looks_valid(self) -> bool:
        """Whether the list can be hoped to hold; `_evaluate` knows."""
        if not self.on_gpu:  # nothing to wait for
            self.moved = float(self.lists.moved()) if math.isfinite(self.moved) else math.inf
            return self.lists.holds(self.moved)
        # as far again as in the last step
        return self.lists.holds((math.sqrt(self.moved) + self.speed) ** 2)

    def _build(self) -> None:
        if self.refill is None:
            self.refill = self._captured(self.lists.fill)
        self.refill()
        if self.lists.make_room():
            # other tensors: what was captured reads the old ones
            self.replay = self.refill = None
            self.lists.fill()

    def _evaluate(self) -> bool:
        """Energies and forces, and whether the neighbors were all of them."""
        if self.replay is None:
            self.replay = self._captured(self._compute)
        self.replay()
        self.host.copy_(self.output, non_blocking=True)
        if self.on_gpu:
            torch.cuda.current_stream(self.output.device).synchronize()
        moved = float(self.host[-1])
        self.speed = max(0.0, math.sqrt(moved) - math.sqrt(self.moved)) if moved else 0.0
        self.moved = moved
        return self.lists.holds(moved)

    def _compute(self) -> None:
        found = self.fast(self.lists.rows, self.virial)
        forces, virial = found.forces.reshape(-1), found.virial.reshape(-1)
        parts = [forces, found.atom_energies, found.energy, virial]
        torch.cat([*parts, self.lists.moved().view(1)], out=self.output)

    def _captured(self, function: Callable[[], None]) -> Callable[[], None]:
        """The function itself, or the replay of a CUDA graph of it."""
        if not self.on_gpu:
            return function
        device = self.output.device
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                function()
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            function()
        return graph.replay

    def _prediction(self) -> Prediction:
        out = self.host.clone()
        n = self.input.shape[0]
        virial = out[4 * n + 1 : 4 * n + 10].view(1, 3, 3)
        return Prediction(
            out[4 * n : 4 * n + 1], out[: 3 * n].view(n, 3), virial, out[3 * n : 4 * n]
        )
