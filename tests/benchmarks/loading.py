"""How fast structures come from dataset files, and how much memory that takes.

    python tests/benchmarks/loading.py data/so3lr.h5 more.h5

One shuffled pass over the training split, streamed in blocks; with --in-memory, from memory.
Batches are cut as for training; neighbor lists are not made.
"""

import argparse
import resource
import sys
import time

import numpy as np

from openmm_mlffd.training.batches import StructureSource
from openmm_mlffd.training.hdf5 import Dataset


def peak_memory():
    """Largest memory of this process so far [GB]."""
    unit = 1e9 if sys.platform == "darwin" else 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+")
    parser.add_argument("--in-memory", action="store_true")
    parser.add_argument("--batch-atoms", type=int, default=4000)
    parser.add_argument("--block-size", type=int, default=4096)
    options = parser.parse_args()
    before = peak_memory()
    source = StructureSource(
        [Dataset(file) for file in options.files],
        "train",
        memory_gb=1e6 if options.in_memory else 0.0,
        block_size=options.block_size,
    )
    start = time.perf_counter()
    structures, atoms, batches, checksum = 0, 0, 0, 0.0
    for batch in source.batches(options.batch_atoms, rng=np.random.default_rng(0)):
        structures += len(batch.energy)
        atoms += len(batch.positions)
        batches += 1
        checksum += float(batch.energy.sum())
    seconds = time.perf_counter() - start
    assert structures == len(source)
    print(f"{structures} structures, {atoms} atoms, {batches} batches, energies {checksum:.3f} eV")
    print(
        f"{seconds:.2f} s: {structures / seconds:.0f} structures/s, {atoms / seconds:.0f} atoms/s; "
        f"largest memory {peak_memory():.2f} GB, {before:.2f} before"
    )


if __name__ == "__main__":
    main()
