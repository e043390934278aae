"""Times of a teacher's own ASE calculator: run by its path, by a Python that has the teacher.

    python teacher_timing.py orb-v2 cuda structures.npz

Needs nothing of this project. The architecture has random weights: its speed does not depend on
their values. Writes a line of JSON for each structure to standard output.
"""

import json
import statistics
import sys
import tempfile
import time
from typing import Any

import numpy as np
import torch

N_SAMPLES, LONGEST = 20, 8.0  # samples of a median, seconds for all of them


def orb_calculator(name: str, device: str, *, compiled: bool) -> Any:
    """The calculator of an Orb architecture with random weights, loaded as published ones are.

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
        made["weights"] = model.state_dict()
        return model

    known = pretrained.ORB_PRETRAINED_MODELS
    if name not in known:
        raise ValueError(f"orb-models has no model {name!r}; there are {', '.join(known)}")
    # the function of that name puts the model together, then has its weights loaded
    load, pretrained.load_model = pretrained.load_model, keep
    try:
        known[name](device="cpu", compile=False)
    finally:
        pretrained.load_model = load
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/random.ckpt"
        torch.save(made["weights"], path)
        loaded = known[name](weights_path=path, device=device, compile=compiled)
    model, *adapter = loaded if isinstance(loaded, tuple) else (loaded,)
    return ORBCalculator(model, *adapter, device=device)


def measure(calculator: Any, numbers: Any, positions: Any, cell: Any) -> dict[str, float]:
    """Median time of energy and forces [s], and the number of samples."""
    from ase import Atoms

    rng = np.random.default_rng(0)
    times: list[float] = []

    def evaluate() -> float:
        moved = positions + 0.01 * rng.uniform(-1, 1, positions.shape)
        atoms = Atoms(numbers, moved, cell=cell, pbc=True)
        atoms.calc = calculator
        before = time.perf_counter()
        atoms.get_forces()
        atoms.get_potential_energy()
        return time.perf_counter() - before

    for _ in range(3):  # kernels are compiled and chosen
        evaluate()
    began = time.perf_counter()
    while len(times) < N_SAMPLES and (time.perf_counter() - began < LONGEST or not times):
        times.append(evaluate())
    return {"bare": statistics.median(times), "n_bare": len(times)}


def main() -> None:
    """Measure the structures of a file: numbers0, positions0, cell0, numbers1 and so on."""
    name, device, path = sys.argv[1:]
    if not name.startswith("orb"):
        raise ValueError(f"only architectures of Orb can be timed here, got {name!r}")
    with np.load(path) as file:
        structures = [
            [file[f"{array}{k}"] for array in ("numbers", "positions", "cell")]
            for k in range(len(file.files) // 3)
        ]
    # on a GPU as it comes, too: compiled, which takes a minute
    for compiled in (False, True) if device.startswith("cuda") else (False,):
        calculator = orb_calculator(name, device, compiled=compiled)
        for numbers, positions, cell in structures:
            row: dict[str, Any] = {"engine": f"{name} compiled"} if compiled else {}
            row["atoms"] = len(numbers)
            try:
                row |= measure(calculator, numbers, positions, cell)
            except RuntimeError as error:
                short = "out of memory" if "out of memory" in str(error) else str(error)[:300]
                row["error"] = short
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
