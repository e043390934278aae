import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline

from openmm_mlffd.kernels import splines


def waves(x, order):
    """Two functions of x and their derivatives."""
    n = torch.tensor([3.0, 7.0], dtype=torch.float64)
    phase = x[:, None] * n + order * torch.pi / 2
    return n**order * torch.sin(phase)


def table_of_waves(n_intervals, degree):
    h = 2.0 / n_intervals
    x = torch.linspace(0, 2, n_intervals + 1, dtype=torch.float64)
    orders = range(1, degree // 2 + 1)
    first = torch.cat([waves(x[:1], k) * h**k for k in orders])
    last = torch.cat([waves(x[-1:], k) * h**k for k in orders])
    return splines.interpolate(waves(x, 0), first, last, degree)


@pytest.mark.parametrize("degree", [3, 5, 7])
def test_basis_splines_are_those_of_scipy(degree):
    a = np.linspace(0, 1, 7)
    knots = np.arange(2 * degree + 2) - degree
    by_scipy = [BSpline(knots, np.eye(degree + 1)[q], degree)(a) for q in range(degree + 1)]
    ours = splines.basis_splines(torch.tensor(a), degree)
    np.testing.assert_allclose(ours.numpy(), np.array(by_scipy).T, atol=1e-14)


@pytest.mark.parametrize("degree", [3, 5, 7])
def test_error_falls_with_the_power_of_the_interval(degree):
    t = torch.linspace(0, 1, 3001, dtype=torch.float64)
    errors = []
    for n in (32, 64):
        found = splines.evaluate(table_of_waves(n, degree), t * n, degree)
        errors.append(float((found - waves(2 * t, 0)).abs().max()))
    assert errors[1] < 1e-4
    assert errors[0] / errors[1] > 0.8 * 2 ** (degree + 1)


@pytest.mark.parametrize("degree", [3, 5, 7])
def test_values_and_slopes_at_knots_and_ends_are_exact(degree):
    n = 40
    table = table_of_waves(n, degree)
    t = torch.arange(n + 1, dtype=torch.float64)
    assert (splines.evaluate(table, t, degree) - waves(t * 2 / n, 0)).abs().max() < 1e-12
    ends = torch.tensor([0.0, float(n)], dtype=torch.float64, requires_grad=True)
    for column in range(2):
        value = splines.evaluate(table, ends, degree)[:, column].sum()
        (slope,) = torch.autograd.grad(value, ends)
        assert (slope - waves(ends * 2 / n, 1)[:, column] * 2 / n).abs().max() < 1e-11
