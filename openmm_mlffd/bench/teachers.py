"""Times of teachers beside those of the student, in the same run on the same structures."""

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openmm_mlffd.bench.systems import Structure

WEIGHTS = "random weights"
"""Said with every number: speed does not depend on the values of weights."""

_WORKER = Path(__file__).with_name("teacher_timing.py")


def teacher_times(
    name: str, structures: Sequence[Structure], *, device: str, python: Path | None, limit: float
) -> Iterator[dict[str, Any]]:
    """Time a teacher's architecture through its own ASE calculator.

    Parameters
    ----------
    name
        Such as "orb-v2".
    structures
        Atoms in boxes.
    device
        Torch device.
    python
        Python of the teacher's environment; None for this one.
    limit
        Seconds after which it is ended.

    Yields
    ------
    dict
        For each structure ``atoms``, ``bare`` (median [s]) or ``error``.
    """
    if python is None:
        if importlib.util.find_spec("orb_models") is None:
            yield {
                "error": f"{name}: orb-models is not here; mlffd teacher install orb, or "
                "pip install orb-models"
            }
            return
        python = Path(sys.executable)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "structures.npz"
        arrays: dict[str, Any] = {}
        for k, s in enumerate(structures):
            arrays |= {f"numbers{k}": s.numbers, f"positions{k}": s.positions}
            arrays[f"cell{k}"] = np.zeros((3, 3)) if s.cell is None else s.cell
        np.savez(path, **arrays)
        command = [str(python), str(_WORKER), name, device, str(path)]
        try:
            result = subprocess.run(
                command, capture_output=True, text=True, timeout=limit, check=False
            )
            out, words, code = result.stdout, result.stderr, result.returncode
        except subprocess.TimeoutExpired as error:
            out = (error.stdout or b"").decode()
            words, code = f"ended after {limit:.0f} s", 1
    yield from (json.loads(line) for line in out.splitlines() if line.startswith("{"))
    if code:
        yield {"error": f"{name}: {words.strip().splitlines()[-1] if words.strip() else code}"}
