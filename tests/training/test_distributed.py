import os
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import yaml

from openmm_mlffd.modelfile import load_student
from openmm_mlffd.training.config import ConfigError
from openmm_mlffd.training.distributed import Processes
from openmm_mlffd.training.train import Trainer

STEPS = {"epochs": 2, "validate_every": 7, "checkpoint_every": 1000}


def torchrun(config, count, tmp_path):
    """`mlffd train` by several processes on this machine."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(asdict(config)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(count), "-m", "openmm_mlffd.cli", "train", str(path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def weights(trainer):
    return np.concatenate([p.detach().numpy().ravel() for p in trainer.average.parameters()])


@pytest.fixture
def straight(morse_config, tmp_path):
    trainer = Trainer(morse_config(output=str(tmp_path / "straight"), **STEPS))
    start = weights(trainer)
    trainer.run()
    return trainer, start


@pytest.mark.parametrize("streamed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_processes_train_like_one(morse_config, straight, tmp_path, streamed):
    one, start = straight
    config = morse_config(**STEPS)
    if streamed:
        config = replace(config, data=replace(config.data, resident_gb=0.0))
    out = torchrun(config, 2, tmp_path)
    assert out.count("finished") == 1  # only the first process speaks
    two = Trainer(config)  # from the checkpoint
    assert two.finished
    assert two.progress.step == one.progress.step > 10
    assert two.progress.best == pytest.approx(one.progress.best, rel=1e-3)
    moved = np.abs(weights(one) - start).max()
    assert np.abs(weights(two) - weights(one)).max() < 0.01 * moved
    assert np.abs(weights(two) - weights(one)).mean() < 1e-3 * np.abs(weights(one) - start).mean()
    assert load_student(tmp_path / "run" / "student.safetensors").header.name == "student"


@pytest.mark.slow
def test_run_of_two_processes_goes_on_with_one(morse_config, straight, tmp_path):
    one, start = straight
    config = morse_config(**STEPS, max_minutes=0.0)
    out = torchrun(config, 2, tmp_path)
    assert "stopped; the same command goes on" in out
    rest = Trainer(morse_config(**STEPS))
    assert rest.progress.step == 1
    rest.run()
    assert np.abs(weights(rest) - weights(one)).max() < 0.01 * np.abs(weights(one) - start).max()


def test_without_torchrun_there_is_one_process(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    processes = Processes.from_environment()
    assert (processes.count, processes.is_first) == (1, True)
    values = torch.tensor([1.0, 2.0])
    processes.sum(values)
    assert values.tolist() == [1.0, 2.0]
    assert processes.any(True)
    assert not processes.any(False)
    assert processes.of_first(3.5) == 3.5


def test_half_of_the_variables_of_torchrun_are_an_error(monkeypatch):
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="LOCAL_RANK, MASTER_ADDR, MASTER_PORT; start several"):
        Processes.from_environment()


ENDS = """
import atexit, sys
from openmm_mlffd.training.distributed import Processes
atexit.register(lambda: print("the interpreter took itself apart", file=sys.stderr))
processes = Processes.from_environment()
print(f"process {processes.rank} is done", end="")
processes.end()
print("and goes on")
"""


@pytest.mark.parametrize("count", [1, 2])
def test_process_of_several_ends_before_the_interpreter_does(count, tmp_path):
    script = tmp_path / "ends.py"
    script.write_text(ENDS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(count), str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    for rank in range(count):
        assert f"process {rank} is done" in done.stdout  # nothing that was written is lost
    assert ("and goes on" in done.stdout) == (count == 1)
    assert ("took itself apart" in done.stderr) == (count == 1)
    assert done.returncode == 0, done.stderr
