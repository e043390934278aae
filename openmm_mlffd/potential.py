"""The student: a graph to energies, forces and virials."""

from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from openmm_mlffd.crowding import FREE, NO_LIMIT, Crowding
from openmm_mlffd.elements import COVALENT_RADII, symbol
from openmm_mlffd.graph import Graph
from openmm_mlffd.painn import PaiNN
from openmm_mlffd.radial import softened_distances
from openmm_mlffd.repulsion import ZBL
from openmm_mlffd.variants import VariantPaiNN

CORE = 0.75
"""The network sees distances below this share of the sum of the covalent radii compressed.

Thermal structures hardly have any (bonds at 1,300 K reach down to 0.7)."""

SMALLEST_CORE = 0.7
"""Smallest such distance [Å]; for two hydrogens the share would be less."""


def soft_bound(energies: Tensor, bound: float) -> Tensor:
    """Energies as they are within ±bound [eV], and never beyond ±1.5 bound.

    b + b/2 tanh((|e| - b) / (b/2)) beyond the bound: twice continuously differentiable.
    """
    width = 0.5 * bound
    size = energies.abs()
    beyond = bound + width * torch.tanh((size - bound) / width)
    return torch.where(size < bound, energies, torch.sign(energies) * beyond)


class Prediction(NamedTuple):
    """What a potential gives for a graph."""

    energy: Tensor
    """Energy of each system [eV], shape (n_systems,), float64."""

    forces: Tensor
    """Forces, minus the derivative of the energy [eV/Å], shape (n_atoms, 3), float64."""

    virial: Tensor
    """dE/dε, ε the strain of atoms and box [eV], symmetric, shape (n_systems, 3, 3), float64.

    The stress with ASE's sign is the virial over the volume; the pressure is minus its trace
    over three volumes, without the kinetic part."""

    atom_energies: Tensor
    """Energy of each atom [eV], shape (n_atoms,), float64; their sum is the energy."""


class Potential(nn.Module):
    """PaiNN plus ZBL repulsion plus a reference energy for each element.

    E = Σ_i (reference[z_i] + bounded(energy_scale · PaiNN_i) + ½ Σ_j ZBL_ij + crowding_i).

    Edge vectors are formed and energies and forces are summed in float64, whatever the precision
    of the network, so that neither a large box nor large reference energies cost accuracy.

    Parameters
    ----------
    network
        The network; its dtype is the precision of the evaluation.
    numbers
        Atomic numbers of the elements, in the order of the species index.
    cutoff
        Neighbor cutoff [Å].
    references
        Reference energy of each element [eV]; zeros if None.
    energy_scale
        Energy [eV] of the network's unit.
    energy_bound
        The network's energy of an atom is bounded softly beyond this [eV], see `soft_bound`;
        None for no bound. Larger than any energy of the training data, it keeps the network from
        outweighing the repulsion in structures that are denser than any it knows.
    coordination_limits
        Coordination of each element beyond which neighbors repel, see `Crowding`; None for none.

    Raises
    ------
    ValueError
        If limits of coordination are given and the cutoff is too short for them.

    Notes
    -----
    In training mode the forces can be differentiated with respect to the weights; in evaluation
    mode (`eval()`) they cannot, and the evaluation is cheaper.
    """

    header: Any
    """What the student file says of itself, a `StudentHeader`; only if it came from a file."""

    __jit_ignored_attributes__: Final = ("header",)
    __jit_unused_properties__: Final = ("references", "coordination_limits")

    def __init__(
        self,
        network: PaiNN | VariantPaiNN,
        numbers: list[int],
        cutoff: float,
        *,
        references: list[float] | None = None,
        energy_scale: float = 1.0,
        energy_bound: float | None = None,
        coordination_limits: list[float] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.repulsion = ZBL(numbers)
        self.numbers = list(numbers)
        self.cutoff = cutoff
        self.energy_scale = energy_scale
        self.energy_bound = 0.0 if energy_bound is None else energy_bound
        self.references = references or [0.0] * len(numbers)
        self.coordination_limits = coordination_limits
        core = [CORE * COVALENT_RADII[z] for z in numbers]
        self._core = torch.tensor(core, dtype=torch.float64, device="cpu")
        self.smallest_core = SMALLEST_CORE

    @property
    def references(self) -> list[float]:
        """Reference energy of each element [eV]; exact whatever the module is cast to."""
        return self._references.tolist()

    @references.setter
    def references(self, energies: list[float]) -> None:
        # neither a buffer, which .float() would round, nor a list, which TorchScript would
        self._references = torch.tensor(energies, dtype=torch.float64, device="cpu")

    @property
    def coordination_limits(self) -> list[float] | None:
        """Coordination of each element beyond which neighbors repel; None for none."""
        return self.crowding.limits if self.crowds else None

    @coordination_limits.setter
    def coordination_limits(self, limits: list[float] | None) -> None:
        reach = 2.0 * FREE * max(COVALENT_RADII[z] for z in self.numbers)
        if limits is not None and reach > self.cutoff:
            raise ValueError(
                f"limits of coordination need a cutoff of {reach:.2f} Å, where atoms of these "
                f"elements stop being neighbors; it is {self.cutoff} Å (train with "
                "model.crowding=false)"
            )
        self.crowds = limits is not None
        self.crowding = Crowding(self.numbers, limits or [NO_LIMIT] * len(self.numbers))

    def forward(self, graph: Graph) -> Prediction:
        """Energy, forces, virial and energy of each atom."""
        vectors = edge_vectors(graph)
        if not vectors.requires_grad:
            vectors.requires_grad_(True)
        learned = self.learned_energies(graph, vectors)
        repulsion = self.repulsion_energies(graph, vectors)

        gradient = _gradient(learned, vectors, self.training) + _gradient(repulsion, vectors, False)
        n_atoms, n_systems = graph.positions.shape[0], graph.cell.shape[0]
        receiver, sender = graph.edge_index[0], graph.edge_index[1]
        zeros = torch.zeros([n_atoms, 3], dtype=gradient.dtype, device=gradient.device)
        forces = zeros.index_add(0, receiver, gradient).index_add(0, sender, -gradient)
        pair_virial = vectors.detach().unsqueeze(2) * gradient.unsqueeze(1)
        virial = torch.zeros(
            [n_systems, 3, 3], dtype=gradient.dtype, device=gradient.device
        ).index_add(0, graph.system[receiver], 0.5 * (pair_virial + pair_virial.transpose(1, 2)))

        references = self._references.to(vectors.device)
        atom_energies = learned + repulsion.detach() + references[graph.species]
        if not self.training:
            atom_energies = atom_energies.detach()
        energy = torch.zeros([n_systems], dtype=torch.float64, device=vectors.device).index_add(
            0, graph.system, atom_energies
        )
        return Prediction(energy, forces, virial, atom_energies)

    def learned_energies(self, graph: Graph, vectors: Tensor) -> Tensor:
        """The network's energy of each atom [eV], shape ``(n_atoms,)``, float64."""
        vectors = vectors.to(self.network.embedding.weight.dtype)
        energies = self.network(
            graph.species, vectors, graph.edge_index, self._cores(graph, vectors)
        )
        energies = energies.to(torch.float64) * self.energy_scale
        return soft_bound(energies, self.energy_bound) if self.energy_bound > 0 else energies

    @torch.jit.unused
    def partial_charges(self, graph: Graph, vectors: Tensor) -> Tensor:
        """Partial charge of each atom [e], shape ``(n_atoms,)``, float64; zeros without a head."""
        if not isinstance(self.network, VariantPaiNN):
            return torch.zeros_like(graph.positions[:, 0])
        vectors = vectors.to(self.network.embedding.weight.dtype)
        charges = self.network.energies_and_charges(
            graph.species, vectors, graph.edge_index, self._cores(graph, vectors)
        )[1]
        return charges.to(torch.float64)

    def _cores(self, graph: Graph, vectors: Tensor) -> Tensor:
        """Distance of each edge below which the network sees distances compressed [Å]."""
        radii = self._core.to(vectors)[graph.species]
        cores = radii[graph.edge_index[0]] + radii[graph.edge_index[1]]
        return cores.clamp(min=self.smallest_core)

    def repulsion_energies(self, graph: Graph, vectors: Tensor) -> Tensor:
        """Repulsion of each atom, crowding included [eV], shape ``(n_atoms,)``, float64."""
        receiver, sender = graph.edge_index[0], graph.edge_index[1]
        distances = softened_distances(vectors)
        pairs = self.repulsion(distances, graph.species[receiver], graph.species[sender])
        zeros = torch.zeros([graph.species.shape[0]], dtype=pairs.dtype, device=pairs.device)
        energies = zeros.index_add(0, receiver, 0.5 * pairs)
        if self.crowds:
            energies = energies + self.crowding(distances, receiver, sender, graph.species)
        return energies

    @torch.jit.unused
    def species(self, numbers: Tensor) -> Tensor:
        """Species index of each atomic number.

        Parameters
        ----------
        numbers
            Atomic numbers, shape ``(n_atoms,)``, any integer type.

        Returns
        -------
        Tensor
            Index into the model's elements, shape ``(n_atoms,)``, int64.

        Raises
        ------
        ValueError
            If the model does not know an element; names atom, element and what it knows.
        """
        table = torch.full((256,), -1, dtype=torch.int64, device=numbers.device)
        table[torch.tensor(self.numbers, device=numbers.device)] = torch.arange(
            len(self.numbers), device=numbers.device
        )
        index = table[numbers.long().clamp(0, 255)]
        unknown = (index < 0).nonzero()[:, 0].tolist()
        if unknown:
            found = sorted({int(numbers[i]) for i in unknown})
            raise ValueError(
                f"the model does not know {', '.join(symbol(z) for z in found)} "
                f"(first at atom {unknown[0]}); it was trained for "
                f"{', '.join(symbol(z) for z in self.numbers)}"
            )
        return index


def edge_vectors(graph: Graph) -> Tensor:
    """Vector from receiver to the sender's image [Å], shape ``(n_edges, 3)``, float64."""
    receiver, sender = graph.edge_index[0], graph.edge_index[1]
    vectors = graph.positions[sender] - graph.positions[receiver]
    cells = graph.cell[graph.system[receiver]]  # (E, 3, 3)
    return vectors + (graph.edge_shift.unsqueeze(2) * cells).sum(dim=1)


def _gradient(energies: Tensor, vectors: Tensor, create_graph: bool) -> Tensor:
    gradient = torch.autograd.grad(
        [energies.sum()], [vectors], create_graph=create_graph, allow_unused=True
    )[0]
    if gradient is None:  # a system without edges
        return torch.zeros_like(vectors)
    return gradient
