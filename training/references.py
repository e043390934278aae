"""What data fix without training: references of the elements, bounds of the network."""

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from openmm_mlffd.crowding import FREE, NO_LIMIT, Crowding
from openmm_mlffd.elements import COVALENT_RADII
from openmm_mlffd.potential import Potential, edge_vectors
from openmm_mlffd.radial import softened_distances
from openmm_mlffd.training.batches import Batch, StructureSource, make_batch, make_graph

BOUND_MARGIN = 1.5
"""How far beyond the validation data the network's energies are free."""

COORDINATION_MARGIN = 0.5
"""Neighbors beyond those in the training data that are free, for what was not trained on."""


def fit_references(
    source: StructureSource,
    potential: Potential,
    device: torch.device,
    *,
    n_structures: int = 20000,
) -> list[float]:
    """Energy of each element [eV] that explains most of the labels' energy, repulsion left out.

    Least squares of energy minus repulsion against the counts of the elements, weighted so that
    every structure counts by its error per atom. An element that does not occur gets 0.

    Parameters
    ----------
    source
        Structures; about ``n_structures`` of them are used, chosen at random.
    potential
        Gives the elements and the repulsion; its references are not used.
    device
        Where to compute the repulsion.
    n_structures
        How many structures to use.
    """
    counts: list[NDArray[np.float64]] = []
    energies: list[NDArray[np.float64]] = []
    used = 0
    # any order would do, but that of the files: elements may come late in them
    for structures in source.batches(4000, rng=np.random.default_rng(0)):
        batch = make_batch(structures, potential, device)
        graph = batch.graph
        repulsion = potential.repulsion_energies(graph, edge_vectors(graph))
        energy = batch.energy.index_add(0, graph.system, -repulsion.to(torch.float64))
        count = torch.zeros(
            (len(energy), len(potential.numbers)), dtype=torch.float64, device=device
        )
        count.index_put_((graph.system, graph.species), count.new_ones(()), accumulate=True)
        counts.append((count / batch.n_atoms[:, None]).cpu().numpy())
        energies.append((energy / batch.n_atoms).cpu().numpy())
        used += len(energy)
        if used >= n_structures:
            break
    solution = np.linalg.lstsq(np.concatenate(counts), np.concatenate(energies), rcond=1e-10)[0]
    return [float(e) for e in solution]


@torch.no_grad()
def measure_energy_bound(potential: Potential, batches: Iterable[Batch]) -> float:
    """Bound of the network's energy of an atom [eV] that leaves structures like these alone.

    `BOUND_MARGIN` times the largest size of that energy in the batches.
    """
    largest = max(
        float(potential.learned_energies(b.graph, edge_vectors(b.graph)).abs().max())
        for b in batches
    )
    return BOUND_MARGIN * largest


@torch.no_grad()
def measure_coordination(
    source: StructureSource, potential: Potential, device: torch.device
) -> list[float]:
    """Largest coordination of each element in the structures, plus `COORDINATION_MARGIN`.

    See `Crowding`. Not less than the potential's limits, if it has any: what it knows it knows
    still. An element that does not occur gets `NO_LIMIT`.
    """
    crowding = Crowding(potential.numbers, [NO_LIMIT] * len(potential.numbers))
    reach = 2.0 * FREE * max(COVALENT_RADII[z] for z in potential.numbers)
    known = potential.coordination_limits or crowding.limits
    before = [k - COORDINATION_MARGIN if k < NO_LIMIT else 0.0 for k in known]
    largest = torch.tensor(before, dtype=torch.float64, device=device)
    for structures in source.batches(20000):
        graph = make_graph(structures, potential, device, cutoff=reach)
        receiver, sender = graph.edge_index[0], graph.edge_index[1]
        distances = softened_distances(edge_vectors(graph))
        found = crowding.coordination(distances, receiver, sender, graph.species)
        largest.scatter_reduce_(0, graph.species, found, "amax")
    return [x + COORDINATION_MARGIN if x > 0.0 else NO_LIMIT for x in largest.tolist()]
