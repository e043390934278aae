"""What changes in the course of a run: learning rate, weights of the loss, averaging."""

import math
import time
from collections.abc import Sequence

import numpy as np

from openmm_mlffd.training.config import ConfigError, LossConfig, OptimizerConfig, TrainConfig
from openmm_mlffd.training.loss import TERMS
from openmm_mlffd.variants import FILTERS

METRICS = ("force_mae", "force_rmse", "energy_mae", "angle")
"""Validation errors that may decide which weights are kept; all are there for every dataset."""


def learning_rate(step: int, n_steps: int, config: OptimizerConfig) -> float:
    """Linear warm-up, then cosine from the highest to the final learning rate."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    x = min(1.0, (step - config.warmup_steps) / max(1, n_steps - config.warmup_steps))
    low = config.final_learning_rate
    return low + (config.learning_rate - low) * 0.5 * (1 + math.cos(math.pi * x))


def loss_factors(step: int, n_steps: int, config: LossConfig) -> list[float]:
    """Factor of the weight of each of `loss.TERMS`, linear between the points of the schedule."""
    done = min(1.0, step / max(1, n_steps))
    return [_interpolate(done, config.schedule.get(name)) for name in TERMS]


def _interpolate(x: float, points: Sequence[Sequence[float]] | None) -> float:
    if not points:
        return 1.0
    return float(np.interp(x, [p[0] for p in points], [p[1] for p in points]))


def average_weight(step: int, n_steps: int, config: OptimizerConfig) -> float:
    """Share of the newest weights in their average after a step.

    "ema": 1 - decay, with a short memory at first, so that the average forgets the random start.
    "swa": 1 before the share `swa_start` of the run, then 1 / n after n steps: the plain mean
    (Izmailov et al. 2018, arXiv 1803.05407).
    """
    if config.average == "swa":
        return 1.0 / max(1, step - int(config.swa_start * n_steps) + 1)
    return 1 - min(config.ema_decay, (1 + step) / (10 + step))


class Pace:
    """The clock of a run: when it is over, and how many steps it has time for.

    Parameters
    ----------
    config
        `fit_minutes`, `max_minutes`.
    before
        Time that earlier parts of the run took [s].
    """

    def __init__(self, config: TrainConfig, before: float) -> None:
        self._fit, self._limit = (
            math.inf if minutes is None else 60 * minutes
            for minutes in (config.fit_minutes, config.max_minutes)
        )
        self._started = time.monotonic()
        self._before = before
        self._first: tuple[int, float] | None = None

    def seconds(self) -> float:
        """Time spent on the run [s], earlier parts included."""
        return self._before + time.monotonic() - self._started

    def is_over(self) -> bool:
        """Whether `max_minutes` have passed."""
        return time.monotonic() - self._started > self._limit

    def speed(self, step: int) -> float:
        """Steps per second since the first call of `fitted_steps`; 0 if not known yet."""
        if self._first is None or step == self._first[0]:
            return 0.0
        return (step - self._first[0]) / (self.seconds() - self._first[1])

    def fitted_steps(self, step: int) -> int | None:
        """Steps that the run will have had after `fit_minutes`; None if that is not set.

        To be called now and then, when all steps up to this one are done. What happens before
        the first call, as compiling, does not count for the speed.
        """
        if self._first is None:
            self._first = (step, self.seconds())
        speed = self.speed(step)
        if math.isinf(self._fit) or not speed:
            return None
        return step + max(1, round(speed * (self._fit - self.seconds())))


def check_config(config: TrainConfig) -> None:
    """Refuse settings that mean nothing, or nothing together.

    Raises
    ------
    ConfigError
        Names the setting.
    """
    loss, optimizer, model = config.loss, config.optimizer, config.model
    _one_of("compile", config.compile, ("auto", "on", "off"))
    _one_of("model.filters", model.filters, FILTERS)
    _one_of("optimizer.average", optimizer.average, ("ema", "swa"))
    _one_of("loss.forces_loss", loss.forces_loss, ("huber", "conditional", "l2"))
    for name in ("fit_minutes", "fit_steps", "batch_edges"):
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ConfigError(f"{name} must be positive, got {value}")
    if loss.large_force is not None and not loss.large_force > 0:
        raise ConfigError(f"loss.large_force must be positive, got {loss.large_force}")
    if config.fit_minutes is not None and config.fit_steps is not None:
        raise ConfigError("fit_minutes and fit_steps exclude one another")
    for name, weight in config.metric.items():
        _one_of("metric: the error", name, METRICS)
        if not weight >= 0:
            raise ConfigError(f"metric.{name} must not be negative, got {weight}")
    if not any(config.metric.values()):
        raise ConfigError("metric: all weights are 0")
    if not 0 <= optimizer.swa_start < 1:
        raise ConfigError(f"optimizer.swa_start is a share of the run, got {optimizer.swa_start}")
    if model.tail_cutoff is not None and not (model.charges and model.tail_cutoff >= model.cutoff):
        raise ConfigError(
            "model.tail_cutoff needs model.charges=true and at least the cutoff of "
            f"{model.cutoff:g} Å, got {model.tail_cutoff:g}"
        )
    if loss.charges and not model.charges:
        raise ConfigError("loss.charges needs a student with charges: model.charges=true")
    if loss.hessian and not config.data.hessians:
        raise ConfigError("loss.hessian needs data.hessians, made by `mlffd data hessian`")
    for name in TERMS:
        if getattr(loss, name) < 0:
            raise ConfigError(f"loss.{name} must not be negative, got {getattr(loss, name)}")
    if not any(getattr(loss, name) for name in TERMS):
        raise ConfigError("loss: all weights are 0")
    for name, points in loss.schedule.items():
        _check_points(name, points)


def _one_of(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _check_points(name: str, points: Sequence[Sequence[float]]) -> None:
    _one_of("loss.schedule: the term", name, TERMS)
    shares = [p[0] for p in points if len(p) == 2]
    if len(shares) != len(points) or sorted(shares) != shares or not shares:
        raise ConfigError(
            f"loss.schedule.{name} must be pairs [share of the run, factor] in rising order, "
            f"got {points}"
        )
    if any(p[1] < 0 for p in points):
        raise ConfigError(f"loss.schedule.{name}: factors must not be negative, got {points}")
