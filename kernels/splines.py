"""Tables of functions: interpolating splines with equidistant knots, in plain torch.

In interval k, at a ∈ [0, 1] of it, the spline is Σ_q w_q(a) c[k + q], q = 0 … degree, with the
basis splines w_q. A spline of degree p has p - 1 continuous derivatives, and its slope is the
derivative of what is interpolated: what is derived from it is conservative.
"""

from functools import cache

import torch
from torch import Tensor


@cache
def _basis_polynomials(degree: int) -> Tensor:
    """Coefficients of w_q by powers of a, shape (degree + 1, degree + 1), float64."""
    basis = torch.zeros((degree + 1, degree + 1), dtype=torch.float64)
    basis[0, 0] = 1.0
    for d in range(1, degree + 1):
        new = torch.zeros_like(basis)
        for r in range(d):
            share = basis[r] / d
            times_a = share.roll(1)  # the highest power is still zero
            new[r] += (r + 1) * share - times_a
            new[r + 1] += times_a + (d - 1 - r) * share
        basis = new
    return basis


def basis_splines(a: Tensor, degree: int) -> Tensor:
    """w_q(a), shape ``(..., degree + 1)``, differentiable to any order."""
    powers = torch.stack([a**k for k in range(degree + 1)], dim=-1)
    return powers @ _basis_polynomials(degree).to(powers).T


def evaluate(table: Tensor, t: Tensor, degree: int) -> Tensor:
    """Values of the spline, differentiable to any order in ``table`` and ``t``.

    Parameters
    ----------
    table
        Coefficients, shape ``(n_intervals + degree, n_functions)``.
    t
        Where, in intervals from the first knot, shape ``(n,)``, between 0 and n_intervals.
    degree
        Odd.

    Returns
    -------
    Tensor
        Values, shape ``(n, n_functions)``.
    """
    knot = t.detach().to(torch.int64).clamp(0, table.shape[0] - degree - 1)
    weights = basis_splines(t - knot.to(t.dtype), degree)  # (n, degree + 1)
    window = knot[:, None] + torch.arange(degree + 1, device=t.device)
    return (weights.to(table.dtype)[:, :, None] * table[window]).sum(1)


def interpolate(values: Tensor, first: Tensor, last: Tensor, degree: int) -> Tensor:
    """Coefficients of the spline through values at its knots.

    Parameters
    ----------
    values
        At the knots, shape ``(n_intervals + 1, n_functions)``, float64.
    first, last
        Derivatives of order 1 to (degree - 1) / 2 at the first and at the last knot, by units of
        an interval, shape ``((degree - 1) / 2, n_functions)``.
    degree
        Odd.

    Returns
    -------
    Tensor
        Coefficients, shape ``(n_intervals + degree, n_functions)``, float64.
    """
    n_intervals, n = values.shape[0] - 1, values.shape[0] - 1 + degree
    matrix = torch.zeros((n, n), dtype=torch.float64)
    basis = _basis_polynomials(degree)
    at_start, at_end = [basis[:, 0]], [basis.sum(1)]
    factor = torch.arange(degree + 1, dtype=torch.float64)
    for _ in range(degree // 2):
        basis = (basis * factor)[:, 1:]  # the derivative
        factor = factor[:-1]
        at_start.append(basis[:, 0])
        at_end.append(basis.sum(1))
    for k in range(n_intervals):
        matrix[k, k : k + degree + 1] = at_start[0]
    matrix[n_intervals, n_intervals - 1 :] = at_end[0]
    for order in range(1, degree // 2 + 1):
        matrix[n_intervals + order, : degree + 1] = at_start[order]
        matrix[n_intervals + degree // 2 + order, -degree - 1 :] = at_end[order]
    wanted = torch.cat([values, first, last]).to("cpu", torch.float64)
    return torch.linalg.solve(matrix, wanted).to(values.device)
