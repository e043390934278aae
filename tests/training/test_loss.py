from dataclasses import replace

import numpy as np
import pytest
import torch

from openmm_mlffd.training.batches import make_batch
from openmm_mlffd.training.config import LossConfig
from openmm_mlffd.training.loss import NetworkPrediction, huber, loss_terms
from openmm_mlffd.training.targets import training_batch

CONFIG = LossConfig(energy=5.0, forces=2.0, stress=0.5, angle=0.1)
TERMS = ("energy", "forces", "stress", "angle")


@pytest.fixture
def batch(make_structures, make_student):
    structures = make_structures(12)
    student = make_student(elements=["H", "C", "O"], references=[0.0] * 3)
    return training_batch(make_batch(structures, student, torch.device("cpu")), student)


def labels(batch):
    return NetworkPrediction(
        batch.energy,
        batch.forces,
        batch.virial.nan_to_num(),
        batch.charges.nan_to_num(),
        batch.curvature.nan_to_num(),
    )


def wrong(batch, seed=0):
    """A prediction with errors on both sides of where the Huber losses change."""
    generator = torch.Generator().manual_seed(seed)

    def noise(like):
        return torch.randn(like.shape, generator=generator, dtype=torch.float64)

    exact = labels(batch)
    return NetworkPrediction(
        exact.energy + 0.02 * batch.n_atoms * noise(exact.energy),
        exact.forces + 0.1 * noise(exact.forces),
        exact.virial + 0.02 * batch.n_atoms[:, None, None] * noise(exact.virial),
        exact.charges + 0.03 * noise(exact.charges),
        exact.curvature,
    )


def huber_by_hand(error, delta):
    return error**2 / (2 * delta) if error < delta else error - delta / 2


def test_huber_is_quadratic_then_linear_with_a_continuous_slope():
    error = torch.linspace(0, 0.3, 31, dtype=torch.float64, requires_grad=True)
    found = huber(error, 0.1)
    expected = [huber_by_hand(e, 0.1) for e in error.tolist()]
    np.testing.assert_allclose(found.detach(), expected, atol=1e-15)
    slope = torch.autograd.grad(found.sum(), error)[0]
    np.testing.assert_allclose(slope, (error.detach() / 0.1).clamp(max=1), atol=1e-12)


def test_loss_of_the_labels_is_zero(batch):
    for name, term in loss_terms(labels(batch), batch, CONFIG).items():
        assert abs(term) < 1e-6, name


def test_terms_are_means_over_structures_or_atoms(batch):
    found, prediction = loss_terms(wrong(batch), batch, CONFIG), wrong(batch)
    n = batch.n_atoms.numpy()
    energy_error = np.abs((prediction.energy - batch.energy).numpy()) / n
    energy = 5.0 * np.mean([huber_by_hand(e, CONFIG.energy_delta) for e in energy_error])
    force_error = np.linalg.norm((prediction.forces - batch.forces).numpy(), axis=1)
    forces = 2.0 * np.mean([huber_by_hand(e, CONFIG.forces_delta) for e in force_error])
    stress = 0.5 * np.mean(
        [
            huber_by_hand(
                np.linalg.norm((prediction.virial[s] - batch.virial[s]).numpy()) / n[s],
                CONFIG.stress_delta,
            )
            for s in range(len(n))
            if batch.virial[s].isfinite().all()
        ]
    )
    angle = 0.1 * np.mean(
        [
            1 - p @ f / (np.linalg.norm(p) * np.linalg.norm(f))
            for p, f in zip(prediction.forces.numpy(), batch.forces.numpy(), strict=True)
            if np.linalg.norm(f) > CONFIG.angle_threshold
        ]
    )
    expected = {"energy": energy, "forces": forces, "stress": stress, "angle": angle}
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value, rel=1e-5), name
        assert value > 1e-4


def test_errors_of_large_forces_count_in_proportion(batch):
    limit = 1.5  # eV/Å, of many forces here
    config = replace(CONFIG, large_force=limit)
    found, prediction = loss_terms(wrong(batch), batch, config), wrong(batch)
    size = np.linalg.norm(batch.forces.numpy(), axis=1)
    assert 0.1 < (size > limit).mean() < 0.9
    error = np.linalg.norm((prediction.forces - batch.forces).numpy(), axis=1)
    error = error * limit / np.maximum(size, limit)
    forces = 2.0 * np.mean([huber_by_hand(e, config.forces_delta) for e in error])
    np.testing.assert_allclose(found["forces"], forces, rtol=1e-6)
    system, n = batch.system.numpy(), batch.n_atoms.numpy()
    factor = np.array([limit / max(limit, size[system == s].max()) for s in range(len(n))])
    assert (factor < 1.0).mean() > 0.0
    error = factor * np.abs((prediction.energy - batch.energy).numpy()) / n
    energy = 5.0 * np.mean([huber_by_hand(e, config.energy_delta) for e in error])
    np.testing.assert_allclose(found["energy"], energy, rtol=1e-6)
    plain = loss_terms(wrong(batch), batch, CONFIG)
    assert found["stress"] < plain["stress"]
    torch.testing.assert_close(found["angle"], plain["angle"])
    nowhere = loss_terms(wrong(batch), batch, replace(CONFIG, large_force=1e6))
    for name, term in plain.items():
        torch.testing.assert_close(nowhere[name], term, msg=name)


@pytest.mark.parametrize("name", TERMS)
def test_each_weight_scales_its_term_and_zero_leaves_it_out(batch, name):
    prediction = wrong(batch)
    before = loss_terms(prediction, batch, CONFIG)
    doubled = loss_terms(prediction, batch, replace(CONFIG, **{name: 2 * getattr(CONFIG, name)}))
    for other in TERMS:
        assert doubled[other].item() == pytest.approx(before[other].item() * (1 + (other == name)))
    without = loss_terms(prediction, batch, replace(CONFIG, **{name: 0.0}))
    assert set(without) == set(TERMS) - {name}


def test_structures_without_a_stress_label_do_not_count(batch):
    prediction = wrong(batch)
    unknown = ~batch.virial.isfinite().all(2).all(1)
    assert 0 < unknown.sum() < len(unknown)
    before = loss_terms(prediction, batch, CONFIG)["stress"]
    virial = prediction.virial.clone().requires_grad_()
    shifted = prediction._replace(virial=virial + 100.0 * unknown[:, None, None])
    after = loss_terms(shifted, batch, CONFIG)["stress"]
    assert after.item() == pytest.approx(before.item(), rel=1e-12)
    slope = torch.autograd.grad(after, virial)[0]
    assert slope.isfinite().all()
    assert slope[unknown].eq(0).all()
    assert slope[~unknown].ne(0).any()


def test_without_any_stress_label_the_term_is_zero(batch):
    blank = batch._replace(virial=torch.full_like(batch.virial, torch.nan))
    assert loss_terms(wrong(batch), blank, CONFIG)["stress"] == 0


def test_gradient_at_the_labels_is_finite(batch):
    forces = batch.forces.clone().requires_grad_()
    virial = batch.virial.nan_to_num().requires_grad_()
    exact = labels(batch)._replace(forces=forces, virial=virial)
    total = sum(t.double() for t in loss_terms(exact, batch, CONFIG).values())
    for slope in torch.autograd.grad(total, [forces, virial]):
        assert slope.abs().max() < 1e-3


def test_direction_of_short_forces_does_not_matter(batch):
    short = batch._replace(forces=batch.forces * 1e-3)
    backwards = labels(short)._replace(forces=-short.forces)
    assert loss_terms(backwards, short, CONFIG)["angle"] == 0
    turned = labels(batch)._replace(forces=-batch.forces)
    assert loss_terms(turned, batch, CONFIG)["angle"].item() == pytest.approx(0.2)
