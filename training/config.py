"""The configuration of a training run: one YAML file, one typed object."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

Kind = TypeVar("Kind")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the file and the setting."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train on."""

    files: list[str]
    """Dataset files, as written by `mlffd data import`."""

    max_structures: int | None = None
    """Use only so many training structures, chosen by the seed; None for all."""

    memory_gb: float = 8.0
    """Data up to this size [GB] are held in memory; larger ones are streamed in blocks."""

    block_size: int = 4096
    """Structures read at a time when streaming; shuffled within a few such blocks."""

    resident_gb: float = 24.0
    """Structures and edges up to this size [GB] stay on the device; 0 makes batches on the fly."""

    hessians: list[str] = field(default_factory=list)
    """Files of Hessian rows for `files`, as written by `mlffd data hessian`."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The student."""

    elements: list[str] = field(default_factory=lambda: ["H", "C", "N", "O", "F", "P", "S", "Cl"])
    """Chemical symbols it shall know."""

    n_channels: int = 128
    """Features per atom."""

    n_interactions: int = 3
    """Message blocks."""

    n_basis: int = 20
    """Radial functions."""

    cutoff: float = 5.0
    """Neighbor cutoff [Å]."""

    norm_softening: float = 1e-2
    """Norms of vector features are sqrt(v² + this); less is rougher, and energy drifts."""

    crowding: bool = True
    """Atoms with more bonded neighbors than any in the training data push them away."""

    filters: str = "sine"
    """Radial filters: "sine" combines `n_basis` waves, "spline" has `n_basis` knots."""

    pair_filters: bool = False
    """Filters of their own for each pair of elements."""

    charges: bool = False
    """Predict partial charges."""

    tail_cutoff: float | None = None
    """Reach [Å] of the Coulomb and dispersion tail (needs `charges`); None for no tail."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the terms of the loss; each is a mean over its atoms or structures."""

    energy: float = 5.0
    """Huber loss of the energy per atom [eV]."""

    energy_delta: float = 0.01
    """Where it turns from quadratic to linear [eV/atom]."""

    forces: float = 1.0
    """Huber loss of the length of the force error [eV/Å]."""

    forces_delta: float = 0.05
    """Where it turns from quadratic to linear [eV/Å]."""

    stress: float = 0.1
    """Huber loss of the virial per atom [eV], periodic structures only."""

    stress_delta: float = 0.01
    """Where it turns from quadratic to linear [eV/atom]."""

    angle: float = 0.02
    """One minus the cosine between force and predicted force."""

    angle_threshold: float = 0.3
    """Forces shorter than this [eV/Å] have no angle."""

    large_force: float | None = None
    """Errors of forces beyond this [eV/Å] count in proportion to this / force, and so do those of
    energies and virials of structures with such forces; None for no limit."""

    forces_loss: str = "huber"
    """"huber", "conditional" (narrower for large reference forces) or "l2" (the square)."""

    charges: float = 0.0
    """Huber loss of the partial charge [e] of an atom; needs `model.charges`."""

    charges_delta: float = 0.02
    """Where it turns from quadratic to linear [e]."""

    hessian: float = 0.0
    """Huber loss of the Hessian times a direction [eV/Å²]; needs `data.hessians`."""

    hessian_delta: float = 0.5
    """Where it turns from quadratic to linear [eV/Å²]."""

    clash: float = 0.0
    """Pairs and clusters of atoms closer than any bond that do not push apart, see `clash.py`."""

    schedule: dict[str, list[list[float]]] = field(default_factory=dict)
    """Term to pairs [share of the run, factor of its weight], linear in between."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay."""

    learning_rate: float = 1e-3
    """Highest learning rate."""

    final_learning_rate: float = 1e-6
    """Learning rate at the end."""

    warmup_steps: int = 500
    """Steps of linear warm-up."""

    weight_decay: float = 1e-3
    """Decoupled weight decay."""

    clip: float = 1.0
    """Largest norm of the gradient; longer ones are shortened."""

    ema_decay: float = 0.999
    """Decay of the moving average of the weights, which is what is validated and saved."""

    muon: bool = False
    """Move weight matrices by their orthogonalized momentum (Muon); AdamW moves the rest."""

    average: str = "ema"
    """"ema", or "swa": the plain mean of the weights since `swa_start`."""

    swa_start: float = 0.75
    """Share of the run after which "swa" averages."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides the result of a training run, and where it goes."""

    name: str = "student"
    """Name of the student."""

    output: str = "runs/student"
    """Folder for checkpoints, logs and the student file."""

    data: DataConfig
    """What to train on."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The student."""

    loss: LossConfig = field(default_factory=LossConfig)
    """Loss terms."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How the weights move."""

    epochs: int = 20
    """Passes over the training data."""

    batch_atoms: int = 4000
    """Atoms in a batch."""

    batch_edges: int | None = None
    """Edges in a batch, at most, of data on the device; about the mean number of edges in
    `batch_atoms` atoms makes padded batches alike and steps fast. None for no limit."""

    seed: int = 0
    """Seed of the weights and of the order of the data."""

    device: str = "auto"
    """"cpu", "cuda", "cuda:1" …; "auto" takes a GPU if there is one."""

    tf32: bool = True
    """TF32 matrix products on GPUs that have them, while training."""

    mixed_precision: bool = False
    """Matrix products and edge features in bfloat16, weights and sums in float32."""

    compile: str = "auto"
    """"on", "off", or "auto": fuse the step's operations, on CUDA devices where a compiler is."""

    fused: str = "off"
    """"on", "off", or "auto": messages and their derivatives by Warp kernels, on CUDA devices where
    Warp is."""

    cuda_graph: bool = True
    """Replay the step as a CUDA graph, on CUDA devices with resident data."""

    validate_every: int = 2000
    """Steps between validations."""

    checkpoint_every: int = 2000
    """Steps between checkpoints."""

    fit_minutes: float | None = None
    """Fit the schedules to this time, after which the run is finished; `epochs` is then the
    largest number of passes. The number of steps depends on the machine's speed."""

    fit_steps: int | None = None
    """Fit the schedules to so many steps, after which the run is finished, whatever `epochs` is."""

    max_minutes: float | None = None
    """Stop after this time, with a checkpoint; running the same command again goes on."""

    metric: dict[str, float] = field(default_factory=lambda: {"force_mae": 1.0})
    """Validation errors and their weights, whose sum decides which weights are kept: of force_mae,
    force_rmse [meV/Å], energy_mae [meV/atom] and angle [°]."""

    wandb_project: str | None = None
    """Project of Weights & Biases that the run is also shown in."""

    initial: str | None = None
    """Student file whose weights and reference energies to start from; None starts at random."""

    licence: str = "MIT"
    """Licence of the weights."""

    def __post_init__(self) -> None:
        # in YAML, on and off without quotation marks are true and false
        words = {"True": "on", "False": "off"}
        for name in ("compile", "fused"):
            value = getattr(self, name)
            object.__setattr__(self, name, words.get(value, value))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML file and apply overrides.

    Parameters
    ----------
    path
        YAML file.
    overrides
        Settings as ``key=value``, nested keys with dots: ``optimizer.learning_rate=5e-4``.

    Returns
    -------
    TrainConfig
        Typed and complete.

    Raises
    ------
    ConfigError
        If the file cannot be read, or a setting is unknown (with a suggestion), missing or of
        the wrong type.
    """
    return load_as(TrainConfig, path, overrides)


def load_as(kind: type[Kind], path: str | Path, overrides: Sequence[str] = ()) -> Kind:
    """Read a YAML file with overrides as a dataclass; errors as of `load_config`."""
    settings = read_settings(path, overrides)
    given = OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)))
    check_keys(given, kind, "command line")
    check_keys(settings, kind, str(path))
    return typed(kind, settings, str(path))


def read_settings(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Settings of a YAML file with overrides, written ``key=value``, not yet checked.

    Raises
    ------
    ConfigError
        If the file cannot be read, or an override has no equals sign.
    """
    try:
        loaded = OmegaConf.load(path)
    except (OSError, YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path}: must hold settings as `key: value`")
    for text in overrides:
        if "=" not in text:
            raise ConfigError(f"{text}: overrides are written key=value")
    try:
        merged = OmegaConf.merge(loaded, OmegaConf.from_dotlist(list(overrides)))
        settings = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {str(error).splitlines()[0]}") from error
    assert isinstance(settings, dict)
    return {str(k): v for k, v in settings.items()}


def typed(kind: type[Kind], settings: dict[str, Any], where: str) -> Kind:
    """Settings as a dataclass of their own, complete with defaults.

    Raises
    ------
    ConfigError
        If a setting is missing or of the wrong type.
    """
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), settings))
    except (OmegaConfBaseException, TypeError) as error:
        key = getattr(error, "full_key", None)
        message = str(error).splitlines()[0]
        raise ConfigError(f"{where}: {f'{key}: ' if key else ''}{message}") from error
    assert isinstance(config, kind)
    return config


def check_keys(settings: Any, kind: type, where: str, prefix: str = "") -> None:
    """Refuse settings that a dataclass does not have, with a suggestion.

    Raises
    ------
    ConfigError
        If there is one.
    """
    if not isinstance(settings, dict):
        raise ConfigError(f"{where}: {prefix.rstrip('.')} must hold settings, got {settings!r}")
    known = get_type_hints(kind)
    for key, value in settings.items():
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean '{prefix}{close[0]}'?" if close else f"known: {', '.join(known)}"
            raise ConfigError(f"{where}: unknown setting '{prefix}{key}'; {hint}")
        if is_dataclass(known[key]):
            check_keys(value, known[key], where, f"{prefix}{key}.")
