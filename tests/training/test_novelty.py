"""Fitting the extrapolation alarm: which atoms count, what is calibrated on what."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from openmm_mlffd.evaluator import Evaluator
from openmm_mlffd.modelfile import load_student
from openmm_mlffd.novelty import COVERAGE, STOP_ERROR, NoveltyMeter, load_novelty
from openmm_mlffd.training import novelty as fitting
from openmm_mlffd.training.hdf5 import Dataset
from openmm_mlffd.validation.novelty_figure import draw_novelty


@pytest.fixture(scope="module")
def file(data_folder):
    return data_folder / "sample.h5"


@pytest.fixture(scope="module")
def fit(file, tmp_path_factory):
    return fitting.fit_novelty(
        None, [file], tmp_path_factory.mktemp("fit") / "x.novelty", max_structures=None
    )


def structures(file, split):
    """Numbers, positions, forces and box of each structure of a split."""
    with Dataset(file) as dataset:
        for row in dataset.in_split(split):
            s = dataset.read(int(row), int(row) + 1)
            cell = s.cell[0] if s.pbc.all() else None
            yield s.atomic_numbers, s.positions, s.forces, cell


def test_all_training_atoms_count_and_no_others(fit, file):
    numbers = np.concatenate([s[0] for s in structures(file, "train")])
    expected = [int((numbers == z).sum()) for z in load_student().numbers]
    assert fit.novelty.header.counts == expected
    assert fit.novelty.header.student == load_student().header.sha256


def test_all_structures_are_looked_through_for_elements_with_too_few_atoms(
    fit, file, tmp_path, monkeypatch
):
    found = fitting.fit_novelty(None, [file], tmp_path / "x.novelty", max_structures=20)
    assert found.novelty.header.counts == fit.novelty.header.counts
    torch.testing.assert_close(found.novelty.mean, fit.novelty.mean, rtol=0, atol=1e-5)
    monkeypatch.setattr(fitting, "ENOUGH", 5)
    few = fitting.fit_novelty(None, [file], tmp_path / "y.novelty", max_structures=20)
    pairs = list(zip(few.novelty.header.counts, fit.novelty.header.counts, strict=True))
    assert all(5 <= some <= every for some, every in pairs if every >= 5)
    assert pairs[0][0] < pairs[0][1]


def test_the_bound_is_calibrated_on_the_validation_split_and_judged_on_the_test_split(fit, file):
    def scores_and_errors(split):
        scores, errors = [], []
        for numbers, positions, forces, cell in structures(file, split):
            meter = NoveltyMeter(numbers, novelty=fit.novelty)
            scores.append(meter.measure(positions, cell))
            predicted = Evaluator(meter.potential, numbers).compute(positions, cell).forces
            errors.append(np.linalg.norm(predicted - forces, axis=1))
        return np.concatenate(scores), np.concatenate(errors)

    scores, errors = scores_and_errors("val")
    known = np.isfinite(scores)  # elements without training atoms have no bound
    scores, errors = scores[known], errors[known]
    below = (errors <= fit.novelty.error_bound(scores)).mean()
    assert below == pytest.approx(COVERAGE, abs=2.0 / len(scores) + 1e-3)
    header = fit.novelty.header
    assert fit.novelty.error_bound(header.stop) == pytest.approx(STOP_ERROR, abs=1e-6)
    assert header.warn == pytest.approx(np.quantile(scores, 0.999), rel=1e-3)
    scores, errors = scores_and_errors("test")
    known = np.isfinite(scores)
    np.testing.assert_allclose(np.sort(fit.scores), np.sort(scores[known]), rtol=1e-3)
    np.testing.assert_allclose(np.sort(fit.errors), np.sort(errors[known]), atol=1e-4)
    assert header.figures["atoms"] == known.sum()


def test_what_was_written_is_what_was_fitted(file, tmp_path):
    path = tmp_path / "x.novelty"
    found = fitting.fit_novelty(None, [file], path, max_structures=20)
    read = load_novelty(None, path)
    # as text: where no error exceeds 1 eV/Å there is no area, and nan is not equal to nan
    assert repr(replace(read.header, sha256="")) == repr(replace(found.novelty.header, sha256=""))
    torch.testing.assert_close(read.whitening, found.novelty.whitening)
    text = fitting.format_fit(found)
    assert f"stop at {read.header.stop:.2f}" in text
    assert draw_novelty(found.novelty, found.scores, found.errors).count("<svg") == 1


def test_the_area_is_the_chance_that_a_large_error_has_the_larger_novelty():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, 60).astype(float)
    positive = rng.random(60) < 0.3
    pairs = scores[positive][:, None] - scores[~positive]
    expected = ((pairs > 0) + 0.5 * (pairs == 0)).mean()
    assert fitting.auroc(scores, positive) == pytest.approx(expected, abs=1e-12)
    assert np.isnan(fitting.auroc(scores, np.zeros(60, bool)))
    assert fitting.ranks(np.array([3.0, 1.0, 3.0])).tolist() == [1.5, 0.0, 1.5]


def test_errors_that_do_not_grow_with_novelty_are_refused_or_give_one_bound(fit):
    rng = np.random.default_rng(0)
    scores = rng.uniform(0.5, 1.5, 500)
    errors = 0.1 / scores
    with pytest.raises(ValueError, match="errors do not grow with novelty"):
        fitting._calibrated(fit.novelty.header, scores, errors)
    header = fitting._calibrated(fit.novelty.header, scores, errors, strict=False)
    assert header.error_factor == pytest.approx(np.quantile(errors, COVERAGE), rel=0.01)
    assert header.warn == pytest.approx(1.5, abs=0.01)
    assert header.error_exponent == 0.0
    assert header.stop == fitting.NEVER
