"""Fit the novelty statistics of a student to its training data, and see what they are worth."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from openmm_mlffd.modelfile import load_student
from openmm_mlffd.novelty import (
    COVERAGE,
    STOP_ERROR,
    FeatureSums,
    Novelty,
    NoveltyHeader,
    atom_features,
    save_novelty,
)
from openmm_mlffd.potential import Potential
from openmm_mlffd.training.batches import Batch, StructureSource, make_batch
from openmm_mlffd.training.hdf5 import Dataset, take

ENOUGH = 2000
"""Atoms of an element that its statistics need, if the training data has so many."""

LARGE_ERRORS = (0.5, 1.0)
"""Force errors [eV/Å] that novelty should tell from smaller ones."""

NEVER = 1e9
"""A novelty that no atom reaches."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class NoveltyFit:
    """Statistics, and novelty against force errors on the test split."""

    novelty: Novelty
    """As written."""

    scores: NDArray[np.float64]
    """Novelty of each atom of the test split, shape (n_atoms,)."""

    errors: NDArray[np.float64]
    """Length of the error of its force [eV/Å], shape (n_atoms,)."""


def fit_novelty(
    model: str | Path | None,
    files: Sequence[str | Path],
    output: str | Path,
    *,
    max_structures: int | None = 6000,
    device: torch.device | None = None,
    batch_atoms: int = 2000,
    strict: bool = True,
) -> NoveltyFit:
    """Fit to the training split, calibrate on the validation split, judge on the test split.

    Parameters
    ----------
    model
        Name of a bundled student, or path of a student file; None is the bundled default.
    files
        Dataset files with the data that it was trained on.
    output
        File to write.
    max_structures
        Training structures that are used, drawn at random with a fixed seed; None for all. For
        elements with fewer than `ENOUGH` atoms in them, all others are looked through, too.
    device
        Torch device; None for the CPU.
    batch_atoms
        Atoms evaluated at a time.
    strict
        Refuse a student whose errors do not grow with novelty. Otherwise its bound is the same
        for all atoms, it never stops a run, and only the threshold to warn means something.

    Raises
    ------
    ModelFileError, DatasetError
        If a file cannot be used.
    ValueError
        If a split is empty, or errors do not grow with novelty.
    """
    where = device or torch.device("cpu")
    potential = load_student(model, device=where)
    datasets = [Dataset(file) for file in files]

    def batches(split: str, limit: int | None) -> Iterator[Batch]:
        source = StructureSource(datasets, split, max_structures=limit)
        _log.info("%d structures of the %s split", len(source), split)
        for structures in source.batches(batch_atoms):
            yield make_batch(structures, potential, where)

    sums = FeatureSums(len(potential.numbers), potential.network.n_channels)
    for batch in batches("train", max_structures):
        sums.add(atom_features(potential, batch.graph), batch.graph.species)
    if max_structures is not None:
        _add_rare_elements(sums, potential, StructureSource(datasets, "train"), batch_atoms)
    mean, whitening = sums.statistics()
    header = NoveltyHeader(
        student=potential.header.sha256,
        elements=potential.header.elements,
        counts=sums.counts.tolist(),
        warn=0.0,
        stop=0.0,
        error_factor=0.0,
        error_exponent=0.0,
        dataset={"files": [Path(f).name for f in files], "structures": max_structures},
    )
    novelty = Novelty(header, mean.float().double(), whitening.float().double())
    scores, errors = _scores_and_errors(potential, novelty, batches("val", None))
    header = _calibrated(header, scores, errors, strict=strict)
    novelty = replace(novelty, header=header)
    scores, errors = _scores_and_errors(potential, novelty, batches("test", None))
    header = replace(header, figures=figures_of_merit(novelty, scores, errors))
    header = save_novelty(output, replace(novelty, header=header))
    return NoveltyFit(novelty=replace(novelty, header=header), scores=scores, errors=errors)


def figures_of_merit(
    novelty: Novelty, scores: NDArray[np.float64], errors: NDArray[np.float64]
) -> dict[str, float]:
    """How well novelty tells force errors: rank correlation, AUROC, coverage of the bound."""
    figures = {
        "atoms": float(len(scores)),
        "spearman": float(np.corrcoef(ranks(scores), ranks(errors))[0, 1]),
        "coverage": float((errors <= novelty.error_bound(scores)).mean()),
    }
    for limit in LARGE_ERRORS:
        figures[f"auroc_{limit:g}"] = auroc(scores, errors > limit)
    return figures


def ranks(values: NDArray[Any]) -> NDArray[np.float64]:
    """Rank of each value from 0; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    first = np.cumsum(counts) - counts
    return (first + 0.5 * (counts - 1))[inverse]


def auroc(scores: NDArray[np.float64], positive: NDArray[np.bool_]) -> float:
    """Chance that a positive has a larger score than a negative; NaN if there are none."""
    n_positive = int(positive.sum())
    n_negative = len(positive) - n_positive
    if not n_positive or not n_negative:
        return float("nan")
    above = ranks(scores)[positive].sum() - n_positive * (n_positive - 1) / 2
    return float(above / (n_positive * n_negative))


def format_fit(fit: NoveltyFit) -> str:
    """The result as lines of text."""
    header, merit = fit.novelty.header, fit.novelty.header.figures
    lines = [
        f"student {header.student[:12]}: {sum(header.counts)} training atoms",
        f"warn at {header.warn:.2f}, stop at {header.stop:.2f}",
        f"force error of {100 * COVERAGE:.0f} % of atoms below {header.error_factor:.3f} "
        f"novelty^{header.error_exponent:.2f} eV/Å",
        f"test split, {merit['atoms']:.0f} atoms: Spearman {merit['spearman']:.3f}, "
        + ", ".join(f"AUROC(error > {x:g} eV/Å) {merit[f'auroc_{x:g}']:.3f}" for x in LARGE_ERRORS)
        + f", {100 * merit['coverage']:.1f} % below the bound",
        " novelty   atoms   error median     90 %     99 %    largest [eV/Å]",
    ]
    edges = np.append(np.quantile(fit.scores, [0, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999]), np.inf)
    for low, high in pairwise(edges):
        here = fit.errors[(fit.scores >= low) & (fit.scores < high)]
        if len(here):
            median, most, nearly = np.quantile(here, [0.5, 0.9, 0.99])
            lines.append(
                f"  ≥{low:6.2f} {len(here):7d}        {median:7.3f}  {most:7.3f}  {nearly:7.3f}    "
                f"{here.max():7.3f}"
            )
    return "\n".join(lines)


def _add_rare_elements(
    sums: FeatureSums, potential: Potential, source: StructureSource, batch_atoms: int
) -> None:
    """Look through all structures for elements of which the random ones have too few atoms."""
    rare = [i for i, count in enumerate(sums.counts.tolist()) if count < ENOUGH]
    sums.forget(rare)
    device = next(potential.parameters()).device
    for structures in source.batches(5 * batch_atoms, rng=np.random.default_rng(0)):
        lacking = [i for i in rare if sums.counts[i] < ENOUGH]
        if not lacking:
            return
        numbers = [potential.numbers[i] for i in lacking]
        found = np.isin(structures.atomic_numbers, numbers)
        rows = np.flatnonzero(np.add.reduceat(found, structures.offsets[:-1]))
        if len(rows):
            batch = make_batch(take(structures, rows), potential, device)
            sums.add(atom_features(potential, batch.graph), batch.graph.species, only=lacking)


def _scores_and_errors(
    potential: Potential, novelty: Novelty, batches: Iterator[Batch]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    scores, errors = [], []
    novelty = novelty.to(next(potential.parameters()).device)
    for batch in batches:
        features = atom_features(potential, batch.graph)
        scores.append(novelty.of_features(features, batch.graph.species).cpu().numpy())
        difference = potential(batch.graph).forces.detach() - batch.forces
        errors.append(difference.norm(dim=1).cpu().numpy())
    score, error = np.concatenate(scores), np.concatenate(errors)
    known = np.isfinite(score) & np.isfinite(error)
    return score[known], error[known]


def _calibrated(
    header: NoveltyHeader,
    scores: NDArray[np.float64],
    errors: NDArray[np.float64],
    *,
    strict: bool = True,
) -> NoveltyHeader:
    """Thresholds, and the bound: the slope of the logarithms, then a conformal quantile."""
    tiny = 1e-9
    x, y = np.log(scores + tiny), np.log(errors + tiny)
    exponent = float(np.polyfit(x, y, 1)[0])
    if exponent <= 0.0:
        reason = (
            "force errors do not grow with novelty: this student is no better on its training "
            f"data than elsewhere (exponent {exponent:.2f})"
        )
        if strict:
            raise ValueError(reason)
        _log.warning("%s; the bound is the same for all atoms", reason)
        exponent = 0.0
    level = min(1.0, np.ceil((len(scores) + 1) * COVERAGE) / len(scores))
    factor = float(np.quantile(errors / (scores + tiny) ** exponent, level))
    return replace(
        header,
        warn=float(np.quantile(scores, 0.999)),
        stop=(STOP_ERROR / factor) ** (1.0 / exponent) if exponent else NEVER,
        error_factor=factor,
        error_exponent=exponent,
    )
