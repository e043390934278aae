"""Launching Warp kernels on torch's tensors: nothing is allocated, nothing is waited for.

Kernels take addresses and numbers only, so that a launch costs microseconds, and the same
kernels can be compiled ahead of time and launched by a host that knows neither Warp nor Python.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

try:
    import warp as wp
except ImportError as error:
    raise ImportError(
        f"the fast kernels need Warp ({error}): pip install 'warp-lang>=1.19'"
    ) from error

# one thread's commands are its own: their parameters are set and read without a lock
_commands = threading.local()
_preparing = threading.Lock()


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Warp says on stdout what it loads; the setting is the caller's and is put back."""
    before = wp.config.log_level
    wp.config.log_level = max(before, wp.LOG_WARNING)
    try:
        yield
    finally:
        wp.config.log_level = before


def prepare(kernel: Any, device: torch.device) -> Any:
    """Compile the kernel, if it is not in Warp's cache, load it and return a launch command.

    Captures of CUDA graphs need this beforehand: modules cannot be loaded in a capture.
    """
    with _preparing, _quietly():
        wp.init()
        where = "cpu" if device.type == "cpu" else f"cuda:{device.index or 0}"
        arguments = [arg.type(0) for arg in kernel.adj.args]
        return wp.launch(
            kernel, dim=1, inputs=arguments, device=where, record_cmd=True,
            block_dim=getattr(kernel, "mlffd_block", 256),
        )  # fmt: skip


def has_cuda() -> bool:
    """Whether Warp can use a CUDA device, which needs a newer driver than torch's."""
    with _preparing, _quietly():
        wp.init()
        return bool(wp.is_cuda_available())


def launch(kernel: Any, n_threads: int, device: torch.device, *arguments: Tensor | float) -> None:
    """Launch on torch's current stream.

    Parameters
    ----------
    kernel
        A Warp kernel whose arguments are uint64 addresses, int32, float32 and float64.
    n_threads
        Number of threads; none are launched for 0.
    device
        Where the tensors are.
    arguments
        Tensors, which must be contiguous and of the types that the kernel reads (this is not
        checked here: operators check what they are given), and numbers.
    """
    if n_threads == 0:
        return
    commands: dict[Any, Any] = _commands.__dict__
    key = (id(kernel), device)
    command = commands.get(key)
    if command is None:
        command = commands[key] = prepare(kernel, device)
        command.mlffd_threads = 1
    if command.mlffd_threads != n_threads:
        command.set_dim(n_threads)
        command.mlffd_threads = n_threads
    for parameter, argument in zip(command.params[1:], arguments, strict=True):
        parameter.value = argument.data_ptr() if isinstance(argument, Tensor) else argument
    if device.type == "cpu":
        command.launch()
    else:
        command.launch(stream=_stream(device))


def _stream(device: torch.device) -> Any:
    """Warp's handle of torch's current stream."""
    stream = torch.cuda.current_stream(device)
    key = ("stream", stream.cuda_stream, device)
    streams: dict[Any, Any] = _commands.__dict__
    found = streams.get(key)
    if found is None:
        found = streams[key] = wp.stream_from_torch(stream)
    return found
