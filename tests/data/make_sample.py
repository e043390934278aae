"""Makes sample.h5: a few small structures of the SO3LR starter set in our own format.

    python tests/data/make_sample.py so3lr_a.h5

The labels come from SO3LR (So3krates-torch 0.2.1, MIT licence); the sample is MIT, too.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

from openmm_mlffd.training.hdf5 import Dataset, DatasetWriter, SplitRule, take
from openmm_mlffd.training.starter import import_starter

HERE = Path(__file__).parent
SPLIT = SplitRule(val=0.15, test=0.15)
# subset: structures, largest number of atoms
PARTS = {
    "nci_chembl": (64, 16),
    "peptide": (8, 22),
    "dimer": (16, 22),
    "water": (12, 12),
    "box_water": (3, 160),
    "box_pep": (1, 200),
}


def main(source: str) -> None:
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        import_starter([source], Path(folder) / "all.h5", split=SPLIT)
        with Dataset(Path(folder) / "all.h5") as everything:
            chosen = []
            for name, (count, n_atoms) in PARTS.items():
                mine = everything.subset == everything.subsets.index(name)
                small = np.flatnonzero(mine & (everything.n_atoms <= n_atoms))
                chosen.extend(rng.choice(small, count, replace=False).tolist())
            parts = [everything.read(i, i + 1) for i in sorted(chosen)]
            names = everything.group_names()
            with DatasetWriter(
                HERE / "sample.h5",
                teacher=everything.teacher,
                subsets=everything.subsets,
                split=SPLIT,
            ) as writer:
                for part in parts:
                    writer.append(take(part, np.array([0])), [names[part.group[0]]])


if __name__ == "__main__":
    main(*sys.argv[1:])
