"""What `mlffd nve` does: from a structure file to lines of text."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from openmm_mlffd.modelfile import find_student, read_header

try:
    from openmmml import MLPotential
except ImportError as error:
    raise ImportError(
        "OpenMM and OpenMM-ML are needed: pip install openmm-mlffd[openmm]"
    ) from error

from openmm_mlffd.validation.nve import NVEResult, equilibrate, measure_nve
from openmm_mlffd.validation.structures import read_structure

EQUILIBRATION = 1.0
"""Langevin dynamics before the runs [ps]."""


def run_nve_command(
    structure: Path,
    *,
    model: str | None,
    picoseconds: float,
    timesteps: Sequence[float],
    temperature: float,
    precision: str,
    seed: int,
    output: Path | None,
    echo: Callable[[str], object],
) -> bool:
    """Equilibrate a structure, run at constant energy and say how well it was conserved.

    Parameters
    ----------
    structure
        PDB or SDF file.
    model
        Bundled name or path of a student; None for the default.
    picoseconds
        Length of each run [ps].
    timesteps
        [fs].
    temperature
        [K].
    precision
        "single" or "double".
    seed
        Seed of the start.
    output
        JSON file for the numbers, or None.
    echo
        Is given the lines of text.

    Returns
    -------
    bool
        Whether all checks are passed.
    """
    header = read_header(model)
    topology, positions = read_structure(structure)
    system = MLPotential("mlffd", modelPath=str(find_student(model))).createSystem(
        topology, precision=precision
    )
    echo(f"{structure}: {topology.getNumAtoms()} atoms; student {header.name} {header.sha256[:12]}")
    start = equilibrate(
        system, positions, temperature=temperature, picoseconds=EQUILIBRATION, seed=seed
    )
    result = measure_nve(
        system, start, timesteps=timesteps, picoseconds=picoseconds, temperature=temperature
    )
    for line in format_nve(result):
        echo(line)
    if output is not None:
        content = {
            "structure": structure.name,
            "student": {"name": header.name, "sha256": header.sha256},
            "temperature": temperature,
            "precision": precision,
            "seed": seed,
            "runs": [asdict(run) for run in result.runs],
            "halving_ratios": result.halving_ratios,
            "checks": [asdict(c) | {"passed": c.passed} for c in result.checks],
        }
        output.write_text(json.dumps(content, indent=1) + "\n")
    return result.passed


def format_nve(result: NVEResult) -> list[str]:
    """The result as lines of text."""
    heads = (
        "dt",
        "length",
        "slope",
        "error",
        "slope",
        "error",
        "drift/",
        "rms(E)",
        "mean T",
        "wall",
    )
    units = ("fs", "ps", "meV/atom/ps", "", "kT/ns/dof", "", "std(KE)", "meV/atom", "K", "ms/step")
    rows = [
        (
            f"{r.timestep:g}",
            f"{r.duration:.4g}",
            f"{1e-3 * r.slope:.5f}",  # per ns to per ps
            f"± {1e-3 * r.slope_error:.5f}",
            f"{r.slope_kt:.4f}",
            f"± {r.slope_kt_error:.4f}",
            f"{r.drift_over_kinetic_std:.5f}",
            f"{r.rms:.5f}",
            f"{r.mean_temperature:.0f}",
            f"{1e3 * r.seconds_per_step:.1f}",
        )
        for r in result.runs
    ]
    lines = [" ".join(f"{cell:>11s}" for cell in row) for row in (heads, units, *rows)]
    for check in result.checks:
        verdict = "passed" if check.passed else "FAILED"
        bounds = f"{check.low:g} to {check.high:g}" if check.low else f"at most {check.high:g}"
        lines.append(f"{verdict}  {check.name}: {check.value:.4g} {check.unit} ({bounds})")
    return lines
