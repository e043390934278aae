"""PaiNN between its messages, forward and backward, without autograd: parts of `FastPotential`.

Nothing is allocated here: what is computed is written to tensors that are given. n is the number of
atoms, c that of channels. A state is scalars q, the first half of rows of 2c, and vectors μ,
``(n, 3, c)``; the second half of the rows is for the norms of projected vectors. Written for
TorchScript.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from openmm_mlffd.kernels import ops  # noqa: F401 (registers torch.ops.mlffd)
from openmm_mlffd.kernels.chain_ops import most_chained
from openmm_mlffd.painn import Interaction, Mixing


def _rounded(x: Tensor) -> Tensor:
    """To 10 bits of mantissa."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp(torch.round(mantissa * 2**11) / 2**11, exponent)


class Chain(nn.Module):
    """Whether what is between messages is done by one kernel, see `kernels.chain_kernels`."""

    def __init__(self, n_channels: int, width: int, like: Tensor) -> None:
        super().__init__()
        single = like.dtype == torch.float32
        self.most, self.on_cpu = (most_chained(n_channels, width) if single else 0), False

    def holds(self, x: Tensor) -> bool:
        """Whether as many atoms as x has rows are for that kernel."""
        return x.shape[0] <= self.most and (x.is_cuda or self.on_cpu)


class Product(nn.Module):
    """A matrix product whose derivative is written out; both write where they are told to."""

    weight: Tensor
    transposed: Tensor

    def __init__(self, weight: Tensor, like: Tensor, reduced: bool) -> None:
        super().__init__()
        self.reduced, self.never = reduced, False
        weight = weight.detach().to(like)
        if reduced:
            weight = _rounded(weight)
        self.register_buffer("weight", weight.contiguous())
        self.register_buffer("transposed", weight.t().contiguous())

    def forward(self, x: Tensor, out: Tensor) -> None:
        """``x @ weight.T``."""
        reduced = self.reduced
        if self.never:  # the first that a stored module asks for, see kernels/ops.py
            reduced = torch.ops.mlffd.import_openmm_mlffd_kernels_ops_first(reduced)
        if reduced:
            torch.ops.mlffd.product_(x, self.weight.t(), out, False)
        else:
            torch.mm(x, self.weight.t(), out=out)

    def backward(self, gradient: Tensor, out: Tensor, add: bool) -> None:
        """``gradient @ weight``, or that added to what is there."""
        if self.reduced:
            torch.ops.mlffd.product_(gradient, self.weight, out, add)
        elif add:
            out.addmm_(gradient, self.weight)
        else:
            torch.mm(gradient, self.weight, out=out)


class Perceptron(nn.Module):
    """Two affine maps with a SiLU between them; the second one's bias is left to who reads it."""

    bias: Tensor
    outer_bias: Tensor

    def __init__(self, layers: nn.Sequential, n_out: int, like: Tensor, reduced: bool) -> None:
        super().__init__()
        inner, outer = layers[0], layers[2]
        assert isinstance(inner, nn.Linear)
        assert isinstance(outer, nn.Linear)
        self.reduced = reduced
        self.inner = Product(inner.weight, like, reduced)
        self.outer = Product(outer.weight[:n_out], like, reduced)
        self.register_buffer("bias", inner.bias.detach().to(like).contiguous())
        self.register_buffer("outer_bias", outer.bias[:n_out].detach().to(like).contiguous())

    def forward(self, x: Tensor, hidden: Tensor, bent: Tensor, out: Tensor) -> None:
        """Values without bias to ``out``; ``hidden`` is for `backward`, ``bent`` for nothing."""
        self.inner(x, hidden)
        torch.ops.mlffd.node_silu_(hidden, self.bias, bent, self.reduced)
        self.outer(bent, out)

    def backward(
        self, gradient: Tensor, hidden: Tensor, bent: Tensor, out: Tensor, add: bool
    ) -> None:
        """From the gradient by the values that by ``x``, or that added to ``out``."""
        self.outer.backward(gradient, bent, False)
        torch.ops.mlffd.node_silu_backward_(hidden, self.bias, bent, self.reduced)
        self.inner.backward(bent, out, add)


class Kept(NamedTuple):
    """What the backward pass of a block needs from its forward pass, of n atoms."""

    uv: Tensor  # (n, 3, 2c), projections u and v of the vectors
    hidden: Tensor  # (n, c), of the mixing's perceptron
    a: Tensor  # (n, 3c), its values
    inner: Tensor  # (n, c), hidden of the context's perceptron
    scale: Tensor  # (n, c), of the vectors among the features


class Space(NamedTuple):
    """Room for what is needed for a moment only, of n atoms."""

    bent: Tensor  # (n, c)
    phi: Tensor  # (n, 3c)
    q: Tensor  # (n, 2c)
    mu: Tensor  # (n, 3, c)
    by_features: Tensor  # (n, 5, c)


class Mix(nn.Module):
    """`Mixing` on states; without new vectors where they are not used any more."""

    def __init__(self, mixing: Mixing, last: bool, like: Tensor, reduced: bool) -> None:
        super().__init__()
        self.n_channels, self.reduced = mixing.n_channels, reduced
        self.softening = mixing.softening
        n_out = (2 if last else 3) * self.n_channels
        self.project = Product(mixing.project.weight, like, reduced)
        self.context = Perceptron(mixing.context, n_out, like, reduced)

    def forward(
        self, q: Tensor, mu: Tensor, uv: Tensor, hidden: Tensor, a: Tensor, bent: Tensor,
        new_q: Tensor, new_mu: Tensor,
    ) -> None:  # fmt: skip
        """New state, which may be in the place of the old one; the rest as in `Kept`."""
        n, c = q.shape[0], self.n_channels
        self.project(mu.view(3 * n, c), uv.view(3 * n, 2 * c))
        torch.ops.mlffd.node_norms_(uv, q, self.softening, self.reduced)
        self.context(q, hidden, bent, a)
        torch.ops.mlffd.node_mix_(
            uv, a, self.context.outer_bias, q, mu, new_q, new_mu, self.reduced
        )

    def backward(
        self, by_q: Tensor, by_mu: Tensor, uv: Tensor, hidden: Tensor, a: Tensor, bent: Tensor,
        by_a: Tensor, by_input: Tensor,
    ) -> None:  # fmt: skip
        """The gradient by the new state becomes that by the old one; ``uv`` is used up."""
        n, c = by_q.shape[0], self.n_channels
        last = a.shape[1] == 2 * c
        torch.ops.mlffd.node_mix_backward_(uv, by_q, by_mu, by_a, self.reduced)
        self.context.backward(by_a, hidden, bent, by_input, False)
        torch.ops.mlffd.node_project_backward_(
            a, self.context.outer_bias, by_input, by_mu, by_q, uv, self.softening, self.reduced
        )
        self.project.backward(uv.view(3 * n, 2 * c), by_mu.view(3 * n, c), not last)


class Block(nn.Module):
    """From one message to the next: mixing, then the context of the next block's features."""

    table: Tensor

    def __init__(
        self, mixing: Mixing, following: Interaction, table: Tensor, like: Tensor, reduced: bool
    ) -> None:
        super().__init__()
        self.n_channels = c = mixing.n_channels
        self.mixing = Mix(mixing, False, like, reduced)
        self.context = Perceptron(following.context, 3 * c, like, reduced)
        self.register_buffer("table", table.view(table.shape[0], 3, -1).contiguous())
        self.chain = Chain(c, 4, like)

    def forward(
        self, q: Tensor, mu: Tensor, kept: Kept, space: Space, new_q: Tensor, new_mu: Tensor,
        features: Tensor,
    ) -> None:  # fmt: skip
        """New state, and the features for the neighbors, of n atoms."""
        n, c = q.shape[0], self.n_channels
        if self.chain.holds(q):
            mix, to, mixed = self.mixing.project, self.context, self.mixing.context
            torch.ops.mlffd.chain_forward_(
                q, mu,
                [mix.transposed, mixed.inner.transposed, mixed.bias, mixed.outer.transposed,
                 mixed.outer_bias, to.inner.transposed, to.bias, to.outer.transposed,
                 to.outer_bias],
                kept.uv, kept.hidden, kept.a, kept.inner, kept.scale, new_q, new_mu, features,
                self.mixing.softening,
            )  # fmt: skip
            return
        self.mixing(q, mu, kept.uv, kept.hidden, kept.a, space.bent, new_q, new_mu)
        phi = space.phi
        if features.dtype == phi.dtype:  # in the place where it stays
            phi = features.view(n, 5 * c)[:, : 3 * c]
        self.context(new_q[:, :c], kept.inner, space.bent, phi)
        torch.ops.mlffd.node_features_(phi, self.context.outer_bias, new_mu, features, kept.scale)

    def backward(
        self, mu: Tensor, kept: Kept, space: Space, old_q: Tensor, old_mu: Tensor, by_q: Tensor,
        by_mu: Tensor,
    ) -> None:  # fmt: skip
        """From the gradients by the new state, and by the features in ``space``, that by the old.

        It goes to ``by_q`` and ``by_mu``, which may be in the place of the others.
        """
        n, c = by_q.shape[0], self.n_channels
        if self.chain.holds(by_q):
            mixed, to = self.mixing.context, self.context
            torch.ops.mlffd.chain_backward_(
                mu,
                [self.mixing.project.weight, mixed.inner.weight, mixed.bias, mixed.outer.weight,
                 mixed.outer_bias, to.inner.weight, to.bias, to.outer.weight],
                kept.uv, kept.hidden, kept.a, kept.inner, kept.scale, space.by_features, old_q,
                old_mu, by_q, by_mu, self.mixing.softening,
            )  # fmt: skip
            return
        bias = self.mixing.context.outer_bias
        by_features = space.by_features
        torch.ops.mlffd.node_features_backward_(
            kept.uv,
            kept.a,
            bias,
            mu,
            kept.scale,
            by_features,
            old_q,
            old_mu,
            by_q,
            by_mu,
            self.mixing.reduced,
        )
        by_phi = by_features.view(n, 5 * c)[:, : 3 * c]
        self.context.backward(by_phi, kept.inner, space.bent, by_q, True)
        self.mixing.backward(
            by_q, by_mu, kept.uv, kept.hidden, kept.a, space.bent, space.phi, space.q
        )


def part(tensor: Tensor, start: int, n: int) -> Tensor:
    """Some consecutive atoms of a tensor."""
    return tensor.narrow(0, start, n)


def part_of(kept: Kept, start: int, n: int) -> Kept:
    """Some consecutive atoms of what is kept."""
    return Kept(
        part(kept.uv, start, n),
        part(kept.hidden, start, n),
        part(kept.a, start, n),
        part(kept.inner, start, n),
        part(kept.scale, start, n),
    )


def first_of(space: Space, n: int) -> Space:
    """Room for no more than n atoms."""
    return Space(
        part(space.bent, 0, n),
        part(space.phi, 0, n),
        part(space.q, 0, n),
        part(space.mu, 0, n),
        part(space.by_features, 0, n),
    )


def feature_room(n: int, table: Tensor, like: Tensor) -> Tensor:
    """Room for the features of n atoms, as the table of filters is stored."""
    return torch.empty([n, 5, like.shape[1]], dtype=table.dtype, device=like.device)


def room_for(n: int, c: int, like: Tensor) -> Kept:
    """Room for what is kept of n atoms."""
    return Kept(
        like.new_empty([n, 3, 2 * c]),
        like.new_empty([n, c]),
        like.new_empty([n, 3 * c]),
        like.new_empty([n, c]),
        like.new_empty([n, c]),
    )


def space_for(n: int, c: int, like: Tensor) -> Space:
    """Room to compute n atoms."""
    return Space(
        like.new_empty([n, c]),
        like.new_empty([n, 3 * c]),
        like.new_empty([n, 2 * c]),
        like.new_empty([n, 3, c]),
        like.new_empty([n, 5, c]),
    )
