"""What is validated, and what it is compared with: a student, a teacher, any ASE calculator."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import openmm
import torch
from numpy.typing import NDArray
from openmmml import MLPotential

from openmm_mlffd.evaluator import resolve_device
from openmm_mlffd.graph import build_graph
from openmm_mlffd.modelfile import StudentHeader, find_student, load_student
from openmm_mlffd.potential import Potential
from openmm_mlffd.training.teacher_worker import Batch, Labels, insert, select, unknown_labels
from openmm_mlffd.training.teachers import Teacher, WorkerTeacher
from openmm_mlffd.units import (
    ANGSTROM_PER_NM,
    KJ_PER_MOL_NM_PER_EV_ANGSTROM,
    KJ_PER_MOL_PER_EV,
)

BATCH_ATOMS = 1500
"""Atoms that a student is given at a time."""


class Structure(NamedTuple):
    """Atomic numbers (n,), positions [Å] (n, 3), box vectors as rows [Å] or None, charge [e]."""

    numbers: NDArray[np.int64]
    positions: NDArray[np.float64]
    cell: NDArray[np.float64] | None = None
    charge: int = 0


class Model(Protocol):
    """Gives structures their energies and forces, and OpenMM a System."""

    name: str
    """What reports call it."""

    identity: str
    """What tells it from any other: a hash, or a description with version and settings."""

    def label(self, batch: Batch, *, precision: str = "single") -> Labels:
        """Energies and forces of structures; NaN, with a reason, where it has none."""

    def system(
        self, topology: openmm.app.Topology, *, precision: str = "single", charge: int = 0
    ) -> openmm.System:
        """A System of these atoms, with their masses and nothing but this model's force.

        The total charge [e] is that of all atoms together; a student ignores it.
        """


class PotentialModel:
    """A potential in memory.

    Parameters
    ----------
    potential
        The potential, in evaluation mode.
    name
        What reports call it.
    identity
        What tells it from any other.
    """

    def __init__(self, potential: Potential, name: str, identity: str) -> None:
        self.name, self.identity = name, identity
        self.potential = potential

    def of_precision(self, precision: str) -> Potential:
        """The potential, its network in single or double precision."""
        self.potential.network.to({"single": torch.float32, "double": torch.float64}[precision])
        return self.potential

    def label(self, batch: Batch, *, precision: str = "single") -> Labels:
        """Energies, forces and stress, some structures at a time.

        Raises
        ------
        ValueError
            If the potential does not know an element.
        """
        potential = self.of_precision(precision)
        labels = unknown_labels(batch)
        for part in portions(batch, BATCH_ATOMS):
            _label_part(potential, batch, part, labels)
        return labels

    def system(
        self, topology: openmm.app.Topology, *, precision: str = "single", charge: int = 0
    ) -> openmm.System:
        """A System whose only force calls `label`."""
        return python_system(self, topology, precision, charge)


class StudentModel(PotentialModel):
    """A student file; its Systems are those of `MLPotential('mlffd')`.

    Parameters
    ----------
    model
        Bundled name or path; None for the default.
    device
        Torch device; None is CUDA if there is any, else the CPU.

    Raises
    ------
    ValueError
        If there is no such student or device, or the file is damaged.
    """

    header: StudentHeader
    """What the file says of itself."""

    def __init__(self, model: str | Path | None = None, device: str | None = None) -> None:
        self._device = resolve_device(device)
        self._potentials: dict[str, Potential] = {}
        self.path = find_student(model)
        single = self.of_precision("single")
        self.header = single.header
        super().__init__(single, self.header.name, self.header.sha256)

    @property
    def device(self) -> str:
        """Name of its torch device."""
        return str(self._device)

    def of_precision(self, precision: str) -> Potential:
        """The student, loaded once for each precision."""
        if precision not in self._potentials:
            self._potentials[precision] = load_student(
                self.path, device=self._device, precision=precision
            )
        return self._potentials[precision]

    def system(
        self, topology: openmm.app.Topology, *, precision: str = "single", charge: int = 0
    ) -> openmm.System:
        """The System that a user of the student would get; the charge is ignored."""
        potential = MLPotential("mlffd", modelPath=str(self.path))
        return potential.createSystem(topology, precision=precision, device=str(self._device))


class TeacherModel:
    """A teacher, in its process or in this one.

    Parameters
    ----------
    teacher
        What labels: a `WorkerTeacher`, or one of the classes of `teacher_worker`.
    name
        What reports call it.
    """

    def __init__(self, teacher: Teacher, name: str) -> None:
        self.name, self.identity = name, teacher.describe()
        self._teacher = teacher

    @classmethod
    def start(
        cls,
        name: str,
        options: Mapping[str, Any] | None = None,
        *,
        python: str | Path | None = None,
    ) -> "TeacherModel":
        """Start a teacher in a process of its own; arguments and errors as `WorkerTeacher`."""
        return cls(WorkerTeacher(name, options, python=python), name)

    def close(self) -> None:
        """End its process, if it has one."""
        if isinstance(self._teacher, WorkerTeacher):
            self._teacher.close()

    def label(self, batch: Batch, *, precision: str = "single") -> Labels:
        """Labels, some structures at a time; the precision is the teacher's own."""
        labels = unknown_labels(batch)
        for part in portions(batch, self._teacher.batch_atoms):
            insert(labels, self._teacher.label(select(batch, part)), batch, part)
        return labels

    def system(
        self, topology: openmm.app.Topology, *, precision: str = "single", charge: int = 0
    ) -> openmm.System:
        """A System whose only force calls the teacher."""
        return python_system(self, topology, precision, charge)


def pack(structures: Sequence[Structure]) -> Batch:
    """Structures as one batch, with their total charges."""
    count = [len(s.numbers) for s in structures]
    periodic = np.array([s.cell is not None for s in structures], bool)
    cells = [np.zeros((3, 3)) if s.cell is None else np.asarray(s.cell) for s in structures]
    return Batch(
        offsets=np.concatenate([[0], np.cumsum(count)]).astype(np.int64),
        atomic_numbers=np.concatenate([s.numbers for s in structures]).astype(np.int64),
        positions=np.concatenate([s.positions for s in structures]).astype(np.float64),
        cell=np.array(cells, np.float64),
        pbc=np.repeat(periodic[:, None], 3, axis=1),
        total_charge=np.array([s.charge for s in structures], np.int64),
    )


def charge_settings(model: Model, charges: Sequence[int]) -> dict[str, list[int]]:
    """What the settings of a piece have to say of total charges [e].

    Nothing, if all are zero or the model is a student, which ignores them.
    """
    if isinstance(model, PotentialModel) or not any(charges):
        return {}
    return {"charges": list(charges)}


def label(
    model: Model, structures: Sequence[Structure], *, precision: str = "single"
) -> list[tuple[float, NDArray[np.float64]]]:
    """Energy [eV] and forces [eV/Å] of each structure.

    Raises
    ------
    ValueError
        If the model refuses a structure.
    """
    batch = pack(structures)
    labels = model.label(batch, precision=precision)
    refused = np.flatnonzero(labels.failure != "")
    if len(refused):
        raise ValueError(f"{model.name} has no energy for it: {labels.failure[refused[0]]}")
    parts = np.split(labels.forces, batch.offsets[1:-1])
    return [(float(e), f) for e, f in zip(labels.energy, parts, strict=True)]


def portions(batch: Batch, n_atoms: int) -> list[NDArray[np.int64]]:
    """Indices of structures that together have up to so many atoms; larger ones stand alone."""
    parts: list[list[int]] = []
    size = 0
    for i, count in enumerate(np.diff(batch.offsets).tolist()):
        if not parts or size + count > n_atoms:
            parts.append([])
            size = 0
        parts[-1].append(i)
        size += count
    return [np.array(part, np.int64) for part in parts]


def masses_and_numbers(
    topology: openmm.app.Topology,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Mass [amu] and atomic number of each atom of a Topology."""
    elements = [atom.element for atom in topology.atoms()]
    masses = [e.mass.value_in_unit(openmm.unit.dalton) for e in elements]
    return np.array(masses), np.array([e.atomic_number for e in elements], np.int64)


def python_system(
    model: Model, topology: openmm.app.Topology, precision: str, charge: int = 0
) -> openmm.System:
    """A System whose only force asks a model; a refusal is an exception that says why.

    The total charge [e] is what the model is told of all atoms together.
    """
    masses, numbers = masses_and_numbers(topology)
    system = openmm.System()
    for mass in masses:
        system.addParticle(mass)
    box = topology.getPeriodicBoxVectors()
    if box is not None:
        system.setDefaultPeriodicBoxVectors(*box)

    def compute(state: openmm.State) -> tuple[float, NDArray[np.float64]]:
        positions = state.getPositions(asNumpy=True)._value * ANGSTROM_PER_NM
        cell = None
        if box is not None:
            cell = state.getPeriodicBoxVectors(asNumpy=True)._value * ANGSTROM_PER_NM
        structure = Structure(numbers, positions, cell, charge)
        energy, forces = label(model, [structure], precision=precision)[0]
        return energy * KJ_PER_MOL_PER_EV, forces * KJ_PER_MOL_NM_PER_EV_ANGSTROM

    force = openmm.PythonForce(compute)
    force.setUsesPeriodicBoundaryConditions(box is not None)
    system.addForce(force)
    system.addForce(openmm.CMMotionRemover())
    return system


def _label_part(
    potential: Potential, batch: Batch, part: NDArray[np.int64], labels: Labels
) -> None:
    own = select(batch, part)
    device = next(potential.parameters()).device
    count = torch.from_numpy(np.diff(own.offsets))
    graph = build_graph(
        torch.from_numpy(np.asarray(own.positions, np.float64)).to(device),
        potential.species(torch.from_numpy(own.atomic_numbers.astype(np.int64))).to(device),
        cutoff=potential.cutoff,
        cell=torch.from_numpy(np.asarray(own.cell, np.float64)).to(device),
        pbc=torch.from_numpy(own.pbc).to(device),
        system=torch.repeat_interleave(torch.arange(len(part)), count).to(device),
    )
    with torch.enable_grad():
        found = potential(graph)
    answer = unknown_labels(own)
    answer.energy[:] = found.energy.detach().cpu().numpy()
    answer.forces[:] = found.forces.detach().cpu().numpy()
    periodic = own.pbc.all(1)
    volume = np.abs(np.linalg.det(own.cell[periodic]))[:, None, None]
    answer.stress[periodic] = found.virial.detach().cpu().numpy()[periodic] / volume
    insert(labels, answer, batch, part)
