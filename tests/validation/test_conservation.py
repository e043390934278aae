import numpy as np
import pytest

from openmm_mlffd.units import BOLTZMANN
from openmm_mlffd.validation.conservation import (
    Check,
    conservation,
    halving_ratio,
    slope_with_error,
)
from openmm_mlffd.validation.nve import NVEResult


def correlated_noise(rng, n, memory):
    """Noise of unit variance whose correlation falls to 1/e in so many samples."""
    keep = np.exp(-1 / memory)
    noise = rng.normal(size=n) * np.sqrt(1 - keep**2)
    noise[0] = rng.normal()
    for i in range(1, n):
        noise[i] += keep * noise[i - 1]
    return noise


def test_a_planted_slope_is_found_with_an_error_that_covers_it():
    rng = np.random.default_rng(0)
    x = np.linspace(0, 10, 2000)
    slopes, errors = np.array(
        [slope_with_error(x, 0.3 * x + correlated_noise(rng, len(x), 10)) for _ in range(60)]
    ).T
    assert slopes.mean() == pytest.approx(0.3, abs=3 * slopes.std() / np.sqrt(60))
    # not the error of independent samples, which is 4.5 times too small
    assert 0.8 * slopes.std() < np.median(errors) < 2 * slopes.std()
    assert np.mean(abs(slopes - 0.3) < 3 * errors) > 0.95


@pytest.mark.parametrize("noise", [0.0, 20.0])
def test_the_error_of_a_slope_covers_energies_that_wander(noise):
    rng = np.random.default_rng(1)
    x = np.linspace(0, 10, 2000)
    slopes, errors = np.array(
        [
            slope_with_error(x, rng.normal(size=len(x)).cumsum() + noise * rng.normal(size=len(x)))
            for _ in range(80)
        ]
    ).T
    # scatter about the line gives a third of it
    assert 0.8 * slopes.std() < np.sqrt(np.mean(errors**2)) < 1.3 * slopes.std()
    assert np.mean(abs(slopes) < 2 * errors) > 0.8


def test_a_line_has_its_slope_and_no_error():
    x = np.linspace(0, 1, 100)
    slope, error = slope_with_error(x, 2 - 3 * x)
    assert slope == pytest.approx(-3)
    assert error < 1e-12


def test_a_slope_needs_two_samples_per_block():
    with pytest.raises(ValueError, match="at least 40 samples"):
        slope_with_error(np.arange(39.0), np.zeros(39))


def test_units_of_the_slope(make_trace):
    time = np.linspace(0, 2, 201)
    result = conservation(make_trace(time, 0.010 * time))  # 1 meV/atom/ps
    assert result.slope == pytest.approx(1000)
    assert result.slope_kt == pytest.approx(1 / (3 * BOLTZMANN * 300))
    assert result.slope_kt == pytest.approx(12.9, abs=0.05)
    assert result.duration == pytest.approx(2)
    assert result.drift_over_kinetic_std == pytest.approx(0.02, rel=0.01)
    assert result.rms == pytest.approx(2 / np.sqrt(12), rel=0.01)


@pytest.mark.parametrize(
    ("picoseconds", "slope_kt", "wander", "passed"),
    [(60, 0.05, 0.0, False), (60, 0.005, 0.0, True), (60, 0.05, 0.1, True), (40, 0.05, 0.0, True)],
)
def test_a_slope_is_judged_by_its_size_and_its_error_in_long_runs(
    make_trace, picoseconds, slope_kt, wander, passed
):
    rng = np.random.default_rng(0)
    time = np.linspace(0, picoseconds, 2001)
    kt_per_ps = 30 * BOLTZMANN * 300 * 1e-3  # of 1 kT/ns/dof, 30 degrees of freedom [eV/ps]
    walk = wander * rng.normal(scale=1e-3, size=len(time)).cumsum()
    trace = make_trace(time, slope_kt * kt_per_ps * time + walk)
    result = NVEResult(traces=[trace], runs=[conservation(trace)], halving_ratios=[])
    judged = [check for check in result.checks if "slope" in check.name]
    assert len(judged) == (picoseconds >= 50)
    of_short_runs = [check for check in result.checks if "std(kinetic energy)" in check.name]
    assert len(of_short_runs) == (picoseconds < 50)
    assert all(check.passed for check in judged) == passed


def test_drift_is_that_of_the_shadow_energy_where_it_is_known(make_trace):
    time = np.linspace(0, 2, 201)
    shadow = 0.005 * time
    shadow[:3] = np.nan
    result = conservation(make_trace(time, 0.010 * time, shadow=shadow))
    assert result.slope == pytest.approx(500)
    assert result.total_slope == pytest.approx(1000)


@pytest.mark.parametrize(("order", "ratio"), [(0, 1), (1, 2), (2, 4)])
def test_the_halving_ratio_is_two_to_the_order(make_trace, order, ratio):
    time = np.linspace(0, 1, 1001)
    ripple = np.sin(300 * time)
    fine = make_trace(time, 0.5**order * ripple, timestep=0.5)
    for timestep in (1.0, 2.0):
        coarse = make_trace(time, timestep**order * ripple, timestep=timestep)
        assert halving_ratio(fine, coarse) == pytest.approx(ratio)


def test_the_halving_ratio_looks_at_the_start_only(make_trace):
    time = np.linspace(0, 1, 1001)
    ripple = np.sin(300 * time)
    late = np.where(time > 0.5, 10.0, 1.0)
    fine = make_trace(time, 0.25 * ripple, timestep=0.5)
    assert halving_ratio(fine, make_trace(time, late * ripple, timestep=1.0)) == pytest.approx(4)


def test_the_halving_ratio_needs_samples(make_trace):
    time = np.linspace(0, 1, 21)
    trace = make_trace(time, time)
    with pytest.raises(ValueError, match="at least 10 samples"):
        halving_ratio(trace, trace)


@pytest.mark.parametrize(
    ("value", "passed"), [(3.0, True), (5.0, True), (2.9, False), (5.1, False), (np.nan, False)]
)
def test_a_check_passes_in_its_range(value, passed):
    assert Check(name="ratio", value=value, unit="", low=3.0, high=5.0).passed is passed
