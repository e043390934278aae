"""What the teacher says of bonds that broke in the student's runs."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openmm_mlffd.validation.suite.frames import read_xyz
from openmm_mlffd.validation.suite.job import Job
from openmm_mlffd.validation.suite.models import Model, Structure, charge_settings, label
from openmm_mlffd.validation.suite.static import relax
from openmm_mlffd.validation.suite.store import read_arrays
from openmm_mlffd.validation.suite.systems import load_system

CLOSED = 1.25
"""If the teacher's relaxation brings it below this multiple again, the teacher keeps the bond."""


class _Refused(Exception):
    """The teacher has no energy for a structure."""


def ask_teacher(job: Job, teacher: Model, name: str, run: dict[str, Any]) -> dict[str, Any]:
    """Whether the teacher closes a bond that broke, when it relaxes the last frame.

    Parameters
    ----------
    job
        Has the pieces, and the total charges of files that do not say theirs.
    teacher
        Is told the total charge of the system.
    name, run
        The run that broke a bond, as `measure_stability` has it.

    Returns
    -------
    dict
        ``stretch``: length of the bond after relaxation over that at the start, ``keeps``:
        whether that is below `CLOSED`, ``falls``: energy that relaxation gained [eV]. If the
        teacher refuses the structure only ``refused``, its reason; that is not kept as a piece.
    """
    folder = job.store.folder / run["folder"]
    system = load_system(run["system"], charge=job.plan.stability.charges.get(run["system"]))
    if run["suspicious_file"]:
        positions = read_xyz(folder / run["suspicious_file"])
    else:
        parts = [read_arrays(p) for p in sorted(folder.glob("segment-*.npz"))]
        positions = np.concatenate([p["positions"] for p in parts])[-1].astype(float)
    settings = {
        "teacher": teacher.identity, "model": job.model.identity, "name": name,
        "positions": float(np.abs(positions).sum()), "closed": CLOSED,
        **charge_settings(teacher, [system.charge]),
    }  # fmt: skip

    def energy(x: NDArray[np.float64]) -> float:
        structure = Structure(system.numbers, x, system.cell, system.charge)
        return label(teacher, [structure])[0][0]

    def length(x: NDArray[np.float64]) -> float:
        first, second = run["broken"][:2]
        return float(np.linalg.norm(x[first] - x[second]))

    def measure(_: Path) -> dict[str, Any]:
        try:
            before = energy(positions)
        except ValueError as error:
            raise _Refused(str(error)) from error
        relaxed = relax(teacher, system, positions)
        ratio = length(relaxed) / length(system.positions)
        return {"stretch": ratio, "keeps": ratio < CLOSED, "falls": before - energy(relaxed)}

    try:
        return dict(job.store.piece(f"teacher on {name}", settings, measure).numbers)
    except _Refused as error:
        return {"refused": str(error)}
