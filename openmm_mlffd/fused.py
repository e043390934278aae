"""A student's network with fused messages, differentiable: for training on forces."""

from typing import Any

import torch
from torch import Tensor, nn

from openmm_mlffd.filters import tabulate
from openmm_mlffd.kernels import training_ops
from openmm_mlffd.potential import Potential
from openmm_mlffd.radial import RadialBasis, compress_core, distances_and_directions
from openmm_mlffd.variants import SplineBasis

_WAVES = (128, 5)
"""Intervals, for up to 20 waves, and degree of the spline between which waves are tabulated."""

_SHORTEST_SEEN = 0.999 * 5.0 / 7.0
"""Compressed distances are larger than this share of the core, see `radial.compress_core`."""


class FusedNetwork(nn.Module):
    """The energies of `PaiNN` and `VariantPaiNN`, with messages by `training_ops.edge_message`.

    Weights are those of the student's network, of which this is another way to evaluate it. The
    radial functions are tabulated as splines once; a filter's table is that of the functions times
    the filter's weights, so that these get their gradients through a small matrix product.

    Parameters
    ----------
    potential
        Of the student.

    Raises
    ------
    ValueError
        If the student has filters by pairs of elements, whose filters are no function of the
        distance alone, or radial functions that are not known here.
    """

    _table: Tensor

    def __init__(self, potential: Potential) -> None:
        super().__init__()
        network: Any = potential.network  # painn.PaiNN or variants.VariantPaiNN
        if any(getattr(i, "has_pairs", False) for i in network.interactions):
            raise ValueError("filters by pairs of elements cannot be tabulated by distance")
        self.network = network
        self.has_charges = bool(getattr(network, "has_charges", False))
        self.has_tail = bool(getattr(network, "has_tail", False))
        basis = network.basis
        if isinstance(basis, SplineBasis):
            self.degree, self._n_intervals = 3, basis.n_basis + 1
            self._shortest, self._per_length = 0.0, 1.0 / basis.spacing
            # spline k is that of the window's second coefficient where it has its knot
            table = torch.eye(basis.n_basis + 4, dtype=torch.float64)[:, 1 : basis.n_basis + 1]
        elif isinstance(basis, RadialBasis):
            n_intervals, self.degree = _WAVES
            self._n_intervals = n_intervals * -(-basis.n_basis // 20)  # more waves, more knots
            self._shortest = _SHORTEST_SEEN * potential.smallest_core
            if not self._shortest < basis.cutoff:
                raise ValueError(
                    f"a cutoff of {basis.cutoff} Å is within the core of the repulsion"
                )
            self._per_length = self._n_intervals / (basis.cutoff - self._shortest)
            table = tabulate(
                basis, shortest=self._shortest, n_intervals=self._n_intervals, degree=self.degree
            )
        else:
            raise ValueError(f"radial functions of the kind {type(basis).__name__} have no table")
        device = next(potential.parameters()).device
        self.register_buffer("_table", table.to(device), persistent=False)

    def forward(
        self,
        species: Tensor,
        edge_vectors: Tensor,
        edge_index: Tensor,
        core: Tensor,
        near: Tensor | None = None,
    ) -> Tensor:
        """Energy of each atom, as of `VariantPaiNN.forward`; `core` and a tail's `near` must be."""
        return self.energies_and_charges(species, edge_vectors, edge_index, core, near)[0]

    def energies_and_charges(
        self,
        species: Tensor,
        edge_vectors: Tensor,
        edge_index: Tensor,
        core: Tensor,
        near: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Energy and partial charge of each atom, as of `VariantPaiNN.energies_and_charges`."""
        network: Any = self.network
        distances, directions = distances_and_directions(edge_vectors)
        far, far_index = distances, edge_index
        if self.has_tail:
            assert near is not None
            distances, directions, core = distances[near], directions[near], core[near]
            edge_index = edge_index[:, near]
        place = (compress_core(distances, core) - self._shortest) * self._per_length
        geometry = torch.cat([directions, place.unsqueeze(1)], dim=1)
        scalars = self._features(species, geometry, edge_index)
        energies = network.readout(scalars).squeeze(1)
        charges = torch.zeros_like(energies)
        if self.has_charges:
            charges = network.charge_readout(scalars).squeeze(1)
        if self.has_tail:
            tail = network.tail(far, charges.to(far.dtype), species, far_index)
            energies = energies.to(far.dtype) + tail / network.energy_scale
        return energies, charges

    def _features(self, species: Tensor, geometry: Tensor, edge_index: Tensor) -> Tensor:
        network: Any = self.network
        n_atoms, c = species.shape[0], network.n_channels
        plan = training_ops.edge_plan(edge_index, geometry[:, 3], n_atoms, self._n_intervals)
        scalars = network.embedding(species)
        vectors: Tensor | None = None
        for interaction, mixing in zip(network.interactions, network.mixings, strict=True):
            features = interaction.context(scalars)
            if vectors is None:
                features = features.view(n_atoms, 2, c)
            else:
                scaled = vectors * features[:, 2 * c :].unsqueeze(1)
                features = torch.cat([features[:, : 2 * c].view(n_atoms, 2, c), scaled], dim=1)
            # rounded weights would make a table that is rough: this small product is exact
            table = (self._table @ interaction.filter.weight.double().T).to(geometry.dtype)
            sums = torch.ops.mlffd.edge_message(
                features.to(geometry.dtype),
                table.view(table.shape[0], -1, c),
                geometry,
                plan,
                self.degree,
            )
            scalars = scalars + sums[:, 0]
            vectors = sums[:, 1:] if vectors is None else vectors + sums[:, 1:]
            scalars, vectors = mixing(scalars, vectors)
        return scalars
