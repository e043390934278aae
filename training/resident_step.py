"""Steps on resident data: batches by index, compiled where possible, replayed as a CUDA graph."""

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openmm_mlffd.potential import Potential
from openmm_mlffd.training.batches import StructureSource
from openmm_mlffd.training.config import TrainConfig
from openmm_mlffd.training.distributed import Processes
from openmm_mlffd.training.resident import (
    Capacity,
    ResidentStructures,
    padded_index,
    plan,
    share,
)
from openmm_mlffd.training.step import TrainingStep

log = logging.getLogger(__name__)

_WARM_UP = 3
_REPLAYED = 1e-2  # largest relative deviation; additions in another order and TF32 make 3e-3


class ResidentStep:
    """Steps on the batches of an epoch, whose structures are on the device.

    On a CUDA device all batches have the same, padded size, for which the step is compiled and
    recorded as a CUDA graph at its first call; each later one copies the indices and replays it.
    Elsewhere batches have the size that they need and operations run one by one.

    Parameters
    ----------
    step
        What is done to the weights.
    structures
        Where batches are cut out.
    capacity
        Size of every batch, with padding.
    config
        `compile` and `cuda_graph`.
    alone
        Whether there is no other process: then the graph has the update, too.
    """

    def __init__(
        self,
        step: TrainingStep,
        structures: ResidentStructures,
        capacity: Capacity,
        config: TrainConfig,
        *,
        alone: bool = True,
    ) -> None:
        self._step = step
        self._structures = structures
        self.capacity = capacity
        device = structures.device
        self._index = torch.full((capacity.structures,), -1, dtype=torch.int64, device=device)
        self._totals = torch.ones(6, device=device, dtype=structures.dtype)
        self._wants_compile = wants_compile(config, device)
        self._wants_graph = device.type == "cuda" and config.cuda_graph
        self._alone = alone
        self._graph: torch.cuda.CUDAGraph | None = None
        self._ready = False
        self.shortfall = ""
        self._parts: list[NDArray[np.int64]] = []
        self._indices = self._index[None]
        self._all_totals = self._totals[None]

    @property
    def padded(self) -> bool:
        """Whether all batches have the same size."""
        return self._wants_compile or self._structures.device.type == "cuda"

    @property
    def is_graph(self) -> bool:
        """Whether steps are replayed."""
        return self._graph is not None

    @property
    def padding(self) -> float:
        """Share of the places for edges that are padding, in the batches of this epoch."""
        if not self.padded:
            return 0.0
        real = sum(int(self._structures.n_edges[p].sum()) for p in self._parts)
        return 1 - real / (self.capacity.edges * len(self._parts))

    @property
    def mean_atoms(self) -> float:
        """Atoms of a batch, on average over this epoch."""
        return sum(self.real_atoms(i) for i in range(len(self._parts))) / len(self._parts)

    def real_atoms(self, number: int) -> int:
        """Atoms of one of the batches."""
        return int(self._structures.n_atoms[self._parts[number]].sum())

    def load_epoch(self, parts: list[NDArray[np.int64]], totals: NDArray[np.float64]) -> None:
        """Bring the batches of an epoch, and what their losses are divided by, to the device."""
        device, dtype = self._structures.device, self._structures.dtype
        self._parts = parts
        self._all_totals = torch.from_numpy(totals).to(device, dtype)
        if self.padded:
            indices = np.stack([padded_index(part, self.capacity.structures) for part in parts])
            self._indices = torch.from_numpy(indices).to(device)

    def run(self, number: int) -> None:
        """The step on one of the batches."""
        if not self.padded:
            part = self._parts[number]
            index = torch.from_numpy(part).to(self._structures.device)
            size = self._structures.capacity([part], padded=False)
            self._step.run(self._structures.batch(index, size), self._all_totals[number])
            return
        self._index.copy_(self._indices[number])
        self._totals.copy_(self._all_totals[number])
        if not self._ready:
            self._prepare()
        if self._graph is None:
            self._differentiate()
            self._step.update()
        else:
            self._graph.replay()
            if not self._alone:
                self._step.update()

    def _differentiate(self) -> None:
        batch = self._structures.batch(self._index, self.capacity)
        self._step.differentiate(batch, self._totals)

    def _recorded(self) -> None:
        self._differentiate()
        if self._alone:
            self._step.update()

    def _prepare(self) -> None:
        self._ready = True
        batch = self._structures.batch(self._index, self.capacity)
        self._step.fuse(batch, self._totals)
        compiled = self._wants_compile and self._step.compile(batch, self._totals)
        if not compiled:
            self._step.write_out(batch, self._totals)
        if self._wants_compile and not compiled:
            self.shortfall += "not compiled; "
        if self._wants_graph:
            try:
                graph = record(self._recorded, self._step)
                check_replay(graph.replay, self._recorded, self._step)
                self._graph = graph
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                self.shortfall += "not recorded as a graph; "
                log.warning("the step is not a CUDA graph (%s); it runs launch by launch", reason)


class ResidentData:
    """The training structures on the device, and the steps on them.

    Parameters
    ----------
    source
        Structures that are held in memory.
    potential
        The student, with its reference energies.
    step
        What is done to the weights.
    config
        Everything else.
    processes
        Each does its share of every batch.
    hessian
        See `ResidentStructures`.
    """

    def __init__(
        self,
        source: StructureSource,
        potential: Potential,
        step: TrainingStep,
        config: TrainConfig,
        *,
        processes: Processes,
        hessian: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None,
    ) -> None:
        self._config = config
        self._processes = processes
        device = next(potential.parameters()).device
        self.structures = ResidentStructures(source, potential, device, hessian=hessian)
        self._counts = self.structures.counts(config.loss.angle_threshold)
        every = [part for batches in self._all_epochs() for part in self._own(batches)]
        capacity = self.structures.capacity(every, padded=True)
        self.step = ResidentStep(
            step, self.structures, capacity, config, alone=processes.count == 1
        )
        log.info(
            "%d structures and %.1f million edges on %s (%.2f GB)",
            len(source),
            self.structures.n_edges.sum() / 1e6,
            device,
            self.structures.n_bytes / 1e9,
        )

    def _all_epochs(self) -> Iterator[list[NDArray[np.int64]]]:
        """Batches of each epoch of the run; a number of steps may need more of them."""
        epoch, n_steps = 0, 0
        while epoch < self._config.epochs or n_steps < (self._config.fit_steps or 0):
            batches = self._plan(epoch)
            yield batches
            epoch, n_steps = epoch + 1, n_steps + len(batches)

    def load_epoch(self, epoch: int) -> int:
        """Make the batches of an epoch ready; returns how many there are."""
        batches = self._plan(epoch)
        totals = np.stack([self._counts[batch].sum(0) for batch in batches])
        self.step.load_epoch(self._own(batches), totals)
        return len(batches)

    def _plan(self, epoch: int) -> list[NDArray[np.int64]]:
        rng = np.random.default_rng([self._config.seed, epoch])
        return plan(
            self.structures.n_atoms,
            self._config.batch_atoms,
            rng,
            n_edges=self.structures.n_edges,
            batch_edges=self._config.batch_edges,
        )

    def _own(self, batches: list[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
        who, n_atoms = self._processes, self.structures.n_atoms
        return [share(batch, n_atoms, who.count)[who.rank] for batch in batches]


def record(work: Callable[[], None], step: TrainingStep) -> torch.cuda.CUDAGraph:
    """Record work as a CUDA graph; weights and optimizer are afterwards as they were before.

    Raises
    ------
    RuntimeError
        If some operation cannot be recorded.
    """
    saved = step.snapshot()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    step.restore(saved)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            work()
    finally:
        step.restore(saved)
    return graph


def check_replay(replay: Callable[[], None], work: Callable[[], None], step: TrainingStep) -> None:
    """Compare what a replayed step and the step itself do; all of it is undone.

    Where the gradients of structures nearly cancel, near the end of a training, TF32 alone changes
    their sum by more than `_REPLAYED`: the difference may be twice what that changes.

    Raises
    ------
    RuntimeError
        If loss or gradient, or the moved weights where the update is a part, differ.
    """
    saved, matmul = step.snapshot(), torch.backends.cuda.matmul

    def after(way: Callable[[], None]) -> list[Tensor]:
        way()
        found = [step.losses.clone(), step.gradient.clone()]
        step.restore(saved)
        return found

    expected = after(work)
    deviations = _deviations(after(replay), expected)
    allowed = [_REPLAYED, _REPLAYED]
    reduced = matmul.allow_tf32
    if reduced and not max(deviations) < _REPLAYED:
        matmul.allow_tf32 = False
        try:
            noise = _deviations(after(work), expected)
        finally:
            matmul.allow_tf32 = reduced
        allowed = [max(_REPLAYED, 2.0 * part) for part in noise]
        log.info("TF32 changes loss and gradient by the parts %.1e, %.1e", *noise)
    if not all(part < most for part, most in zip(deviations, allowed, strict=True)):
        raise RuntimeError(f"replayed, loss and gradient differ by the parts {deviations}")
    log.info("replayed loss and gradient differ by the parts %.1e, %.1e", *deviations)


def wants_compile(config: TrainConfig, device: torch.device) -> bool:
    """Whether to compile: as set, or, for "auto", on a GPU if a C compiler is there."""
    if config.compile == "auto":
        if device.type != "cuda":
            return False
        found = any(shutil.which(c) for c in ("cc", "gcc", "clang"))
        if not found:
            log.info("no C compiler is here, so the step is not compiled")
        return found
    return config.compile == "on"


def _deviations(found: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    return [
        float((b - a).norm() / a.norm().clamp(min=1e-12))
        for a, b in zip(expected, found, strict=True)
    ]
