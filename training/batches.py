"""From dataset files to batches on the device: seeded order, bounded memory, prefetched."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openmm_mlffd.graph import Graph, build_graph
from openmm_mlffd.potential import Potential
from openmm_mlffd.training.hdf5 import Dataset, Structures, concatenate, take


class Batch(NamedTuple):
    """Some structures with their labels, on the device."""

    graph: Graph
    """Atoms and edges."""

    energy: Tensor
    """[eV], shape (n_systems,), float64."""

    forces: Tensor
    """[eV/Å], shape (n_atoms, 3), float64."""

    virial: Tensor
    """Stress times volume [eV], NaN where not known, shape (n_systems, 3, 3), float64."""

    n_atoms: Tensor
    """Atoms of each system, shape (n_systems,), float64."""

    subset: Tensor
    """Subset of each system, shape (n_systems,), int64."""

    charges: Tensor
    """Partial charges [e], NaN where not known, shape (n_atoms,), float64."""

    probe: Tensor
    """Direction of the Hessian's row [Å], zeros where not known, shape (n_atoms, 3), float64."""

    curvature: Tensor
    """Hessian times the direction [eV/Å], NaN where not known, shape (n_atoms, 3), float64."""


def make_batch(structures: Structures, potential: Potential, device: torch.device) -> Batch:
    """Structures as tensors with a neighbor list, which is built on the device.

    Raises
    ------
    ValueError
        If a structure has an element that the potential does not know.
    """
    count = np.diff(structures.offsets)
    volume = np.abs(np.linalg.det(structures.cell))
    graph = make_graph(structures, potential, device, cutoff=potential.cutoff)

    def send(array: NDArray, dtype: torch.dtype) -> Tensor:
        return _send(array, dtype, device)

    return Batch(
        graph=graph,
        energy=send(structures.energy, torch.float64),
        forces=send(structures.forces, torch.float64),
        virial=send(structures.stress * volume[:, None, None], torch.float64),
        n_atoms=send(count, torch.float64),
        subset=send(structures.subset, torch.int64),
        charges=send(structures.partial_charges, torch.float64),
        probe=torch.zeros_like(graph.positions),
        curvature=torch.full_like(graph.positions, torch.nan),
    )


def make_graph(
    structures: Structures, potential: Potential, device: torch.device, *, cutoff: float
) -> Graph:
    """Structures as a graph of all pairs closer than the cutoff [Å]; see `make_batch`."""
    count = np.diff(structures.offsets)
    species = potential.species(torch.from_numpy(structures.atomic_numbers))
    return build_graph(
        _send(structures.positions, torch.float64, device),
        _send(species.numpy(), torch.int64, device),
        cutoff=cutoff,
        cell=_send(structures.cell, torch.float64, device),
        pbc=_send(structures.pbc, torch.bool, device),
        system=_send(np.repeat(np.arange(len(count)), count), torch.int64, device),
    )


def _send(array: NDArray, dtype: torch.dtype, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array).to(dtype)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class StructureSource:
    """The structures of one split of one or several dataset files.

    Parameters
    ----------
    datasets
        Open files; their subsets are merged by name.
    split
        "train", "val", "test" or "all".
    memory_gb
        Up to this size [GB] everything is held in memory; beyond, blocks are read as needed.
    max_structures
        Take a random subset of this size; None for all.
    block_size
        Structures read at a time from the files.
    seed
        Seed of the random subset.

    Raises
    ------
    ValueError
        If the split is empty.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        split: str,
        *,
        memory_gb: float = 8.0,
        max_structures: int | None = None,
        block_size: int = 4096,
        seed: int = 0,
    ) -> None:
        self.subsets = sorted({name for d in datasets for name in d.subsets})
        self._datasets = list(datasets)
        indices = [d.in_split(split) for d in datasets]
        if max_structures is not None:
            chosen = np.random.default_rng(seed).permutation(sum(map(len, indices)))
            keep = np.zeros(len(chosen), bool)
            keep[chosen[:max_structures]] = True
            ends = np.cumsum([len(i) for i in indices])[:-1]
            indices = [i[k] for i, k in zip(indices, np.split(keep, ends), strict=True)]
        # blocks of consecutive structures: (file, indices within the file)
        self._blocks = [
            (f, part)
            for f, index in enumerate(indices)
            for part in np.split(index, range(block_size, len(index), block_size))
            if len(part)
        ]
        if not self._blocks:
            raise ValueError(
                f"no structure is in the split {split!r} of "
                f"{', '.join(str(d.path) for d in datasets)}"
            )
        self.n_atoms = np.concatenate([datasets[f].n_atoms[part] for f, part in self._blocks])
        self._memory: Structures | None = None
        if self.n_atoms.sum() * 40 < memory_gb * 1e9:
            self._memory = concatenate(self._read_block(b) for b in range(len(self._blocks)))

    def __len__(self) -> int:
        return len(self.n_atoms)

    @property
    def in_memory(self) -> bool:
        """Whether everything is held in memory."""
        return self._memory is not None

    @property
    def memory(self) -> Structures:
        """All structures, in the order of the files.

        Raises
        ------
        ValueError
            If they are streamed.
        """
        if self._memory is None:
            raise ValueError("the structures are streamed, not held in memory")
        return self._memory

    @property
    def rows(self) -> list[tuple[int, NDArray[np.int64]]]:
        """Where the structures are: number of the file and indices within it, block by block."""
        return list(self._blocks)

    def _read_block(self, block: int) -> Structures:
        file, part = self._blocks[block]
        dataset = self._datasets[file]
        first = int(part[0])
        structures = take(dataset.read(first, int(part[-1]) + 1), part - first)
        names = np.array([self.subsets.index(s) for s in dataset.subsets], "u1")
        return structures._replace(subset=names[structures.subset])

    def batches(
        self, batch_atoms: int, *, rng: np.random.Generator | None = None, first: int = 0
    ) -> Iterator[Structures]:
        """One pass over the structures, in batches of up to so many atoms.

        Parameters
        ----------
        batch_atoms
            Atoms in a batch, at most (one larger structure is a batch of its own).
        rng
            Shuffles: everything if in memory, else blocks and within pools of 8 blocks.
            None keeps the order of the files.
        first
            Batches to pass over at the start, without reading them where possible.
        """
        if self._memory is not None:
            order = np.arange(len(self)) if rng is None else rng.permutation(len(self))
            for part in _cut(order, self.n_atoms, batch_atoms)[first:]:
                yield take(self._memory, part)
            return
        blocks = np.arange(len(self._blocks))
        if rng is not None:
            rng.shuffle(blocks)
        starts = np.cumsum([0] + [len(part) for _, part in self._blocks])
        for pool in np.split(blocks, range(8, len(blocks), 8)):
            rows = np.concatenate([np.arange(starts[b], starts[b + 1]) for b in pool])
            order = np.arange(len(rows)) if rng is None else rng.permutation(len(rows))
            parts = _cut(order, self.n_atoms[rows], batch_atoms)
            skipped, first = min(first, len(parts)), max(0, first - len(parts))
            if skipped < len(parts):
                structures = concatenate(self._read_block(b) for b in pool)
                for part in parts[skipped:]:
                    yield take(structures, part)


def _cut(
    order: NDArray[np.int64], n_atoms: NDArray[np.int64], batch_atoms: int
) -> list[NDArray[np.int64]]:
    """Cut an order of structures where the number of atoms would pass the limit."""
    return np.split(order, cut_places(n_atoms[order], batch_atoms))


def cut_places(
    n_atoms: NDArray[np.int64],
    batch_atoms: int,
    n_edges: NDArray[np.int64] | None = None,
    batch_edges: int | None = None,
) -> list[int]:
    """Where batches begin, but the first, so that none has more atoms or edges than so many.

    A structure with more is a batch of its own.
    """
    limits = [(np.cumsum(n_atoms), batch_atoms)]
    if n_edges is not None and batch_edges is not None:
        limits.append((np.cumsum(n_edges), batch_edges))
    cuts: list[int] = []
    start = 0
    while True:
        end = min(
            int(np.searchsorted(ends, (ends[start - 1] if start else 0) + most, side="right"))
            for ends, most in limits
        )
        start = max(start + 1, end)
        if start >= len(n_atoms):
            return cuts
        cuts.append(start)


def prefetch(
    structures: Iterator[Structures],
    potential: Potential,
    device: torch.device,
    depth: int = 4,
    *,
    convert: Callable[[Batch], Any] = lambda batch: batch,
) -> Iterator[Any]:
    """Make batches in a thread of their own, on a CUDA stream of their own, ahead of their use.

    What is given are `Batch`, or what `convert` makes of them in that thread.
    """
    ready: queue.Queue[Any] = queue.Queue(depth)
    stopped = threading.Event()
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def put(item: Any) -> None:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return

    def produce() -> None:
        try:
            for part in structures:
                if stopped.is_set():
                    return
                with torch.cuda.stream(stream):
                    batch = convert(make_batch(part, potential, device))
                if stream is not None:
                    stream.synchronize()
                put(batch)
            put(None)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=produce, daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            if stream is not None:
                for tensor in _tensors(item):
                    tensor.record_stream(torch.cuda.current_stream(device))
            yield item
    finally:
        stopped.set()
        thread.join()


def _tensors(item: tuple[Any, ...]) -> Iterator[Tensor]:
    for part in item:
        if isinstance(part, Tensor):
            yield part
        else:
            yield from _tensors(part)
