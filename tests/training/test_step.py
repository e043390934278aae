import copy
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from openmm_mlffd.modelfile import make_potential
from openmm_mlffd.training.batches import make_batch
from openmm_mlffd.training.config import LossConfig, OptimizerConfig, TrainConfig
from openmm_mlffd.training.flat import FlatWeights
from openmm_mlffd.training.loss import TERMS, loss_terms
from openmm_mlffd.training.resident_step import check_replay
from openmm_mlffd.training.step import TrainingStep, _deviation, predict
from openmm_mlffd.training.targets import count_totals, training_batch

CPU = torch.device("cpu")
CONFIG = TrainConfig(
    data=None,
    loss=LossConfig(energy=2.0, forces=1.0, stress=0.2, angle=0.1),
    optimizer=OptimizerConfig(clip=0.5, weight_decay=0.01),
)


@pytest.fixture
def student(make_student):
    return make_student(elements=["H", "C", "O"], references=[0.0] * 3).train()


@pytest.fixture
def batch(make_structures, student):
    return training_batch(make_batch(make_structures(12), student, CPU), student)


def run(step, batch, n=3, rate=1e-3, newest=0.25):
    for i in range(n):
        step.set_controls(rate, newest, (0, i), [1.0] * len(TERMS))
        step.run(batch, count_totals(batch, CONFIG.loss.angle_threshold))


def test_flat_weights_are_the_modules_own(student):
    before = [p.clone() for p in student.network.parameters()]
    flat = FlatWeights(student.network, extra=2)
    assert all(torch.equal(a, b) for a, b in zip(before, student.network.parameters(), strict=True))
    with torch.no_grad():
        flat.weights.mul_(2.0)
    for a, b in zip(before, student.network.parameters(), strict=True):
        assert torch.equal(2 * a, b)
        assert b.data_ptr() % 128 == flat.weights.data_ptr() % 128
    assert flat.summed.numel() == flat.gradient.numel() + 2


def test_step_is_clipped_adamw_of_the_loss(student, batch):
    reference, average = copy.deepcopy(student), copy.deepcopy(student)
    step = TrainingStep(student, average, CONFIG)
    run(step, batch)
    parameters = list(reference.network.parameters())
    slow = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
    for _ in range(3):
        found = predict(reference.network, batch, reference.energy_scale)
        terms = loss_terms(found, batch, CONFIG.loss)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        for a, p in zip(slow, parameters, strict=True):
            a.lerp_(p.detach(), 0.25)
    for a, b in zip(student.network.parameters(), parameters, strict=True):
        np.testing.assert_allclose(a.detach(), b.detach(), atol=1e-10)
    for a, b in zip(average.network.parameters(), slow, strict=True):
        np.testing.assert_allclose(a.detach(), b, atol=1e-10)
    assert step.losses[TERMS.index("forces")] == pytest.approx(terms["forces"].item())


def test_factors_scale_the_terms(student, batch):
    step = TrainingStep(student, copy.deepcopy(student), CONFIG)
    totals = count_totals(batch, 0.3)
    found = []
    for factor in (1.0, 3.0):
        step.set_controls(0.0, 0.0, (0, 0), [factor, *[1.0] * (len(TERMS) - 1)])
        step.differentiate(batch, totals)
        found.append(step.losses.clone())
    assert found[1][0] == pytest.approx(3 * found[0][0].item())
    assert torch.equal(found[0][1:], found[1][1:])


@pytest.mark.parametrize("hessian", [0.0, 0.5])
def test_traced_gradient_is_that_of_autograd(student, batch, hessian):
    """All derivatives written out, which is what is compiled."""
    config = TrainConfig(
        data=None, loss=LossConfig(stress=0.2, hessian=hessian, clash=10 * hessian, large_force=2.0)
    )
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(batch.forces.shape, generator=generator, dtype=torch.float64)
    batch = batch._replace(probe=noise, curvature=noise)
    step = TrainingStep(student, copy.deepcopy(student), config)
    totals, factors = count_totals(batch, 0.3).double(), torch.ones(len(TERMS), dtype=torch.float64)
    weights = step.weights
    terms, gradient = step.loss_gradient(weights, list(batch), totals, factors)
    traced = step.loss_gradient.traced(weights, list(batch), totals, factors)
    with torch.no_grad():
        same, written_out = traced([w.detach() for w in weights], list(batch), totals, factors)
    assert (terms[TERMS.index("hessian")] > 0) == bool(hessian)
    np.testing.assert_allclose(same, terms, rtol=1e-12)
    for a, b in zip(gradient, written_out, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)
    # and it is a function of its inputs, not a recording of numbers
    moved = batch._replace(vectors=batch.vectors * 1.01, energy=batch.energy + 0.3)
    terms, gradient = step.loss_gradient(weights, list(moved), totals, factors)
    with torch.no_grad():
        same, written_out = traced([w.detach() for w in weights], list(moved), totals, factors)
    np.testing.assert_allclose(same, terms, rtol=1e-10)
    for a, b in zip(gradient, written_out, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-10)


def test_traced_gradient_of_a_student_with_charges_and_tail(make_header, make_structures):
    architecture = {
        "kind": "painn-variant",
        "n_channels": 8,
        "n_interactions": 2,
        "n_basis": 6,
        "filters": "spline",
        "pair_filters": True,
        "charges": True,
        "tail": True,
        "message_cutoff": 3.0,
    }
    header = make_header(elements=["H", "C", "O"], references=[0.0] * 3, cutoff=5.0)
    student = make_potential(replace(header, architecture=architecture)).double().train()
    batch = training_batch(make_batch(make_structures(8), student, CPU), student)
    config = TrainConfig(data=None, loss=LossConfig(charges=1.0))
    step = TrainingStep(student, copy.deepcopy(student), config)
    arguments = (list(batch), count_totals(batch, 0.3).double(), torch.ones(len(TERMS)).double())
    terms, gradient = step.loss_gradient(step.weights, *arguments)
    traced = step.loss_gradient.traced(step.weights, *arguments)
    with torch.no_grad():
        same, written_out = traced([w.detach() for w in step.weights], *arguments)
    np.testing.assert_allclose(same, terms, rtol=1e-12)
    assert terms[TERMS.index("charges")] > 0
    for a, b in zip(gradient, written_out, strict=True):
        assert a.abs().max() > 0
        np.testing.assert_allclose(a, b, atol=1e-12)


@pytest.mark.slow
def test_compiled_steps_make_the_weights_of_plain_steps(student, batch):
    weights = []
    for compiled in (False, True):
        mine = copy.deepcopy(student)
        step = TrainingStep(mine, copy.deepcopy(mine), CONFIG)
        if compiled:
            step.set_controls(0.0, 0.0, (0, 0), [1.0] * len(TERMS))
            assert step.compile(batch, count_totals(batch, 0.3))
        run(step, batch)
        weights.append([p.detach() for p in mine.network.parameters()])
    for a, b in zip(*weights, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-8)


def test_step_that_cannot_be_compiled_runs_uncompiled(student, batch, caplog, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no compiler found\nsecond line")

    monkeypatch.setattr(torch, "compile", broken)
    step = TrainingStep(student, copy.deepcopy(student), CONFIG)
    with caplog.at_level(logging.WARNING):
        assert not step.compile(batch, count_totals(batch, 0.3))
    assert "not compiled (RuntimeError: no compiler found)" in caplog.text
    before = [p.detach().clone() for p in student.network.parameters()]
    run(step, batch)
    assert not torch.equal(before[0], next(student.network.parameters()))


def test_bfloat16_gives_nearly_the_same_gradient(make_student, make_structures):
    student = make_student(elements=["H", "C", "O"], references=[0.0] * 3).train()
    student.network.float()
    batch = training_batch(make_batch(make_structures(30), student, CPU), student)
    found = []
    for mixed in (False, True):
        config = TrainConfig(data=None, mixed_precision=mixed)
        step = TrainingStep(student, copy.deepcopy(student), config)
        step.set_controls(0.0, 0.0, (0, 0), [1.0] * len(TERMS))
        step.differentiate(batch, count_totals(batch, 0.3))
        found.append(step._flat.gradient.clone())
    assert found[1].dtype == torch.float32
    error = (found[1] - found[0]).norm() / found[0].norm()
    assert 1e-5 < error < 0.05


def test_snapshot_puts_everything_back(student, batch):
    step = TrainingStep(student, copy.deepcopy(student), CONFIG)
    saved = step.snapshot()
    start = [p.detach().clone() for p in student.network.parameters()]
    run(step, batch)
    first = [p.detach().clone() for p in student.network.parameters()]
    step.restore(saved)
    for a, b in zip(start, student.network.parameters(), strict=True):
        assert torch.equal(a, b)
    run(step, batch)
    for a, b in zip(first, student.network.parameters(), strict=True):
        assert torch.equal(a, b)
    fresh = copy.deepcopy(student)
    with torch.no_grad():
        for p, value in zip(fresh.network.parameters(), start, strict=True):
            p.copy_(value)
    run(TrainingStep(fresh, copy.deepcopy(fresh), CONFIG), batch)
    for a, b in zip(first, fresh.network.parameters(), strict=True):
        assert torch.equal(a, b)


def test_compiled_gradient_that_is_wrong_is_not_used(student, batch, caplog, monkeypatch):
    def miscompiled(traced, **_):
        def wrong(*arguments):
            terms, gradients = traced(*arguments)
            return terms, [1.1 * g for g in gradients]

        return wrong

    monkeypatch.setattr(torch, "compile", miscompiled)
    step = TrainingStep(student, copy.deepcopy(student), CONFIG)
    step.set_controls(0.0, 0.0, (0, 0), [1.0] * len(TERMS))
    with caplog.at_level(logging.WARNING):
        assert not step.compile(batch, count_totals(batch, 0.3))
    assert "the compiled gradient differs by a part of 1.0e-01" in caplog.text


def test_replay_that_does_something_else_is_noticed(student, batch):
    step = TrainingStep(student, copy.deepcopy(student), CONFIG)
    step.set_controls(1e-3, 0.1, (0, 0), [1.0] * len(TERMS))
    totals = count_totals(batch, 0.3)
    before = [p.detach().clone() for p in student.network.parameters()]
    check_replay(lambda: step.run(batch, totals), lambda: step.run(batch, totals), step)
    with pytest.raises(RuntimeError, match="replayed, loss and gradient differ"):
        check_replay(lambda: step.run(batch, 2 * totals), lambda: step.run(batch, totals), step)
    after = student.network.parameters()
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.fixture
def tf32():
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, True
    yield matmul
    matmul.allow_tf32 = before


def test_replay_may_differ_by_twice_what_tf32_changes(student, batch, tf32):
    step = TrainingStep(student, copy.deepcopy(student), CONFIG)
    step.set_controls(1e-3, 0.1, (0, 0), [1.0] * len(TERMS))
    totals = count_totals(batch, 0.3)

    def work():  # as if TF32 made a difference of 5 %
        step.run(batch, (1.05 if tf32.allow_tf32 else 1.0) * totals)

    check_replay(lambda: step.run(batch, 0.97 * totals), work, step)
    assert tf32.allow_tf32
    with pytest.raises(RuntimeError, match="replayed, loss and gradient differ"):
        check_replay(lambda: step.run(batch, 1.3 * totals), work, step)


class ReducedProducts(TorchDispatchMode):
    """Matrix products whose factors are rounded to the 10 bits of TF32."""

    PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.PRODUCTS:
            first = len(args) - 2
            args = (*args[:first], *(self.rounded(a) for a in args[first:]))
        return func(*args, **(kwargs or {}))

    @staticmethod
    def rounded(x):
        bits = x.contiguous().view(torch.int32)
        return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("wrong", [False, True])
@pytest.mark.parametrize("way", ["fused", "compiled"])
def test_rounding_does_not_keep_a_trained_student_from_fast_steps(
    way, wrong, make_structures, make_student, monkeypatch, caplog
):
    """Near its labels, TF32 changes a gradient by more than the limit, and still is no error."""
    student = make_student(elements=["H", "C", "O"], references=[0.0] * 3).float().train()
    config = TrainConfig(
        data=None, loss=LossConfig(forces_delta=0.02), fused="on" if way == "fused" else "off"
    )
    step = TrainingStep(student, copy.deepcopy(student), config)
    batch = training_batch(make_batch(make_structures(12), student, CPU), student)
    exact = predict(student.network, batch, student.energy_scale)
    size = exact.forces.detach().norm(dim=1).mean()
    noise = torch.randn(batch.forces.shape, generator=torch.Generator().manual_seed(0))
    batch = batch._replace(
        forces=exact.forces.detach() + 0.002 * size * noise, energy=exact.energy.detach()
    )
    plain = step.loss_gradient

    class Fused:
        clashes = None
        is_fused = True

        def __call__(self, *arguments):
            with ReducedProducts():
                terms, gradients = plain(*arguments)
            # clashing atoms, of whose gradient rounding leaves nothing, must not count
            off = float(arguments[-1][TERMS.index("clash")]) + (0.05 if wrong else 0.0)
            return terms, [(1.0 + off) * g for g in gradients]

    totals, factors = count_totals(batch, 0.3), torch.ones(len(TERMS))
    arguments = (step.weights, list(batch), totals, factors)
    assert _deviation(Fused()(*arguments), plain(*arguments)) > 0.02
    monkeypatch.setattr("openmm_mlffd.training.step.fused_gradient", lambda *_: Fused())
    step.set_controls(0.0, 0.0, (0, 0), [1.0] * len(TERMS))
    if way == "compiled":  # what a compiler would make of the traced operations
        monkeypatch.setattr(torch, "compile", lambda *_, **__: Fused())
        monkeypatch.setattr("openmm_mlffd.training.step._of_values", lambda compiled: compiled)
        assert step.compile(batch, totals) != wrong
        return
    with caplog.at_level(logging.INFO):
        step.fuse(batch, totals)
    assert ("messages are not fused" in caplog.text) == wrong
    assert ("messages are fused" in caplog.text) != wrong
