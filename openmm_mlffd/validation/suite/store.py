"""Finished pieces of a validation on disk, so that runs go on where they stopped."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openmm_mlffd.storage import replacing

VERSION = 1
"""Pieces of another version are not used; raised when what a piece measures changes."""


class OutOfTime(Exception):
    """The time that was given is used up; what is finished is on disk."""


class Clock:
    """The time that a command may take.

    Parameters
    ----------
    minutes
        From now on; None for no limit.
    """

    def __init__(self, minutes: float | None = None) -> None:
        self._end = math.inf if minutes is None else time.monotonic() + 60 * minutes

    def check(self, seconds: float = 0.0) -> None:
        """Raise `OutOfTime` if there is less time left than this, or none."""
        if time.monotonic() + seconds > self._end:
            raise OutOfTime("the time that was given is used up; the same command goes on")


@dataclass(frozen=True)
class Piece:
    """A finished measurement."""

    numbers: dict[str, Any]
    """What it found, as JSON has it."""

    folder: Path
    """Its arrays and trajectories."""

    machine: str = ""
    """What it was measured on."""

    def arrays(self, name: str = "arrays") -> dict[str, NDArray[Any]]:
        """Arrays that it stored under a name."""
        return read_arrays(self.folder / f"{name}.npz")


class Store:
    """Pieces of a validation, in a folder each.

    Parameters
    ----------
    folder
        Made if it is not there. Several validations may share it.
    clock
        Looked at before a piece is begun.
    tell
        Is given a line for each piece that is begun, and for each that was there.
    machine
        What measures, in words; it is kept with the pieces, which may have been measured
        elsewhere.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        clock: Clock | None = None,
        tell: Callable[[str], object] = lambda _: None,
        machine: str = "",
    ) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.clock = clock or Clock()
        self.tell = tell
        self._machine = machine
        self.machines: set[str] = set()
        """What all pieces that were asked for so far were measured on."""

    def piece(
        self,
        name: str,
        settings: Mapping[str, Any],
        measure: Callable[[Path], dict[str, Any]],
        *,
        unfinished: Callable[[dict[str, Any]], bool] = lambda _: False,
    ) -> Piece:
        """A piece that was measured before with these settings, or measured now.

        Parameters
        ----------
        name
            What is measured; part of the folder's name.
        settings
            All that the result depends on, the identity of the model included; plain values.
        measure
            Is given the piece's folder, where it may have left something the last time, and
            returns the numbers.
        unfinished
            Told the numbers of an earlier command; whether it is worth while to measure again.

        Raises
        ------
        OutOfTime
            If there is no time to begin it, or it ran out of time; what it left is kept.
        """
        settings = {"name": name, "version": VERSION, **settings}
        text = json.dumps(settings, sort_keys=True, ensure_ascii=False)
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        words = "".join(c if c.isalnum() else "-" for c in name)
        folder = self.folder / f"{words}-{key}"
        numbers = folder / "numbers.json"
        if numbers.is_file() and (folder / "made.json").is_file():  # a copy may lack one
            known = json.loads(numbers.read_text("utf-8"))
            if not unfinished(known):
                self.tell(f"{name}: found")
                return self._give(known, folder)
        self.clock.check()
        folder.mkdir(exist_ok=True)
        write_json(folder / "settings.json", settings)
        self.tell(f"{name} …")
        began = time.monotonic()
        found = plain(measure(folder))
        seconds = time.monotonic() - began
        write_json(folder / "made.json", {"machine": self._machine, "seconds": seconds})
        write_json(numbers, found)
        self.tell(f"{name}: {seconds:.1f} s")
        return self._give(found, folder)

    def _give(self, numbers: dict[str, Any], folder: Path) -> Piece:
        made = json.loads((folder / "made.json").read_text("utf-8"))
        self.machines.add(made["machine"])
        return Piece(numbers, folder, made["machine"])


def plain(value: Any) -> Any:
    """A value as JSON has it: arrays as lists, numbers that are not finite as None.

    Raises
    ------
    TypeError
        If it is nothing that JSON has.
    """
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    raise TypeError(f"numbers, text, lists and dicts are needed, got {type(value).__name__}")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, as a whole or not at all."""
    text = json.dumps(plain(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    _replace(path, text.encode())


def write_arrays(path: Path, **arrays: Any) -> None:
    """Write an npz file, as a whole or not at all."""
    with replacing(path) as file:
        np.savez_compressed(file, **arrays)


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Arrays of an npz file."""
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def write_text(path: Path, text: str) -> None:
    """Write a text file, as a whole or not at all."""
    _replace(path, text.encode())


def _replace(path: Path, content: bytes) -> None:
    with replacing(path) as file:
        file.write(content)
