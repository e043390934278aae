"""Where the course of a run can be followed: TensorBoard, and Weights & Biases where asked for."""

from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from openmm_mlffd.training.config import ConfigError


class Boards:
    """Numbers over steps, in TensorBoard files and, with a project, in Weights & Biases.

    Use as a context manager.

    Parameters
    ----------
    folder
        Where TensorBoard's files go.
    first_step
        What was written beyond, by a run that was lost, is left out.
    project
        Project of Weights & Biases; None for TensorBoard alone.
    name
        Name of the run there.
    settings
        Configuration that is shown there.

    Raises
    ------
    ConfigError
        If a project is given and the package wandb is not installed.
    """

    def __init__(
        self,
        folder: Path,
        first_step: int,
        *,
        project: str | None = None,
        name: str = "",
        settings: dict[str, Any] | None = None,
    ) -> None:
        self._run: Any = None
        if project is not None:
            try:
                import wandb
            except ImportError as error:
                raise ConfigError(
                    "wandb_project needs Weights & Biases: pip install wandb"
                ) from error
            self._run = wandb.init(
                project=project,
                name=name,
                config=settings,
                dir=str(folder),
                resume="allow",
                id=name,
            )
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def __enter__(self) -> "Boards":
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()
        if self._run is not None:
            self._run.finish()

    def add(self, values: dict[str, float], step: int) -> None:
        """Note values of a step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        if self._run is not None:
            self._run.log(values, step=step)
