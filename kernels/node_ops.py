"""`torch.ops.mlffd.node_*`: what PaiNN does on each atom between matrix products, and back.

Everything is written to tensors that are given, most of them in place. m is the number of atoms,
c that of channels. Products come without their bias, which is given beside them. What the
operators compute is in `reference`, under the same names; with ``reduced`` they round what
`product_` is to read to 10 bits of mantissa.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from openmm_mlffd.kernels import node_kernels as kernels
from openmm_mlffd.kernels.launch import launch
from openmm_mlffd.kernels.library import define, require


def node_norms_(uv: Tensor, q: Tensor, softening: float, reduced: bool) -> None:
    """Softened norms of v, of uv ``(m, 3, 2c)``, to the second half of q ``(m, 2c)``."""
    m, c = _sizes(uv)
    _need("q", q, uv, (m, 2 * c))
    _launch("norms", uv, m, c, (uv, q), numbers=(softening, 0.0), reduced=reduced)


def node_silu_(hidden: Tensor, bias: Tensor, out: Tensor, reduced: bool) -> None:
    """SiLU of hidden ``(m, c)`` and its bias ``(c,)`` to ``out``."""
    m, c = hidden.shape
    _need("bias", bias, hidden, (c,))
    _need("out", out, hidden, (m, c))
    _launch("silu", hidden, m, c, (hidden, bias, out), reduced=reduced)


def node_silu_backward_(hidden: Tensor, bias: Tensor, gradient: Tensor, reduced: bool) -> None:
    """Gradient by the output of `node_silu_` becomes that by its input."""
    m, c = hidden.shape
    _need("bias", bias, hidden, (c,))
    _need("gradient", gradient, hidden, (m, c))
    _launch("silu_backward", hidden, m, c, (hidden, bias, gradient), reduced=reduced)


def node_mix_(
    uv: Tensor,
    a: Tensor,
    bias: Tensor,
    q: Tensor,
    mu: Tensor,
    new_q: Tensor,
    new_mu: Tensor,
    reduced: bool,
) -> None:
    """New scalars, to the first half of ``new_q`` ``(m, 2c)``, and vectors ``(m, 3, c)``.

    With a of ``(m, 2c)`` instead of ``(m, 3c)``, no vectors are read or written.
    """
    m, c = _sizes(uv)
    last = _check_a(uv, a, bias)
    for name, tensor in (("q", q), ("new_q", new_q)):
        _need(name, tensor, uv, (m, 2 * c))
    if not last:
        for name, tensor in (("mu", mu), ("new_mu", new_mu)):
            _need(name, tensor, uv, (m, 3, c))
    _launch("mix", uv, m, c, (uv, a, bias, q, mu, new_q, new_mu), last=last, reduced=reduced)


def node_features_(phi: Tensor, bias: Tensor, mu: Tensor, features: Tensor, scale: Tensor) -> None:
    """Features for the neighbors ``(m, 5, c)`` from phi ``(m, 3c)``; scale, its last third.

    ``phi`` may be the first columns of ``features``.
    """
    m, c = scale.shape
    _need("bias", bias, scale, (3 * c,))
    _need("mu", mu, scale, (m, 3, c))
    require("features", features, features.dtype, (m, 5, c), scale.device)
    _need("scale", scale, scale, (m, c))
    if phi.dtype != scale.dtype or tuple(phi.shape) != (m, 3 * c) or phi.stride(1) != 1:
        raise ValueError(f"phi must be rows of {3 * c} {scale.dtype}, got {tuple(phi.shape)}")
    given = (phi, bias, mu, features, scale)
    _launch(
        "features",
        scale,
        m,
        c,
        given,
        reduced=features.dtype == torch.float16,
        stride=phi.stride(0),
    )


def node_features_backward_(
    uv: Tensor,
    a: Tensor,
    bias: Tensor,
    mu: Tensor,
    scale: Tensor,
    by_features: Tensor,
    old_q: Tensor,
    old_mu: Tensor,
    by_q: Tensor,
    by_mu: Tensor,
    reduced: bool,
) -> None:
    """Back through `node_features_`, whose vectors are those that `node_mix_` makes of ``mu``.

    The first three of ``by_features`` ``(m, 5, c)`` become the gradient by phi. The gradients
    ``old_q`` ``(m, c)`` and ``old_mu`` ``(m, 3, c)`` by the new state are copied to ``by_q`` and
    ``by_mu``, which may be the same, and what comes through the features is added to the latter.
    """
    m, c = _sizes(uv)
    if _check_a(uv, a, bias):
        raise ValueError("the last block has no features")
    for name, tensor in (("mu", mu), ("old_mu", old_mu), ("by_mu", by_mu)):
        _need(name, tensor, uv, (m, 3, c))
    for name, tensor in (("scale", scale), ("old_q", old_q), ("by_q", by_q)):
        _need(name, tensor, uv, (m, c))
    _need("by_features", by_features, uv, (m, 5, c))
    given = (uv, a, bias, mu, scale, by_features, by_q, by_mu, old_q, old_mu)
    _launch("features_backward", uv, m, c, given, reduced=reduced)


def node_mix_backward_(
    uv: Tensor, by_q: Tensor, by_mu: Tensor, by_a: Tensor, reduced: bool
) -> None:
    """Gradient by a, ``(m, 3c)`` or ``(m, 2c)`` as in `node_mix_`, from that by the new state."""
    m, c = _sizes(uv)
    last = by_a.shape[1] == 2 * c
    _need("by_q", by_q, uv, (m, c))
    _need("by_a", by_a, uv, (m, (2 if last else 3) * c))
    if not last:
        _need("by_mu", by_mu, uv, (m, 3, c))
    _launch("mix_backward", uv, m, c, (uv, by_q, by_mu, by_a), last=last, reduced=reduced)


def node_project_backward_(
    a: Tensor,
    bias: Tensor,
    by_input: Tensor,
    by_mu: Tensor,
    by_q: Tensor,
    uv: Tensor,
    softening: float,
    reduced: bool,
) -> None:
    """Gradients by u and v in the place of ``uv``; ``by_q`` becomes that by the old scalars.

    ``by_input`` ``(m, 2c)`` is the gradient by scalars and norms; ``by_q`` and ``by_mu`` come as
    those by the new state.
    """
    m, c = _sizes(uv)
    last = _check_a(uv, a, bias)
    _need("by_input", by_input, uv, (m, 2 * c))
    _need("by_q", by_q, uv, (m, c))
    if not last:
        _need("by_mu", by_mu, uv, (m, 3, c))
    given = (a, bias, by_input, by_mu, by_q, uv)
    _launch(
        "project_backward", uv, m, c, given, last=last, numbers=(softening, 0.0), reduced=reduced
    )


def node_readout_(
    hidden: Tensor,
    bias: Tensor,
    weight: Tensor,
    energies: Tensor,
    scale: float,
    bound: float,
    reduced: bool,
) -> None:
    """Energy of each atom [eV] from ``hidden``, which becomes the gradient of the energy.

    Parameters
    ----------
    hidden
        Before the SiLU, shape ``(m, n_hidden)``.
    bias
        Of ``hidden``, shape ``(n_hidden,)``.
    weight
        Of the energy, its own bias last, shape ``(n_hidden + 1,)``.
    energies
        Shape ``(m,)``, float64.
    scale
        Of the network's energy [eV].
    bound
        Beyond this energies bend [eV], see `potential.soft_bound`; 0 for never.
    """
    m, width = hidden.shape
    _need("hidden", hidden, hidden, (m, width))
    _need("bias", bias, hidden, (width,))
    _need("weight", weight, hidden, (width + 1,))
    require("energies", energies, torch.float64, (m,), hidden.device)
    lanes = 1 if hidden.device.type == "cpu" else kernels.READOUT_LANES
    given = (hidden, bias, weight, energies)
    rest = (0,) * (kernels.N_ADDRESSES - len(given))
    launch(
        kernels.readout_kernel(hidden.dtype, reduced), m * lanes, hidden.device, width, scale,
        bound, *given, *rest,
    )  # fmt: skip


def node_halves_(q: Tensor, mu: Tensor, half_q: Tensor, half_mu: Tensor) -> None:
    """Scalars ``(m, c)`` and vectors ``(m, 3, c)`` in half precision."""
    m, c = q.shape
    _need("q", q, q, (m, c))
    _need("mu", mu, q, (m, 3, c))
    require("half_q", half_q, torch.float16, (m, c), q.device)
    require("half_mu", half_mu, torch.float16, (m, 3, c), q.device)
    _launch("halves", q, m, c, (q, mu, half_q, half_mu), reduced=True)


def product_(x: Tensor, weight: Tensor, out: Tensor, add: bool) -> None:
    """``x @ weight``, or that added to ``out``, with inputs of reduced precision.

    On CUDA a product of tensor cores in TF32: of the mantissas of the inputs, which are float32, 10
    bits are used, and sums are float32. On the CPU ``x`` is cut to as many bits. Cut, not
    rounded, is the worst that hardware does, and too bad for forces: what comes here should have
    been rounded, as operators do that have ``reduced`` for it.
    """
    if x.device.type == "cuda":
        with _tf32():
            _multiply(x, weight, out, add)
    else:
        _multiply(_cut(x), weight, out, add)


@contextlib.contextmanager
def _tf32() -> Iterator[None]:
    """The setting is the process's and is put back; newer versions of torch have it twice."""
    settings: Any = torch.backends.cuda.matmul
    newer = getattr(settings, "fp32_precision", None)
    before = settings.allow_tf32 if newer is None else newer == "tf32"
    settings.allow_tf32 = True
    try:
        yield
    finally:
        settings.allow_tf32 = before
        if newer is not None:
            settings.fp32_precision = newer


def _multiply(x: Tensor, weight: Tensor, out: Tensor, add: bool) -> None:
    if add:
        out.addmm_(x, weight)
    else:
        torch.mm(x, weight, out=out)


def _cut(x: Tensor) -> Tensor:
    """Without the last 13 of 23 bits of the mantissa."""
    return (x.contiguous().view(torch.int32) & -0x2000).view(torch.float32)


def _sizes(uv: Tensor) -> tuple[int, int]:
    m, c = uv.shape[0], uv.shape[2] // 2
    _need("uv", uv, uv, (m, 3, 2 * c))
    return m, c


def _check_a(uv: Tensor, a: Tensor, bias: Tensor) -> bool:
    """Check a and its bias; whether they are the last block's."""
    m, c = uv.shape[0], uv.shape[2] // 2
    last = a.shape[1] == 2 * c
    _need("a", a, uv, (m, (2 if last else 3) * c))
    _need("bias", bias, uv, (a.shape[1],))
    return last


def _need(name: str, tensor: Tensor, like: Tensor, shape: Sequence[int]) -> None:
    require(name, tensor, like.dtype, shape, like.device)


def _launch(
    name: str,
    like: Tensor,
    n_atoms: int,
    n_channels: int,
    given: Sequence[Tensor],
    *,
    last: bool = False,
    reduced: bool = False,
    numbers: tuple[float, float] = (0.0, 0.0),
    stride: int = 0,
) -> None:
    real, device = like.dtype, like.device
    if real not in (torch.float32, torch.float64):
        raise TypeError(f"only float32 and float64 are supported, got {real}")
    if reduced and real != torch.float32:
        raise TypeError(f"reduced precision is that of float32, got {real}")
    found = kernels.node_kernels(kernels.Variant(n_channels, real, reduced))
    lanes = 1 if device.type == "cpu" else n_channels
    rest = (0,) * (kernels.N_ADDRESSES - len(given))
    launch(found[name + "_last" * last], n_atoms * lanes, device, stride, *numbers, *given, *rest)


def _nothing(*arguments: object) -> None:
    """The fake of operators that return nothing."""


_SCHEMAS: dict[Callable[..., None], str] = {
    node_norms_: "Tensor uv, Tensor(a!) q, float softening, bool reduced",
    node_silu_: "Tensor hidden, Tensor bias, Tensor(a!) out, bool reduced",
    node_silu_backward_: "Tensor hidden, Tensor bias, Tensor(a!) gradient, bool reduced",
    node_mix_: (
        "Tensor uv, Tensor a, Tensor bias, Tensor q, Tensor mu, Tensor(a!) new_q, "
        "Tensor(b!) new_mu, bool reduced"
    ),
    node_features_: ("Tensor phi, Tensor bias, Tensor mu, Tensor(a!) features, Tensor(b!) scale"),
    node_features_backward_: (
        "Tensor uv, Tensor a, Tensor bias, Tensor mu, Tensor scale, Tensor(a!) by_features, "
        "Tensor old_q, Tensor old_mu, Tensor(b!) by_q, Tensor(c!) by_mu, "
        "bool reduced"
    ),
    node_mix_backward_: "Tensor uv, Tensor by_q, Tensor by_mu, Tensor(a!) by_a, bool reduced",
    node_project_backward_: (
        "Tensor a, Tensor bias, Tensor by_input, Tensor by_mu, Tensor(a!) by_q, Tensor(b!) uv, "
        "float softening, bool reduced"
    ),
    node_readout_: (
        "Tensor(a!) hidden, Tensor bias, Tensor weight, Tensor(b!) energies, float scale, "
        "float bound, bool reduced"
    ),
    node_halves_: "Tensor q, Tensor mu, Tensor(a!) half_q, Tensor(b!) half_mu",
    product_: "Tensor x, Tensor weight, Tensor(a!) out, bool add",
}
for _function, _arguments in _SCHEMAS.items():
    define(f"{_function.__name__}({_arguments}) -> ()", _function, _nothing)
