import itertools
import logging
import math
import os
import pickle
import resource
import shutil
import signal
import time
from dataclasses import asdict, replace

import h5py
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from openmm_mlffd.modelfile import load_student, read_header, save_student
from openmm_mlffd.training.batches import make_batch
from openmm_mlffd.training.config import ConfigError, DataConfig, OptimizerConfig
from openmm_mlffd.training.evaluate import evaluate
from openmm_mlffd.training.hdf5 import Dataset
from openmm_mlffd.training.schedule import learning_rate
from openmm_mlffd.training.train import Trainer, TrainingError, pick_device, train

OFFSETS = [-13.6, -1029.4, -2043.7]  # planted in the Morse clusters
CPU = torch.device("cpu")


class Interrupted(Trainer):
    """A trainer to which something happens after so many steps."""

    def __init__(self, config, at_step, event):
        super().__init__(config)
        self.at_step, self.event = at_step, event

    def _step(self, batch, lr):
        super()._step(batch, lr)
        if self.progress.step + 1 == self.at_step:
            self.event()


def weights(trainer):
    both = itertools.chain(trainer.potential.parameters(), trainer.average.parameters())
    return [p.detach().clone() for p in both]


def assert_same_run(trainer, other):
    assert trainer.progress == other.progress
    assert all(torch.equal(a, b) for a, b in zip(weights(trainer), weights(other), strict=True))


def errors(trainer, potential):
    """Errors of a potential on the validation set of a run."""
    source = trainer.validation
    batches = (make_batch(s, potential, CPU) for s in source.batches(500))
    return evaluate(potential, batches, source.subsets, CPU)["all"]


def poison(path, copy, rows):
    """A copy of a dataset file in which some forces are not numbers."""
    shutil.copy(path, copy)
    with h5py.File(copy, "a") as file:
        for row in rows:
            file["forces"][row] = np.nan
    return DataConfig(files=[str(copy)])


def first_atom_of_split(path, split):
    with Dataset(path) as dataset:
        return dataset.offsets[dataset.in_split(split)]


# learning


def test_training_learns_a_morse_potential(morse_config):
    trainer = Trainer(morse_config(epochs=30))
    before = errors(trainer, trainer.average)
    path = trainer.run()
    after = errors(trainer, load_student(path))
    assert after["force_mae"] < 0.35 * before["force_mae"]
    assert after["energy_mae"] < 0.5 * before["energy_mae"]
    assert after["angle"] < 0.5 * before["angle"]
    assert after["force_relative"] < 25
    assert trainer.finished


def test_student_file_says_how_it_was_made(morse_config, morse_file):
    trainer = Trainer(morse_config(name="toy", licence="CC0"))
    potential = load_student(trainer.run())
    header = potential.header
    assert (header.name, header.licence, header.teacher) == ("toy", "CC0", "Morse")
    assert header.elements == ["H", "C", "O"]
    assert header.references == trainer.potential.references
    assert header.references == pytest.approx(OFFSETS, abs=3)
    assert header.dataset["files"] == ["morse.h5"]
    assert header.dataset["train_structures"] == len(trainer.source)
    assert header.training["config"]["epochs"] == 3
    assert str(morse_file.parent) not in str(asdict(header))
    measured = header.metrics["by_subset"]["all"]["force_mae"]
    assert measured == pytest.approx(trainer.progress.best, abs=1e-3)
    assert header.metrics["by_subset"]["all"]["stress_relative"] is None


def test_seed_decides_the_result(morse_config, tmp_path):
    runs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        trainer = Trainer(morse_config(epochs=1, seed=seed, output=str(tmp_path / name)))
        trainer.run()
        runs.append(trainer)
    assert_same_run(runs[0], runs[1])
    assert not torch.equal(weights(runs[0])[0], weights(runs[2])[0])


def test_learning_rate_rises_linearly_and_falls_like_a_cosine():
    config = OptimizerConfig(learning_rate=1e-3, final_learning_rate=1e-5, warmup_steps=10)
    rates = [learning_rate(step, 110, config) for step in range(111)]
    np.testing.assert_allclose(rates[:10], 1e-4 * np.arange(1, 11))
    assert rates[10] == pytest.approx(1e-3)
    assert rates[60] == pytest.approx((1e-3 + 1e-5) / 2)
    assert rates[85] == pytest.approx(1e-5 + 0.99e-3 * 0.5 * (1 + math.cos(0.75 * math.pi)))
    assert rates[110] == pytest.approx(1e-5)
    assert learning_rate(500, 110, config) == pytest.approx(1e-5)
    assert learning_rate(0, 1, replace(config, warmup_steps=0)) == 1e-3


def test_each_step_uses_the_learning_rate_of_the_schedule(morse_config):
    used = []

    class Recording(Trainer):
        def _step(self, batch, lr):
            super()._step(batch, lr)
            used.append(self.optimizer.param_groups[0]["lr"])

    trainer = Recording(morse_config(epochs=1))
    trainer.run()
    n_steps = round(trainer.source.n_atoms.sum() / 60)
    expected = [learning_rate(s, n_steps, trainer.config.optimizer) for s in range(len(used))]
    assert used == pytest.approx(expected)
    assert abs(len(used) - n_steps) <= 2


def test_average_follows_the_weights(morse_config):
    config = morse_config(epochs=1, optimizer={"ema_decay": 0.0})
    trainer = Trainer(config)
    before = [p.clone() for p in trainer.average.parameters()]
    trainer.run()
    pairs = list(zip(trainer.average.parameters(), trainer.potential.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not all(torch.equal(a, p) for a, (p, _) in zip(before, pairs, strict=True))
    slow = Trainer(morse_config(epochs=1, output=config.output + "-slow"))
    slow.run()
    pairs = zip(slow.average.parameters(), slow.potential.parameters(), strict=True)
    assert not any(torch.equal(a, b) for a, b in pairs)


# stopping and going on


@pytest.fixture
def straight(morse_config, tmp_path):
    """A run that nothing interrupts."""
    trainer = Trainer(morse_config(output=str(tmp_path / "straight")))
    trainer.run()
    return trainer


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("at_step", [1, 14])
def test_run_that_a_signal_stops_goes_on_as_if_nothing_had_been(
    morse_config, straight, number, at_step
):
    before = signal.getsignal(number)
    first = Interrupted(morse_config(), at_step, lambda: os.kill(os.getpid(), number))
    first.run()
    assert first.progress.step == at_step
    assert not first.finished
    assert signal.getsignal(number) is before
    second = Trainer(morse_config())
    assert second.progress.step == at_step
    second.run()
    assert second.finished
    assert_same_run(second, straight)


def test_run_that_dies_goes_on_from_its_last_checkpoint(morse_config, straight):
    def die():
        raise MemoryError

    config = morse_config(checkpoint_every=5)
    with pytest.raises(MemoryError):
        Interrupted(config, 13, die).run()
    again = Trainer(config)
    assert again.progress.step == 10
    again.run()
    assert_same_run(again, straight)


def test_streamed_run_goes_on_like_one_that_is_not_stopped(morse_config, morse_file, tmp_path):
    data = DataConfig(files=[str(morse_file)], memory_gb=0.0, block_size=7)
    whole = Trainer(morse_config(data=data, output=str(tmp_path / "whole")))
    assert not whole.source.in_memory
    whole.run()
    config = morse_config(data=data)
    Interrupted(config, 17, lambda: os.kill(os.getpid(), signal.SIGTERM)).run()
    rest = Trainer(config)
    rest.run()
    assert_same_run(rest, whole)


def test_time_limit_stops_with_a_checkpoint(morse_config, straight):
    Trainer(morse_config(max_minutes=0.0)).run()
    again = Trainer(morse_config())
    assert again.progress.step == 1
    again.run()
    assert_same_run(again, straight)


def test_finished_run_stays_as_it_is(morse_config):
    potential, path = train(morse_config())
    again = Trainer(morse_config())
    assert again.finished
    assert again.run() == path
    for ours, theirs in zip(potential.parameters(), again.average.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_checkpoint_of_other_settings_is_refused(morse_config):
    Trainer(morse_config(max_minutes=0.0)).run()
    with pytest.raises(ConfigError, match=r"checkpoint.pt was made with other settings for seed"):
        Trainer(morse_config(seed=1))


@pytest.mark.parametrize("content", ["empty", "cut", "pickle"])
def test_checkpoint_that_cannot_be_read_is_named_and_nothing_runs(morse_config, tmp_path, content):
    Trainer(morse_config(max_minutes=0.0)).run()
    file, ran = tmp_path / "run" / "checkpoint.pt", tmp_path / "ran"

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(ran),)

    whole = file.read_bytes()
    file.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "pickle": b""}[content])
    if content == "pickle":
        with file.open("wb") as stream:
            torch.save({"config": Payload()}, stream)
    with pytest.raises(ConfigError, match=r"checkpoint.pt: not a checkpoint that can be read"):
        Trainer(morse_config())
    assert not ran.exists()


def test_checkpoint_holds_nothing_that_needs_trust(morse_config, tmp_path):
    Trainer(morse_config(max_minutes=0.0)).run()
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert state["progress"]["step"] == 1
    assert pickle.dumps(state["config"])
    assert not (tmp_path / "run" / "checkpoint.pt.tmp").exists()


def test_full_disk_leaves_the_old_checkpoint(morse_config, tmp_path):
    trainer = Trainer(morse_config(max_minutes=0.0))
    trainer.run()
    file = tmp_path / "run" / "checkpoint.pt"
    before = file.read_bytes()
    trainer.progress.step = 99
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            trainer.save_checkpoint()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert file.read_bytes() == before
    assert not file.with_name("checkpoint.pt.tmp").exists()


def test_losses_and_errors_can_be_followed_in_tensorboard(morse_config, tmp_path):
    trainer = Trainer(morse_config(epochs=8, validate_every=30))
    trainer.run()
    assert trainer.progress.step > 50
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    tags = set(board.Tags()["scalars"])
    assert {"loss/total", "loss/forces", "learning_rate", "validation/force_mae"} <= tags
    found = [s.value for s in board.Scalars("validation/force_mae")]
    assert min(found) == pytest.approx(trainer.progress.best, rel=1e-5)
    assert [s.step for s in board.Scalars("validation/force_mae")][:2] == [30, 60]


# starting from a student


def test_run_can_start_from_a_student(morse_config, tmp_path):
    _, path = train(morse_config(output=str(tmp_path / "first")))
    student = load_student(path)
    second = Trainer(morse_config(initial=str(path)))
    for ours, theirs in zip(second.potential.parameters(), student.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert second.potential.references == student.references
    before = errors(second, second.average)
    second.run()
    assert second.progress.best < before["force_mae"]


def test_student_file_says_what_it_was_trained_from(morse_config, tmp_path):
    _, path = train(morse_config(output=str(tmp_path / "first"), epochs=1))
    first = read_header(path)
    config = morse_config(initial=str(path), epochs=2)
    trainer = Trainer(config)
    trainer.save_checkpoint()
    _, second = train(config)  # resumed
    record = read_header(second).training
    assert record["config"]["initial"] == path.name
    assert record["initial"]["sha256"] == first.sha256
    assert record["initial"]["training"] == first.training
    assert record["initial"]["dataset"]["train_structures"] > 0
    assert "initial" not in first.training


def test_student_of_another_architecture_is_no_start(morse_config, tmp_path):
    _, path = train(morse_config(output=str(tmp_path / "first"), max_minutes=None, epochs=1))
    model = replace(morse_config().model, cutoff=4.0)
    with pytest.raises(ConfigError, match=r"initial: .* has cutoff 4.5, this run 4.0"):
        Trainer(morse_config(initial=str(path), model=model))


def test_student_with_rougher_norms_is_a_start(morse_config, tmp_path):
    config = morse_config(output=str(tmp_path / "first"), epochs=1)
    _, path = train(replace(config, model=replace(config.model, norm_softening=1e-4)))
    second = Trainer(morse_config(initial=str(path)))
    assert load_student(path).network.norm_softening == 1e-4
    assert second.average.network.norm_softening == 1e-2


def test_student_keeps_the_limits_of_what_its_start_was_trained_on(morse_config, tmp_path):
    _, path = train(morse_config(output=str(tmp_path / "first"), epochs=1))
    limits = read_header(path).coordination_limits
    assert limits is not None
    assert all(0.0 < x < 20.0 for x in limits)
    known = load_student(path)
    known.coordination_limits = [limits[0] + 1.0, *limits[1:]]
    header = replace(known.header, coordination_limits=known.coordination_limits)
    wider = tmp_path / "wider.safetensors"
    save_student(wider, known, header)
    # without a step: what data fix, and the errors
    _, second = train(morse_config(output=str(tmp_path / "second"), initial=str(wider), epochs=0))
    assert read_header(second).coordination_limits == pytest.approx(known.coordination_limits)
    for key, weight in load_student(second).state_dict().items():
        assert torch.equal(weight, known.state_dict()[key])


def test_crowding_can_be_left_out(morse_config, tmp_path):
    config = morse_config(epochs=0)
    _, path = train(replace(config, model=replace(config.model, crowding=False)))
    assert read_header(path).coordination_limits is None


# labels that are not finite


def test_bad_label_is_left_out_and_reported(morse_config, morse_file, tmp_path, caplog):
    bad = first_atom_of_split(morse_file, "train")[5:6]
    trainer = Trainer(morse_config(data=poison(morse_file, tmp_path / "bad.h5", bad)))
    with caplog.at_level(logging.WARNING):
        trainer.run()
    assert trainer.progress.bad_steps == 3  # one for each epoch
    assert all(w.isfinite().all() for w in weights(trainer))
    assert "3 steps left out: loss or gradient not finite, last in batch" in caplog.text
    assert "of epoch 2" in caplog.text
    assert trainer.progress.best < 2000


def test_step_with_a_bad_label_changes_no_weight(morse_config, morse_file, tmp_path):
    every = first_atom_of_split(morse_file, "train")
    data = poison(morse_file, tmp_path / "bad.h5", every)
    trainer = Trainer(morse_config(data=data, epochs=1))
    before = weights(trainer)
    trainer.run()
    assert trainer.progress.bad_steps == trainer.progress.step > 5
    assert all(torch.equal(a, b) for a, b in zip(before, weights(trainer), strict=True))


def test_too_many_bad_labels_stop_the_run_and_leave_the_checkpoint(
    morse_config, morse_file, tmp_path
):
    good = morse_config(epochs=5)
    Interrupted(good, 14, lambda: os.kill(os.getpid(), signal.SIGTERM)).run()
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    before = checkpoint.read_bytes()
    every = first_atom_of_split(morse_file, "train")
    bad = replace(good, data=poison(morse_file, tmp_path / "bad.h5", every))
    with pytest.raises(TrainingError, match=r"steps had a loss .*batch \d+ of epoch \d.*bad.h5"):
        Trainer(bad).run()
    assert checkpoint.read_bytes() == before
    again = Trainer(good)
    again.run()
    assert again.finished
    assert again.progress.bad_steps == 0


# surroundings


def test_training_changes_nothing_global(morse_config):
    def state():
        return {
            "dtype": torch.get_default_dtype(),
            "threads": torch.get_num_threads(),
            "grad": torch.is_grad_enabled(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "tf32": torch.backends.cuda.matmul.allow_tf32,
            "random": torch.get_rng_state().tolist(),
            "numpy random": np.random.get_state()[1].tolist(),  # noqa: NPY002
            "signals": [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)],
        }

    for tf32 in (True, False):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        before = state()
        Trainer(
            morse_config(epochs=1, tf32=not tf32, output=f"{morse_config().output}{tf32}")
        ).run()
        assert state() == before


def test_devices_that_are_not_here_are_named():
    assert pick_device("cpu") == CPU
    for name in ("cuda:99", "gpu"):
        with pytest.raises(ConfigError, match=f"device: .*{name}.*there are cpu"):
            pick_device(name)


@pytest.mark.parametrize("muon", [False, True])
def test_run_fitted_to_a_time_ends_its_schedule_with_it(morse_config, monkeypatch, muon):
    now = [0.0]  # a clock that steps move
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    optimizer = {"learning_rate": 1e-3, "muon": muon}
    trainer = Trainer(morse_config(epochs=10_000, fit_minutes=5, optimizer=optimizer))
    rates = []

    def timed(batch, lr):
        rates.append(lr)
        now[0] += 2.0
        original(batch, lr)

    original = trainer._step
    monkeypatch.setattr(trainer, "_step", timed)
    trainer.run()
    assert trainer.finished
    assert trainer.progress.step == 150
    assert rates[-1] < 0.02 * max(rates)
    assert (trainer.folder / "student.safetensors").exists()


def test_run_with_muon_goes_on_as_if_it_had_not_stopped(morse_config, tmp_path):
    optimizer = {"learning_rate": 1e-3, "muon": True}
    whole = Trainer(morse_config(epochs=2, optimizer=optimizer, output=str(tmp_path / "whole")))
    whole.run()
    config = morse_config(epochs=2, optimizer=optimizer)
    first = Interrupted(config, 15, lambda: signal.raise_signal(signal.SIGTERM))
    first.run()
    rest = Trainer(config)
    assert 0 < rest.progress.step < whole.progress.step
    rest.run()
    assert_same_run(rest, whole)


def test_metric_decides_which_weights_are_kept(morse_config, tmp_path, monkeypatch):
    course = iter([(40.0, 3.0), (41.0, 2.0), (39.0, 4.0), (60.0, 0.5)])

    def errors_of(*_):
        force, energy = next(course, (99.0, 99.0))
        row = {"force_mae": force, "force_rmse": 1.0, "energy_mae": energy, "angle": 1.0}
        return {"all": row, "morse": row}

    monkeypatch.setattr("openmm_mlffd.training.train.evaluate", errors_of)
    found = {}
    for name, metric in (
        ("forces", {"force_mae": 1.0}),
        ("both", {"force_mae": 1.0, "energy_mae": 10.0}),
    ):
        course = iter([(40.0, 3.0), (41.0, 2.0), (39.0, 4.0), (60.0, 0.5)])
        settings = {"epochs": 8, "validate_every": 15, "output": str(tmp_path / name)}
        _, path = train(morse_config(metric=metric, **settings))
        found[name] = read_header(path).metrics["by_subset"]["all"]["force_mae"]
    assert found == {"forces": 39.0, "both": 41.0}
