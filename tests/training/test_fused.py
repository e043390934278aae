"""Training with fused messages: the loss and gradient of the plain step by other kernels."""

import copy
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("warp")

from openmm_mlffd.fused import FusedNetwork
from openmm_mlffd.modelfile import make_potential
from openmm_mlffd.training.batches import make_batch
from openmm_mlffd.training.config import LossConfig, TrainConfig, load_config
from openmm_mlffd.training.loss import TERMS
from openmm_mlffd.training.step import TrainingStep, wants_fused
from openmm_mlffd.training.targets import count_totals, training_batch
from openmm_mlffd.training.train import Trainer

CPU = torch.device("cpu")
CONFIG = TrainConfig(data=None, loss=LossConfig(stress=0.2, clash=0.5), fused="on")
PAINN = {"kind": "painn", "n_channels": 8, "n_interactions": 2, "n_basis": 6}
CHOICES = {
    "kind": "painn-variant",
    "filters": "sine",
    "pair_filters": False,
    "charges": False,
    "tail": False,
    "message_cutoff": 5.0,
}
VARIANTS = {
    "waves": PAINN,
    "splines": PAINN | CHOICES | {"filters": "spline"},
    "charges and tail": PAINN | CHOICES | {"charges": True, "tail": True, "message_cutoff": 3.0},
}


@pytest.fixture
def make_case(make_header, make_structures):
    """A student, a batch and a configuration."""

    def make(variant="waves", n=10, dtype=torch.float64, **changes):
        header = make_header(elements=["H", "C", "O"], references=[0.0] * 3, cutoff=5.0)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            student = make_potential(replace(header, architecture=VARIANTS[variant]))
        student = student.to(dtype).train()
        batch = training_batch(make_batch(make_structures(n), student, CPU), student)
        return student, batch, replace(CONFIG, **changes)

    return make


def gradient_of(step, batch):
    step.set_controls(0.0, 0.0, (0, 0), [1.0] * len(TERMS))
    step.differentiate(batch, count_totals(batch, 0.3))
    return step.losses.clone(), step.gradient.clone()


def arguments(batch):
    dtype = batch.energy.dtype
    return list(batch), count_totals(batch, 0.3).to(dtype), torch.ones(len(TERMS), dtype=dtype)


@pytest.mark.parametrize(("variant", "tolerance"), [
    ("waves", 1e-8), ("splines", 1e-12), ("charges and tail", 1e-8),
])  # fmt: skip
def test_fused_gradient_is_the_plain_one(make_case, variant, tolerance):
    student, batch, config = make_case(variant)
    found = []
    for fused in ("off", "on"):
        mine = copy.deepcopy(student)
        step = TrainingStep(mine, copy.deepcopy(mine), replace(config, fused=fused))
        found.append(gradient_of(step, batch))
        assert step.shortfall == ""
        assert step.loss_gradient.is_fused == (fused == "on")
    for plain, fused in zip(*found, strict=True):
        assert plain.norm() > 0
        assert (fused - plain).norm() < tolerance * plain.norm()


def test_fused_gradient_written_out_has_no_tensors_of_edges_times_channels(make_case):
    student, batch, config = make_case()
    step = TrainingStep(student, copy.deepcopy(student), config)
    step.fuse(batch, count_totals(batch, 0.3))
    assert step.loss_gradient.is_fused
    expected = step.loss_gradient(step.weights, *arguments(batch))
    traced = step.loss_gradient.traced(step.weights, *arguments(batch))
    with torch.no_grad():
        terms, gradients = traced([w.detach() for w in step.weights], *arguments(batch))
    np.testing.assert_allclose(terms, expected[0], rtol=1e-12)
    for a, b in zip(gradients, expected[1], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)
    n_edges, n_channels = len(batch.vectors), 8
    names = []
    for node in traced.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[0] == n_edges:
            assert value.numel() < 10 * n_edges, node
        names.append(str(node.target))
    assert n_edges * n_channels > 10 * n_channels
    # of two blocks, for the batch and for atoms that clash; nothing is computed in vain
    assert names.count("mlffd.edge_message.default") == 4
    assert names.count("mlffd.edge_message_tangent.default") == 4
    assert names.count("mlffd.edge_message_second.default") == 4
    assert names.count("mlffd.edge_message_backward.default") == 8
    assert names.count("mlffd.edge_message_table.default") == 4
    assert names.count("mlffd.edge_message_second_table.default") == 4
    without = [n for n in traced.graph.nodes if n.args and n.args[-1] is False]
    without = [n for n in without if str(n.target).startswith("mlffd.edge_message_")]
    assert len(without) == 8


def test_written_out_step_is_the_step_for_any_batch_of_its_shape(make_case):
    student, batch, config = make_case()
    step = TrainingStep(student, copy.deepcopy(student), config)
    other = batch._replace(vectors=1.02 * batch.vectors, energy=batch.energy + 0.3)
    expected = gradient_of(step, other)
    step.write_out(batch, count_totals(batch, 0.3))
    found = gradient_of(step, other)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12 * b.norm())


def test_padding_changes_nothing(make_case):
    student, batch, config = make_case("charges and tail")
    atom, structure, n = len(batch.species), len(batch.energy), 300

    def zero(name):
        old = getattr(batch, name)
        return {name: torch.cat([old, torch.zeros_like(old[:1])])}

    far = batch.vectors.new_tensor([10.0, 0.0, 0.0]).expand(n, 3)
    padded = batch._replace(
        system=torch.cat([batch.system, torch.tensor([structure])]),
        edge_index=torch.cat([batch.edge_index, torch.full((2, n), atom)], 1),
        vectors=torch.cat([batch.vectors, far]),
        core=torch.cat([batch.core, batch.core[:1].expand(n)]),
        near=torch.cat([batch.near, torch.full((50,), len(batch.vectors) + n - 1)]),
        **zero("species") | zero("energy") | zero("virial") | zero("n_atoms") | zero("real"),
        **zero("forces") | zero("charges") | zero("repulsion") | zero("probe") | zero("curvature"),
    )
    step = TrainingStep(student, copy.deepcopy(student), config)
    expected = gradient_of(step, batch)
    step.differentiate(padded, count_totals(batch, 0.3))
    np.testing.assert_allclose(step.losses, expected[0], rtol=1e-10)
    np.testing.assert_allclose(step.gradient, expected[1], atol=1e-10 * expected[1].norm())


def test_fused_gradient_in_single_precision_is_the_same_at_each_call(make_case):
    student, batch, config = make_case(dtype=torch.float32)
    step = TrainingStep(student, copy.deepcopy(student), config)
    first, second = gradient_of(step, batch), gradient_of(step, batch)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    plain = TrainingStep(student, copy.deepcopy(student), replace(config, fused="off"))
    expected = gradient_of(plain, batch)[1]
    assert (first[1] - expected).norm() < 1e-4 * expected.norm()


def test_mixed_precision_gives_nearly_the_same_gradient(make_case):
    student, batch, config = make_case(dtype=torch.float32)
    found = []
    for fused, mixed in [("off", False), ("on", True)]:
        mine = copy.deepcopy(student)
        changed = replace(config, fused=fused, mixed_precision=mixed)
        step = TrainingStep(mine, copy.deepcopy(mine), changed)
        found.append(gradient_of(step, batch)[1])
        assert step.shortfall == ""
    assert 1e-5 < (found[1] - found[0]).norm() / found[0].norm() < 0.05


def test_wrong_fused_gradient_is_not_used(make_case, caplog, monkeypatch):
    student, batch, config = make_case()
    features = FusedNetwork._features
    monkeypatch.setattr(
        FusedNetwork, "_features", lambda self, *arguments: 1.1 * features(self, *arguments)
    )
    step = TrainingStep(student, copy.deepcopy(student), config)
    with caplog.at_level(logging.WARNING):
        gradient_of(step, batch)
    assert "the fused gradient differs by a part of" in caplog.text
    assert not step.loss_gradient.is_fused
    assert step.shortfall == "not fused; "


@pytest.mark.parametrize(("architecture", "loss", "reason"), [
    (CHOICES | {"pair_filters": True, "message_cutoff": 4.0}, {}, "pairs of elements"),
    ({}, {"hessian": 1.0}, "third derivatives"),
])  # fmt: skip
def test_what_cannot_be_fused_is_said(
    make_header, make_structures, caplog, architecture, loss, reason
):
    header = make_header(elements=["H", "C", "O"], references=[0.0] * 3)
    student = make_potential(replace(header, architecture=PAINN | architecture)).double()
    batch = training_batch(make_batch(make_structures(3), student, CPU), student)
    step = TrainingStep(student, copy.deepcopy(student), replace(CONFIG, loss=LossConfig(**loss)))
    with caplog.at_level(logging.WARNING):
        gradient_of(step, batch)
    assert reason in caplog.text
    assert step.shortfall == "not fused; "


@pytest.mark.slow
def test_compiled_fused_step_makes_the_weights_of_plain_steps(make_case):
    student, batch, config = make_case(n=4, loss=LossConfig())
    weights = []
    for fused in (False, True):
        mine = copy.deepcopy(student)
        step = TrainingStep(mine, copy.deepcopy(mine), replace(config, fused="on" * fused or "off"))
        step.set_controls(1e-3, 0.25, (0, 0), [1.0] * len(TERMS))
        if fused:
            assert step.compile(batch, count_totals(batch, 0.3))
            assert step.loss_gradient.is_fused
        for _ in range(3):
            step.run(batch, count_totals(batch, 0.3))
        weights.append([p.detach() for p in mine.network.parameters()])
    for a, b in zip(*weights, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-7)


def test_run_with_fused_messages_makes_the_student_of_a_plain_run(morse_config):
    errors = []
    for fused in ("off", "on"):
        trainer = Trainer(morse_config(fused=fused, output=str(morse_config().output) + fused))
        trainer.run()
        assert trainer.training_step.loss_gradient.is_fused == (fused == "on")
        assert trainer.shortfall == ""
        errors.append(trainer.progress.best)
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)


def test_fused_is_a_word_or_a_truth_value(tmp_path):
    path = tmp_path / "run.yaml"
    for text, word in [("on", "on"), ("false", "off"), ("auto", "auto")]:
        path.write_text(f"data: {{files: [a.h5]}}\nfused: {text}\n")
        assert load_config(path).fused == word
    assert not wants_fused(load_config(path), CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("compiler", ["on", "off"])
def test_fused_steps_on_a_gpu_are_recorded_as_a_graph(morse_config, compiler):
    trainer = Trainer(morse_config(fused="on", compile=compiler, device="cuda"))
    trainer.run()
    assert trainer.shortfall == ""
    assert trainer.training_step.loss_gradient.is_fused
    assert trainer._resident.step.is_graph
