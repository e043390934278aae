"""Weights and gradient of a module as one tensor each."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class FlatWeights:
    """A module's weights, and their gradient, as one tensor each of which the module has views.

    Clipping, the optimizer, averaging and the sum over processes are then one operation each.
    The gradient has room for a few numbers more, which are summed with it.

    Parameters
    ----------
    module
        Its parameters are moved; those of a deep copy made later are its own.
    extra
        Numbers that travel with the gradient.
    """

    _ALIGNMENT = 32  # elements: matrix products like addresses of multiples of 128 bytes

    def __init__(self, module: nn.Module, extra: int = 0) -> None:
        parameters = list(module.parameters())
        starts, end = [], 0
        for p in parameters:
            starts.append(end)
            end += -(-p.numel() // self._ALIGNMENT) * self._ALIGNMENT
        flat = torch.zeros(end, dtype=parameters[0].dtype, device=parameters[0].device)
        self._buffer = torch.zeros(end + extra, dtype=flat.dtype, device=flat.device)
        self.gradient, self.extra = self._buffer[:end], self._buffer[end:]
        self.views = []
        for p, start in zip(parameters, starts, strict=True):
            place = slice(start, start + p.numel())
            flat[place].view_as(p).copy_(p.detach())
            p.data = flat[place].view_as(p)
            self.views.append(self.gradient[place].view_as(p))
        self.parameters = parameters
        self.weights = nn.Parameter(flat, requires_grad=True)
        self.weights.grad = self.gradient

    @property
    def summed(self) -> Tensor:
        """Gradient and extra numbers in one tensor, for the sum over processes."""
        return self._buffer

    def write_gradient(self, gradients: Sequence[Tensor]) -> None:
        """Copy the gradient of each parameter to its place."""
        torch._foreach_copy_(self.views, list(gradients))
