import json
from dataclasses import replace

import pytest
import torch

from openmm_mlffd.training.profile import WAYS, profile_training, variants
from openmm_mlffd.training.train import Trainer


def test_each_way_to_train_is_one_configuration(morse_config):
    found = dict(variants(morse_config()))
    assert tuple(found) == WAYS
    assert found["plain"].data.resident_gb == 0
    assert found["cached"].data.resident_gb > 0
    for setting, word in [("compile", "compiled"), ("fused", "fused")]:
        assert all((getattr(found[w], setting) == "on") == (word in w) for w in WAYS)
    assert all(found[w].cuda_graph == ("graphed" in w) for w in WAYS)


def test_fused_way_is_measured_with_fused_messages(morse_config):
    pytest.importorskip("warp")
    (timing,) = profile_training(
        morse_config(), ways=("fused+graphed",), n_steps=2, echo=lambda _: None
    )
    assert timing.note == ""
    assert any("mlffd::edge_message" in name for name, _ in timing.top)


def test_profile_prints_speeds_and_where_the_time_goes(morse_config, tmp_path):
    lines = []
    config = morse_config()
    found = profile_training(
        config,
        ways=("plain", "cached"),
        n_steps=4,
        output=tmp_path / "speed.json",
        echo=lines.append,
    )
    stored = json.loads((tmp_path / "speed.json").read_text())
    assert [t["way"] for t in stored["timings"]] == ["plain", "cached"]
    assert stored["device"] == (
        torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    )
    for timing in found:
        per_step = timing.atoms_per_second * timing.step_ms / 1e3
        assert 30 < per_step <= config.batch_atoms
        assert timing.launches > 100
        assert 0.3 < sum(part for _, part in timing.top) <= 1.001
    assert "atoms/s" in lines[0]
    assert any("where the time goes" in line for line in lines)
    assert not (tmp_path / "run").exists()


def test_steps_for_measurements_go_on_beyond_an_epoch(morse_config):
    trainer = Trainer(morse_config(epochs=1))
    steps = trainer.steps()
    n = trainer.n_steps
    atoms = [next(steps) for _ in range(3 * n)]
    assert sum(atoms[:n]) == pytest.approx(trainer.source.n_atoms.sum(), rel=0.2)


def test_a_graph_is_asked_for_in_vain_on_the_cpu(morse_config):
    config = morse_config(epochs=1)
    trainer = Trainer(replace(config, cuda_graph=True))
    trainer.run()
    assert not trainer._resident.step.is_graph
    assert trainer.padding == 0
