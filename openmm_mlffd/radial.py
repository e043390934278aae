"""Radial basis and smooth cutoff."""

import math

import torch
from torch import Tensor, nn

SOFTENING = 0.01
"""Distances are sqrt(r^2 + SOFTENING^2) [Å], so that coincident atoms have finite forces."""


def softened_distances(vectors: Tensor, softening: float = SOFTENING) -> Tensor:
    """``sqrt(r^2 + softening^2)`` [Å], shape ``(n_edges,)``, of vectors [Å] ``(n_edges, 3)``."""
    return torch.sqrt(vectors.square().sum(dim=1) + softening**2)


def distances_and_directions(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Softened length and direction of each edge.

    Parameters
    ----------
    vectors
        Edge vectors [Å], shape ``(n_edges, 3)``.

    Returns
    -------
    distances
        Softened distances [Å], shape ``(n_edges,)``.
    directions
        ``vectors / distances``, shape ``(n_edges, 3)``; zero for coincident atoms.
    """
    distances = softened_distances(vectors)
    return distances, vectors / distances.unsqueeze(1)


def smooth_cutoff(x: Tensor) -> Tensor:
    """Polynomial 1 - 28 x^6 + 48 x^7 - 21 x^8 of x = distance / cutoff, and 0 beyond x = 1.

    Value and first two derivatives vanish at the cutoff, so that forces have a continuous
    derivative (Gasteiger et al. 2020, arXiv 2003.03123, equation 8, p = 6).
    """
    x = x.clamp(max=1.0)
    return 1.0 + x**6 * (-28.0 + x * (48.0 - 21.0 * x))


def compress_core(distances: Tensor, core: Tensor) -> Tensor:
    """Distances as the network sees them: unchanged beyond the core, at least 5/7 core within.

    d = core (5/7 + t^6 - 5/7 t^7), t = r / core, for r < core: twice continuously differentiable
    and flat for small r. Shorter than any distance it was trained on, the network would be free
    to do anything; so it does nothing, and the repulsion acts alone.

    Parameters
    ----------
    distances
        Distances [Å], shape ``(n_edges,)``.
    core
        Radius of the core of each pair [Å], shape ``(n_edges,)``.
    """
    t = (distances / core).clamp(max=1.0)
    return torch.where(distances < core, core * (5 / 7 + t**6 * (1 - 5 / 7 * t)), distances)


class RadialBasis(nn.Module):
    """sqrt(2 / cutoff) sin(n π r / cutoff) / r times the smooth cutoff, n = 1 … n_basis.

    Parameters
    ----------
    n_basis
        Number of functions.
    cutoff
        Distance [Å] at which they vanish.
    """

    def __init__(self, n_basis: int, cutoff: float) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.n_basis = n_basis

    def forward(self, distances: Tensor) -> Tensor:
        """Values at distances [Å] of shape ``(n_edges,)``: shape ``(n_edges, n_basis)``."""
        n = torch.arange(1, self.n_basis + 1, dtype=distances.dtype, device=distances.device)
        waves = torch.sin(distances.unsqueeze(1) * (n * (math.pi / self.cutoff)))
        envelope = smooth_cutoff(distances / self.cutoff) * math.sqrt(2.0 / self.cutoff)
        return waves * (envelope / distances).unsqueeze(1)
