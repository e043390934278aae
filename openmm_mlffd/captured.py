"""One evaluation with fixed memory; on a GPU, the replay of a captured CUDA graph.

A step is evaluated with the neighbors that there are, and what comes back tells whether they were
still valid. If not they are found anew and the step is evaluated again, before anyone sees the
result. So there is one wait for the device in a step, and no result is ever that of a stale list.
"""

import logging
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openmm_mlffd.faults import not_finite
from openmm_mlffd.potential import Prediction
from openmm_mlffd.rows import VerletRows, check_volume

_WARM_UP = 3  # evaluations before a capture: libraries and allocators set themselves up

_FEW = 4096  # atoms whose forces are summed by the host sooner than by another kernel

_logger = logging.getLogger(__name__)


class CapturedStep:
    """One evaluation of one or more systems, with everything that it needs at fixed addresses.

    Parameters
    ----------
    fast
        The student, as `FastPotential`.
    lists
        The neighbors.
    virial
        Whether the virials are wanted; they are zero if not.
    there
        Whether positions come from the device and forces stay there.
    check
        Called with positions [Å] that are not finite, to say which.
    labels
        What the caller calls each atom, for error messages; None for 0, 1, …
    capture
        Whether to make CUDA graphs, on a GPU; it takes as long as some ten evaluations.
    """

    def __init__(
        self,
        fast: Callable[..., Prediction],
        lists: VerletRows,
        virial: bool,
        there: bool,
        check: Callable[[NDArray[np.float64]], None],
        labels: Sequence[int] | None,
        capture: bool = True,
    ) -> None:
        self.fast, self.lists, self.virial, self.there = fast, lists, virial, there
        self.check, self.labels, self.capture = check, labels, capture
        self.n_systems = lists.pbc.shape[0]
        # energies, virials, norm of many forces, square of how far an atom has moved
        self.n_tail = 10 * self.n_systems + 2
        n, device = lists.rows.positions.shape[0], lists.rows.positions.device
        self.n_atoms, self.device, self.on_gpu = n, device, device.type == "cuda"
        self.input = torch.zeros((n, 3), dtype=torch.float64, pin_memory=self.on_gpu)
        # forces, atom energies, and the tail
        self.output = torch.zeros(4 * n + self.n_tail, dtype=torch.float64, device=device)
        n_read = self.n_tail if there else 4 * n + self.n_tail
        self.host = torch.zeros(n_read, dtype=torch.float64, pin_memory=self.on_gpu)
        # views: indexing tensors costs microseconds
        self.given: NDArray[np.float64] = self.input.numpy()
        self.flat = self.given.reshape(-1)
        self.found: NDArray[np.float64] = self.host.numpy()
        self.tail = self.found[-self.n_tail :]
        self.few = n <= _FEW and not there
        self.no_size = torch.zeros(1, dtype=torch.float64, device=device)
        self.forces = self.found[: 0 if there else 3 * n].reshape(-1, 3)
        self.all_forces = self.forces.reshape(-1)
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
        """Evaluate; what was found is in the attributes until the next call.

        Parameters
        ----------
        positions
            Atom positions, times ``length`` in Å, shape ``(n_atoms, 3)``.
        box
            Box vectors, times ``length`` in Å, shape ``(3, 3)`` or ``(n_systems, 3, 3)``; None
            for no box.
        length
            The caller's unit of length [Å].
        """
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
        cells = torch.tensor(box * length).view(-1, 3, 3)
        for cell, periodic in zip(cells, self.lists.pbc.cpu(), strict=True):
            check_volume(cell, periodic)
        self.lists.rows.cell.copy_(cells)
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
        size = self.no_size if self.few else torch.linalg.vector_norm(forces).view(1)
        parts = [forces, found.atom_energies, found.energy, virial, size]
        torch.cat([*parts, self.lists.moved().view(1)], out=self.output)
        if self.copies_inside:
            self._download()

    def _download(self) -> None:
        self.host.copy_(self.output[-self.host.shape[0] :], non_blocking=True)

    def _captured(self, function: Callable[[], None]) -> Callable[[], None]:
        """The function itself, or the replay of a CUDA graph of it."""
        if not self.on_gpu or not self.capture:
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
        energies = self.tail[: self.n_systems]
        size = self.all_forces.dot(self.all_forces) if self.few else self.tail[-2]
        if math.isfinite(size) and (
            math.isfinite(energies[0]) if self.n_systems == 1 else np.isfinite(energies).all()
        ):
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
        n, energies, virials = self.n_atoms, 4 * self.n_atoms, 4 * self.n_atoms + self.n_systems
        return Prediction(
            out[energies:virials],
            out[: 3 * n].view(n, 3),
            out[virials : virials + 9 * self.n_systems].view(-1, 3, 3),
            out[3 * n : energies],
        )
