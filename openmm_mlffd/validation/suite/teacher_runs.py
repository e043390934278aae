"""Student and teacher side by side: measurement."""

import math
from typing import Any

import numpy as np

from openmm_mlffd.validation.suite.dynamics import Trajectory
from openmm_mlffd.validation.suite.job import Job
from openmm_mlffd.validation.suite.models import Model, Structure, label
from openmm_mlffd.validation.suite.plan import EnsembleRun
from openmm_mlffd.validation.suite.runs import run_and_keep
from openmm_mlffd.validation.suite.static import (
    bond_lengths_and_angles,
    dimer_piece,
    frequencies,
    geometry_piece,
    relax,
    rmsd,
    torsion_piece,
)
from openmm_mlffd.validation.suite.store import write_arrays
from openmm_mlffd.validation.suite.systems import dimers, load_system, molecules


def compare_geometries(job: Job, teacher: Model) -> dict[str, Any]:
    """Relaxed geometries and wavenumbers of both, by molecule."""
    names = job.plan.teacher.molecules
    found = {}
    for name in molecules() if names is None else names:
        system = load_system(name)
        reference = geometry_piece(job.store, teacher, name).arrays()
        start = reference["positions"]

        def measure(folder: Any, system: Any = system, start: Any = start) -> dict[str, Any]:
            # from the teacher's minimum: what is compared is one minimum, not two conformers
            positions = relax(job.model, system, start)
            write_arrays(
                folder / "arrays.npz", positions=positions,
                frequencies=frequencies(job.model, system, positions),
            )  # fmt: skip
            return {}

        settings = {"model": job.model.identity, "teacher": teacher.identity, "name": name}
        mine = job.store.piece(f"geometry of {name}", settings, measure).arrays()
        lengths, angles = zip(
            *(bond_lengths_and_angles(system, x) for x in (mine["positions"], start)), strict=True
        )
        difference = mine["frequencies"] - reference["frequencies"]
        found[name] = {
            "atoms": len(system.numbers),
            "rmsd": rmsd(mine["positions"], start),
            "bond_mae": float(np.abs(lengths[0] - lengths[1]).mean()),
            "angle_mae": float(np.abs(angles[0] - angles[1]).mean()) if angles[0].size else 0.0,
            "frequency_mae": float(np.abs(difference).mean()),
            "frequency_largest": float(np.abs(difference).max()),
            "frequencies": mine["frequencies"],
            "teacher_frequencies": reference["frequencies"],
        }
    return found


def compare_torsions(job: Job, teacher: Model) -> dict[str, Any]:
    """Energies of both along a torsion [meV], by molecule."""
    names = job.plan.teacher.torsions
    everything = [name for name, system in molecules().items() if system.torsion]
    found = {}
    for name in everything if names is None else names:
        scan = torsion_piece(job.store, teacher, name, job.plan.teacher.scan_step).arrays()
        system = load_system(name)
        structures = [Structure(system.numbers, x, charge=system.charge) for x in scan["positions"]]
        # at the teacher's geometries: two curves at the same points
        mine = np.array([e for e, _ in label(job.model, structures, precision="double")])
        mine -= mine.min()
        reference = scan["energies"] - scan["energies"].min()
        if not scan["intact"].all():  # the teacher took it apart: nothing can be said
            mine[:], reference[:] = math.nan, math.nan
        shift = (mine - reference).mean()
        found[name] = {
            "angles": scan["angles"],
            "student": 1e3 * mine,
            "teacher": 1e3 * reference,
            "mae": 1e3 * float(np.abs(mine - reference - shift).mean()),
            "barrier": 1e3 * float(mine.max()),
            "teacher_barrier": 1e3 * float(reference.max()),
        }
    return found


def compare_dimers(job: Job, teacher: Model) -> dict[str, Any]:
    """Interaction energies of both along a distance [meV], by dimer."""
    names = job.plan.teacher.dimers
    found = {}
    for name, dimer in dimers().items():
        if names is not None and name not in names:
            continue
        curves = [dimer_piece(job.store, model, dimer).arrays() for model in (job.model, teacher)]
        mine, reference = (1e3 * c["energies"] for c in curves)
        # the wall is far from what dynamics visits
        soft = reference < 500.0
        found[name] = {
            "distances": curves[0]["distances"],
            "student": mine,
            "teacher": reference,
            "mae": float(np.abs(mine - reference)[soft].mean()),
            "deepest": float(mine.min()),
            "teacher_deepest": float(reference.min()),
        }
    return found


def run_both(job: Job, teacher: Model, run: EnsembleRun) -> tuple[Trajectory, Trajectory]:
    """Trajectories of both over the same time."""
    reference = run_and_keep(job, teacher, run, f"teacher {teacher.name}")
    mine = run_and_keep(job, job.model, run, "student")
    last = min(float(t.time[-1]) if len(t.time) else 0.0 for t in (mine, reference))
    return mine.until(last), reference.until(last)
