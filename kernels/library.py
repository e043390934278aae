"""The operators' library, `torch.ops.mlffd`, and what all of them check."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# torch.library.custom_op costs ten microseconds more at each call
LIBRARY = torch.library.Library("mlffd", "DEF")


def define(schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register an operator for the CPU and CUDA, and what it returns for tensors without data."""
    name = schema.split("(")[0]
    LIBRARY.define(schema)
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, function, key)
    torch.library.register_fake(f"mlffd::{name}", fake, lib=LIBRARY)


def require(
    name: str, tensor: Tensor, dtype: torch.dtype, shape: Sequence[int], device: torch.device
) -> None:
    """Raise unless a tensor is what a kernel reads: type, shape, contiguous, on the device."""
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have the shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} like the rest, got {tensor.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous: call contiguous() first")
