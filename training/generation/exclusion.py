"""Molecules that must not be in a dataset: of benchmarks, or held out by another one."""

from collections.abc import Sequence
from pathlib import Path

from openmm_mlffd.training.generation.molecules import read_excluded, skeletons
from openmm_mlffd.training.generation.peptides import smiles_of_group
from openmm_mlffd.training.hdf5 import SPLITS, Dataset

_BLOCK = 4096  # structures that are read at a time


class Exclusion:
    """Groups of structures that are unwanted, by ``group in exclusion``.

    Parameters
    ----------
    lists
        Files of InChIKeys or SMILES. A group with one of these molecules is unwanted.
    held_out
        Dataset files. A group with a molecule that their validation or test split holds alone is
        unwanted, and so is one of the same molecules as a cluster there. Protonation states
        and stereoisomers count as one molecule; a group that is no SMILES is one by its name.

    Raises
    ------
    SourceMissing
        If a list is missing, or has a line that is neither InChIKey nor SMILES.
    DatasetError
        If a dataset cannot be read.
    """

    def __init__(self, lists: Sequence[Path] = (), held_out: Sequence[Path] = ()) -> None:
        self._molecules = set(read_excluded(lists))
        self._clusters: set[tuple[str, ...]] = set()
        self._names: set[str] = set()
        for path in held_out:
            with Dataset(path, unlabelled=True) as dataset:
                groups = dataset.group_names()
                held: set[int] = set()
                for start in range(0, len(dataset), _BLOCK):
                    block = dataset.read(start, min(start + _BLOCK, len(dataset)))
                    held |= set(block.group[block.split != SPLITS.index("train")].tolist())
            for name in (groups[i] for i in held):
                self._names.add(name)
                found = skeletons(smiles_of_group(name))
                if len(found) == 1:
                    self._molecules.update(found)
                elif found:
                    self._clusters.add(found)

    def __contains__(self, group: str) -> bool:
        if group in self._names:
            return True
        found = skeletons(smiles_of_group(group))
        return not self._molecules.isdisjoint(found) or found in self._clusters
