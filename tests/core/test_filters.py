import pytest
import torch

from openmm_mlffd.fast import _TABLES
from openmm_mlffd.filters import tabulate
from openmm_mlffd.kernels import splines
from openmm_mlffd.modelfile import load_student
from openmm_mlffd.radial import RadialBasis

SHORTEST = 0.5
# largest error of a filter, and of its slope [1/Å], by the spline; filters are of the order of 1
ERRORS = {"single": (3e-6, 3e-4), "mixed": (3e-3, 5e-2), "double": (1e-12, 1e-9)}


def table_and_weight(precision):
    network = load_student(precision="double").network
    n_intervals, degree = _TABLES[precision]
    weight = network.interactions[1].filter.weight
    of_basis = tabulate(network.basis, shortest=SHORTEST, n_intervals=n_intervals, degree=degree)
    return of_basis @ weight.T, weight, network.basis


@pytest.mark.parametrize("precision", ["single", "mixed", "double"])
def test_table_is_as_exact_as_its_precision_needs(precision):
    table, weight, basis = table_and_weight(precision)
    n_intervals, degree = _TABLES[precision]
    distances = torch.linspace(SHORTEST, basis.cutoff, 4001, dtype=torch.float64)
    scale = n_intervals / (basis.cutoff - SHORTEST)

    def of_table(r):
        return splines.evaluate(table, (r - SHORTEST) * scale, degree)

    def exactly(r):
        return basis(r) @ weight.T

    ones = torch.ones_like(distances)
    found, slope = torch.func.jvp(of_table, (distances,), (ones,))
    expected, expected_slope = torch.func.jvp(exactly, (distances,), (ones,))
    assert expected.abs().max() > 0.5
    value_error, slope_error = ERRORS[precision]
    assert (found - expected).abs().max() < value_error
    assert (slope - expected_slope).abs().max() < slope_error


@pytest.mark.parametrize(("n_intervals", "degree"), [(20, 3), (24, 5), (40, 7)])
def test_value_and_slope_vanish_at_the_cutoff(n_intervals, degree):
    basis = RadialBasis(8, 4.0)
    table = tabulate(basis, shortest=SHORTEST, n_intervals=n_intervals, degree=degree)
    end = torch.full((1,), float(n_intervals), dtype=torch.float64)
    value, slope = torch.func.jvp(
        lambda t: splines.evaluate(table, t, degree), (end,), (torch.ones_like(end),)
    )
    assert value.abs().max() < 1e-12
    assert slope.abs().max() < 1e-12
    near = splines.evaluate(table, end - 1.0, degree)
    assert near.abs().max() > 1e-7
