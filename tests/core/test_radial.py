import numpy as np
import pytest
import torch

from openmm_mlffd.radial import (
    SOFTENING,
    RadialBasis,
    compress_core,
    distances_and_directions,
    smooth_cutoff,
    softened_distances,
)

CUTOFF = 4.5


def envelope_by_hand(x, p=6):
    """Equation 8 of arXiv 2003.03123."""
    a, b, c = (p + 1) * (p + 2) / 2, p * (p + 2), p * (p + 1) / 2
    return np.where(x < 1, 1 - a * x**p + b * x ** (p + 1) - c * x ** (p + 2), 0.0)


def derivatives(function, x, order):
    """Value and derivatives of a function of one number."""
    x = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    found = [function(x)]
    for _ in range(order):
        found.append(torch.autograd.grad(found[-1], x, create_graph=True)[0])
    return [f.item() for f in found]


def test_smooth_cutoff_is_the_envelope_of_the_paper():
    x = np.linspace(0, 1.5, 301)
    found = smooth_cutoff(torch.tensor(x)).numpy()
    np.testing.assert_allclose(found, envelope_by_hand(x), atol=1e-12)


def test_smooth_cutoff_falls_from_one_to_zero():
    values = smooth_cutoff(torch.linspace(0, 1, 200, dtype=torch.float64))
    assert values[0] == 1
    assert (values.diff() <= 0).all()
    assert abs(values[-1]) < 1e-12


def test_smooth_cutoff_and_two_derivatives_vanish_at_the_cutoff():
    value, first, second, third = derivatives(smooth_cutoff, 1 - 1e-9, 3)
    assert abs(value) < 1e-12
    assert abs(first) < 1e-9
    assert abs(second) < 1e-5
    assert third == pytest.approx(-336.0, rel=1e-4)


def test_beyond_the_cutoff_there_is_nothing():
    assert derivatives(smooth_cutoff, 1.0 + 1e-6, 2) == pytest.approx([0, 0, 0], abs=1e-12)
    basis = RadialBasis(6, CUTOFF)(torch.tensor([CUTOFF, CUTOFF + 0.1, 50.0]))
    assert basis.abs().max() < 1e-6


def test_basis_is_sine_waves_over_the_distance():
    r = np.linspace(0.05, CUTOFF + 0.5, 97)
    found = RadialBasis(5, CUTOFF)(torch.tensor(r)).numpy()
    for n in range(1, 6):
        wave = np.sqrt(2 / CUTOFF) * np.sin(n * np.pi * r / CUTOFF) / r
        np.testing.assert_allclose(found[:, n - 1], wave * envelope_by_hand(r / CUTOFF), atol=1e-12)
    assert np.abs(found).max(0).min() > 0.4


def test_waves_without_the_cutoff_are_orthonormal():
    r = np.linspace(1e-6, CUTOFF, 20001)
    basis = (
        RadialBasis(4, CUTOFF)(torch.tensor(r)).numpy()
        / np.maximum(envelope_by_hand(r / CUTOFF), 1e-300)[:, None]
    )
    inside = r < 0.999 * CUTOFF
    overlap = np.trapezoid(
        (basis[:, :, None] * basis[:, None, :] * (r**2)[:, None, None])[inside],
        r[inside],
        axis=0,
    )
    np.testing.assert_allclose(overlap, np.eye(4), atol=2e-3)


@pytest.mark.parametrize("n", range(5))
def test_basis_and_two_derivatives_vanish_at_the_cutoff(n):
    basis = RadialBasis(5, CUTOFF)
    value, first, second = derivatives(lambda r: basis(r[None])[0, n], CUTOFF - 1e-6, 2)
    assert abs(value) < 1e-12
    assert abs(first) < 1e-9
    assert abs(second) < 1e-3
    assert abs(derivatives(lambda r: basis(r[None])[0, n], CUTOFF - 0.5, 1)[1]) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coincident_atoms_have_finite_values_and_derivatives(dtype):
    vectors = torch.zeros(1, 3, dtype=dtype, requires_grad=True)
    distances, directions = distances_and_directions(vectors)
    assert distances.item() == pytest.approx(SOFTENING)
    assert directions.eq(0).all()
    total = RadialBasis(4, CUTOFF)(distances).sum() + directions.sum()
    assert torch.autograd.grad(total, vectors)[0].isfinite().all()


def test_softening_does_not_matter_at_the_length_of_a_bond():
    vectors = torch.tensor([[1.0, 0, 0], [0.6, 0, 0.8], [0, 3.0, 0]], dtype=torch.float64)
    distances, directions = distances_and_directions(vectors)
    np.testing.assert_allclose(distances.numpy(), [1, 1, 3], atol=6e-5)
    np.testing.assert_allclose(directions.norm(dim=1).numpy(), 1, atol=6e-5)
    assert torch.equal(distances, softened_distances(vectors))
    assert (directions * vectors).sum(1).gt(0).all()


def test_core_is_compressed_smoothly_and_nothing_else_is_touched():
    core = torch.tensor(1.2, dtype=torch.float64)
    r = torch.linspace(0.0, 2.0, 4001, dtype=torch.float64, requires_grad=True)
    d = compress_core(r, core)
    (slope,) = torch.autograd.grad(d.sum(), r, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), r)
    assert torch.equal(d[r >= core], r[r >= core])
    assert torch.allclose(d[0], 5 / 7 * core)
    assert (slope >= 0).all()
    assert d.detach().diff().abs().max() < 6e-4
    assert slope.detach().diff().abs().max() < 5e-3
    assert curvature.diff().abs().max() < 0.06
