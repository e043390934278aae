"""What can go wrong while a student is evaluated, as exceptions that say what to do."""

import torch

_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc")
_BROKEN_DEVICE = ("CUDA error", "cudaError", "CUBLAS_STATUS", "CUDNN_STATUS", "device-side assert")


class OutOfMemory(MemoryError):
    """A device has no room for what the evaluation needs."""


class NotFinite(FloatingPointError):
    """Energies or forces are not numbers."""


class DeviceLost(RuntimeError):
    """The GPU reported an error after which a process cannot use it any more."""


def explained(error: BaseException, n_atoms: int, device: torch.device) -> BaseException:
    """The exception to raise for one from torch; itself, if it says enough already.

    Parameters
    ----------
    error
        What was caught.
    n_atoms, device
        Of the evaluation.
    """
    text = str(error)
    if isinstance(error, OutOfMemory | NotFinite | DeviceLost):
        return error
    if isinstance(error, MemoryError) or any(words in text for words in _NO_MEMORY):
        return OutOfMemory(
            f"{n_atoms} atoms do not fit into the memory of {device} ({_first_line(text)}). Use "
            "fewer atoms, a device with more memory, or free what other programs hold; "
            "precision='mixed' needs less. Nothing was computed: the last state is as it was"
        )
    if any(words in text for words in _BROKEN_DEVICE):
        return DeviceLost(
            f"{device} failed in an evaluation of {n_atoms} atoms ({_first_line(text)}). This "
            "process cannot use the GPU any more: start again from the last checkpoint, with "
            "CUDA_LAUNCH_BLOCKING=1 if it happens again, to see where"
        )
    return error


def not_finite(what: str, n_atoms: int, first: int | None) -> NotFinite:
    """The exception for energies or forces that are not numbers.

    Parameters
    ----------
    what
        "energy" or "forces".
    n_atoms
        Number of atoms.
    first
        What the caller calls the first atom that is concerned; None for no single one.
    """
    where = "" if first is None else f" on atom {first}"
    return NotFinite(
        f"the student's {what}{where} ({n_atoms} atoms) are not finite, though the positions are: "
        "atoms coincide, or the structure is broken beyond what the precision can hold. Go back "
        "to the last good state, minimise, and use a shorter time step"
    )


def _first_line(text: str) -> str:
    return text.strip().split("\n")[0][:200]
