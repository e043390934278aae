import numpy as np
import pytest

from openmm_mlffd.validation.suite.statistics import (
    block_error,
    bootstrap_ratio,
    distance_with_noise,
    jensen_shannon,
    quantile_bins,
    rank_correlation,
)


def counts(values):
    return np.histogram(values, np.linspace(-5, 5, 41))[0].astype(float)


def test_the_interval_of_a_mean_is_that_of_theory():
    rng = np.random.default_rng(0)
    values = rng.normal(3.0, 1.0, 400)
    value, low, high = bootstrap_ratio(values, np.ones(400), np.arange(400))
    assert value == pytest.approx(values.mean())
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.15)


def test_structures_of_one_molecule_are_no_independent_evidence():
    rng = np.random.default_rng(0)
    molecule = np.repeat(rng.normal(size=50), 20)
    value, low, high = bootstrap_ratio(molecule, np.ones(1000), np.repeat(np.arange(50), 20))
    _, single_low, single_high = bootstrap_ratio(molecule, np.ones(1000), np.arange(1000))
    assert (high - low) / (single_high - single_low) == pytest.approx(np.sqrt(20), rel=0.25)
    assert low < value < high


def test_a_ratio_of_sums_weighs_structures_by_their_size():
    value, _, _ = bootstrap_ratio(np.array([1.0, 9.0]), np.array([1.0, 3.0]), np.arange(2))
    assert value == pytest.approx(2.5)


def test_there_is_no_ratio_and_no_interval_of_nothing():
    assert np.isnan(bootstrap_ratio(np.zeros(3), np.zeros(3), np.arange(3))).all()
    value, low, high = bootstrap_ratio(np.ones(3), np.ones(3), np.zeros(3, int))
    assert value == 1.0
    assert np.isnan([low, high]).all()


def test_block_errors_cover_correlated_series():
    rng = np.random.default_rng(1)
    errors, means = [], []
    for _ in range(200):
        steps = rng.normal(size=2000)
        series = np.convolve(steps, np.ones(40) / 40, mode="valid")
        means.append(series.mean())
        errors.append(block_error(series))
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(means), rel=0.2)
    assert np.isnan(block_error(np.ones(4)))


def test_jensen_shannon_is_zero_for_the_same_and_one_for_nothing_in_common():
    assert jensen_shannon(np.array([1.0, 2.0, 0.0]), np.array([2.0, 4.0, 0.0])) == 0.0
    assert jensen_shannon(np.array([1.0, 0.0]), np.array([0.0, 5.0])) == pytest.approx(1.0)
    # by hand: p = (1/2, 1/2), q = (1, 0), m = (3/4, 1/4)
    divergence = 0.5 * (0.5 * np.log2(2 / 3) + 0.5 * np.log2(2)) + 0.5 * np.log2(4 / 3)
    assert jensen_shannon(np.array([1.0, 1.0]), np.array([1.0, 0.0])) == pytest.approx(
        np.sqrt(divergence)
    )


def test_noise_is_the_distance_of_samples_of_one_distribution():
    rng = np.random.default_rng(2)
    same = [
        distance_with_noise(rng.normal(size=1000), rng.normal(size=1000), counts) for _ in range(20)
    ]
    distance, _, noise = np.mean(same, axis=0)
    # halves are compared for the noise: they scatter more than the whole
    assert distance < noise < 2 * distance
    far, error, noise = distance_with_noise(
        rng.normal(size=1000), rng.normal(1.0, 1.0, size=1000), counts
    )
    assert far > 3 * noise
    assert 0 < error < 0.1


def test_rank_correlation_sees_order_only():
    x = np.linspace(0, 1, 50)
    assert rank_correlation(x, np.exp(9 * x)) == pytest.approx(1.0)
    assert rank_correlation(x, -(x**3)) == pytest.approx(-1.0)


def test_equal_values_share_a_bin():
    x = np.repeat([1.0, 2.0, 3.0], 30)
    centers, (median,) = quantile_bins(x, 10 * x, 10, [0.5])
    np.testing.assert_allclose(centers, [1, 2, 3])
    np.testing.assert_allclose(median, [10, 20, 30])


def test_the_last_bin_is_halved_while_points_are_left():
    x = np.arange(1000.0)
    centers, _ = quantile_bins(x, x, 2, [0.5], tail=60)
    # 500, 250, 125, and 62 twice
    np.testing.assert_allclose(centers, [249.5, 624.5, 812, 906, 968.5], atol=1)
