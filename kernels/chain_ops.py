"""`torch.ops.mlffd.chain_*`: from one message to the next, and back, for systems of few atoms.

Everything is written to tensors that are given. m is the number of atoms, c that of channels; all
but the features, which may be float16, and energies is float32. The operators compute what
`blocks` does with products and the operators of `node_ops`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from openmm_mlffd.kernels import chain_kernels as kernels
from openmm_mlffd.kernels.launch import launch
from openmm_mlffd.kernels.library import define, require

MOST_BLOCKS = 132
"""Blocks that are at work at the same time: the multiprocessors of an H100."""


def most_chained(n_channels: int, width: int) -> int:
    """Atoms up to which the blocks are all at work at once; 0 if there is no room for one."""
    return MOST_BLOCKS * kernels.most_atoms(n_channels, width)


def chain_forward_(
    q: Tensor,
    mu: Tensor,
    weights: Sequence[Tensor],
    uv: Tensor,
    hidden: Tensor,
    a: Tensor,
    inner: Tensor,
    scale: Tensor,
    new_q: Tensor,
    new_mu: Tensor,
    features: Tensor,
    softening: float,
) -> None:
    """Mixing, and the next block's context.

    Parameters
    ----------
    q, mu
        State, shapes ``(m, 2c)``, of which the first half of each row is read, and ``(m, 3, c)``.
    weights
        Projection ``(c, 2c)``; of mixing and of context the inner matrix ``(2c or c, c)`` and
        bias ``(c,)``, outer matrix ``(c, 3c)`` and bias ``(3c,)``; all transposed.
    uv, hidden, a, inner, scale
        For the way back, see `blocks.Kept`.
    new_q, new_mu
        New state, like the old one and maybe in its place.
    features
        For the neighbors, shape ``(m, 5, c)``.
    softening
        Of norms, see `painn`.
    """
    m, c = mu.shape[0], mu.shape[2]
    sizes = [(c, 2 * c), (2 * c, c), (c,), (c, 3 * c), (3 * c,), (c, c), (c,), (c, 3 * c), (3 * c,)]
    _weights(weights, sizes, mu)
    given = {
        "q": (q, (m, 2 * c)), "mu": (mu, (m, 3, c)), "uv": (uv, (m, 3, 2 * c)),
        "hidden": (hidden, (m, c)), "a": (a, (m, 3 * c)), "inner": (inner, (m, c)),
        "scale": (scale, (m, c)), "new_q": (new_q, (m, 2 * c)), "new_mu": (new_mu, (m, 3, c)),
    }  # fmt: skip
    _check(given)
    require("features", features, features.dtype, (m, 5, c), mu.device)
    _launch(
        "forward", m, c, c, features.dtype, (softening, 0.0, 0.0),
        [q, mu, *weights, uv, hidden, a, inner, scale, new_q, new_mu, features], mu.device,
    )  # fmt: skip


def chain_backward_(
    mu: Tensor,
    weights: Sequence[Tensor],
    uv: Tensor,
    hidden: Tensor,
    a: Tensor,
    inner: Tensor,
    scale: Tensor,
    by_features: Tensor,
    old_q: Tensor,
    old_mu: Tensor,
    by_q: Tensor,
    by_mu: Tensor,
    softening: float,
) -> None:
    """Back through `chain_forward_`.

    Parameters
    ----------
    mu
        Vectors of the old state, shape ``(m, 3, c)``.
    weights
        Projection ``(2c, c)``; of mixing and of context the inner matrix ``(c, 2c or c)`` and
        bias, outer matrix ``(3c, c)`` and, of mixing only, bias; as the layers have them.
    uv, hidden, a, inner, scale
        As the forward pass left them.
    by_features, old_q, old_mu
        Gradients by features ``(m, 5, c)`` and by the new state, ``(m, c)`` and ``(m, 3, c)``.
    by_q, by_mu
        For the gradient by the old state; the latter maybe in the place of ``mu``.
    softening
        Of norms.
    """
    m, c = mu.shape[0], mu.shape[2]
    _weights(
        weights,
        [(2 * c, c), (c, 2 * c), (c,), (3 * c, c), (3 * c,), (c, c), (c,), (3 * c, c)],
        mu,
    )
    given = {
        "mu": (mu, (m, 3, c)), "uv": (uv, (m, 3, 2 * c)), "hidden": (hidden, (m, c)),
        "a": (a, (m, 3 * c)), "inner": (inner, (m, c)), "scale": (scale, (m, c)),
        "by_features": (by_features, (m, 5, c)), "old_q": (old_q, (m, c)),
        "old_mu": (old_mu, (m, 3, c)), "by_q": (by_q, (m, c)), "by_mu": (by_mu, (m, 3, c)),
    }  # fmt: skip
    _check(given)
    _launch(
        "backward", m, c, c, torch.float32, (softening, 0.0, 0.0),
        [mu, *weights, uv, hidden, a, inner, scale, by_features, old_q, old_mu, by_q, by_mu],
        mu.device,
    )  # fmt: skip


def chain_last_(
    q: Tensor,
    mu: Tensor,
    weights: Sequence[Tensor],
    backward: Sequence[Tensor],
    energies: Tensor,
    by_q: Tensor,
    by_mu: Tensor,
    softening: float,
    scale: float,
    bound: float,
) -> None:
    """The last mixing, the energy of each atom, and the gradient of their sum by the state.

    Parameters
    ----------
    q, mu
        State, shapes ``(m, 2c)`` and ``(m, 3, c)``.
    weights
        Projection ``(c, 2c)``; of mixing the inner matrix ``(2c, c)`` and bias, outer matrix
        ``(c, 2c)`` and bias; of the readout the matrix ``(c, w)`` and bias ``(w,)``, all
        transposed, and the energy's weights and bias ``(w + 1,)``.
    backward
        Matrices of readout ``(w, c)``, outer ``(2c, c)``, inner ``(c, 2c)`` and projection
        ``(2c, c)``.
    energies
        Shape ``(m,)``, float64 [eV].
    by_q, by_mu
        For the gradient, ``(m, c)`` and ``(m, 3, c)``, the latter maybe in the place of ``mu``.
    softening
        Of norms.
    scale, bound
        See `node_readout_`.
    """
    m, c, w = mu.shape[0], mu.shape[2], weights[6].shape[0]
    sizes = [(c, 2 * c), (2 * c, c), (c,), (c, 2 * c), (2 * c,), (c, w), (w,), (w + 1,)]
    _weights(weights, sizes, mu)
    _weights(backward, [(w, c), (2 * c, c), (c, 2 * c), (2 * c, c)], mu)
    given = {
        "q": (q, (m, 2 * c)), "mu": (mu, (m, 3, c)), "by_q": (by_q, (m, c)),
        "by_mu": (by_mu, (m, 3, c)),
    }  # fmt: skip
    _check(given)
    require("energies", energies, torch.float64, (m,), mu.device)
    _launch(
        "last", m, c, w, torch.float32, (softening, scale, bound),
        [q, mu, *weights, *backward, energies, by_q, by_mu], mu.device,
    )  # fmt: skip


def _weights(weights: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], like: Tensor) -> None:
    if len(weights) != len(shapes):
        raise ValueError(f"{len(shapes)} weights are needed, got {len(weights)}")
    for k, (weight, shape) in enumerate(zip(weights, shapes, strict=True)):
        require(f"weight {k}", weight, torch.float32, shape, like.device)


def _check(given: dict[str, tuple[Tensor, tuple[int, ...]]]) -> None:
    device = given["mu"][0].device
    for name, (tensor, shape) in given.items():
        require(name, tensor, torch.float32, shape, device)


def _launch(
    name: str,
    n_atoms: int,
    n_channels: int,
    width: int,
    stored: torch.dtype,
    numbers: tuple[float, float, float],
    given: Sequence[Tensor],
    device: torch.device,
) -> None:
    most = kernels.most_atoms(n_channels, width)
    if most == 0:
        raise ValueError(
            f"{n_channels} channels and {width} of the readout are too many, or not multiples of 4"
        )
    fitting = [r for r in kernels.ATOMS if r <= most]
    atoms = next((r for r in fitting if n_atoms <= r * MOST_BLOCKS), most)
    variant = kernels.Variant(n_channels, width, stored, atoms)
    threads = 1 if device.type == "cpu" else kernels.THREADS
    rest = (0,) * (kernels.N_ADDRESSES - len(given))
    launch(
        kernels.chain_kernel(variant, name), -(-n_atoms // atoms) * threads, device, n_atoms,
        *numbers, *given, *rest,
    )  # fmt: skip


def _nothing(*arguments: object) -> None:
    """The fake of operators that return nothing."""


define(
    "chain_forward_(Tensor q, Tensor mu, Tensor[] weights, Tensor(a!) uv, Tensor(b!) hidden, "
    "Tensor(c!) a, Tensor(d!) inner, Tensor(e!) scale, Tensor(f!) new_q, Tensor(g!) new_mu, "
    "Tensor(h!) features, float softening) -> ()",
    chain_forward_,
    _nothing,
)
define(
    "chain_backward_(Tensor mu, Tensor[] weights, Tensor uv, Tensor hidden, Tensor a, "
    "Tensor inner, Tensor scale, Tensor by_features, Tensor old_q, Tensor old_mu, "
    "Tensor(a!) by_q, Tensor(b!) by_mu, float softening) -> ()",
    chain_backward_,
    _nothing,
)
define(
    "chain_last_(Tensor q, Tensor mu, Tensor[] weights, Tensor[] backward, Tensor(a!) energies, "
    "Tensor(b!) by_q, Tensor(c!) by_mu, float softening, float scale, float bound) -> ()",
    chain_last_,
    _nothing,
)
