"""Which evaluator works for a student: that with the fused kernels, or plain torch."""

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from openmm_mlffd.evaluator import Evaluator, StudentSource, resolve_device
from openmm_mlffd.modelfile import load_student
from openmm_mlffd.painn import PaiNN

KERNELS = ("auto", "fused", "eager")
"""Fused kernels (Warp), plain torch, or the first of these that can evaluate the student."""

PRECISIONS = ("single", "mixed", "double")
"""Of the network; OpenMM's words."""

_logger = logging.getLogger(__name__)


def open_evaluator(
    source: StudentSource,
    numbers: Sequence[int],
    *,
    kernels: str = "auto",
    precision: str = "single",
    device: str | torch.device | None = None,
    labels: Sequence[int] | None = None,
) -> Evaluator:
    """Load a student and make the evaluator of its atoms.

    Parameters
    ----------
    source
        The student.
    numbers
        Atomic number of each atom.
    kernels
        One of `KERNELS`.
    precision
        "single", "mixed" (fused kernels only) or "double".
    device
        Torch device; None for CUDA if there is any, else the CPU.
    labels
        What the caller calls each atom, for error messages.

    Raises
    ------
    ValueError
        If a word or the device is unknown, mixed precision is asked of plain torch, fused kernels
        of a variant of PaiNN, or as `Evaluator`.
    ImportError
        If fused kernels are asked for and Warp is missing.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if kernels not in KERNELS:
        raise ValueError(f"kernels must be one of {', '.join(KERNELS)}, got {kernels!r}")
    where = resolve_device(device)
    if kernels == "fused" or (kernels == "auto" and can_run_kernels(where)):
        from openmm_mlffd.engine import FastEvaluator

        # the weights are rounded once, to what the kernels read
        potential = source.load(device=where, precision="double")
        if kernels == "fused" or isinstance(potential.network, PaiNN):
            return FastEvaluator(potential, numbers, precision=precision, labels=labels)
        _logger.warning("variants of PaiNN run in plain torch, many times slower than PaiNN itself")
    if precision == "mixed":
        raise ValueError(
            "mixed precision needs the fused kernels: pip install warp-lang, and a student that is "
            "no variant"
        )
    return Evaluator(source.load(device=where, precision=precision), numbers, labels=labels)


def open_graphs(model: str | Path | None, precision: str, device: torch.device) -> Any:
    """The student that is the fastest on batches of graphs.

    Parameters
    ----------
    model
        Name of a bundled student or path of a student file.
    precision
        "single" or "double".
    device
        Torch device.

    Returns
    -------
    FusedGraphs or Potential
        Plain torch where fused kernels cannot run.
    """
    if can_run_kernels(device):
        from openmm_mlffd.batched import FusedGraphs

        potential = load_student(model, device=device, precision="double")
        if isinstance(potential.network, PaiNN):
            return FusedGraphs(potential, precision=precision)
    return load_student(model, device=device, precision=precision)


def can_run_kernels(device: torch.device) -> bool:
    """Whether Warp is there and can use the device; if not, says what to do about it."""
    warp = importlib.util.find_spec("warp")
    if warp is None:
        advice = "pip install warp-lang"
    elif device.type == "cpu":
        folders = [Path(folder) / "bin" for folder in warp.submodule_search_locations or ()]
        if any(list(folder.glob("*warp-clang*")) for folder in folders):
            return True
        advice = "this build of Warp has no compiler for the CPU: pip install warp-lang"
    elif device.type == "cuda":
        from openmm_mlffd.kernels.launch import has_cuda

        if has_cuda():
            return True
        advice = "Warp finds no CUDA device: its wheels need a newer driver than PyTorch's"
    else:
        return True
    _logger.warning("students run many times slower than they could: %s", advice)
    return False
