"""Checkpoint files of training runs: written whole or not at all, read without pickle."""

import io
import math
import pickle
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from openmm_mlffd.storage import replacing
from openmm_mlffd.training.config import ConfigError, TrainConfig

_FREE = {
    "output",
    "device",
    "fit_minutes",
    "max_minutes",
    "validate_every",
    "checkpoint_every",
    "data",
    "compile",
    "cuda_graph",
    "wandb_project",
}
"""Settings that may change between the parts of a run."""


@dataclass
class Progress:
    """Where a run is."""

    step: int = 0
    """Optimizer steps done."""

    epoch: int = 0
    """Passes over the data finished."""

    batch: int = 0
    """Batches of the current pass done."""

    bad_steps: int = 0
    """Steps left out because the loss or the gradient was not finite."""

    seconds: float = field(default=0.0, compare=False)
    """Time spent [s], to the last look at the clock."""

    best: float = math.inf
    """Smallest force MAE on the validation set so far [meV/Å]."""


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a state; the file that is there stays until the new one is complete."""
    # not into the file at once: torch.save of a full disk does not raise an OSError
    content = io.BytesIO()
    torch.save(state, content)
    with replacing(path) as file:
        file.write(content.getbuffer())


def read_checkpoint(path: Path, config: TrainConfig, device: torch.device) -> dict[str, Any]:
    """Read the state of a run of the same configuration.

    Raises
    ------
    ConfigError
        If the file cannot be read, or was made with other settings.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ConfigError(
            f"{path}: not a checkpoint that can be read ({cause}); remove it to start anew"
        ) from error
    before, now = state["config"], asdict(config)
    changed = [k for k in now if k not in _FREE and before.get(k) != now[k]]
    if changed:
        raise ConfigError(
            f"{path} was made with other settings for {', '.join(changed)}; "
            "give them as they were, or choose another output folder"
        )
    return state
