"""Many systems at once: a student on batches of them, with the fused kernels."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from openmm_mlffd.captured import CapturedStep
from openmm_mlffd.engine import REMEMBERED
from openmm_mlffd.evaluator import Evaluation, StudentSource, resolve_device
from openmm_mlffd.fast import FastPotential
from openmm_mlffd.faults import explained
from openmm_mlffd.graph import Graph
from openmm_mlffd.neighbors import DEFAULT_SKIN
from openmm_mlffd.potential import Potential, Prediction
from openmm_mlffd.rows import VerletRows

BATCH_ATOMS = 20_000
"""Atoms in a batch: enough for a GPU to be busy, 1 GB."""

_KEPT = 4  # batches that were seen again: their memory and CUDA graphs are kept


_NO_CELL = np.zeros((3, 3))
_NOWHERE, _EVERYWHERE = np.zeros(3, dtype=np.bool_), np.ones(3, dtype=np.bool_)


class AtomicSystem(NamedTuple):
    """Atoms at a place. A plain tuple of the same will do."""

    numbers: ArrayLike
    """Atomic numbers, shape (n_atoms,)."""

    positions: ArrayLike
    """Positions [Å], shape (n_atoms, 3)."""

    cell: ArrayLike | None = None
    """Box vectors as rows [Å], shape (3, 3); None for no box."""

    pbc: ArrayLike | None = None
    """Which box vectors are periodic, shape (3,); None means all where a cell is given."""


class _Checked(NamedTuple):
    """A system as arrays, and where it was in the list."""

    place: int
    numbers: NDArray[np.int64]
    positions: NDArray[np.float64]
    cell: NDArray[np.float64]
    pbc: NDArray[np.bool_]


class BatchedEvaluator:
    """A student on any number of systems; time and memory grow with the sum of their atoms.

    Systems are sorted by size and put into batches. A batch of the same atoms as one before it
    (replicas of a simulation) keeps its neighbors and, on a GPU, its CUDA graph.

    Parameters
    ----------
    model
        Name of a bundled student, path of a student file, or a `Potential`, best in double
        precision; None is the bundled default.
    precision
        "single", "mixed" or "double", see `FastPotential`.
    device
        Torch device; None for CUDA if there is any. A `Potential` stays where it is.
    batch_atoms
        Atoms that are evaluated at a time; a system of more is a batch of its own.

    Raises
    ------
    ValueError
        If the student is a variant of PaiNN, a word is unknown, or ``batch_atoms`` is not positive.

    Examples
    --------
    >>> evaluator = BatchedEvaluator()
    >>> for energy, forces, virial, _ in evaluator.evaluate([(numbers, positions)] * 32): ...
    """

    def __init__(
        self,
        model: str | Path | Potential | None = None,
        *,
        precision: str = "single",
        device: str | torch.device | None = None,
        batch_atoms: int = BATCH_ATOMS,
    ) -> None:
        if batch_atoms < 1:
            raise ValueError(f"a batch needs atoms, got batch_atoms={batch_atoms}")
        if not isinstance(model, Potential):
            source = StudentSource.find(model)
            model = source.load(device=resolve_device(device), precision="double")
        self.potential = model
        self.device = next(model.parameters()).device
        self.batch_atoms = batch_atoms
        self._precision = precision
        self._fast: dict[bool, FastPotential] = {}
        self._fast_for(1)
        self._seen: OrderedDict[bytes, CapturedStep | None] = OrderedDict()

    def _fast_for(self, n_atoms: int) -> FastPotential:
        """The student: quick where memory is no matter."""
        remember = n_atoms <= REMEMBERED
        if remember not in self._fast:
            with torch.inference_mode(False), torch.no_grad():
                self._fast[remember] = FastPotential(
                    self.potential, precision=self._precision, remember=remember
                )
        return self._fast[remember]

    def evaluate(self, systems: Iterable[Any]) -> list[Evaluation]:
        """Energies, forces, virials and energies of the atoms, in the order of the systems.

        Parameters
        ----------
        systems
            `AtomicSystem`, or tuples ``(numbers, positions[, cell[, pbc]])``.

        Returns
        -------
        list of Evaluation
            One for each system.

        Raises
        ------
        ValueError
            If a system has no atoms, elements that the student does not know, positions of another
            shape or not finite, or a box without volume; says which system.
        OutOfMemory, NotFinite, DeviceLost
            See `faults`.
        """
        checked = [_checked(k, AtomicSystem(*system)) for k, system in enumerate(systems)]
        _check_all(checked)
        found: list[Evaluation | None] = [None] * len(checked)
        for batch in _batches(checked, self.batch_atoms):
            for system, evaluation in zip(batch, self._evaluate(batch), strict=True):
                found[system.place] = evaluation
        return [evaluation for evaluation in found if evaluation is not None]

    def _evaluate(self, batch: Sequence[_Checked]) -> Iterator[Evaluation]:
        positions = np.concatenate([s.positions for s in batch])
        try:
            step = self._step(batch)
            step(positions, np.stack([s.cell for s in batch]), 1.0)
            out = step.prediction()
        except (RuntimeError, MemoryError, FloatingPointError) as error:
            self._seen.clear()
            better = explained(error, len(positions), self.device)
            if better is error:
                raise
            raise better from error
        energies, virials = out.energy.tolist(), out.virial.numpy()
        forces, of_atoms = out.forces.numpy(), out.atom_energies.numpy()
        start = 0
        for k, system in enumerate(batch):
            end = start + len(system.numbers)
            yield Evaluation(
                energies[k], forces[start:end].copy(), virials[k].copy(), of_atoms[start:end].copy()
            )
            start = end

    def _step(self, batch: Sequence[_Checked]) -> CapturedStep:
        """Memory for a batch; kept from the second time on that these atoms come."""
        lengths = np.array([len(s.numbers) for s in batch])
        numbers, pbc = np.concatenate([s.numbers for s in batch]), np.stack([s.pbc for s in batch])
        key = b"|".join(part.tobytes() for part in (lengths, numbers, pbc))
        again = key in self._seen
        step = self._seen.get(key)
        if step is None:
            step = self._open(numbers, lengths, pbc, keep=again)
        self._seen[key] = step if again else None
        self._seen.move_to_end(key)
        while len(self._seen) > _KEPT:
            self._seen.popitem(last=False)
        return step

    def _open(
        self, numbers: NDArray[Any], lengths: NDArray[Any], pbc: NDArray[Any], *, keep: bool
    ) -> CapturedStep:
        with torch.inference_mode(False), torch.no_grad():
            lists = VerletRows(
                self.potential.species(torch.tensor(numbers)).to(self.device),
                self.potential.cutoff,
                DEFAULT_SKIN if keep else 0.0,
                periodic=torch.tensor(pbc),
                system=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
            )
            fast = self._fast_for(len(numbers))
            return CapturedStep(fast, lists, True, False, _refuse, None, capture=keep)


def _checked(index: int, system: AtomicSystem) -> _Checked:
    """A system as arrays of the right shapes."""
    numbers = np.asarray(system.numbers, dtype=np.int64)
    positions = np.asarray(system.positions, dtype=np.float64)
    if numbers.ndim != 1 or not len(numbers) or positions.shape != (len(numbers), 3):
        raise ValueError(
            f"system {index}: atoms and positions of shape (n_atoms, 3) are needed, got "
            f"{numbers.shape} numbers and positions of shape {positions.shape}"
        )
    if system.cell is None:
        if system.pbc is not None and np.any(system.pbc):
            raise ValueError(f"system {index}: periodic directions need a cell")
        return _Checked(index, numbers, positions, _NO_CELL, _NOWHERE)
    cell = np.asarray(system.cell, dtype=np.float64)
    if system.pbc is None:
        return _Checked(index, numbers, positions, cell, _EVERYWHERE)
    pbc = np.array(system.pbc, dtype=np.bool_)
    return _Checked(index, numbers, positions, np.where(pbc[:, None], cell, 0.0), pbc)


def _check_all(systems: Sequence[_Checked]) -> None:
    """Refuse positions that are not finite and boxes without volume; of all systems at once."""
    if not systems:
        return
    if not np.isfinite(np.concatenate([s.positions for s in systems])).all():
        for s in systems:
            bad = np.flatnonzero(~np.isfinite(s.positions).all(axis=1))
            if len(bad):
                raise ValueError(f"system {s.place}: the position of atom {bad[0]} is not finite")
    cells, pbc = np.stack([s.cell for s in systems]), np.stack([s.pbc for s in systems])
    # vectors that are not periodic are zero: unit vectors at right angles leave the volume
    frames = cells if pbc.all() else _completed(cells, pbc)
    for k in np.flatnonzero(~(np.abs(np.linalg.det(frames)) > 1e-6)).tolist():
        raise ValueError(
            f"system {systems[k].place}: the periodic box has no volume: {cells[k].tolist()}"
        )


def _completed(cells: NDArray[np.float64], pbc: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Cells whose vectors that are not periodic are of length 1 and at right angles to the rest."""
    found = cells.copy()
    for k in np.flatnonzero(~pbc.all(axis=1)).tolist():
        rest = ~pbc[k]
        _, _, axes = np.linalg.svd(cells[k][pbc[k]])
        found[k][rest] = axes[pbc[k].sum() :]
    return found


class FusedGraphs:
    """A student with fused kernels in the place of a `Potential` that is asked for graphs.

    Parameters
    ----------
    potential
        The student; its device is that of the work.
    precision
        As of `BatchedEvaluator`.
    """

    training = False

    def __init__(self, potential: Potential, *, precision: str = "single") -> None:
        self.cutoff = potential.cutoff
        with torch.inference_mode(False), torch.no_grad():
            self.fast = FastPotential(potential, precision=precision, remember=False)

    def eval(self) -> "FusedGraphs":
        """Nothing: it is for evaluation only."""
        return self

    def train(self, mode: bool = True) -> "FusedGraphs":
        """Refused but for ``mode=False``: it is for evaluation only."""
        if mode:
            raise ValueError("a student with fused kernels cannot be trained")
        return self

    @torch.no_grad()
    def __call__(self, graph: Graph) -> Prediction:
        """As of `Potential`; the graph's edges are not looked at."""
        periodic = graph.cell.abs().sum(2) > 0
        lists = VerletRows(graph.species, self.cutoff, 0.0, periodic=periodic, system=graph.system)
        lists.rows.positions.copy_(graph.positions)
        lists.rows.cell.copy_(graph.cell)
        lists.build()
        found: Prediction = self.fast(lists.rows, True)
        return found


def _batches(systems: Sequence[_Checked], n_atoms: int) -> Iterator[list[_Checked]]:
    """Systems of similar size, up to a number of atoms."""
    batch: list[_Checked] = []
    total = 0
    for system in sorted(systems, key=lambda s: (len(s.numbers), s.place)):
        if batch and total + len(system.numbers) > n_atoms:
            yield batch
            batch, total = [], 0
        batch.append(system)
        total += len(system.numbers)
    if batch:
        yield batch


def _refuse(positions: NDArray[np.float64]) -> None:
    raise ValueError("positions are not finite")
