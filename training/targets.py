"""What a training step needs: edges, labels, and the parts of them that no weight can change."""

from typing import NamedTuple

import torch
from torch import Tensor

from openmm_mlffd.elements import COVALENT_RADII
from openmm_mlffd.potential import CORE, SMALLEST_CORE, Potential, edge_vectors
from openmm_mlffd.training.batches import Batch


class TrainingBatch(NamedTuple):
    """Some structures for a training step, in the precision of the network.

    Repulsion and reference energies do not depend on the weights: they are taken out of energies
    and virials once, and added to the predicted forces.
    """

    species: Tensor
    """Element index of each atom, shape (n_atoms,), int64."""

    system: Tensor
    """Structure of each atom, ascending, shape (n_atoms,), int64."""

    edge_index: Tensor
    """Receiver and sender of each edge, sorted by receiver, shape (2, n_edges), int64."""

    vectors: Tensor
    """Edge vectors [Å], shape (n_edges, 3)."""

    core: Tensor
    """Core of each edge [Å], see `radial.compress_core`, shape (n_edges,)."""

    near: Tensor
    """Edges within the reach of messages, shape (n_near,); empty without a tail."""

    energy: Tensor
    """Label of the network's energy [eV], shape (n_systems,)."""

    forces: Tensor
    """Label of the forces [eV/Å], shape (n_atoms, 3)."""

    virial: Tensor
    """Label of the network's virial [eV], NaN where not known, shape (n_systems, 3, 3)."""

    charges: Tensor
    """Label of the partial charges [e], NaN where not known, shape (n_atoms,)."""

    repulsion: Tensor
    """Forces of the repulsion [eV/Å], shape (n_atoms, 3)."""

    probe: Tensor
    """Direction u of the Hessian's row [Å], zeros where not known, shape (n_atoms, 3)."""

    curvature: Tensor
    """Label of the network's Hessian times u [eV/Å], NaN where not known, (n_atoms, 3)."""

    n_atoms: Tensor
    """Atoms of each structure, 0 for padding, shape (n_systems,)."""

    real: Tensor
    """1 for atoms, 0 for padding, shape (n_atoms,)."""


class BatchTotals(NamedTuple):
    """What the terms of the loss are divided by: counts over all processes of a step."""

    structures: Tensor
    """Structures, shape ()."""

    atoms: Tensor
    """Atoms, shape ()."""

    stressed: Tensor
    """Structures with a stress label, shape ()."""

    pushed: Tensor
    """Atoms with a force that has a direction, shape ()."""

    charged: Tensor
    """Atoms with a charge label, shape ()."""

    probed: Tensor
    """Atoms with a row of the Hessian, shape ()."""


def count_totals(batch: TrainingBatch, angle_threshold: float) -> Tensor:
    """The counts of `BatchTotals` for one batch, as one tensor of shape (6,), float32."""
    known = batch.virial.isfinite().all(2).all(1) & (batch.n_atoms > 0)
    long = (batch.forces.square().sum(1) > angle_threshold**2) & (batch.real > 0)
    counts = (
        (batch.n_atoms > 0).sum(),
        batch.real.sum(),
        known.sum(),
        long.sum(),
        (batch.charges.isfinite() & (batch.real > 0)).sum(),
        (batch.curvature.isfinite().all(1) & (batch.real > 0)).sum(),
    )
    return torch.stack([c.float() for c in counts])


def training_batch(batch: Batch, potential: Potential) -> TrainingBatch:
    """Edges and labels of a batch, with repulsion and reference energies taken out.

    Parameters
    ----------
    batch
        Structures with a neighbor list of the potential's cutoff.
    potential
        Gives repulsion, reference energies and precision; its network is not evaluated.
    """
    graph, dtype = batch.graph, next(potential.parameters()).dtype
    with torch.enable_grad():
        vectors = edge_vectors(graph).requires_grad_(True)
        atom_energies = potential.repulsion_energies(graph, vectors)
        gradient = torch.zeros_like(vectors)
        if vectors.shape[0]:
            gradient = torch.autograd.grad(atom_energies.sum(), vectors)[0]
    vectors, atom_energies = vectors.detach(), atom_energies.detach()
    forces, virial = scatter_gradient(
        gradient, vectors, graph.edge_index, graph.system, batch.n_atoms.shape[0]
    )
    references = torch.tensor(potential.references, dtype=torch.float64, device=vectors.device)
    atom_energies = atom_energies + references[graph.species]
    energy = batch.energy.index_add(0, graph.system, -atom_energies)
    return TrainingBatch(
        species=graph.species,
        system=graph.system,
        edge_index=graph.edge_index,
        vectors=vectors.to(dtype),
        core=edge_cores(graph.species, graph.edge_index, potential.numbers).to(dtype),
        near=near_edges(vectors, potential),
        energy=energy.to(dtype),
        forces=batch.forces.to(dtype),
        virial=(batch.virial - virial).to(dtype),
        charges=batch.charges.to(dtype),
        repulsion=forces.to(dtype),
        probe=batch.probe.to(dtype),
        curvature=(batch.curvature - repulsion_curvature(batch, potential)).to(dtype),
        n_atoms=batch.n_atoms.to(dtype),
        real=torch.ones_like(forces[:, 0], dtype=dtype),
    )


def near_edges(vectors: Tensor, potential: Potential) -> Tensor:
    """Indices of the edges [Å] that messages take; none, for all of them, without a tail."""
    if not getattr(potential.network, "has_tail", False):
        return torch.zeros(0, dtype=torch.int64, device=vectors.device)
    return (vectors.norm(dim=1) < potential.network.cutoff).nonzero()[:, 0]


def repulsion_curvature(batch: Batch, potential: Potential) -> Tensor:
    """The repulsion's Hessian times the probes [eV/Å], shape (n_atoms, 3), float64."""
    zeros = torch.zeros_like(batch.forces)
    if not bool(batch.probe.ne(0).any()):
        return zeros
    graph = batch.graph
    receiver, sender = graph.edge_index[0], graph.edge_index[1]
    with torch.enable_grad():
        vectors = edge_vectors(graph).requires_grad_(True)
        energies = potential.repulsion_energies(graph, vectors)
        gradient = torch.autograd.grad(energies.sum(), vectors, create_graph=True)[0]
        along = (gradient * (batch.probe[sender] - batch.probe[receiver])).sum()
        change = torch.autograd.grad(along, vectors)[0]
    return zeros.index_add(0, sender, change).index_add(0, receiver, -change)


def edge_cores(species: Tensor, edge_index: Tensor, numbers: list[int]) -> Tensor:
    """Core of each edge [Å] as `Potential` has it, shape (n_edges,), float64."""
    radii = torch.tensor(
        [CORE * COVALENT_RADII[z] for z in numbers], dtype=torch.float64, device=species.device
    )[species]
    return (radii[edge_index[0]] + radii[edge_index[1]]).clamp(min=SMALLEST_CORE)


def scatter_gradient(
    gradient: Tensor, vectors: Tensor, edge_index: Tensor, system: Tensor, n_systems: int
) -> tuple[Tensor, Tensor]:
    """Forces and virials of an energy's gradient by the edge vectors.

    Parameters
    ----------
    gradient
        dE/dr of each edge [eV/Å], shape ``(n_edges, 3)``.
    vectors
        Edge vectors [Å], shape ``(n_edges, 3)``.
    edge_index
        Receiver and sender, shape ``(2, n_edges)``.
    system
        Structure of each atom, shape ``(n_atoms,)``.
    n_systems
        Number of structures.

    Returns
    -------
    forces
        [eV/Å], shape ``(n_atoms, 3)``.
    virial
        dE/dε [eV], symmetric, shape ``(n_systems, 3, 3)``.
    """
    receiver, sender = edge_index[0], edge_index[1]
    zeros = torch.zeros([system.shape[0], 3], dtype=gradient.dtype, device=gradient.device)
    forces = zeros.index_add(0, receiver, gradient).index_add(0, sender, -gradient)
    pair = vectors.unsqueeze(2) * gradient.unsqueeze(1)
    # to atoms first: atoms are many, so that additions to one address do not queue on a GPU
    by_atom = torch.zeros([system.shape[0], 3, 3], dtype=gradient.dtype, device=gradient.device)
    by_atom = by_atom.index_add(0, receiver, 0.5 * (pair + pair.transpose(1, 2)))
    total = torch.zeros([n_systems, 3, 3], dtype=gradient.dtype, device=gradient.device)
    return forces, total.index_add(0, system, by_atom)
