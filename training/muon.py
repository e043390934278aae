"""Muon: momentum of weight matrices, made orthogonal, as their update."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from openmm_mlffd.training.flat import FlatWeights

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_RMS = 0.2  # of AdamW's updates, about: the same learning rate serves both


def orthogonalized(matrices: Tensor) -> Tensor:
    """Nearest matrices whose singular values are about 1, by five Newton-Schulz iterations.

    Parameters
    ----------
    matrices
        Shape ``(n, rows, columns)``; zeros stay zeros.

    Returns
    -------
    Tensor
        Same shape, singular values between 0.7 and 1.2.

    References
    ----------
    Jordan et al. 2024, https://kellerjordan.github.io/posts/muon.
    """
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.transpose(1, 2) if tall else x


class Muon:
    """Takes over the weight matrices of a network; what else there is stays with AdamW.

    Matrices of linear layers with at least two rows and columns count, embeddings do not. Those
    of one shape are handled together.

    Parameters
    ----------
    network
        Whose parameters are those of `flat`.
    flat
        Its weights and gradients.
    momentum
        Decay of the sum of gradients.

    References
    ----------
    Jordan et al. 2024, see `orthogonalized`; Liu et al. 2025, arXiv 2502.16982 (the size of the
    update).
    """

    def __init__(self, network: nn.Module, flat: FlatWeights, momentum: float = 0.95) -> None:
        self._momentum = momentum
        mine = {
            id(m.weight)
            for m in network.modules()
            if isinstance(m, nn.Linear) and min(m.weight.shape) > 1
        }
        self._groups: list[tuple[list[Tensor], list[Tensor]]] = []
        self.sums: list[Tensor] = []
        shapes: dict[torch.Size, tuple[list[Tensor], list[Tensor]]] = {}
        for weight, gradient in zip(flat.parameters, flat.views, strict=True):
            if id(weight) in mine:
                weights, gradients = shapes.setdefault(weight.shape, ([], []))
                weights.append(weight.data)
                gradients.append(gradient)
        for shape, (weights, gradients) in shapes.items():
            self._groups.append((weights, gradients))
            self.sums.append(weights[0].new_zeros(len(weights), *shape))

    @torch.no_grad()
    def step(self, rate: Tensor, finite: Tensor) -> None:
        """Move the matrices, and zero their gradients, so that AdamW leaves them alone.

        Parameters
        ----------
        rate
            Learning rate, shape ().
        finite
            Whether gradients are finite, shape (); if not, nothing moves.
        """
        for (weights, gradients), total in zip(self._groups, self.sums, strict=True):
            new = torch.stack(gradients)
            new = torch.where(finite, new, 0.0)
            total.copy_(torch.where(finite, self._momentum * total + new, total))
            update = orthogonalized(new + self._momentum * total)
            size = _RMS * max(update.shape[1:]) ** 0.5
            scaled = torch.where(finite, rate * size * update, 0.0)
            torch._foreach_sub_(weights, list(scaled.unbind()))
            torch._foreach_zero_(gradients)

    def state(self) -> list[Tensor]:
        """What a step changes besides weights and gradients."""
        return self.sums

    @torch.no_grad()
    def load(self, state: Sequence[Tensor]) -> None:
        """Momentum of a checkpoint."""
        for mine, value in zip(self.sums, state, strict=True):
            mine.copy_(value)
