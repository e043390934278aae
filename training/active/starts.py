"""Where the runs of a round begin, and which molecules must never be trained on."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from openmm_mlffd.elements import SYMBOLS
from openmm_mlffd.training.config import ConfigError
from openmm_mlffd.training.datasets.combine import rule_of
from openmm_mlffd.training.datasets.survey import blocks_of
from openmm_mlffd.training.hdf5 import SPLITS, Dataset, SplitRule, Structures, concatenate, take
from openmm_mlffd.training.sources import open_source


@dataclass(frozen=True)
class HeldOut:
    """Molecules of the validation and test splits."""

    rule: SplitRule
    """How groups are split."""

    teacher: str
    """What the labels of the data are of."""

    names: frozenset[str]
    """Groups, as they are and as canonical SMILES."""

    compositions: frozenset[str]
    """Such as ``C2 H6 O1``."""

    @classmethod
    def of(cls, paths: Sequence[str]) -> "HeldOut":
        """Of dataset files.

        Raises
        ------
        ConfigError
            If the files are split in different ways, or have different teachers.
        """
        rules, teachers = set(), set()
        names: set[str] = set()
        compositions: set[str] = set()
        for path in paths:
            with Dataset(path) as dataset:
                rules.add(rule_of(dataset))
                teachers.add(dataset.teacher)
                groups = dataset.group_names()
                for _, block in blocks_of(dataset):
                    for i in np.flatnonzero(block.split != SPLITS.index("train")).tolist():
                        name = groups[int(block.group[i])]
                        if name not in names:
                            names |= {name, canonical(name)}
                            atoms = slice(int(block.offsets[i]), int(block.offsets[i + 1]))
                            compositions.add(composition(block.atomic_numbers[atoms]))
        if len(rules) > 1 or len(teachers) > 1:
            raise ConfigError("data: the files must have one teacher and one split; merge them")
        return cls(rules.pop(), teachers.pop(), frozenset(names), frozenset(compositions))

    def reason(self, group: str, numbers: NDArray[np.uint8]) -> str:
        """Why frames of a group must not be trained on; empty if they may be.

        A group that is named by its composition alone might be any molecule of it.
        """
        if self.rule(group) != SPLITS.index("train"):
            return "held out by the split"
        if group in self.names or canonical(group) in self.names:
            return "a molecule of the validation or test split"
        if group == composition(numbers) and group in self.compositions:
            return "of the composition of a molecule of the validation or test split"
        return ""


def canonical(group: str) -> str:
    """Canonical SMILES of a group that is one, where RDKit is installed; else the name itself."""
    try:
        from openmm_mlffd.training.datasets.chemistry import name_and_charge

        return name_and_charge(group)[0]
    except ImportError:
        return group


def composition(numbers: NDArray[np.uint8]) -> str:
    """Numbers of atoms by element, such as ``C2 H6 O1``."""
    counts = Counter(SYMBOLS[z] for z in numbers.tolist())
    return " ".join(f"{symbol}{counts[symbol]}" for symbol in sorted(counts))


@dataclass(frozen=True)
class Starts:
    """Structures that runs may begin at."""

    structures: Structures
    groups: list[str]
    skipped: dict[str, int]
    """Why structures were left out, and how many."""

    def draw(self, count: int, rng: np.random.Generator) -> list[int]:
        """Indices of so many of them, of as many groups as there are."""
        order = rng.permutation(len(self.groups))
        seen: Counter[str] = Counter()
        turn = np.zeros(len(order), int)
        for place, i in enumerate(order.tolist()):
            turn[place] = seen[self.groups[i]]
            seen[self.groups[i]] += 1
        return [int(i) for i in order[np.argsort(turn, kind="stable")][:count]]


def read_starts(paths: Sequence[str], held_out: HeldOut, known: Sequence[int]) -> Starts:
    """Structures of files that may be trained on and that the student can evaluate.

    Parameters
    ----------
    paths
        What `open_source` reads.
    held_out
        Molecules that are left out.
    known
        Atomic numbers that the student knows.

    Raises
    ------
    ConfigError
        If nothing is left.
    SourceError
        If a file cannot be read.
    """
    parts, groups = [], []
    skipped: Counter[str] = Counter()
    for path in paths:
        source = open_source(Path(path))
        structures, names = source.read(0, len(source))
        keep, reasons = [], {}
        for i, name in enumerate(names):
            numbers = structures.atomic_numbers[structures.offsets[i] : structures.offsets[i + 1]]
            if name not in reasons:
                reasons[name] = held_out.reason(name, numbers)
            reason = reasons[name]
            if not reason and not np.isin(numbers, known).all():
                reason = "elements that the student does not know"
            pbc = structures.pbc[i]
            if not reason and pbc.any() and not pbc.all():
                reason = "periodic in some directions only"
            if reason:
                skipped[reason] += 1
            else:
                keep.append(i)
        parts.append(take(structures, np.array(keep, int)))
        groups += [names[i] for i in keep]
    if not groups:
        raise ConfigError(
            f"explore.starts: nothing to start from in {', '.join(paths)}: "
            + "; ".join(f"{n} × {reason}" for reason, n in skipped.items())
        )
    return Starts(concatenate(parts), groups, dict(skipped))
