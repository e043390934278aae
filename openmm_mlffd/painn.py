"""PaiNN: Schütt, Unke, Gastegger 2021, arXiv 2102.03150. Edges to energy per atom, nothing else."""

import torch
from torch import Tensor, nn

from openmm_mlffd.kernels import reference
from openmm_mlffd.radial import RadialBasis, compress_core, distances_and_directions

NORM_SOFTENING = 1e-2
"""Added to squared norms of vector features before the square root.

Whenever a vector feature passes zero, the norm turns round within about the root of this. At 1e-4
that happens within one time step of 0.5 fs, and the energy wanders."""


def _mlp(n_in: int, n_hidden: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(n_in, n_hidden), nn.SiLU(), nn.Linear(n_hidden, n_out))


class Interaction(nn.Module):
    """Message block, figure 2b: features of the neighbors, filtered by distance and direction."""

    def __init__(self, n_channels: int, n_basis: int, first: bool) -> None:
        super().__init__()
        self.n_channels = n_channels
        n_messages = 2 if first else 3  # the first block has no vectors to pass on yet
        self.context = _mlp(n_channels, n_channels, n_messages * n_channels)
        self.filter = nn.Linear(n_basis, n_messages * n_channels, bias=False)

    def forward(
        self,
        scalars: Tensor,
        vectors: Tensor | None,
        basis: Tensor,
        directions: Tensor,
        edge_index: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """New scalars (n_atoms, n_channels) and vectors (n_atoms, 3, n_channels)."""
        n = 2 * self.n_channels
        phi = self.context(scalars)  # (N, 3C): scalar, direction and vector messages
        filters = self.filter(basis)
        if vectors is None:
            ds, dv = reference.message_sum(phi, None, filters, directions, edge_index)
            return scalars + ds, dv
        scaled = vectors * phi[:, n:].unsqueeze(1)
        ds, dv = reference.message_sum(phi[:, :n], scaled, filters, directions, edge_index)
        return scalars + ds, vectors + dv


class Mixing(nn.Module):
    """Update block, figure 2c: mixes channels and couples scalars with vectors, atom by atom."""

    def __init__(self, n_channels: int, softening: float) -> None:
        super().__init__()
        self.n_channels = n_channels
        self.softening = softening
        self.project = nn.Linear(n_channels, 2 * n_channels, bias=False)
        self.context = _mlp(2 * n_channels, n_channels, 3 * n_channels)

    def forward(self, scalars: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """New scalars (n_atoms, n_channels) and vectors (n_atoms, 3, n_channels)."""
        u, v = self.project(vectors).split(self.n_channels, dim=2)  # (N, 3, C) each
        norm = torch.sqrt(v.square().sum(dim=1) + self.softening)
        a_ss, a_sv, a_vv = self.context(torch.cat([scalars, norm], dim=1)).split(
            self.n_channels, dim=1
        )
        scalars = scalars + a_ss + a_sv * (u * v).sum(dim=1)
        return scalars, vectors + a_vv.unsqueeze(1) * u


class PaiNN(nn.Module):
    """Polarizable atom interaction network: energy of each atom from its surroundings.

    Invariant to translation, rotation, reflection and the order of the atoms; with a cutoff
    whose first two derivatives vanish, twice continuously differentiable.

    Parameters
    ----------
    n_elements
        Number of chemical elements.
    n_channels
        Features per atom (scalars, and as many vectors).
    n_interactions
        Number of message blocks.
    n_basis
        Number of radial functions.
    cutoff
        Neighbor cutoff [Å].
    norm_softening
        Norms of vector features are sqrt(v² + norm_softening).

    References
    ----------
    Schütt, Unke, Gastegger, ICML 2021, arXiv 2102.03150, figure 2. Differences: a cutoff with
    two continuous derivatives, a filter without bias (so that messages vanish smoothly at the
    cutoff), no vector messages in the first block (they are zero), softened distances and norms
    (see `radial`).
    """

    def __init__(
        self,
        n_elements: int,
        *,
        n_channels: int = 128,
        n_interactions: int = 3,
        n_basis: int = 20,
        cutoff: float = 5.0,
        norm_softening: float = NORM_SOFTENING,
    ) -> None:
        super().__init__()
        self.n_channels = n_channels
        self.norm_softening = norm_softening
        self.embedding = nn.Embedding(n_elements, n_channels)
        self.basis = RadialBasis(n_basis, cutoff)
        self.interactions = nn.ModuleList(
            [Interaction(n_channels, n_basis, first=i == 0) for i in range(n_interactions)]
        )
        self.mixings = nn.ModuleList(
            [Mixing(n_channels, norm_softening) for _ in range(n_interactions)]
        )
        self.readout = _mlp(n_channels, n_channels // 2, 1)

    def forward(
        self,
        species: Tensor,
        edge_vectors: Tensor,
        edge_index: Tensor,
        core: Tensor | None = None,
    ) -> Tensor:
        """Energy of each atom.

        Parameters
        ----------
        species
            Element index of each atom, shape ``(n_atoms,)``, int64.
        edge_vectors
            Sender minus receiver [Å], shape ``(n_edges, 3)``.
        edge_index
            Receiver and sender of each edge, shape ``(2, n_edges)``, int64.
        core
            Distance [Å] within which each edge is compressed, see `radial.compress_core`,
            shape ``(n_edges,)``; None for no such core.

        Returns
        -------
        Tensor
            Energy of each atom in units of the model's energy scale, shape ``(n_atoms,)``.
        """
        distances, directions = distances_and_directions(edge_vectors)
        if core is not None:
            distances = compress_core(distances, core)
        basis = self.basis(distances)
        scalars = self.embedding(species)
        vectors: Tensor | None = None
        for interaction, mixing in zip(self.interactions, self.mixings):  # noqa: B905 (TorchScript)
            scalars, vectors = interaction(scalars, vectors, basis, directions, edge_index)
            scalars, vectors = mixing(scalars, vectors)
        return self.readout(scalars).squeeze(1)
