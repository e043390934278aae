"""Times of a teacher's own ASE calculator: run by its path, by a Python that has the teacher.

    python teacher_timing.py orb-v2 cuda structures.npz

Needs nothing of this project. The architecture has random weights: its speed does not depend on
their values. Writes a line of JSON for each structure to standard output.
"""

import json
import statistics
import sys
import time
from typing import Any

import numpy as np

N_SAMPLES, LONGEST = 20, 8.0  # samples of a median, seconds for all of them


def orb_calculator(name: str, device: str) -> Any:
    """The calculator of an Orb architecture with random weights.

    Raises
    ------
    ValueError
        If orb-models has no such model.
    """
    from orb_models.forcefield import pretrained

    try:
        from orb_models.forcefield.inference.calculator import ORBCalculator
    except ImportError:  # before 0.6
        from orb_models.forcefield.calculator import ORBCalculator

    made: dict[str, Any] = {}

    def keep(model: Any, *_: Any, **__: Any) -> Any:
        made["model"] = model.to(device)
        return made["model"]

    known = pretrained.ORB_PRETRAINED_MODELS
    if name not in known:
        raise ValueError(f"orb-models has no model {name!r}; there are {', '.join(known)}")
    # the function of that name puts the model together, then has its weights loaded
    load, pretrained.load_model = pretrained.load_model, keep
    try:
        loaded = known[name](device=device, compile=False)
    finally:
        pretrained.load_model = load
    if isinstance(loaded, tuple):
        model, adapter = loaded
        return ORBCalculator(model.eval(), adapter, device=device)
    return ORBCalculator(loaded.eval(), device=device)


def measure(calculator: Any, numbers: Any, positions: Any, cell: Any) -> dict[str, float]:
    """Median time of energy and forces [s], and the number of samples."""
    from ase import Atoms

    rng = np.random.default_rng(0)
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < N_SAMPLES + 3 and (time.perf_counter() - began < LONGEST or len(times) < 4):
        moved = positions + 0.01 * rng.uniform(-1, 1, positions.shape)
        atoms = Atoms(numbers, moved, cell=cell, pbc=True)
        atoms.calc = calculator
        before = time.perf_counter()
        atoms.get_forces()
        atoms.get_potential_energy()
        times.append(time.perf_counter() - before)
    return {"bare": statistics.median(times[3:]), "n_bare": len(times) - 3}


def main() -> None:
    """Measure the structures of a file: numbers0, positions0, cell0, numbers1 and so on."""
    name, device, path = sys.argv[1:]
    if not name.startswith("orb"):
        raise ValueError(f"only architectures of Orb can be timed here, got {name!r}")
    calculator = orb_calculator(name, device)
    with np.load(path) as file:
        for k in range(len(file.files) // 3):
            numbers = file[f"numbers{k}"]
            row: dict[str, Any] = {"atoms": len(numbers)}
            try:
                row |= measure(calculator, numbers, file[f"positions{k}"], file[f"cell{k}"])
            except RuntimeError as error:
                short = "out of memory" if "out of memory" in str(error) else str(error)[:300]
                row["error"] = short
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
