"""All training structures with their edges on the device; batches are cut out there by index."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openmm_mlffd.potential import Potential
from openmm_mlffd.training.batches import StructureSource, cut_places, make_batch
from openmm_mlffd.training.hdf5 import take
from openmm_mlffd.training.targets import TrainingBatch, training_batch

_BUILD_ATOMS = 20_000
_ROUND = 64


@dataclass(frozen=True)
class Capacity:
    """Fixed sizes of a padded batch; each leaves room for one atom and one structure of padding."""

    structures: int
    atoms: int
    edges: int
    near: int
    """Edges that messages take; 0 where all do."""


class ResidentStructures:
    """The structures of a source, their edges and what the repulsion contributes, on a device.

    Edges are found once, when this is made; a batch is some gathers by index, without the host.

    Parameters
    ----------
    source
        Structures that are held in memory.
    potential
        Gives cutoff, elements, repulsion, reference energies and precision.
    device
        Where everything is held: about 20 bytes per edge and 100 per atom.
    hessian
        Directions [Å] and Hessian times direction [eV/Å] of each atom of the source, shape
        ``(n_atoms, 3)`` each, NaN where not known; None if there are none.

    Raises
    ------
    ValueError
        If the source is streamed, or has an element that the potential does not know.
    """

    def __init__(
        self,
        source: StructureSource,
        potential: Potential,
        device: torch.device,
        *,
        hessian: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None,
    ) -> None:
        self.device = device
        self.dtype = next(potential.parameters()).dtype
        self.far = 2.0 * potential.cutoff
        self.has_hessian = hessian is not None
        self.n_atoms = np.asarray(source.n_atoms, dtype=np.int64)
        parts, edge_counts = [], []
        order = np.arange(len(source))
        for rows in np.split(order, cut_places(self.n_atoms, _BUILD_ATOMS)):
            batch = make_batch(take(source.memory, rows), potential, device)
            if hessian is not None:
                first = int(self.n_atoms[: rows[0]].sum())
                span = slice(first, first + len(batch.forces))
                probe = torch.from_numpy(hessian[0][span]).to(device, torch.float64)
                curvature = torch.from_numpy(hessian[1][span]).to(device, torch.float64)
                batch = batch._replace(probe=probe.nan_to_num(), curvature=curvature)
            packed, count = _pack(training_batch(batch, potential), self.has_hessian)
            parts.append(packed)
            edge_counts.append(count.cpu().numpy())
        self._arrays = {k: torch.cat([p.pop(k) for p in parts]) for k in list(parts[0])}
        self.n_edges = np.concatenate(edge_counts)
        self._reach: float | None = None
        if getattr(potential.network, "has_tail", False):
            self._reach = float(potential.network.cutoff)  # type: ignore[arg-type]

        def starts(count: NDArray[np.int64]) -> Tensor:
            return torch.from_numpy(np.concatenate([[0], np.cumsum(count)])).to(device)

        self._first_atom, self._first_edge = starts(self.n_atoms), starts(self.n_edges)
        self.n_near = np.zeros_like(self.n_edges)
        if self._reach is not None:
            near = self._is_near(self._arrays["vectors"]).cumsum(0)
            near = torch.cat([near.new_zeros(1), near])[self._first_edge]
            self.n_near = near.diff().cpu().numpy()

    def _is_near(self, vectors: Tensor) -> Tensor:
        assert self._reach is not None
        return vectors.square().sum(1) < self._reach**2

    def _near(self, vectors: Tensor, capacity: int) -> Tensor:
        """Indices of near edges, then of the last edge, which is padding."""
        if self._reach is None:
            return torch.zeros(0, dtype=torch.int64, device=self.device)
        near = self._is_near(vectors)
        place = torch.where(near, near.cumsum(0) - 1, capacity)
        index = torch.full((capacity + 1,), len(vectors) - 1, device=self.device)
        return index.scatter(0, place, torch.arange(len(vectors), device=self.device))[:-1]

    @property
    def n_bytes(self) -> int:
        """Memory that this takes on the device."""
        return sum(t.element_size() * t.numel() for t in self._arrays.values())

    def counts(self, angle_threshold: float) -> NDArray[np.float64]:
        """What each structure adds to `BatchTotals`, shape ``(n, 6)``."""
        a, n = self._arrays, len(self.n_atoms)
        structure = torch.repeat_interleave(
            torch.arange(n, device=self.device), self._first_atom.diff()
        )

        def count(atoms: Tensor) -> Tensor:
            zeros = torch.zeros(n, dtype=torch.float64, device=self.device)
            return zeros.index_add(0, structure, atoms.double())

        known = a["virial"].isfinite().all(2).all(1).double()
        columns = [
            torch.ones_like(known),
            a["n_atoms"].double(),
            known,
            count(a["forces"].square().sum(1) > angle_threshold**2),
            count(a["charges"].isfinite()),
            count(a["curvature"].isfinite().all(1)) if self.has_hessian else 0 * known,
        ]
        return torch.stack(columns, 1).cpu().numpy()

    def capacity(self, parts: list[NDArray[np.int64]], *, padded: bool) -> Capacity:
        """Sizes that fit each of these batches; without padding, those of the largest one."""
        structures = max(len(p) for p in parts)
        atoms = max(int(self.n_atoms[p].sum()) for p in parts)
        edges = max(int(self.n_edges[p].sum()) for p in parts)
        near = max(int(self.n_near[p].sum()) for p in parts)
        if not padded:
            return Capacity(structures, atoms, edges, near)

        def rounded(n: int) -> int:
            return _ROUND * (n // _ROUND + 1)

        near = 0 if self._reach is None else rounded(near)
        return Capacity(structures + 1, rounded(atoms), rounded(edges), near)

    def batch(self, index: Tensor, capacity: Capacity) -> TrainingBatch:
        """Structures as one batch of fixed sizes.

        Parameters
        ----------
        index
            Structures, -1 for padding at the end, shape ``(capacity.structures,)``, int64, on
            the device.
        capacity
            Sizes; must suffice, which is not checked, since that would wait for the device.

        Notes
        -----
        Waits for nothing, so that it can be part of a CUDA graph. Padding is atoms of the last
        structure and edges of the last atom with itself, longer than the cutoff, whose messages
        and derivatives are zero.
        """
        used = index >= 0
        structure = index.clamp(min=0)
        slot, row, real, first = _rows(self._first_atom, structure, used, capacity.atoms)
        edge_slot, edge_row, edge_real, _ = _rows(self._first_edge, structure, used, capacity.edges)
        a = self._arrays
        last = capacity.atoms - 1
        ends = a["ends"].index_select(0, edge_row).long() + first[edge_slot].unsqueeze(1)
        ends = torch.where(edge_real.unsqueeze(1), ends, last)
        vectors = a["vectors"].index_select(0, edge_row)
        filler = torch.zeros_like(vectors[0])
        filler[0] += self.far
        vectors = torch.where(edge_real.unsqueeze(1), vectors, filler)
        real_3 = real.unsqueeze(1)

        def atoms(name: str, padding: float) -> Tensor:
            rows = a[name].index_select(0, row)
            return torch.where(real_3 if rows.dim() == 2 else real, rows, padding)

        def systems(name: str) -> Tensor:
            rows = a[name].index_select(0, structure)
            return torch.where(used.reshape(-1, *[1] * (rows.dim() - 1)), rows, 0.0)

        forces = atoms("forces", 0.0)
        return TrainingBatch(
            species=atoms("species", 0).long(),
            system=slot,
            edge_index=ends.t().contiguous(),
            vectors=vectors,
            core=a["core"].index_select(0, edge_row),
            near=self._near(vectors, capacity.near),
            energy=systems("energy"),
            forces=forces,
            virial=systems("virial"),
            charges=atoms("charges", torch.nan),
            repulsion=atoms("repulsion", 0.0),
            probe=atoms("probe", 0.0) if self.has_hessian else torch.zeros_like(forces),
            curvature=(
                atoms("curvature", torch.nan)
                if self.has_hessian
                else torch.full_like(forces, torch.nan)
            ),
            n_atoms=systems("n_atoms"),
            real=real.to(self.dtype),
        )


def _rows(
    first: Tensor, structure: Tensor, used: Tensor, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Slot in the batch and row in the store of each place, whether it is real, first of a slot."""
    count = torch.where(used, first[structure + 1] - first[structure], 0)
    end = count.cumsum(0)
    place = torch.arange(capacity, device=first.device)
    slot = torch.searchsorted(end, place, right=True).clamp(max=len(structure) - 1)
    real = place < end[-1]
    row = first[structure[slot]] + place - (end - count)[slot]
    return slot, torch.where(real, row, 0), real, end - count


def _pack(batch: TrainingBatch, hessian: bool) -> tuple[dict[str, Tensor], Tensor]:
    """What is kept of a batch, with atoms counted from the first of their structure."""
    count = batch.n_atoms.long()
    first = (count.cumsum(0) - count)[batch.system]
    system = batch.system[batch.edge_index[0]]
    ends = (batch.edge_index - first[batch.edge_index]).t()
    kept = {
        "species": batch.species.to(torch.uint8),
        "ends": ends.to(torch.int16 if int(count.max()) < 2**15 else torch.int32),
        "vectors": batch.vectors,
        "core": batch.core,
        "energy": batch.energy,
        "forces": batch.forces,
        "virial": batch.virial,
        "charges": batch.charges,
        "repulsion": batch.repulsion,
        "n_atoms": batch.n_atoms,
    }
    if hessian:
        kept |= {"probe": batch.probe, "curvature": batch.curvature}
    return kept, torch.bincount(system, minlength=len(count))


def estimated_gb(source: StructureSource, potential: Potential, device: torch.device) -> float:
    """Memory that `ResidentStructures` would take [GB], from a sample of the structures."""
    rows = np.sort(np.random.default_rng(0).permutation(len(source))[:100])
    graph = make_batch(take(source.memory, rows), potential, device).graph
    edges_per_atom = graph.edge_index.shape[1] / max(1, graph.positions.shape[0])
    size = next(potential.parameters()).element_size()
    per_edge, per_atom = 4 + 4 * size, 1 + 7 * size
    return float(source.n_atoms.sum()) * (per_atom + edges_per_atom * per_edge) / 1e9


def plan(
    n_atoms: NDArray[np.int64],
    batch_atoms: int,
    rng: np.random.Generator | None,
    *,
    n_edges: NDArray[np.int64] | None = None,
    batch_edges: int | None = None,
) -> list[NDArray[np.int64]]:
    """One pass over structures: the batches of `StructureSource.batches` with the same generator.

    Parameters
    ----------
    n_atoms
        Atoms of each structure.
    batch_atoms
        Atoms in a batch, at most.
    rng
        Shuffles; None keeps the order.
    n_edges, batch_edges
        Edges of each structure, and in a batch, at most; None for no such limit. It makes
        batches alike, so that less of the places of padded ones is padding.
    """
    order = np.arange(len(n_atoms)) if rng is None else rng.permutation(len(n_atoms))
    edges = None if n_edges is None else n_edges[order]
    return np.split(order, cut_places(n_atoms[order], batch_atoms, edges, batch_edges))


def share(
    batch: NDArray[np.int64], n_atoms: NDArray[np.int64], n_shares: int
) -> list[NDArray[np.int64]]:
    """Cut a batch into parts of about as many atoms each; some may be empty."""
    if n_shares == 1:
        return [batch]
    middle = np.cumsum(n_atoms[batch]) - 0.5 * n_atoms[batch]
    total = float(n_atoms[batch].sum())
    cuts = [int(np.searchsorted(middle, total * k / n_shares)) for k in range(1, n_shares)]
    return np.split(batch, cuts)


def padded_index(part: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Indices of a batch with -1 for padding, shape ``(size,)``."""
    index = np.full(size, -1, dtype=np.int64)
    index[: len(part)] = part
    return index


def resident_batches(
    structures: ResidentStructures, parts: list[NDArray[np.int64]]
) -> Iterator[TrainingBatch]:
    """Batches of just the size that each needs."""
    for part in parts:
        index = torch.from_numpy(part).to(structures.device)
        yield structures.batch(index, structures.capacity([part], padded=False))
