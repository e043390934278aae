"""`Evaluator` with the fused kernels; on a GPU, a step is the replay of a captured CUDA graph.

A step is evaluated with the neighbors that there are, and what comes back tells whether they were
still valid. If not they are found anew and the step is evaluated again, before anyone sees the
result. So there is one wait for the device in a step, and no result is ever that of a stale list.
"""

import copy
import logging
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from openmm_mlffd.evaluator import Evaluator
from openmm_mlffd.fast import FastPotential
from openmm_mlffd.faults import explained, not_finite
from openmm_mlffd.neighbors import DEFAULT_SKIN
from openmm_mlffd.potential import Potential, Prediction
from openmm_mlffd.rows import VerletRows, check_volume

_REMEMBERED = 4096
"""Systems of more atoms than this are evaluated in little memory, at the price of some time."""

_WARM_UP = 3  # evaluations before a capture: libraries and allocators set themselves up
_FREE, _PERIODIC = (False, False, False), (True, True, True)
_TAIL = 12  # energy, virial (9), norm of the forces, square of how far an atom has moved

_logger = logging.getLogger(__name__)


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
                potential, precision=precision, remember=len(numbers) <= _REMEMBERED
            )
        self._skin, self._capacity = skin, capacity
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._steps: dict[tuple[Any, ...], _Step] = {}
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
            return self._run(_FREE, array, None, virial=virial, collect=_Step.prediction)
        periodic = _PERIODIC
        box = np.array(cell, dtype=np.float64)
        if pbc is not None:
            given = np.asarray(pbc, dtype=np.bool_)
            box[~given] = 0.0
            periodic = (bool(given[0]), bool(given[1]), bool(given[2]))
        return self._run(periodic, array, box, virial=virial, collect=_Step.prediction)

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
        cell: NDArray[np.float64] | None,
        *,
        length: float = 1.0,
        energy: float = 1.0,
        force: float = 1.0,
    ) -> tuple[float, Tensor]:
        """As `energy_and_forces`, of positions that are on the device already.

        Parameters
        ----------
        positions
            Atom positions, times ``length`` in Å, shape ``(n_atoms, 3)``, on the student's device.
        cell, length, energy, force
            As of `energy_and_forces`; the box is on the host.

        Returns
        -------
        float, Tensor
            Energy, and forces on the device, with the dtype of the positions.
        """
        if not positions.is_cuda:
            value, forces = self.energy_and_forces(
                positions.detach().double().numpy(), cell, length=length, energy=energy, force=force
            )
            return value, torch.from_numpy(forces).to(positions.dtype)
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
        collect: Callable[["_Step"], Any],
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

    def _open(self, periodic: tuple[bool, bool, bool], virial: bool, there: bool) -> "_Step":
        with torch.inference_mode(False), torch.no_grad():
            lists = VerletRows(
                self._species, self.potential.cutoff, self._skin,
                periodic=torch.tensor(periodic), capacity=self._capacity,
            )  # fmt: skip
            return _Step(self.fast, lists, virial, there, self._check, self.labels)


class _Step:
    """One evaluation, with everything that it needs at fixed addresses."""

    def __init__(
        self,
        fast: Callable[..., Prediction],
        lists: VerletRows,
        virial: bool,
        there: bool,
        check: Callable[[NDArray[np.float64]], None],
        labels: Sequence[int] | None,
    ) -> None:
        self.fast, self.lists, self.virial, self.there = fast, lists, virial, there
        self.check, self.labels = check, labels
        n, device = lists.rows.positions.shape[0], lists.rows.positions.device
        self.n_atoms, self.device, self.on_gpu = n, device, device.type == "cuda"
        self.input = torch.zeros((n, 3), dtype=torch.float64, pin_memory=self.on_gpu)
        # forces, atom energies, and the tail
        self.output = torch.zeros(4 * n + _TAIL, dtype=torch.float64, device=device)
        n_read = _TAIL if there else 4 * n + _TAIL
        self.host = torch.zeros(n_read, dtype=torch.float64, pin_memory=self.on_gpu)
        # views: indexing tensors costs microseconds
        self.given: NDArray[np.float64] = self.input.numpy()
        self.flat = self.given.reshape(-1)
        self.found: NDArray[np.float64] = self.host.numpy()
        self.tail = self.found[-_TAIL:]
        self.forces = self.found[: 0 if there else 3 * n].reshape(-1, 3)
        self.box: bytes | None = None
        self.box_length = 1.0
        self.moved = math.inf
        self.speed = 0.0
        self.copies_inside = True
        self.replay: Callable[[], None] | None = None
        self.refill: Callable[[], None] | None = None

    def __call__(
        self,
        positions: NDArray[np.float64] | Tensor,
        box: NDArray[np.float64] | None,
        length: float,
    ) -> None:
        self._take(positions, length)
        if box is None:
            if self.box is None:
                self.box = b""
        elif self.box is None or box.tobytes() != self.box or length != self.box_length:
            self._take_box(box, length)
        if not self._looks_valid():
            self._build()
        if not self._evaluate():
            self._build()
            if not self._evaluate():
                self._refuse_positions()
        self._refuse_results()

    def _take(self, positions: NDArray[np.float64] | Tensor, length: float) -> None:
        if isinstance(positions, Tensor):
            torch.mul(positions.detach(), length, out=self.lists.rows.positions)
            return
        np.multiply(positions, length, out=self.given)
        if not math.isfinite(self.flat.dot(self.flat)):
            self.check(self.given)
        if not self.on_gpu or not self.copies_inside:
            self._upload()

    def _upload(self) -> None:
        if not self.there:
            self.lists.rows.positions.copy_(self.input, non_blocking=True)

    def _take_box(self, box: NDArray[np.float64], length: float) -> None:
        cell = torch.tensor(box * length)
        check_volume(cell, self.lists.pbc[0].cpu())
        self.lists.rows.cell.copy_(cell[None])
        self.box, self.box_length, self.moved = box.tobytes(), length, math.inf

    def _looks_valid(self) -> bool:
        """Whether the list can be hoped to hold; `_evaluate` knows."""
        if not self.on_gpu:  # nothing to wait for
            self.moved = float(self.lists.moved()) if math.isfinite(self.moved) else math.inf
            return self.lists.holds(self.moved)
        # as far again as in the last step
        return self.lists.holds((math.sqrt(self.moved) + self.speed) ** 2)

    def _build(self) -> None:
        with torch.inference_mode(False), torch.no_grad():
            if self.refill is None:
                self.refill = self._captured(self._fill)
            self.refill()
            if self.lists.make_room():
                # other tensors: what was captured reads the old ones
                self.replay = self.refill = None
                self._fill()

    def _evaluate(self) -> bool:
        """Energies and forces, and whether the neighbors were all of them."""
        if self.replay is None:
            with torch.inference_mode(False), torch.no_grad():
                self.replay = self._captured(self._compute)
        if self.on_gpu:
            self.replay()
            if not self.copies_inside:
                self._download()
            torch.cuda.current_stream(self.device).synchronize()
        else:
            with torch.inference_mode(False), torch.no_grad():
                self.replay()
        moved = float(self.tail[-1])
        self.speed = max(0.0, math.sqrt(moved) - math.sqrt(self.moved)) if moved else 0.0
        self.moved = moved
        return self.lists.holds(moved)

    def _fill(self) -> None:
        if self.copies_inside:
            self._upload()
        self.lists.fill()

    def _compute(self) -> None:
        if self.copies_inside:
            self._upload()
        found = self.fast(self.lists.rows, self.virial)
        forces, virial = found.forces.reshape(-1), found.virial.reshape(-1)
        size = torch.linalg.vector_norm(forces).view(1)
        parts = [forces, found.atom_energies, found.energy, virial, size]
        torch.cat([*parts, self.lists.moved().view(1)], out=self.output)
        if self.copies_inside:
            self._download()

    def _download(self) -> None:
        self.host.copy_(self.output[-self.host.shape[0] :], non_blocking=True)

    def _captured(self, function: Callable[[], None]) -> Callable[[], None]:
        """The function itself, or the replay of a CUDA graph of it."""
        if not self.on_gpu:
            return function
        try:
            return self._capture(function)
        except RuntimeError as error:
            if not self.copies_inside or "memory" in str(error):
                raise
            _logger.info("copies are left out of the CUDA graph: %s", error)
            self.copies_inside = False
            self._upload()
            return self._capture(function)

    def _capture(self, function: Callable[[], None]) -> Callable[[], None]:
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                function()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            function()
        return graph.replay

    def _refuse_positions(self) -> None:
        """Say what is wrong with positions whose neighbors cannot be found."""
        self.check(self.lists.rows.positions.cpu().numpy())
        raise RuntimeError("atoms are not where their neighbors were just searched")

    def _refuse_results(self) -> None:
        if math.isfinite(self.tail[0]) and math.isfinite(self.tail[-2]):
            return
        forces = self.output[: 3 * self.n_atoms].view(-1, 3).cpu().numpy()
        bad = np.flatnonzero(~np.isfinite(forces).all(axis=1)).tolist()
        if not bad:
            raise not_finite("energy", self.n_atoms, None)
        first = bad[0] if self.labels is None else self.labels[bad[0]]
        raise not_finite("forces", self.n_atoms, first)

    def forces_there(self, force: float, dtype: torch.dtype) -> Tensor:
        """Forces on the device, the caller's to keep."""
        return (self.output[: 3 * self.n_atoms].view(-1, 3) * force).to(dtype)

    def prediction(self) -> Prediction:
        """All of it, the caller's to keep."""
        with torch.inference_mode(False):
            out = torch.from_numpy(self.found.copy())
        n = self.n_atoms
        return Prediction(
            out[4 * n : 4 * n + 1],
            out[: 3 * n].view(n, 3),
            out[4 * n + 1 : 4 * n + 10].view(1, 3, 3),
            out[3 * n : 4 * n],
        )
