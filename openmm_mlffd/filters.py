"""The radial filters of a student as tables."""

import torch
from torch import Tensor
from torch.func import jacfwd

from openmm_mlffd.kernels import splines
from openmm_mlffd.radial import RadialBasis


def tabulate(basis: RadialBasis, *, shortest: float, n_intervals: int, degree: int) -> Tensor:
    """Spline coefficients of the radial functions; times a filter's weights, those of the filter.

    Between `shortest` and the cutoff; at both ends derivatives are exact up to the order that the
    degree allows, so that value and slope vanish at the cutoff.

    Parameters
    ----------
    basis
        The radial functions.
    shortest
        Distance [Å] of the first knot.
    n_intervals, degree
        Of the spline, see `splines`.

    Returns
    -------
    Tensor
        Coefficients, shape ``(n_intervals + degree, n_basis)``, float64, on the CPU.
    """
    step = (basis.cutoff - shortest) / n_intervals
    knots = torch.linspace(shortest, basis.cutoff, n_intervals + 1, dtype=torch.float64)
    first, last = (_derivatives(basis, knots[k], degree // 2, step) for k in (0, n_intervals))
    return splines.interpolate(basis(knots), first, last, degree)


def _derivatives(basis: RadialBasis, distance: Tensor, n: int, step: float) -> Tensor:
    """Derivatives of order 1 to n of the basis, by so many Å, shape (n, n_basis)."""

    def function(x: Tensor) -> Tensor:
        return basis(distance + step * x[None])[0]

    found = []
    for _ in range(n):
        function = jacfwd(function)
        found.append(function(torch.zeros((), dtype=torch.float64)))
    return torch.stack(found)
