"""Student files, Topologies and Contexts that the tests of the interfaces share."""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import openmm
import pytest
from openmm import app, unit

from openmm_mlffd.elements import COVALENT_RADII
from openmm_mlffd.modelfile import save_student
from openmm_mlffd.units import (
    ANGSTROM_PER_NM,
    KJ_PER_MOL_NM_PER_EV_ANGSTROM,
    KJ_PER_MOL_PER_EV,
)

REFERENCES = [-13.587, -1029.41271, -1485.6021, -2043.7341234]  # like those of a real teacher


@pytest.fixture(scope="session")
def make_student_file(tmp_path_factory, make_header, make_student) -> Callable[..., Path]:
    """Files of untrained students for H, C, N and O."""

    def make(seed: int = 0, **changes) -> Path:
        path = tmp_path_factory.mktemp("student") / "toy.safetensors"
        changes = {"references": REFERENCES} | changes
        save_student(path, make_student(seed=seed, **changes), make_header(**changes))
        return path

    return make


@pytest.fixture(scope="session")
def student_file(make_student_file) -> str:
    return str(make_student_file())


@pytest.fixture(scope="session")
def other_student_file(make_student_file) -> str:
    return str(make_student_file(seed=1))


@pytest.fixture(scope="session")
def make_topology() -> Callable[..., app.Topology]:
    """Topology of a molecule or box, one residue, bonds where atoms are close."""

    def make(numbers, positions=None, cell=None, *, name: str = "MOL") -> app.Topology:
        topology = app.Topology()
        residue = topology.addResidue(name, topology.addChain())
        atoms = []
        for i, z in enumerate(numbers):
            element = app.Element.getByAtomicNumber(int(z)) if z else None
            symbol = element.symbol if element else "M"
            atoms.append(topology.addAtom(f"{symbol}{i + 1}", element, residue))
        if positions is not None:
            for i, j in _close(numbers, positions):
                topology.addBond(atoms[i], atoms[j])
        if cell is not None:
            topology.setPeriodicBoxVectors(np.asarray(cell) / ANGSTROM_PER_NM * unit.nanometer)
        return topology

    return make


def _close(numbers, positions) -> Iterable[tuple[int, int]]:
    radii = np.array([COVALENT_RADII[z] for z in numbers])
    distances = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    return np.argwhere(np.triu(distances < 1.2 * (radii[:, None] + radii), 1)).tolist()


@pytest.fixture(scope="session")
def make_context() -> Callable[..., openmm.Context]:
    """Contexts at given positions [Å] and box vectors [Å]."""

    def make(system, positions, cell=None, *, platform="Reference", integrator=None):
        context = openmm.Context(
            system,
            integrator or openmm.VerletIntegrator(0.0005),
            openmm.Platform.getPlatform(platform),
        )
        if cell is not None:
            context.setPeriodicBoxVectors(*np.asarray(cell) / ANGSTROM_PER_NM)
        context.setPositions(np.asarray(positions) / ANGSTROM_PER_NM)
        return context

    return make


@pytest.fixture(scope="session")
def energy_and_forces() -> Callable[..., tuple[float, np.ndarray]]:
    """Energy [eV] and forces [eV/Å] of a Context."""

    def get(context, groups=-1):
        state = context.getState(energy=True, forces=True, groups=groups)
        forces = state.getForces(asNumpy=True)._value / KJ_PER_MOL_NM_PER_EV_ANGSTROM
        return state.getPotentialEnergy()._value / KJ_PER_MOL_PER_EV, forces

    return get


@pytest.fixture(scope="session")
def derivative(energy_and_forces) -> Callable[..., np.ndarray]:
    """Minus the derivative of a Context's energy by the atoms' positions [eV/Å]."""

    def get(context, atoms, step=1e-3, groups=-1):
        start = context.getState(positions=True).getPositions(asNumpy=True)._value
        forces = np.zeros((len(atoms), 3))
        weights = np.array([1.0, -8.0, 8.0, -1.0]) / (12 * step)
        for row, atom in enumerate(atoms):
            for axis in range(3):
                for shift, weight in zip((-2, -1, 1, 2), weights, strict=True):
                    moved = start.copy()
                    moved[atom, axis] += shift * step / ANGSTROM_PER_NM
                    context.setPositions(moved)
                    context.computeVirtualSites()
                    forces[row, axis] -= weight * energy_and_forces(context, groups)[0]
        context.setPositions(start)
        return forces

    return get


@pytest.fixture(scope="session")
def reduced_box(make_box):
    """Random atoms in a triclinic box, of the form that OpenMM asks for, below twice the cutoff."""
    box = make_box(n_atoms=9, length=5.0, seed=3)
    cell = np.array([[5.5, 0.0, 0.0], [1.9, 5.2, 0.0], [-2.3, 1.7, 6.0]])
    return box._replace(positions=box.positions @ np.linalg.inv(box.cell) @ cell, cell=cell)
