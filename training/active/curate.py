"""From collected frames to structures that are worth a label, and from labels to training data."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from openmm_mlffd.training.active.config import CurateConfig, RetrainConfig
from openmm_mlffd.training.active.explore import Frames
from openmm_mlffd.training.active.starts import Starts
from openmm_mlffd.training.datasets.survey import blocks_of, fingerprints
from openmm_mlffd.training.hdf5 import (
    Dataset,
    DatasetWriter,
    SplitRule,
    Structures,
    concatenate,
    take,
)
from openmm_mlffd.training.sources import Frame, pack

SUBSET = "active"
"""Name of the subset of new structures."""


class Choice(NamedTuple):
    """Frames that are to be labelled."""

    structures: Structures
    groups: list[str]
    scores: list[float]
    dropped: dict[str, int]
    """Why others are not, and how many."""


def choose(
    batches: Sequence[Frames], starts: Starts, config: CurateConfig, known: set[bytes]
) -> Choice | None:
    """Take the frames that say most: those before failures first, then by score.

    Parameters
    ----------
    batches
        Collected frames.
    starts
        Where they come from.
    config
        How many, and how different.
    known
        Fingerprints of structures that have labels.

    Returns
    -------
    Choice or None
        None if nothing is left.
    """
    candidates = [(frames, k) for frames in batches for k in range(len(frames.time))]
    candidates.sort(key=lambda c: (not c[0].failing[c[1]], -c[0].score[c[1]]))
    offsets = {id(frames): _offsets(frames, starts) for frames in batches}
    taken: dict[int, list[NDArray[np.float64]]] = {}
    dropped: Counter[str] = Counter()
    per_start: Counter[int] = Counter()
    parts: list[Structures] = []
    groups: list[str] = []
    scores: list[float] = []
    seen = set(known)
    for frames, k in candidates:
        start = int(frames.start[k])
        first = offsets[id(frames)][k]
        x = frames.positions[first : offsets[id(frames)][k + 1]]
        if len(parts) >= config.max_frames or per_start[start] >= config.max_per_start:
            dropped["more than were wanted"] += 1
            continue
        shape = _distances(x)
        differences = (np.abs(shape - other).mean() for other in taken.get(start, []))
        if any(d < config.least_difference for d in differences):
            dropped["like another frame"] += 1
            continue
        structure = _structure(starts, start, x, float(frames.temperature[k]))
        taken.setdefault(start, []).append(shape)
        key = fingerprints(structure)[0]
        if key in seen:
            dropped["labelled before"] += 1
            continue
        seen.add(key)
        per_start[start] += 1
        parts.append(structure)
        groups.append(starts.groups[start])
        scores.append(float(frames.score[k]))
    if not parts:
        return None
    return Choice(concatenate(parts), groups, scores, dict(dropped))


def _offsets(frames: Frames, starts: Starts) -> NDArray[np.int64]:
    count = np.diff(starts.structures.offsets)[frames.start]
    return np.concatenate([[0], np.cumsum(count)])


def _distances(positions: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distances of atoms from one another, or of large systems from every few of their atoms."""
    some = positions[:: max(1, len(positions) // 64)]
    return np.asarray(np.linalg.norm(positions[:, None] - some, axis=-1))


def _structure(
    starts: Starts, start: int, positions: NDArray[np.float64], temperature: float
) -> Structures:
    s = starts.structures
    periodic = bool(s.pbc[start].any())
    frame = Frame(
        numbers=s.atomic_numbers[s.offsets[start] : s.offsets[start + 1]],
        positions=positions,
        charge=int(s.total_charge[start]),
        group=starts.groups[start],
        subset=SUBSET,
        cell=s.cell[start] if periodic else None,
        pbc=(periodic, periodic, periodic),
        temperature=temperature,
    )
    return pack(frame, [SUBSET])


def known_fingerprints(paths: Sequence[str | Path]) -> set[bytes]:
    """Of all structures of dataset files."""
    found: set[bytes] = set()
    for path in paths:
        with Dataset(path, unlabelled=True) as dataset:
            for _, block in blocks_of(dataset):
                found.update(fingerprints(block))
    return found


def write_candidates(path: Path, choice: Choice, rule: SplitRule, origin: str) -> None:
    """Write structures without labels."""
    path.unlink(missing_ok=True)
    with DatasetWriter(path, teacher=None, subsets=[SUBSET], split=rule, origin=origin) as writer:
        writer.append(choice.structures, choice.groups)


class Mixture(NamedTuple):
    """What a training set was mixed from."""

    old: int
    """Structures of the old training data."""

    new: int
    """New structures."""

    repeats: int
    """How often each of the new ones is there."""

    validation: int
    """Structures of the validation split."""


def repeats_for(n_old: int, n_new: int, config: RetrainConfig) -> int:
    """How often new structures are repeated to be their share of the training set."""
    wanted = config.share * n_old / ((1.0 - config.share) * max(1, n_new))
    return max(1, min(config.max_repeats, math.ceil(wanted)))


def mix(
    path: Path,
    old: Sequence[str],
    new: Sequence[Path],
    config: RetrainConfig,
    rng: np.random.Generator,
) -> Mixture:
    """Write a training set: a part of the old data, new ones several times, all held-out ones.

    Parameters
    ----------
    path
        File to write.
    old
        Dataset files that the student was trained on.
    new
        Dataset files with new labels.
    config
        How much of each.
    rng
        Draws the old structures.
    """
    path.unlink(missing_ok=True)
    olds = [Dataset(p) for p in old]
    news = [Dataset(p) for p in new]
    subsets = sorted({s for d in (*olds, *news) for s in d.subsets})
    attributes = olds[0].attributes
    rule = SplitRule(
        val=attributes["split_val"], test=attributes["split_test"], seed=attributes["split_seed"]
    )
    train = [d.in_split("train") for d in olds]
    n_old = sum(map(len, train))
    keep = np.ones(n_old, bool)
    if config.replay is not None and config.replay < n_old:
        keep[:] = False
        keep[rng.permutation(n_old)[: config.replay]] = True
    parts = np.split(keep, np.cumsum([len(t) for t in train])[:-1])
    n_new = sum(len(d.in_split("train")) for d in news)
    repeats = repeats_for(int(keep.sum()), n_new, config)
    n_val = 0
    with DatasetWriter(path, teacher=olds[0].teacher, subsets=subsets, split=rule) as writer:
        for dataset, indices, chosen in zip(olds, train, parts, strict=True):
            n_val += len(dataset.in_split("val"))
            # the test split is not trained on: novelty is judged by it
            held = [dataset.in_split(s) for s in ("val", "test")]
            _copy(dataset, np.concatenate([indices[chosen], *held]), subsets, writer)
        for dataset in news:
            for _ in range(repeats):
                _copy(dataset, dataset.in_split("train"), subsets, writer)
    for dataset in (*olds, *news):
        dataset.__exit__()
    return Mixture(int(keep.sum()), n_new, repeats, n_val)


def _copy(
    dataset: Dataset, indices: NDArray[np.int64], subsets: list[str], writer: DatasetWriter
) -> None:
    groups = dataset.group_names()
    names = np.array([subsets.index(s) for s in dataset.subsets], "u1")
    wanted = np.zeros(len(dataset), bool)
    wanted[indices] = True
    for start, block in blocks_of(dataset):
        here = np.flatnonzero(wanted[start : start + len(block.energy)])
        if len(here):
            part = take(block, here)
            part = part._replace(subset=names[part.subset])
            writer.append(part, [groups[g] for g in part.group])
