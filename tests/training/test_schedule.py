"""The clock of a run, and batches limited by edges."""

import time

import numpy as np
import pytest

from openmm_mlffd.training.config import ConfigError, DataConfig, LossConfig, TrainConfig
from openmm_mlffd.training.resident import plan
from openmm_mlffd.training.schedule import Pace, check_config


@pytest.fixture
def clock(monkeypatch):
    """Seconds that `time.monotonic` shows, as a list of one."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def config(**settings):
    return TrainConfig(data=DataConfig(files=["a.h5"]), **settings)


def test_steps_are_those_for_which_there_is_time_at_the_speed_after_the_start(clock):
    pace = Pace(config(fit_minutes=10), 60.0)
    clock[0] += 100  # compiling: no part of the speed
    assert pace.fitted_steps(50) is None
    clock[0] += 10
    assert pace.speed(150) == pytest.approx(10.0)
    assert pace.fitted_steps(150) == 150 + 10 * (600 - 60 - 110)
    clock[0] += 440  # late: the run is about to end
    assert pace.fitted_steps(160) == 161
    assert pace.seconds() == pytest.approx(610)


def test_without_a_time_to_fit_to_the_epochs_decide(clock):
    pace = Pace(config(max_minutes=1), 500.0)
    pace.fitted_steps(1)
    clock[0] += 50
    assert pace.fitted_steps(50) is None
    assert not pace.is_over()  # earlier parts do not count
    clock[0] += 11
    assert pace.is_over()


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        ({"stress_relative": 1.0}, "metric: the error must be one of force_mae"),
        ({"force_mae": -1.0}, "metric.force_mae must not be negative"),
        ({"force_mae": 0.0}, "all weights are 0"),
    ],
)
def test_metric_that_means_nothing_is_refused(metric, said):
    with pytest.raises(ConfigError, match=said):
        check_config(config(metric=metric))


@pytest.mark.parametrize("large", [0.0, -1.0])
def test_limit_of_large_forces_must_be_positive(large):
    with pytest.raises(ConfigError, match="large_force must be positive"):
        check_config(config(loss=LossConfig(large_force=large)))


@pytest.mark.parametrize("name", ["fit_minutes", "batch_edges"])
def test_times_and_sizes_must_be_positive(name):
    with pytest.raises(ConfigError, match=name):
        check_config(config(**{name: 0}))


def test_batches_have_at_most_so_many_edges_and_all_structures_once():
    rng = np.random.default_rng(0)
    n_atoms = rng.integers(3, 60, 500)
    n_edges = n_atoms * np.where(rng.random(500) < 0.05, 150, 15)  # boxes among molecules
    parts = plan(n_atoms, 400, np.random.default_rng(1), n_edges=n_edges, batch_edges=9000)
    assert sorted(np.concatenate(parts)) == list(range(500))
    edges = np.array([n_edges[p].sum() for p in parts])
    assert edges.max() <= 9000
    assert max(n_atoms[p].sum() for p in parts) <= 400
    unlimited = plan(n_atoms, 400, np.random.default_rng(1))
    without = np.array([n_edges[p].sum() for p in unlimited])
    assert edges.mean() / edges.max() > without.mean() / without.max() + 0.1
