"""`mlffd teacher install`: Python environments of teachers, whose packages do not agree."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

MARK = ".complete"
"""File of an environment that was installed to its end."""

FOLDER_VARIABLE = "MLFFD_TEACHERS"


class InstallError(ValueError):
    """An environment that cannot be made; the message has the cause."""


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What a teacher needs."""

    requirements: tuple[str, ...]
    """For pip."""

    modules: tuple[str, ...]
    """What must be importable in the end."""


def environment_of(name: str, version: tuple[int, int]) -> Environment:
    """What a family of teachers needs with a version of Python.

    Parameters
    ----------
    name
        ``so3lr``, ``gfn2-xtb``, ``orb`` or ``fennix``.
    version
        Of Python: the newer orb-models needs 3.12.

    Raises
    ------
    InstallError
        If there is no such family.
    """
    orb = "orb-models==0.7.0" if version >= (3, 12) else "orb-models==0.5.5"
    known = {
        "so3lr": Environment(
            requirements=("So3krates-torch==0.2.1",), modules=("so3krates_torch", "matscipy")
        ),
        "gfn2-xtb": Environment(
            requirements=("tblite>=0.4", "ase>=3.23"), modules=("tblite.ase", "ase")
        ),
        "orb": Environment(requirements=(orb,), modules=("orb_models", "ase")),
        "fennix": Environment(
            requirements=("fennol==2026.6.29", "ase>=3.23"), modules=("fennol", "ase")
        ),
    }
    if name not in known:
        raise InstallError(f"there is no environment {name!r}; there are {', '.join(known)}")
    return known[name]


def family_of(teacher: str) -> str | None:
    """Environment that a teacher is run in by its name; None for one that has none."""
    if teacher.startswith("orb"):
        return "orb"
    return {"so3lr-stock": "so3lr"}.get(teacher, None if ":" in teacher else teacher)


def environments_folder() -> Path:
    """Where environments are: the variable MLFFD_TEACHERS, else in the user's data folder."""
    if named := os.environ.get(FOLDER_VARIABLE):
        return Path(named)
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "mlffd" / "teachers"


def python_of(folder: Path) -> Path:
    """Python of an environment."""
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def installed_python(teacher: str) -> Path | None:
    """Python of the environment of a teacher, if it was installed."""
    family = family_of(teacher)
    if family is None:
        return None
    folder = environments_folder() / family
    return python_of(folder) if (folder / MARK).is_file() else None


def install(
    name: str,
    *,
    python: str | None = None,
    pip_arguments: Sequence[str] = (),
    environment: Environment | None = None,
    echo: Callable[[str], object] = lambda _: None,
) -> Path:
    """Make the environment of a teacher, or find that it is there.

    Parameters
    ----------
    name
        Of `environment_of`; of the folder, too.
    python
        Python to make it with; None for the one that runs.
    pip_arguments
        Further arguments of ``pip install``, such as ``torch==2.13.0`` or ``--no-index``.
    environment
        What is needed; None for that of the name.
    echo
        Is told what is done.

    Returns
    -------
    pathlib.Path
        Its Python, which `mlffd label` finds by itself.

    Raises
    ------
    InstallError
        If there is no such name, or Python or pip fails. What was half made is removed.
    """
    maker = python or sys.executable
    environment = environment or environment_of(name, _version_of(maker))
    folder = environments_folder() / name
    target = python_of(folder)
    if (folder / MARK).is_file():
        echo(f"{folder}: is there already")
        return target
    shutil.rmtree(folder, ignore_errors=True)  # what an earlier run had not finished
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        echo(f"{folder}: {' '.join(environment.requirements)}")
        _run([maker, "-m", "venv", str(folder)], "the environment cannot be made")
        pip = [str(target), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
        _run([*pip, *pip_arguments, *environment.requirements], "pip failed")
        code = "; ".join(f"import {module}" for module in environment.modules)
        _run([str(target), "-c", code], "the packages are there, but cannot be imported")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    (folder / MARK).touch()
    return target


def _version_of(python: str) -> tuple[int, int]:
    code = "import sys; print(*sys.version_info[:2])"
    major, minor = _run([python, "-c", code], f"{python} is no Python").split()
    return int(major), int(minor)


def _run(command: list[str], failure: str) -> str:
    # this package's path is no business of another environment
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    except OSError as error:
        raise InstallError(f"{failure}: {command[0]} cannot be started ({error})") from error
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise InstallError(f"{failure}: {' | '.join(lines[-3:]) or done.returncode}")
    return done.stdout
