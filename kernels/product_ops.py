"""`torch.ops.mlffd.few_*`: matrix products of few rows, and what comes after them."""

import torch
from torch import Tensor

from openmm_mlffd.kernels import product_kernels as kernels
from openmm_mlffd.kernels.launch import launch
from openmm_mlffd.kernels.library import define, require


def few_product_(x: Tensor, weight: Tensor, out: Tensor, add: bool) -> None:
    """``x @ weight.T``, or that added to what is there. Rows may have gaps between them.

    Shapes ``(n_rows, n_in)``, ``(n_out, n_in)`` and ``(n_rows, n_out)``, all float32; n_in is a
    multiple of four.
    """
    _launch(x, weight, out, kernels.ADD if add else 0)


def few_silu_(
    x: Tensor, weight: Tensor, bias: Tensor, hidden: Tensor, out: Tensor, reduced: bool
) -> None:
    """``x @ weight.T`` to ``hidden``, and the SiLU of that and its bias to ``out``.

    As `few_product_` and `node_silu_`.
    """
    mode = kernels.SILU + (kernels.REDUCED if reduced else 0)
    _launch(x, weight, out, mode, bias, hidden)


def few_silu_backward_(
    gradient: Tensor, weight: Tensor, bias: Tensor, hidden: Tensor, out: Tensor, reduced: bool
) -> None:
    """``gradient @ weight.T``, the gradient by the output of a SiLU, and to ``out`` by its input.

    As `few_product_` and `node_silu_backward_`.
    """
    mode = kernels.SILU_BACKWARD + (kernels.REDUCED if reduced else 0)
    _launch(gradient, weight, out, mode, bias, hidden)


def _launch(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    mode: int,
    bias: Tensor | None = None,
    hidden: Tensor | None = None,
) -> None:
    (n_rows, n_in), n_out, device = x.shape, weight.shape[0], x.device
    require("weight", weight, torch.float32, (n_out, n_in), device)
    for name, tensor, n in (("x", x, n_in), ("out", out, n_out)):
        if tensor.dtype != torch.float32 or tensor.device != device:
            raise TypeError(f"{name} must be torch.float32 on {device}, got {tensor.dtype}")
        if tuple(tensor.shape) != (n_rows, n) or tensor.stride(1) != 1:
            raise ValueError(f"{name} must be {n_rows} rows of {n}, got {tuple(tensor.shape)}")
    if n_in % 4 or x.stride(0) % 4 or x.storage_offset() % 4:
        raise ValueError(f"rows must be multiples of four numbers, got {n_in}")
    if bias is not None and hidden is not None:
        require("bias", bias, torch.float32, (n_out,), device)
        require("hidden", hidden, torch.float32, (n_rows, n_out), device)
    lanes = 1 if device.type == "cpu" else 32
    n_tasks = n_out * -(-n_rows // kernels.ROWS)
    launch(
        kernels.product_of_few, n_tasks * lanes, device, n_rows, n_in, n_out, x.stride(0),
        out.stride(0), mode, x, weight, 0 if bias is None else bias,
        0 if hidden is None else hidden, out,
    )  # fmt: skip


def _nothing(*arguments: object) -> None:
    """The fake of operators that return nothing."""


_SILU = "Tensor weight, Tensor bias, "
define(
    "few_product_(Tensor x, Tensor weight, Tensor(a!) out, bool add) -> ()", few_product_, _nothing
)
define(
    f"few_silu_(Tensor x, {_SILU}Tensor(a!) hidden, Tensor(b!) out, bool reduced) -> ()",
    few_silu_,
    _nothing,
)
define(
    f"few_silu_backward_(Tensor gradient, {_SILU}Tensor hidden, Tensor(a!) out, bool reduced) "
    "-> ()",
    few_silu_backward_,
    _nothing,
)
