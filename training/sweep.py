"""`mlffd sweep`: students by one file, in the same time or steps, to compare speed and error."""

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openmm_mlffd.modelfile import load_student
from openmm_mlffd.storage import replacing
from openmm_mlffd.training.config import ConfigError, load_as, load_config
from openmm_mlffd.training.schedule import check_config
from openmm_mlffd.training.shards import FolderError, Kind, locked

log = logging.getLogger(__name__)

SCRIPT = Path(__file__).with_name("train_in_time.sh")
KIND = Kind("mlffd-sweep", "points", "trained", "training")
POINT = "point.json"
FORMAT = "mlffd-sweep-point"

Echo = Callable[[str], object]


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Students that are trained one after the other; several processes may share the work."""

    base: str
    """YAML file of the training, beside this file or from the current folder."""

    output: str = "runs/sweep"
    """Folder with one folder for each point."""

    minutes: float = 4.0
    """Time of each point, evaluation included; a point may have another. Where steps are given, it
    is only what ``--max-minutes`` counts with."""

    steps: int | None = None
    """Steps of each point, so that all see as much data, however fast they are and whatever else
    the machine does; a point may have others. None: as many as the minutes allow."""

    reserve: float = 45.0
    """Part of it that is kept for starting and for the evaluation [s]."""

    sizes: list[int] = field(default_factory=lambda: [50, 1000, 5000])
    """Numbers of atoms whose time per step is measured with `mlffd bench`; none for none. Points
    that were trained without are timed by a later run with."""

    points: dict[str, dict[str, Any]]
    """Name to settings of the training, such as model.n_channels; ``minutes`` and ``steps`` are
    those of the sweep."""


@dataclass(frozen=True)
class Point:
    """One student."""

    name: str
    minutes: float
    overrides: list[str]


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> tuple[SweepConfig, list[Point]]:
    """Read a sweep; all its settings are checked before anything is trained.

    Raises
    ------
    ConfigError
        If a file cannot be read, or a setting is unknown or of the wrong type.
    """
    config = load_as(SweepConfig, path, overrides)
    if not config.points:
        raise ConfigError(f"{path}: points: there are none")
    points = []
    for name, settings in config.points.items():
        rest = {k: v for k, v in settings.items() if k not in ("minutes", "steps")}
        minutes = float(settings.get("minutes", config.minutes))
        if (steps := settings.get("steps", config.steps)) is not None:
            rest["fit_steps"] = steps
        given = [f"{key}={json.dumps(value)}" for key, value in rest.items()]
        check_config(load_config(base_of(config, path), given))
        points.append(Point(name, minutes, given))
    return config, points


def base_of(config: SweepConfig, path: str | Path) -> Path:
    """The file of the training: beside the sweep's, or from the current folder."""
    beside = Path(path).parent / config.base
    return beside if beside.exists() else Path(config.base)


def run_sweep(
    path: str | Path,
    *,
    overrides: Sequence[str] = (),
    only: Sequence[str] = (),
    max_minutes: float | None = None,
    echo: Echo = log.info,
) -> bool:
    """Train, evaluate and time all points that are not done; whether all are done in the end.

    Parameters
    ----------
    path
        YAML file of the sweep.
    overrides
        Its settings as ``key=value``.
    only
        Take points whose names hold one of these texts; all if there is none.
    max_minutes
        Begin no point that would end after so long.
    echo
        Is given lines of text.

    Raises
    ------
    ConfigError
        If a file cannot be used.
    """
    config, points = load_sweep(path, overrides)
    began, finished = time.monotonic(), True
    for point in points:
        if only and not any(text in point.name for text in only):
            continue
        folder = Path(config.output) / point.name
        spent = (time.monotonic() - began) / 60
        try:
            with locked(folder, KIND):
                if (folder / POINT).exists():
                    _time_later(config, point, folder, echo)
                elif max_minutes is not None and spent + point.minutes > max_minutes:
                    echo(f"{point.name}: no time left; the same command goes on")
                    finished = False
                else:
                    echo(f"{point.name}: {_length(point)} with {' '.join(point.overrides)}")
                    finished &= _run(config, base_of(config, path), point, folder, echo)
        except FolderError:
            echo(f"{point.name}: another process is at it")
            finished = False
    return finished


def _steps(point: Point) -> str:
    """Steps that it was given, as text; empty if it was given a time."""
    given = [o.partition("=")[2] for o in point.overrides if o.startswith("fit_steps=")]
    return given[0] if given else ""


def _length(point: Point) -> str:
    return f"{_steps(point)} steps" if _steps(point) else f"{point.minutes:g} minutes"


def _time_later(config: SweepConfig, point: Point, folder: Path, echo: Echo) -> None:
    """Measure the time per step of a student that was trained without."""
    content = _read(folder / POINT)
    if content["speed"] is not None or not config.sizes:
        echo(f"{point.name}: done before")
        return
    bench = _bench(folder / "student.safetensors", folder, config.sizes, echo)
    if bench is not None:
        _write(folder, content | {"speed": _speed(bench)})
        echo(f"{point.name}: timed")


def _run(config: SweepConfig, base: Path, point: Point, folder: Path, echo: Echo) -> bool:
    settings = load_config(base, point.overrides)
    environment = os.environ | {
        "PYTHON": sys.executable,
        "RESERVE_S": f"{config.reserve:g}",
        "DATA": os.environ.get("DATA", settings.data.files[0]),
    }
    student = folder / "student.safetensors"
    with (folder / "train.log").open("w") as output:
        status = subprocess.run(
            ["bash", str(SCRIPT), str(base), f"{point.minutes:g}", str(folder), *point.overrides],
            env=environment, stdout=output, stderr=subprocess.STDOUT, check=False,
        ).returncode  # fmt: skip
    tables = {split: _read(folder / f"{split}.json") for split in ("val", "test")}
    if status or not student.exists() or tables["val"] is None:
        echo(f"{point.name}: FAILED with status {status}; see {folder / 'train.log'}")
        return False
    bench = _bench(student, folder, config.sizes, echo) if config.sizes else None
    _write_point(point, folder, student, tables, bench)
    errors = (tables["test"] or tables["val"] or {})["all"]
    echo(f"{point.name}: force MAE {errors['force_mae']:.1f} meV/Å")
    return True


def _bench(student: Path, folder: Path, sizes: Sequence[int], echo: Echo) -> Any:
    """Times per step, by another process; None, with a line, where they cannot be had."""
    is_plain = load_student(student).header.architecture["kind"] == "painn"
    command = [
        sys.executable, "-m", "openmm_mlffd.cli", "bench", str(student),
        "-o", str(folder / "bench"), "--sections", "speed",
        "--engines", "python" if is_plain else "eager", "--precisions", "single",
        "--sizes", ",".join(map(str, sizes)),
    ]  # fmt: skip
    with (folder / "bench.log").open("w") as output:
        subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False)
    found = _read(folder / "bench" / "bench.json")
    if found is None:
        echo(f"{folder.name}: no time per step; see {folder / 'bench.log'}")
    return found


def _write_point(
    point: Point, folder: Path, student: Path, tables: dict[str, Any], bench: Any
) -> None:
    potential = load_student(student)
    header = potential.header
    content = {
        "format": FORMAT,
        "version": 1,
        "name": point.name,
        "minutes": None if _steps(point) else point.minutes,
        "settings": point.overrides,
        "architecture": header.architecture,
        "cutoff": header.cutoff,
        "weights": sum(p.numel() for p in potential.parameters()),
        "steps": header.training.get("steps"),
        "train_structures": header.dataset.get("train_structures"),
        "student": header.sha256,
        "errors": tables,
        "speed": None if bench is None else _speed(bench),
    }
    _write(folder, content)


def _speed(bench: Any) -> dict[str, Any]:
    return {"host": bench["host"], "rows": bench["speed"]}


def _write(folder: Path, content: dict[str, Any]) -> None:
    with replacing(folder / POINT) as file:
        file.write((json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def _read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8")) if path.exists() else None
