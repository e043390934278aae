"""Makes golden_v1: a small student of file format version 1 and what it says of three systems.

Run once, when the format was new. Later versions must read the file and give the same numbers,
so it is never made anew; a new format version gets a golden file of its own.
"""

import json
from pathlib import Path

import numpy as np
import torch

from openmm_mlffd.graph import build_graph
from openmm_mlffd.modelfile import StudentHeader, load_student, make_potential, save_student

HERE = Path(__file__).parent
NUMBERS = [6, 8, 1, 1, 7, 1]
POSITIONS = [
    [0.0, 0.1, 0.0],
    [1.2, -0.1, 0.3],
    [-0.6, 0.9, -0.2],
    [-0.5, -0.9, 0.4],
    [0.3, 0.6, 2.4],
    [1.1, 1.2, 2.1],
]
CELL = [[4.1, 0.0, 0.0], [1.3, 4.4, 0.0], [-0.9, 0.8, 4.6]]


def main() -> None:
    if (HERE / "golden_v1.safetensors").exists():
        raise SystemExit("golden_v1.safetensors is there, and is to stay as it is")
    torch.manual_seed(1)
    header = StudentHeader(
        name="golden_v1",
        architecture={"kind": "painn", "n_channels": 8, "n_interactions": 2, "n_basis": 6},
        elements=["H", "C", "N", "O"],
        references=[-13.587222780835477, -1029.4130806556, -1484.9814983, -2041.8396282],
        cutoff=4.5,
        energy_scale=20.0,
        energy_bound=2.0,
        teacher="none: random weights",
    )
    header = save_student(HERE / "golden_v1.safetensors", make_potential(header), header)
    potential = load_student(HERE / "golden_v1.safetensors", precision="double")
    systems = []
    clash = (0.6 * np.array(POSITIONS)).tolist()  # within the cores of most pairs
    for positions, cell in ((POSITIONS, None), (POSITIONS, CELL), (clash, None)):
        found = potential(
            build_graph(
                torch.tensor(positions, dtype=torch.float64),
                potential.species(torch.tensor(NUMBERS)),
                cutoff=potential.cutoff,
                cell=None if cell is None else torch.tensor(cell, dtype=torch.float64),
            )
        )
        systems.append(
            {
                "numbers": NUMBERS,
                "positions": positions,
                "cell": cell,
                "energy": found.energy.item(),
                "forces": np.round(found.forces.numpy(), 10).tolist(),
                "virial": np.round(found.virial[0].numpy(), 10).tolist(),
            }
        )
    stored = {"sha256": header.sha256, "systems": systems}
    (HERE / "golden_v1.json").write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
