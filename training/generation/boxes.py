"""Periodic boxes of water, with a solute or without, by OpenMM's Modeller."""

import io
from typing import Any

import numpy as np
import openmm
from numpy.typing import NDArray
from openmm import app, unit

from openmm_mlffd.training.generation.clusters import random_rotation
from openmm_mlffd.training.generation.molecules import numbers_of
from openmm_mlffd.training.generation.recipe import BoxesConfig
from openmm_mlffd.units import ANGSTROM_PER_NM

_SKEW = 0.35  # largest tilt, relative to the box vectors
_WATER_SIZE = 3  # atoms

# what Modeller needs to know of a solute: the size of its atoms, to leave out waters that clash
_SIZES = {"H": 0.12, "C": 0.34, "N": 0.325, "O": 0.3, "F": 0.3, "P": 0.37, "S": 0.355, "Cl": 0.34}
_DEPTH = 0.4


def random_cell(
    config: BoxesConfig, smallest: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Box vectors as rows [Å], reduced as OpenMM wants them, shape ``(3, 3)``.

    Parameters
    ----------
    config
        Range of the edges, fraction of skewed boxes.
    smallest
        Shortest edge that the solute needs [Å].
    rng
        Of edges and angles.
    """
    low, high = config.edges
    edges = np.maximum(rng.uniform(low, high, 3), smallest)
    cell = np.diag(edges)
    if rng.random() < config.triclinic:
        tilt = rng.uniform(-_SKEW, _SKEW, 3)
        cell[1, 0], cell[2, 0], cell[2, 1] = tilt * edges[[0, 0, 1]]
    return cell


def solvate(
    solute: Any | None, cell: NDArray[np.float64], rng: np.random.Generator
) -> NDArray[np.float64]:
    """A solute in the middle of a box of water.

    Parameters
    ----------
    solute
        RDKit molecule with a conformer; None for pure water.
    cell
        Box vectors as rows [Å], shape ``(3, 3)``.
    rng
        Of the orientation of the solute and of the water.

    Returns
    -------
    numpy.ndarray
        Positions [Å]: the solute's atoms, then waters as O, H, H, each molecule in one piece.
    """
    topology, positions = app.Topology(), np.zeros((0, 3))
    field = app.ForceField("tip3p.xml")
    if solute is not None:
        _add_solute(topology, solute, field)
        positions = np.array(solute.GetConformer().GetPositions())
        positions = (positions - positions.mean(0)) @ random_rotation(rng).T + cell.sum(0) / 2.0
    modeller = app.Modeller(topology, _vectors(positions) * unit.nanometer)
    vectors = _vectors(cell) * unit.nanometer
    modeller.addSolvent(field, model="tip3p", boxVectors=vectors, neutralize=False)
    found = modeller.getPositions().value_in_unit(unit.angstrom)
    return np.array([[p.x, p.y, p.z] for p in found])


def _vectors(rows: NDArray[np.float64]) -> list[openmm.Vec3]:
    return [openmm.Vec3(*row) for row in (rows / ANGSTROM_PER_NM).tolist()]


def _add_solute(topology: app.Topology, solute: Any, field: app.ForceField) -> None:
    residue = topology.addResidue("MOL", topology.addChain())
    atoms = [
        topology.addAtom(f"{a.GetSymbol()}{i}", app.Element.getBySymbol(a.GetSymbol()), residue)
        for i, a in enumerate(solute.GetAtoms())
    ]
    for bond in solute.GetBonds():
        topology.addBond(atoms[bond.GetBeginAtomIdx()], atoms[bond.GetEndAtomIdx()])
    types, inside, sizes = [], [], []
    for i, atom in enumerate(solute.GetAtoms()):
        symbol = atom.GetSymbol()
        types.append(
            f'<Type name="mol-{i}" class="mol-{i}" element="{symbol}" mass="{atom.GetMass()}"/>'
        )
        inside.append(f'<Atom name="{symbol}{i}" type="mol-{i}"/>')
        size = _SIZES.get(symbol, 0.35)
        sizes.append(f'<Atom type="mol-{i}" charge="0" sigma="{size}" epsilon="{_DEPTH}"/>')
    inside += [
        f'<Bond from="{bond.GetBeginAtomIdx()}" to="{bond.GetEndAtomIdx()}"/>'
        for bond in solute.GetBonds()
    ]
    field.loadFile(
        io.StringIO(
            f"<ForceField><AtomTypes>{''.join(types)}</AtomTypes>"
            f'<Residues><Residue name="MOL">{"".join(inside)}</Residue></Residues>'
            '<NonbondedForce coulomb14scale="0.833333" lj14scale="0.5">'
            f"{''.join(sizes)}</NonbondedForce></ForceField>"
        )
    )


def scale_density(
    positions: NDArray[np.float64],
    cell: NDArray[np.float64],
    n_solute: int,
    density: float,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Move whole molecules, so that the density is so many times what it was.

    Parameters
    ----------
    positions
        As `solvate` gives them [Å].
    cell
        Box vectors as rows [Å].
    n_solute
        Atoms of the solute.
    density
        Relative to the present one.

    Returns
    -------
    tuple
        Positions and box vectors [Å].
    """
    scale = density ** (-1.0 / 3.0)
    waters = (len(positions) - n_solute) // _WATER_SIZE
    molecule = np.concatenate(
        [np.zeros(n_solute, int), np.repeat(np.arange(waters) + 1, _WATER_SIZE)]
    )
    count = np.bincount(molecule, minlength=waters + 1)
    sums = np.zeros((waters + 1, 3))
    np.add.at(sums, molecule, positions)
    centers = sums / np.maximum(count, 1)[:, None]
    return positions + ((scale - 1.0) * centers)[molecule], scale * cell


def numbers_in_box(solute: Any | None, n_waters: int) -> NDArray[np.int64]:
    """Atomic numbers in the order of `solvate`."""
    own = np.zeros(0, int) if solute is None else numbers_of(solute)
    return np.concatenate([own, np.tile([8, 1, 1], n_waters)])
