"""Partial charges of a student at work, and the forces that come of their change."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openmm_mlffd.graph import Graph
from openmm_mlffd.neighbors import VerletList
from openmm_mlffd.potential import Potential, edge_vectors


class PartialCharges:
    """Partial charges of one configuration.

    Attributes
    ----------
    values
        [e], shape ``(n_atoms,)``, float64, without gradients.
    """

    def __init__(self, charges: Tensor, vectors: Tensor, graph: Graph) -> None:
        self.values = charges.detach()
        self._charges = charges
        self._vectors = vectors
        self._graph = graph

    def forces(self, potentials: Tensor) -> Tensor:
        """Forces that come of the charges' change with the positions; may be asked for once.

        Parameters
        ----------
        potentials
            Derivative of an energy by each charge [eV/e], shape ``(n_atoms,)``.

        Returns
        -------
        Tensor
            -Σ_i potential_i dq_i/dx [eV/Å], shape ``(n_atoms, 3)``; their sum is zero.
        """
        forces = torch.zeros_like(self._graph.positions)
        if not self._charges.requires_grad:  # atoms without neighbors
            return forces
        (gradient,) = torch.autograd.grad(
            [self._charges], [self._vectors], [potentials], allow_unused=True
        )
        if gradient is None:
            return forces
        receiver, sender = self._graph.edge_index[0], self._graph.edge_index[1]
        return forces.index_add(0, receiver, gradient).index_add(0, sender, -gradient)


class ChargeEvaluator:
    """The charges that a student gives the same atoms again and again, in plain torch.

    What the charges of a molecule lack of its total charge is spread over its atoms equally.

    Parameters
    ----------
    potential
        The student, in evaluation mode.
    numbers
        Atomic number of each atom.
    molecules
        Index of each atom's molecule, shape ``(n_atoms,)``.
    totals
        Total charge of each molecule [e].

    Raises
    ------
    ValueError
        If the student has no charges, or does not know an element.

    Notes
    -----
    Threads may share an instance.
    """

    def __init__(
        self,
        potential: Potential,
        numbers: Sequence[int],
        molecules: Sequence[int],
        totals: Sequence[float],
    ) -> None:
        network = potential.network
        if not getattr(network, "has_charges", False):
            raise ValueError(
                "the student has no partial charges; one that is trained with model.charges=true "
                "and loss.charges has"
            )
        self._potential = potential
        self.device = next(potential.parameters()).device
        with torch.inference_mode(False):
            self._species = potential.species(torch.tensor(numbers)).to(self.device)
            self._molecules = torch.tensor(molecules, device=self.device)
            self._sizes = self._molecules.bincount(minlength=len(totals)).double()
            self._totals = torch.tensor(totals, dtype=torch.float64, device=self.device)
        # that of the messages: the charges know nothing of a tail
        self._neighbors = VerletList(float(network.cutoff))  # type: ignore[arg-type] # a module's attribute

    def charges(
        self, positions: NDArray[np.float64], cell: NDArray[np.float64] | None = None
    ) -> PartialCharges:
        """Charges at these positions.

        Parameters
        ----------
        positions
            Finite positions [Å], shape ``(n_atoms, 3)``.
        cell
            Box vectors as rows [Å], shape ``(3, 3)``; None for no box.
        """
        with torch.inference_mode(False), torch.enable_grad():
            graph = self._neighbors.graph(
                torch.tensor(positions, device=self.device),
                self._species,
                cell=None if cell is None else torch.tensor(cell),
            )
            vectors = edge_vectors(graph).requires_grad_(True)
            raw = self._potential.partial_charges(graph, vectors)
            sums = torch.zeros_like(self._totals).index_add(0, self._molecules, raw)
            lacking = (self._totals - sums) / self._sizes
            return PartialCharges(raw + lacking[self._molecules], vectors, graph)


def has_charges(architecture: dict[str, Any]) -> bool:
    """Whether the header of a student file tells of partial charges."""
    return bool(architecture.get("charges", False))
