"""`mlffd data merge` and `mlffd data split`: dataset files from dataset files, streamed."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from openmm_mlffd.training.datasets.survey import blocks_of, fingerprints
from openmm_mlffd.training.hdf5 import (
    SPLITS,
    Dataset,
    DatasetError,
    DatasetWriter,
    SplitRule,
    take,
)


class Merged(NamedTuple):
    """What a merge came to."""

    structures: int
    """Written."""

    duplicates: int
    """Left out, since they had come before."""

    excluded: int = 0
    """Left out, since a molecule of theirs was not wanted."""


def rule_of(dataset: Dataset) -> SplitRule:
    """How the groups of a file are split."""
    attributes = dataset.attributes
    return SplitRule(
        val=attributes["split_val"], test=attributes["split_test"], seed=attributes["split_seed"]
    )


def choose_rule(val: float | None, test: float | None, seed: int | None) -> SplitRule | None:
    """A rule from what a command was given, the rest by default; None if it was given nothing."""
    given = {"val": val, "test": test, "seed": seed}
    values: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
    return SplitRule(**values) if values else None


def merge(
    paths: Sequence[str | Path],
    output: str | Path,
    *,
    split: SplitRule | None = None,
    wanted: Callable[[str], bool] = lambda group: True,
) -> Merged:
    """Write the structures of several files as one; what comes twice is taken once.

    Parameters
    ----------
    paths
        Files with labels of one teacher, or without labels; subsets of the same name become one.
    output
        File to write.
    split
        How groups are split; None for the rule of the files.
    wanted
        Whether a group, such as a SMILES, is to be in the file.

    Raises
    ------
    DatasetError
        If the files have different teachers, whose energies have nothing to do with one another,
        or different splits and none is given.
    FileExistsError
        If the output is there already.
    """
    teachers: set[str] = set()
    rules: set[SplitRule] = set()
    subsets: list[str] = []
    origins: list[str] = []
    for path in paths:
        with Dataset(path, unlabelled=True) as dataset:
            teachers.add(dataset.teacher)
            subsets += [s for s in dataset.subsets if s not in subsets]
            rules.add(rule_of(dataset))
            origins += [dataset.origin] if dataset.origin not in ("", *origins) else []
    if len(teachers) > 1:
        said = " and ".join(repr(t or "without labels") for t in sorted(teachers))
        raise DatasetError(f"the files have labels of different teachers: {said}")
    if split is None and len(rules) > 1:
        raise DatasetError("the files are split in different ways; say how with val, test and seed")
    split = split or rules.pop()
    written, duplicates, excluded = 0, 0, 0
    seen: set[bytes] = set()
    with DatasetWriter(
        output,
        teacher=teachers.pop() or None,
        subsets=subsets,
        split=split,
        origin="; ".join(origins),
    ) as writer:
        for path in paths:
            with Dataset(path, unlabelled=True) as dataset:
                groups = dataset.group_names()
                good = np.array([wanted(group) for group in groups], bool)
                names = np.array([subsets.index(s) for s in dataset.subsets], "u1")
                for _, block in blocks_of(dataset):
                    chosen = np.flatnonzero(good[block.group])
                    excluded += len(block.energy) - len(chosen)
                    block, keep = take(block, chosen), []
                    for i, key in enumerate(fingerprints(block)):
                        if key not in seen:
                            seen.add(key)
                            keep.append(i)
                    duplicates += len(chosen) - len(keep)
                    written += len(keep)
                    if not keep:
                        continue
                    block = take(block._replace(subset=names[block.subset]), np.array(keep, int))
                    writer.append(block, [groups[g] for g in block.group])
    return Merged(written, duplicates, excluded)


def split_file(
    path: str | Path, folder: str | Path, *, split: SplitRule | None = None
) -> dict[str, int]:
    """Write training, validation and test structures of a file as files of their own.

    Parameters
    ----------
    path
        Dataset file, labelled or not.
    folder
        Where ``train.h5``, ``val.h5`` and ``test.h5`` are written; made if it is not there. In
        each of them every structure is in that split still.
    split
        Another rule than that of the file.

    Returns
    -------
    dict
        Structures by split; a file without any is not written.

    Raises
    ------
    FileExistsError
        If one of the files is there already.
    """
    folder = Path(folder)
    counts = {}
    with Dataset(path, unlabelled=True) as dataset:
        groups = dataset.group_names()
        rule = split or rule_of(dataset)
        place = np.array([rule(g) for g in groups], int)
        existing = [folder / f"{name}.h5" for name in SPLITS if (folder / f"{name}.h5").exists()]
        if existing:
            raise FileExistsError(f"{existing[0]} exists; remove it or choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        for which, name in enumerate(SPLITS):
            counts[name] = 0
            if not (place == which).any():
                continue
            with DatasetWriter(
                folder / f"{name}.h5",
                teacher=dataset.teacher if dataset.labelled else None,
                subsets=dataset.subsets,
                split=rule,
                origin=dataset.origin,
            ) as writer:
                for _, block in blocks_of(dataset):
                    chosen = np.flatnonzero(place[block.group] == which)
                    if not len(chosen):
                        continue
                    mine = take(block, chosen)
                    writer.append(mine, [groups[g] for g in mine.group])
                    counts[name] += len(mine.energy)
    return counts
