"""The configuration of `mlffd active`: one YAML file, one typed object."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openmm_mlffd.training.config import ConfigError, LossConfig, OptimizerConfig, load_as

SPLITS = ("val", "test")
TERMS = ("force_mae", "force_rmse", "energy_mae", "angle", "stress_relative")


@dataclass(frozen=True, kw_only=True)
class ExploreConfig:
    """Dynamics with the student."""

    starts: list[str]
    """Files of structures: datasets, SDF, or what ASE reads; boxes among them are periodic runs."""

    max_starts: int = 200
    """Structures drawn from them in each round, of as many molecules as there are."""

    temperatures: list[float] = field(default_factory=lambda: [300.0, 400.0, 500.0, 600.0])
    """One of these [K] is drawn for each."""

    picoseconds: float = 5.0
    """Length of each run [ps]."""

    timestep: float = 0.5
    """[fs]."""

    friction: float = 5.0
    """Of the thermostat [1/ps]."""

    look: int = 20
    """Steps between looks at novelty and failures."""

    batch_atoms: int = 2000
    """Molecules of so many atoms together are evaluated at once."""

    pull: float = 0.0
    """Share of the molecules in which a hydrogen is drawn from its atom to another one nearby:
    structures of transfers, which undisturbed dynamics seldom shows. Boxes have none."""

    committee: list[str] = field(default_factory=list)
    """Further students; with any, disagreement takes the place of novelty."""

    threshold: float | None = None
    """Frames with an atom beyond this are collected: novelty (None: that at which the alarm
    warns), or the disagreement of the committee's forces [eV/Å] (None: 0.3)."""

    spacing: float = 0.1
    """Between collected frames of a run [ps]."""

    before_failure: int = 10
    """Looks before a failure that are collected, however known they are."""

    closest: float = 0.55
    """A run fails if two atoms are nearer than this share of the sum of their radii, …"""

    stretched: float = 1.5
    """… if a bond is so many times as long as at the start, …"""

    energy_jump: float = 0.25
    """… or if the potential energy is so far from that of the start [eV/atom]."""


@dataclass(frozen=True, kw_only=True)
class CurateConfig:
    """Which of the collected frames are labelled."""

    max_frames: int = 1000
    """In each round, at most."""

    max_per_start: int = 20
    """Of each start, at most."""

    least_difference: float = 0.03
    """Frames of a start whose distances between atoms differ by less than this [Å, mean] are
    taken for the same."""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The teacher, as for `mlffd label`."""

    name: str
    """so3lr, gfn2-xtb, ase:package.module:factory …"""

    python: str | None = None
    """Python that has it; None for what was installed for it, else this one."""

    options: dict[str, Any] = field(default_factory=dict)
    """Its settings."""

    timeout: float = 600.0
    """Longest time for a batch [s]."""

    batch_atoms: int | None = None
    """Atoms given to it at a time; None for what it likes."""

    workers: int = 1
    """Processes."""

    shard_size: int = 100
    """Structures that can be lost when the process is ended."""

    max_force: float = 100.0
    """Larger forces [eV/Å] are failures."""

    max_net_force: float = 0.1
    """Larger sums of forces [eV/Å] are failures."""


@dataclass(frozen=True, kw_only=True)
class RetrainConfig:
    """Training from the current student on; names are those of the training configuration."""

    replay: int | None = 20000
    """Structures of the old data, drawn anew in each round; None for all."""

    share: float = 0.2
    """New frames are repeated until they are this share of the structures …"""

    max_repeats: int = 20
    """… but no more often than this."""

    epochs: int = 2
    batch_atoms: int = 4000
    batch_edges: int | None = None
    fit_minutes: float | None = None
    validate_every: int = 2000
    checkpoint_every: int = 500
    tf32: bool = True
    compile: str = "auto"
    cuda_graph: bool = True
    loss: LossConfig = field(default_factory=lambda: LossConfig(forces_delta=0.02, energy=20.0))
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=2e-4, warmup_steps=50)
    )


@dataclass(frozen=True, kw_only=True)
class AcceptConfig:
    """When the retrained student takes the place of the current one."""

    files: list[str] = field(default_factory=list)
    """Dataset files to compare both on; none for `data`. They never change."""

    split: str = "val"
    """val or test."""

    tolerance: float = 0.02
    """Errors may be larger by this share …"""

    terms: list[str] = field(default_factory=lambda: ["force_mae", "energy_mae"])
    """… in each of these."""


@dataclass(frozen=True, kw_only=True)
class ActiveConfig:
    """Everything that decides the result of a loop, and where it goes."""

    name: str = "active"
    """Name of the students that come out."""

    output: str = "runs/active"
    """Folder with one folder for each round."""

    student: str = "default"
    """Bundled name or path of the student to start from."""

    data: list[str]
    """Dataset files that it was trained on."""

    rounds: int = 3
    """Of exploring, labelling and training."""

    seed: int = 0
    """Of starts, temperatures, noise and training."""

    device: str = "auto"
    """"cpu", "cuda", "cuda:1" …; "auto" takes a GPU if there is one."""

    novelty_structures: int = 6000
    """Training structures that the novelty of a retrained student is fitted to."""

    explore: ExploreConfig
    curate: CurateConfig = field(default_factory=CurateConfig)
    teacher: TeacherConfig
    training: RetrainConfig = field(default_factory=RetrainConfig)
    accept: AcceptConfig = field(default_factory=AcceptConfig)


def load_active(path: str | Path, overrides: Sequence[str] = ()) -> ActiveConfig:
    """Read a YAML file and apply overrides, written ``key=value``.

    Raises
    ------
    ConfigError
        If the file cannot be read, or a setting is unknown (with a suggestion), missing, of the
        wrong type or without meaning.
    """
    config = load_as(ActiveConfig, path, overrides)
    _check(config, str(path))
    return config


def _check(config: ActiveConfig, where: str) -> None:
    positive = {
        "explore.picoseconds": config.explore.picoseconds,
        "explore.timestep": config.explore.timestep,
        "explore.look": config.explore.look,
        "explore.max_starts": config.explore.max_starts,
        "curate.max_frames": config.curate.max_frames,
        "curate.max_per_start": config.curate.max_per_start,
        "training.max_repeats": config.training.max_repeats,
        "rounds": config.rounds,
    }
    for name, value in positive.items():
        if not value > 0:
            raise ConfigError(f"{where}: {name} must be positive, got {value}")
    if not config.explore.temperatures or min(config.explore.temperatures) <= 0:
        raise ConfigError(f"{where}: explore.temperatures must be positive numbers [K]")
    if not 0 <= config.explore.pull <= 1:
        raise ConfigError(
            f"{where}: explore.pull is a share from 0 to 1, got {config.explore.pull:g}"
        )
    if not 0 < config.training.share < 1:
        raise ConfigError(
            f"{where}: training.share is a share between 0 and 1, got {config.training.share:g}"
        )
    if config.accept.split not in SPLITS:
        raise ConfigError(f"{where}: accept.split must be val or test, got {config.accept.split!r}")
    unknown = [term for term in config.accept.terms if term not in TERMS]
    if unknown or not config.accept.terms:
        raise ConfigError(f"{where}: accept.terms must be of {', '.join(TERMS)}, got {unknown}")
    for name, files in (("data", config.data), ("explore.starts", config.explore.starts)):
        if not files:
            raise ConfigError(f"{where}: {name} must name a file")
