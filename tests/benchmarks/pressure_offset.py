"""How far the student's pressure is from its teacher's in boxes of water.

    python tests/benchmarks/pressure_offset.py data/so3lr.h5

On the boxes of water of the validation and test splits: mean difference of the virial's part of the
pressure with its standard error, and that times the isothermal compressibility of water, which is
about the relative difference of densities at constant pressure.
"""

import sys

import numpy as np

from openmm_mlffd.batched import BatchedEvaluator
from openmm_mlffd.training.hdf5 import Dataset
from openmm_mlffd.units import BAR_PER_EV_PER_CUBIC_ANGSTROM

SUBSET = "box_water"
COMPRESSIBILITY = 4.6e-5  # 1/bar, of water at 300 K


def main() -> None:
    """Print the mean difference."""
    evaluator, differences, labels = BatchedEvaluator(), [], []
    with Dataset(sys.argv[1]) as data:
        for i in np.concatenate([data.in_split("val"), data.in_split("test")]).tolist():
            one = data.read(i, i + 1)
            if data.subsets[int(one.subset[0])] != SUBSET:
                continue
            found = evaluator.evaluate([(one.atomic_numbers, one.positions, one.cell[0])])[0]
            volume = abs(float(np.linalg.det(one.cell[0])))
            teacher = -float(np.trace(one.stress[0])) / 3
            differences.append(-float(np.trace(found.virial)) / 3 / volume - teacher)
            labels.append(teacher)
    offset = BAR_PER_EV_PER_CUBIC_ANGSTROM * np.array(differences)
    spread = BAR_PER_EV_PER_CUBIC_ANGSTROM * np.std(labels)
    error = offset.std(ddof=1) / np.sqrt(len(offset))
    print(
        f"{len(offset)} boxes, whose pressures scatter by {spread:.0f} bar: student minus teacher "
        f"{offset.mean():.0f} +- {error:.0f} bar, so its density is higher by about "
        f"{-100 * COMPRESSIBILITY * offset.mean():.2f} +- {100 * COMPRESSIBILITY * error:.2f} %"
    )


if __name__ == "__main__":
    main()
