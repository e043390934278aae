"""The numbers of a validation that are looked at first, found in its JSON."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openmm_mlffd.validation.report import number


@dataclass(frozen=True)
class Headline:
    """A number that stands for a section."""

    section: str
    """Name of the section."""

    name: str
    """What it is."""

    unit: str
    """Its unit."""

    value: float
    """NaN if it was not measured."""

    @property
    def text(self) -> str:
        """The value with its unit; counts without decimals."""
        counted = not self.unit and float(self.value).is_integer()
        return f"{self.value:.0f}" if counted else f"{number(self.value)} {self.unit}".strip()


def read_validation(path: Path) -> dict[str, Any]:
    """Content of `validation.json`, given that file or the folder of the report.

    Raises
    ------
    ValueError
        If there is no such file, or it is another one.
    """
    file = path / "validation.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"{path}: no validation is there; `mlffd validate MODEL -o {path}` makes one"
        )
    try:
        content = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error})") from error
    found = content.get("format"), content.get("version")
    if found != ("mlffd-validation", 1):
        raise ValueError(
            f"{file}: has format {found[0]!r} version {found[1]!r}; 'mlffd-validation' version 1 "
            "is needed"
        )
    return dict(content)


def headlines(content: Mapping[str, Any]) -> list[Headline]:
    """The numbers that are looked at first; those that were not measured are left out."""
    finders: dict[str, Callable[[Mapping[str, Any]], Iterator[tuple[str, str, Any]]]] = {
        "forces": _forces,
        "nve": _nve,
        "ensembles": _ensembles,
        "stability": _stability,
        "teacher": _teacher,
        "robustness": _robustness,
        "speed": _speed,
    }
    found = []
    for section, numbers in content["sections"].items():
        if "error" in numbers:
            continue
        for name, unit, value in finders[section](numbers):
            if value is not None and math.isfinite(value):
                found.append(Headline(section, name, unit, float(value)))
    return found


def _forces(numbers: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    found = numbers["all"]
    yield "structures", "", found["structures"]
    yield "force MAE", "meV/Å", found["force_mae"]["value"]
    yield "force RMSE", "meV/Å", found["force_rmse"]["value"]
    yield "angle between forces", "degrees", found["angle"]["value"]
    yield "energy MAE", "meV/atom", found["energy_mae"]["value"]
    yield "stress error", "%", found["stress_relative"]["value"]
    for subset, row in numbers["subsets"].items():
        yield f"force MAE, {subset}", "meV/Å", row["force_mae"]["value"]


def _nve(numbers: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    for name, run in numbers["runs"].items():
        finest = run["runs"][0]
        where = f"{name}, {finest['timestep']:g} fs"
        yield f"length, {where}", "ps", finest["duration"]
        yield f"size of the slope, {where}", "kT/ns/dof", abs(finest["slope_kt"])
        yield f"its error, {where}", "kT/ns/dof", finest["slope_kt_error"]
        yield f"drift / std(Ekin), {where}", "", finest["drift_over_kinetic_std"]
        for ratio in run["halving_ratios"][:1]:
            yield f"rms(E) ratio, {where}", "", ratio


def _ensembles(numbers: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    for name, run in numbers.items():
        yield f"length, {name}", "ps", run["picoseconds"]
        yield f"mean temperature, {name}", "K", run["temperature"]
        yield f"density, {name}", "g/cm³", run.get("density")


def _stability(numbers: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    for kind in ("molecules", "boxes"):
        runs = numbers[kind].values()
        if not runs:
            continue
        yield f"runs of {kind}", "", len(runs)
        yield (
            f"length of the shortest that did not fail, {kind}",
            "ps",
            min(
                (r["picoseconds"] for r in runs if not (r["failure"] or r["broken"])), default=None
            ),
        )
        yield f"that exploded, {kind}", "", sum(bool(r["failure"]) for r in runs)
        yield f"that broke a bond, {kind}", "", sum(bool(r["broken"]) for r in runs)


def _teacher(numbers: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    geometries = numbers["geometries"].values()
    if geometries:
        yield "relaxed geometry, largest RMSD", "Å", max(g["rmsd"] for g in geometries)
        yield (
            "wavenumbers, mean MAE",
            "1/cm",
            sum(g["frequency_mae"] for g in geometries) / len(geometries),
        )
    if numbers["torsions"]:
        errors = [abs(t["barrier"] - t["teacher_barrier"]) for t in numbers["torsions"].values()]
        yield "torsion barrier, largest error", "meV", max(errors)
    if numbers["dimers"]:
        yield (
            "interaction energy, largest MAE",
            "meV",
            max(d["mae"] for d in numbers["dimers"].values()),
        )
    for name, found in numbers["dynamics"].get("features", {}).items():
        yield f"Jensen–Shannon distance, {name}", "", found["js"]
    yield "density / the teacher's − 1", "", numbers.get("box", {}).get("density_difference")


def _robustness(numbers: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    yield "distorted structures", "", numbers["distorted"]["structures"]
    yield "of them without finite forces", "", numbers["distorted"]["not_finite"]
    yield "of them in a hole", "", numbers["distorted"]["holes"]
    yield "minimisations that failed in silence", "", numbers["minimizations"]["silent"]
    if "preparations" in numbers:  # reports made before have none
        yield "preparations that failed in silence", "", numbers["preparations"]["silent"]


def _speed(numbers: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    for row in numbers["systems"]:
        yield f"time of a step, {row['system']}, {row['atoms']} atoms", "ms", row["ms_per_step"]
