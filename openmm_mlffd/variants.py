"""PaiNN with other filters, partial charges and a long-range tail."""

from typing import Final

import torch
from torch import Tensor, nn

from openmm_mlffd.kernels import reference
from openmm_mlffd.painn import NORM_SOFTENING, Interaction, Mixing, _mlp
from openmm_mlffd.radial import RadialBasis, compress_core, distances_and_directions
from openmm_mlffd.tail import LongRangeTail

FILTERS = ("sine", "spline")


class SplineBasis(nn.Module):
    """Cubic B-splines on equal knots, the last of which ends at the cutoff.

    A linear combination of them is a cubic spline that vanishes at the cutoff with two
    derivatives: an evaluation may read it from a table with four terms, exactly.

    Parameters
    ----------
    n_basis
        Number of splines.
    cutoff
        Distance [Å] at which they vanish.
    """

    def __init__(self, n_basis: int, cutoff: float) -> None:
        super().__init__()
        self.n_basis = n_basis
        self.spacing = cutoff / (n_basis + 1)

    def forward(self, distances: Tensor) -> Tensor:
        """Values at distances [Å] of shape ``(n_edges,)``: shape ``(n_edges, n_basis)``."""
        knots = torch.arange(self.n_basis, dtype=distances.dtype, device=distances.device)
        x = (distances.unsqueeze(1) / self.spacing - knots).abs()
        outer, inner = torch.relu(2.0 - x), torch.relu(1.0 - x)
        return (outer * outer * outer - 4.0 * inner * inner * inner) / 6.0


class VariantInteraction(Interaction):
    """Message block whose filters may be scaled for each pair of elements, channel by channel."""

    has_pairs: Final[bool]

    def __init__(
        self, n_channels: int, n_basis: int, first: bool, *, n_elements: int, pairs: bool
    ) -> None:
        super().__init__(n_channels, n_basis, first)
        self.has_pairs = pairs
        if pairs:
            self.pair_scale = nn.Embedding(n_elements * n_elements, self.filter.out_features)
            nn.init.ones_(self.pair_scale.weight)

    def forward(  # type: ignore[override]
        self,
        scalars: Tensor,
        vectors: Tensor | None,
        basis: Tensor,
        pair: Tensor,
        directions: Tensor,
        edge_index: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """As `Interaction.forward`; `pair` is the index of each edge's pair, ``(n_edges,)``."""
        n = 2 * self.n_channels
        phi = self.context(scalars)
        filters = self.filter(basis)
        if self.has_pairs:
            filters = filters * self.pair_scale(pair)
        if vectors is None:
            ds, dv = reference.message_sum(phi, None, filters, directions, edge_index)
            return scalars + ds, dv
        scaled = vectors * phi[:, n:].unsqueeze(1)
        ds, dv = reference.message_sum(phi[:, :n], scaled, filters, directions, edge_index)
        return scalars + ds, vectors + dv


class VariantPaiNN(nn.Module):
    """`PaiNN` with a choice of filters, and with partial charges and a long-range tail if asked.

    The tail has a neighbor list of its own reach: the edges that are given reach as far as the
    tail does, and the message blocks use those closer than their cutoff.

    Parameters
    ----------
    numbers
        Atomic numbers of the elements.
    n_channels, n_interactions, n_basis, cutoff, norm_softening
        As of `PaiNN`; with ``filters="spline"``, `n_basis` is the number of knots.
    filters
        "sine" or "spline".
    pair_filters
        Scale the filters for each pair of elements.
    charges
        Predict partial charges.
    tail_cutoff
        Reach of the tail [Å]; None for no tail.
    energy_scale
        Energy [eV] of the unit in which energies are given; the tail's are converted.

    Raises
    ------
    ValueError
        If there is a tail without charges, or one shorter than the cutoff.
    """

    has_charges: Final[bool]
    has_tail: Final[bool]

    def __init__(
        self,
        numbers: list[int],
        *,
        n_channels: int = 128,
        n_interactions: int = 3,
        n_basis: int = 20,
        cutoff: float = 5.0,
        norm_softening: float = NORM_SOFTENING,
        filters: str = "sine",
        pair_filters: bool = False,
        charges: bool = False,
        tail_cutoff: float | None = None,
        energy_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if tail_cutoff is not None and not (charges and tail_cutoff >= cutoff):
            raise ValueError(
                "a tail needs charges and a reach of at least the cutoff, got "
                f"charges={charges}, {tail_cutoff} Å and {cutoff} Å"
            )
        n_elements = len(numbers)
        self.n_channels = n_channels
        self.norm_softening = norm_softening
        self.n_elements = n_elements
        self.cutoff = cutoff
        self.energy_scale = energy_scale
        self.has_charges = charges
        self.has_tail = tail_cutoff is not None
        self.embedding = nn.Embedding(n_elements, n_channels)
        self.basis = (RadialBasis if filters == "sine" else SplineBasis)(n_basis, cutoff)
        self.interactions = nn.ModuleList(
            [
                VariantInteraction(
                    n_channels, n_basis, i == 0, n_elements=n_elements, pairs=pair_filters
                )
                for i in range(n_interactions)
            ]
        )
        self.mixings = nn.ModuleList(
            [Mixing(n_channels, norm_softening) for _ in range(n_interactions)]
        )
        self.readout = _mlp(n_channels, n_channels // 2, 1)
        if charges:
            self.charge_readout = _mlp(n_channels, n_channels // 2, 1)
        if tail_cutoff is not None:
            self.tail = LongRangeTail(numbers, tail_cutoff)

    def forward(
        self,
        species: Tensor,
        edge_vectors: Tensor,
        edge_index: Tensor,
        core: Tensor | None = None,
        near: Tensor | None = None,
    ) -> Tensor:
        """Energy of each atom; arguments as of `energies_and_charges`."""
        return self.energies_and_charges(species, edge_vectors, edge_index, core, near)[0]

    @torch.jit.export
    def energies_and_charges(
        self,
        species: Tensor,
        edge_vectors: Tensor,
        edge_index: Tensor,
        core: Tensor | None = None,
        near: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Energy and partial charge of each atom.

        Parameters
        ----------
        species, edge_vectors, edge_index, core
            As of `PaiNN.forward`.
        near
            Indices of the edges closer than the cutoff, and maybe of further ones, which do not
            count, shape ``(n_near,)``; None to find them, which waits for the device.

        Returns
        -------
        energies
            In units of the model's energy scale, shape ``(n_atoms,)``.
        charges
            [e], shape ``(n_atoms,)``; zeros without charges.
        """
        distances, directions = distances_and_directions(edge_vectors)
        far, far_index = distances, edge_index
        if self.has_tail:
            if near is None:
                near = (distances < self.cutoff).nonzero()[:, 0]
            distances, directions = distances[near], directions[near]
            edge_index = edge_index[:, near]
            if core is not None:
                core = core[near]
        if core is not None:
            distances = compress_core(distances, core)
        scalars = self._features(species, distances, directions, edge_index)
        energies = self.readout(scalars).squeeze(1)
        charges = torch.zeros_like(energies)
        if self.has_charges:
            charges = self.charge_readout(scalars).squeeze(1)
        if self.has_tail:
            tail = self.tail(far, charges.to(far.dtype), species, far_index)
            energies = energies.to(far.dtype) + tail / self.energy_scale
        return energies, charges

    def _features(
        self, species: Tensor, distances: Tensor, directions: Tensor, edge_index: Tensor
    ) -> Tensor:
        basis = self.basis(distances)
        pair = species[edge_index[0]] * self.n_elements + species[edge_index[1]]
        scalars = self.embedding(species)
        vectors: Tensor | None = None
        for interaction, mixing in zip(self.interactions, self.mixings):  # noqa: B905 (TorchScript)
            scalars, vectors = interaction(scalars, vectors, basis, pair, directions, edge_index)
            scalars, vectors = mixing(scalars, vectors)
        return scalars
