"""What the adapter of every engine needs: a student found again, and its numbers as numpy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from openmm_mlffd.faults import explained, not_finite
from openmm_mlffd.modelfile import (
    ModelFileError,
    bundled_students,
    find_student,
    load_student,
    read_header,
)
from openmm_mlffd.neighbors import DEFAULT_SKIN, VerletList
from openmm_mlffd.potential import Potential, Prediction

_MOST_NAMED = 5


class Evaluation(NamedTuple):
    """What a student says of one configuration. The arrays are the caller's to keep."""

    energy: float
    """Energy [eV]."""

    forces: NDArray[np.float64]
    """Forces [eV/Å], shape (n_atoms, 3)."""

    virial: NDArray[np.float64]
    """dE/dε [eV], shape (3, 3); see `Prediction`."""

    atom_energies: NDArray[np.float64]
    """Energy of each atom [eV], shape (n_atoms,)."""


@dataclass(frozen=True, kw_only=True)
class StudentSource:
    """Which student, and where it was: plain values, to be stored and found again elsewhere."""

    name: str
    """Name of the bundled student; empty for a file of one's own."""

    path: str
    """Where the file was. A hint: any file with the hash will do."""

    sha256: str
    """Hash of the student. Another student is refused."""

    @classmethod
    def find(cls, model: str | Path | None = None) -> "StudentSource":
        """Source of a bundled student's name (None: the default) or of a student file.

        Raises
        ------
        ModelFileError
            If there is no such student, or its header cannot be read.
        """
        path = find_student(model)
        names = [name for name, bundled in bundled_students().items() if bundled == path]
        sha256 = read_header(path).sha256
        return cls(name=names[0] if names else "", path=str(path.resolve()), sha256=sha256)

    def locate(self) -> Path:
        """Path of a file that says it is this student.

        It is the bundled student of that name, the file at the path, or a file of the same name
        in the working directory, whichever comes first.

        Raises
        ------
        ModelFileError
            If none of these is this student; says what they are instead.
        """
        places = [Path(self.path), Path.cwd() / Path(self.path).name]
        bundled = bundled_students().get(self.name)
        if bundled is not None:
            places.insert(0, bundled)
        found = []
        for place in dict.fromkeys(places):
            if not place.is_file():
                found.append(f"{place} does not exist")
                continue
            try:
                sha256 = read_header(place).sha256
            except ModelFileError as error:
                found.append(str(error))
                continue
            if sha256 == self.sha256:
                return place
            found.append(f"{place} is another student (SHA-256 {sha256})")
        raise ModelFileError(
            f"the student {self.name or Path(self.path).name!r} with SHA-256 {self.sha256} is "
            f"needed, but {'; '.join(found)}. Put the file back, or into the working directory"
        )

    def load(self, *, device: str | torch.device = "cpu", precision: str = "single") -> Potential:
        """Load the student; see `load_student`."""
        with torch.inference_mode(False):
            return load_student(
                self.locate(), device=device, precision=precision, sha256=self.sha256
            )


class Evaluator:
    """A student at work on the same atoms again and again.

    Parameters
    ----------
    potential
        The student, in evaluation mode; its device and precision are those of the work.
    numbers
        Atomic number of each atom.
    skin
        Margin of the neighbor list [Å].
    labels
        What the caller calls each atom, for error messages; None for 0, 1, …

    Raises
    ------
    ValueError
        If there are no atoms, or the student does not know an element.

    Notes
    -----
    Threads may share an instance. No global state of torch is changed; in particular TF32 matrix
    products, if they were switched on, are used in single precision on CUDA devices.
    """

    def __init__(
        self,
        potential: Potential,
        numbers: Sequence[int] | NDArray[np.integer[Any]],
        *,
        skin: float = DEFAULT_SKIN,
        labels: Sequence[int] | None = None,
    ) -> None:
        if len(numbers) == 0:
            raise ValueError("there are no atoms to evaluate")
        self.potential = potential
        self.numbers = np.array(numbers, dtype=np.int64)
        self._shape = (len(self.numbers), 3)
        self.labels = labels
        self.device = next(potential.parameters()).device
        self.neighbors = VerletList(potential.cutoff, skin)
        with torch.inference_mode(False):
            self._species = potential.species(torch.tensor(self.numbers)).to(self.device)

    def with_numbers(self, numbers: Sequence[int] | NDArray[np.integer[Any]]) -> "Evaluator":
        """Make an evaluator of other atoms with the same student."""
        return Evaluator(self.potential, numbers, skin=self.neighbors.skin)

    def predict(
        self,
        positions: ArrayLike,
        cell: ArrayLike | None = None,
        pbc: ArrayLike | None = None,
        *,
        virial: bool = True,
    ) -> Prediction:
        """Energies, forces and virial as tensors on the student's device.

        Parameters
        ----------
        positions
            Atom positions [Å], inside the box or not, shape ``(n_atoms, 3)``.
        cell
            Box vectors as rows [Å], shape ``(3, 3)``; None for no box.
        pbc
            Which box vectors are periodic, shape ``(3,)``; None means all where a cell is given
            and none otherwise.
        virial
            Whether the virial is wanted; evaluators may leave it zero if not.

        Returns
        -------
        Prediction
            For the one system; nothing in it is shared with other calls.

        Raises
        ------
        ValueError
            If positions are missing or not finite, or the periodic box has no volume.
        """
        array = np.asarray(positions, dtype=np.float64)
        self._check(array)
        # the caller may be in inference mode or without gradients; the forces need them
        with torch.inference_mode(False), torch.enable_grad():
            graph = self.neighbors.graph(
                torch.tensor(array, device=self.device),
                self._species,
                cell=None if cell is None else torch.tensor(np.asarray(cell, dtype=np.float64)),
                pbc=None if pbc is None else torch.tensor(np.asarray(pbc, dtype=np.bool_)),
            )
            return self.potential(graph)

    def compute(
        self, positions: ArrayLike, cell: ArrayLike | None = None, pbc: ArrayLike | None = None
    ) -> Evaluation:
        """Energies, forces and virial as numpy arrays; arguments and errors as `predict`."""
        prediction = self.predict(positions, cell, pbc)
        return Evaluation(
            prediction.energy.item(),
            prediction.forces.detach().cpu().numpy(),
            prediction.virial[0].detach().cpu().numpy(),
            prediction.atom_energies.detach().cpu().numpy(),
        )

    def energy_and_forces(
        self,
        positions: NDArray[np.float64],
        cell: NDArray[np.float64] | None = None,
        *,
        length: float = 1.0,
        energy: float = 1.0,
        force: float = 1.0,
    ) -> tuple[float, NDArray[np.float64]]:
        """What dynamics needs in each step, in the units of the caller.

        Parameters
        ----------
        positions
            Atom positions, float64, shape ``(n_atoms, 3)``.
        cell
            Box vectors as rows, float64, shape ``(3, 3)``; None for no box.
        length
            What the caller's unit of length is in Å.
        energy, force
            What 1 eV and 1 eV/Å are in the caller's units.

        Returns
        -------
        float, ndarray
            Energy, and forces of shape ``(n_atoms, 3)``, the caller's to keep.

        Raises
        ------
        ValueError
            As of `predict`.
        OutOfMemory, NotFinite, DeviceLost
            See `faults`.
        """
        box = None if cell is None else length * cell
        try:
            found = self.predict(length * positions, box, virial=False)
            value, forces = found.energy.item(), found.forces.detach().cpu().numpy()
        except (RuntimeError, MemoryError) as error:
            better = explained(error, len(self.numbers), self.device)
            if better is error:
                raise
            raise better from error
        bad = np.flatnonzero(~np.isfinite(forces).all(axis=1)).tolist()
        if bad:
            first = bad[0] if self.labels is None else self.labels[bad[0]]
            raise not_finite("forces", len(forces), first)
        if not math.isfinite(value):
            raise not_finite("energy", len(forces), None)
        return value * energy, forces * force

    def energy_and_forces_there(
        self,
        positions: Tensor,
        cell: NDArray[np.float64] | None = None,
        *,
        length: float = 1.0,
        energy: float = 1.0,
        force: float = 1.0,
    ) -> tuple[float, Tensor]:
        """As `energy_and_forces`, of positions in a tensor, on the student's device.

        Returns
        -------
        float, Tensor
            Energy, and forces with the device and dtype of the positions.
        """
        value, forces = self.energy_and_forces(
            positions.detach().double().cpu().numpy(), cell,
            length=length, energy=energy, force=force,
        )  # fmt: skip
        return value, torch.from_numpy(forces).to(positions)

    def _check(self, positions: NDArray[np.float64]) -> None:
        if positions.shape != self._shape:
            raise ValueError(
                f"positions of shape ({len(self.numbers)}, 3) are needed, got {positions.shape}"
            )
        if np.isfinite(positions).all():
            return
        bad = np.flatnonzero(~np.isfinite(positions).all(axis=1)).tolist()
        labels = bad if self.labels is None else [self.labels[i] for i in bad]
        more = f" and {len(bad) - _MOST_NAMED} more" if len(bad) > _MOST_NAMED else ""
        raise ValueError(
            f"positions must be finite, but not those of atom "
            f"{', '.join(str(i) for i in labels[:_MOST_NAMED])}{more} "
            f"(first: {positions[bad[0]].tolist()} Å): the structure is broken, or the time step "
            "too long for it"
        )


def resolve_device(device: str | torch.device | None = None) -> torch.device:
    """The torch device of that name; None is CUDA if there is any, else the CPU.

    Raises
    ------
    ValueError
        If there is no such device; lists those that there are.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    n_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    there = ", ".join(["cpu", *(f"cuda:{i}" for i in range(n_cuda))])
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{device!r} is no device; there are {there}") from error
    if found.type == "cpu" or (found.type == "cuda" and (found.index or 0) < n_cuda):
        return found
    raise ValueError(f"device {str(found)!r} is not here; there are {there}")
