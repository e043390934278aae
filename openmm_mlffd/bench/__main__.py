"""`python -m openmm_mlffd.bench`: the benchmark without the command-line tool's library."""

import argparse
import sys
from pathlib import Path

from openmm_mlffd.bench.run import ENGINES, SECTIONS, Bench
from openmm_mlffd.evaluator import StudentSource, resolve_device


def main() -> int:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(prog="python -m openmm_mlffd.bench")
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--sizes", default="50,1000,5000,25000,100000")
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--precisions", default="single,mixed")
    parser.add_argument("--device", default=None)
    parser.add_argument("--student", default=None)
    parser.add_argument("--output", type=Path, default=Path("bench"))
    given = parser.parse_args()
    bench = Bench(
        source=StudentSource.find(given.student),
        output=given.output,
        sizes=[int(n) for n in given.sizes.split(",")],
        engines=given.engines.split(","),
        precisions=given.precisions.split(","),
        device=resolve_device(given.device),
    )
    return 0 if bench.run(given.sections.split(",")) else 1


if __name__ == "__main__":
    sys.exit(main())
