"""How far labels are from those of a dataset file that was given to `mlffd label`.

    python tests/benchmarks/compare_labels.py data.h5 labels

`labels` is the folder of that command. Prints mean and largest differences, and what failed. A
file whose forces and charges are rounded to 0.001 differs by 0.25 meV/Å and me on average.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from openmm_mlffd.training.hdf5 import Dataset, take


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("dataset", type=Path)
    parser.add_argument("labels", type=Path)
    options = parser.parse_args()
    manifest = json.loads((options.labels / "manifest.json").read_text())
    shards, count = manifest["shards"].values(), manifest["identity"]["structures"]
    failed = {int(i): why for shard in shards for i, why in shard["failures"]}
    with Dataset(options.dataset) as dataset, Dataset(options.labels / "dataset.h5") as found:
        kept = np.setdiff1d(np.arange(count), list(failed))
        before, after = take(dataset.read(0, count), kept), found.read(0, len(found))
        teacher = found.teacher
    if not np.array_equal(before.positions, after.positions):
        raise SystemExit(f"{options.labels} has labels of other structures")
    print(teacher)
    sizes = np.diff(before.offsets)
    for name, unit, values in (
        ("energy", "meV", 1e3 * (after.energy - before.energy)),
        ("energy", "meV/atom", 1e3 * (after.energy - before.energy) / sizes),
        ("forces", "meV/Å", 1e3 * (after.forces - before.forces)),
        ("charges", "me", 1e3 * (after.partial_charges - before.partial_charges)),
    ):
        size = np.abs(values)
        print(f"{name:8s} mean {size.mean():.4f}, largest {size.max():.4f} {unit}")
    print(f"{len(failed)} of {count} failed")
    for index, why in list(failed.items())[:5]:
        print(f"  {index}: {why}")


if __name__ == "__main__":
    main()
