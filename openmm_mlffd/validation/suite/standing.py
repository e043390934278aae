"""What the pieces of a validation say so far, finished or not; needs no library of the report.

python -m openmm_mlffd.validation.suite.standing PIECES [--json FILE]
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openmm_mlffd.units import AVOGADRO
from openmm_mlffd.validation.conservation import EnergyTrace, conservation, temperature
from openmm_mlffd.validation.suite.dynamics import join_nve, read_segments
from openmm_mlffd.validation.suite.nve_runs import relative_slopes
from openmm_mlffd.validation.suite.shape import shape_numbers, water_distances
from openmm_mlffd.validation.suite.statistics import block_error
from openmm_mlffd.validation.suite.store import write_json
from openmm_mlffd.validation.suite.systems import System, load_system

LEFT_OUT = 0.2
"""Share of a run that is left out at its start."""

RADIAL_FRAMES = 200
"""Frames at most whose distances are counted."""

_GRAM = 1e24 / AVOGADRO  # g/cm³ of 1 amu/Å³


def standing(pieces: Path) -> dict[str, dict[str, Any]]:
    """Numbers of each piece of a folder, by name; pieces without segments only say their end."""
    found = {}
    for path in sorted(pieces.glob("*/settings.json")):
        settings = json.loads(path.read_text("utf-8"))
        folder = path.parent
        numbers: dict[str, Any] = {"finished": (folder / "numbers.json").is_file()}
        try:
            if next(folder.glob("nve-*.npz"), None) is not None:
                numbers |= _nve(folder, settings)
            elif "frame" in settings and (folder / "segment-0000.npz").is_file():
                numbers |= _langevin(folder, settings)
            elif "look" in settings:
                numbers |= _molecules(folder, settings)
        except (ValueError, OSError, KeyError) as error:
            numbers["unreadable"] = str(error)
        found[f"{settings['name']} [{folder.name[-6:]}]"] = numbers
    return found


def _nve(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    timestep = settings["timestep"]
    n = len(load_system(settings["system"], tuple(settings["copies"])).numbers)
    parts = read_segments(folder, f"nve-{timestep:g}fs")
    trace = join_nve(parts, timestep, n, 3 * n - 3)
    numbers: dict[str, Any] = {
        "picoseconds": float(trace.time[-1]),
        "planned_picoseconds": settings["length"],
        "atoms": n,
    }
    return numbers | slope_numbers(trace, settings["temperature"])


def slope_numbers(trace: EnergyTrace, kelvin: float) -> dict[str, Any]:
    """Drift with its errors, also relative to the atomisation energy."""
    result = conservation(trace, kelvin)
    return {k: v for k, v in asdict(result).items() if k != "duration"} | relative_slopes(
        result, trace
    )


def _langevin(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    parts = read_segments(folder, "segment")
    joined = {
        name: np.concatenate([p[name] for p in parts])
        for name in ("time", "positions", "cell", "potential", "kinetic")
    }
    system = load_system(settings["system"], tuple(settings["copies"]))
    n, n_frames = len(system.numbers), len(joined["time"])
    spent = sum(float(p["seconds"]) for p in parts)
    late = slice(int(LEFT_OUT * n_frames), None)
    kelvin = temperature(joined["kinetic"], 3 * n - 3)[late]
    numbers: dict[str, Any] = {
        "picoseconds": float(joined["time"][-1]) if n_frames else 0.0,
        "planned_picoseconds": settings["picoseconds"],
        "atoms": n,
        "milliseconds_per_step": 1e3 * spent * settings["timestep"] * 1e-3
        / (n_frames * settings["frame"]) if n_frames else None,
        "failure": str(parts[-1]["failure"]),
        "temperature": float(kelvin.mean()) if len(kelvin) else None,
        "temperature_error": block_error(kelvin),
    }  # fmt: skip
    if not n_frames:
        return numbers
    if system.cell is not None:
        numbers |= _box(system, joined["cell"], joined["positions"], late)
    return numbers | shape_numbers(system, joined["positions"], joined["cell"])


def _box(
    system: System, cells: NDArray[np.float64], positions: NDArray[np.float32], late: slice
) -> dict[str, Any]:
    volume = np.abs(np.linalg.det(cells))
    density = _GRAM * system.masses.sum() / volume
    start = abs(float(np.linalg.det(np.asarray(system.cell))))
    numbers: dict[str, Any] = {
        "density": float(density[late].mean()),
        "density_error": block_error(density[late]),
        "density_first": float(density[0]),
        "density_last": float(density[-1]),
        "volume_ratio_smallest": float(volume.min() / start),
        "volume_ratio_largest": float(volume.max() / start),
        "volume_relative_std": float(volume[late].std() / volume[late].mean()),
    }
    step = max(1, len(volume[late]) // RADIAL_FRAMES)
    for second, curve in water_distances(
        system, positions[late][::step], cells[late][::step]
    ).items():
        r, g = curve
        first = r < (3.4 if second == "O–O" else 2.4)  # the first peak, not a higher one beyond
        k = int(np.where(first, g, 0.0).argmax())
        numbers[f"{second} first peak"] = [float(r[k]), float(g[k])]
    return numbers


def _molecules(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    parts = read_segments(folder, "segment")
    if not parts:
        return {}
    stretch = np.concatenate([p["stretch"] for p in parts])
    failures = [
        [settings["runs"][int(i)], f"{kind} at {when} ps"]
        for p in parts for i, when, kind, _ in p["failures"]
    ]  # fmt: skip
    kelvin = np.nanmean(np.concatenate([p["temperature"] for p in parts]))
    spent = sum(float(p["seconds"]) for p in parts)
    return {
        "picoseconds": float(parts[-1]["time"][-1]),
        "planned_picoseconds": settings["picoseconds"],
        "molecules": len(settings["runs"]),
        "failures": failures,
        "longest_bond": float(np.nanmax(stretch)),
        "temperature_of_all": float(kelvin),
        "milliseconds_per_step": 1e3 * spent / (len(stretch) * settings["look"]),
    }


def format_standing(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """One line for each piece that has something to say."""
    for name, numbers in found.items():
        if "picoseconds" not in numbers:
            continue
        length = f"{numbers['picoseconds']:.4g}/{numbers['planned_picoseconds']:g} ps"
        state = "done" if numbers["finished"] else "…"
        yield f"{name:64s} {length:>16s} {state:4s} {_words(numbers)}"
    rest = [n for n, v in found.items() if "picoseconds" not in v and not v["finished"]]
    done = sum("picoseconds" not in v and v["finished"] for v in found.values())
    yield f"other pieces: {done} done; begun: {', '.join(rest) or 'none'}"


def _words(numbers: dict[str, Any]) -> str:
    words = []

    def pm(key: str, unit: str, digits: int, label: str = "") -> None:
        value, error = numbers.get(key), numbers.get(f"{key}_error")
        if value is None:
            return
        text = f"{label or key} {value:.{digits}f}"
        if error is not None and math.isfinite(error):
            text += f" ± {error:.{digits}f}"
        words.append(f"{text} {unit}".strip())

    pm("slope", "meV/atom/ns", 3)
    pm("slope_kt", "kT/ns/dof", 5, "=")
    pm("slope_of_atomization", "%/ns of the atomisation energy", 5, "=")
    pm("drift_over_kinetic_std", "", 5, "drift/std(Ekin)")
    pm("density", "g/cm³", 4)
    pm("temperature", "K", 1, "T")
    peaks = {k: numbers[k] for k in ("O–O first peak", "O–H first peak") if k in numbers}
    words += [f"{key} {r:.2f} Å, {g:.2f} high" for key, (r, g) in peaks.items()]
    pm("longest_bond", "", 3, "longest bond ×")
    pm("largest_rmsd", "Å", 2, "RMSD up to")
    pm("largest_omega", "°", 0, "amides turned by up to")
    pm("inverted_centers", "", 0, "inverted centers")
    pm("milliseconds_per_step", "ms/step", 2, "")
    if "seconds_per_step" in numbers:
        words.append(f"{1e3 * numbers['seconds_per_step']:.2f} ms/step")
    words += [str(numbers[k]) for k in ("failures", "failure", "unreadable") if numbers.get(k)]
    return "; ".join(words)


def main() -> None:
    """Print the lines, and write all numbers if a file is given."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pieces", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = standing(options.pieces)
    sys.stdout.write("\n".join([*format_standing(found), ""]))
    if options.json is not None:
        write_json(options.json, found)


if __name__ == "__main__":
    main()
