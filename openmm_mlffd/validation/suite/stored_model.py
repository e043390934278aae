"""A model of which only pieces are there: a teacher that ran on another machine."""

import json
from pathlib import Path

import openmm

from openmm_mlffd.training.teacher_worker import Batch, Labels
from openmm_mlffd.validation.suite.models import python_system
from openmm_mlffd.validation.suite.store import OutOfTime


class StoredModel:
    """Stands for a model in what was measured of it, and measures nothing.

    Parameters
    ----------
    name, identity
        Those of the model.
    """

    def __init__(self, name: str, identity: str) -> None:
        self.name, self.identity = name, identity

    @classmethod
    def of_pieces(cls, pieces: Path, name: str) -> "StoredModel":
        """The model of this name that pieces were measured of.

        Raises
        ------
        ValueError
            If there is none, or more than one.
        """
        found = set()
        for path in pieces.glob("*/settings.json"):
            settings = json.loads(path.read_text("utf-8"))
            piece = settings["name"]
            if piece.startswith(f"teacher {name} ") or piece.endswith(f", {name}"):
                found.add(settings["model"])
        if len(found) != 1:
            several = "; ".join(sorted(found)) or "nothing"
            raise ValueError(
                f"{pieces} has to hold what one teacher {name} was measured to do, and holds "
                f"{several}; without --teacher-from-pieces the teacher is started"
            )
        return cls(name, found.pop())

    def label(self, batch: Batch, *, precision: str = "single") -> Labels:
        """Never.

        Raises
        ------
        OutOfTime
            Always: what is asked for was not measured.
        """
        raise OutOfTime(f"{self.name} did not measure all of it, and is not started here")

    def system(
        self, topology: openmm.app.Topology, *, precision: str = "single", charge: int = 0
    ) -> openmm.System:
        """A System whose energy cannot be asked for."""
        return python_system(self, topology, precision, charge)
