"""What needs no dynamics: relaxed geometries, vibrations, torsions, dimers, of any model."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from numpy.typing import NDArray

from openmm_mlffd.units import ANGSTROM_PER_NM, WAVENUMBER
from openmm_mlffd.validation.nve import make_context
from openmm_mlffd.validation.suite.models import Model, Structure, label
from openmm_mlffd.validation.suite.store import Piece, Store, write_arrays
from openmm_mlffd.validation.suite.systems import Dimer, System, load_system

TOLERANCE = 0.5
"""Of minimisations, root mean square of the forces [kJ/mol/nm]."""

RESTRAINT = 2000.0
"""Of a torsion in a scan [kJ/mol/rad^2]."""

BOND_CHANGE = 0.25
"""A bond that changes its length by more than this share is none any more."""

DIMER_DISTANCES = np.concatenate([np.arange(-0.4, 1.0, 0.1), np.arange(1.0, 4.01, 0.25)])
"""Distances of dimers relative to that of their file [Å]."""

_STEP = 0.01  # Å, of the second derivatives


def relax(model: Model, system: System, positions: NDArray[np.float64]) -> NDArray[np.float64]:
    """Positions of the nearest minimum [Å], shape ``(n_atoms, 3)``."""
    made = model.system(system.topology, precision="double", charge=system.charge)
    return _minimise(made, positions)


def _minimise(system: openmm.System, positions: NDArray[np.float64]) -> NDArray[np.float64]:
    context = make_context(system, openmm.VerletIntegrator(0.001))
    context.setPositions(positions / ANGSTROM_PER_NM)
    openmm.LocalEnergyMinimizer.minimize(context, tolerance=TOLERANCE, maxIterations=300)
    found = context.getState(positions=True).getPositions(asNumpy=True)._value
    return np.array(found) * ANGSTROM_PER_NM


def frequencies(
    model: Model, system: System, positions: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Harmonic wavenumbers of a molecule [1/cm], ascending; imaginary ones are negative.

    Without the six (five of a linear molecule) that are translations and rotations: they are
    projected out.

    Parameters
    ----------
    model
        Gives the forces.
    system
        The molecule.
    positions
        Where to compute them [Å], shape ``(n_atoms, 3)``.
    """
    numbers, n = system.numbers, 3 * len(positions)
    steps = _STEP * np.eye(n).reshape(n, -1, 3)
    structures = [
        Structure(numbers, positions + sign * step, charge=system.charge)
        for step in steps
        for sign in (1.0, -1.0)
    ]
    forces = np.array([f for _, f in label(model, structures, precision="double")])
    hessian = -(forces[::2] - forces[1::2]).reshape(n, n) / (2 * _STEP)
    roots = np.repeat(np.sqrt(system.masses), 3)
    weighted = 0.5 * (hessian + hessian.T) / np.outer(roots, roots)
    free = _internal_directions(positions, system.masses)
    values = np.linalg.eigvalsh(free.T @ weighted @ free)
    return np.asarray(np.sign(values) * np.sqrt(np.abs(values)) * WAVENUMBER)


def _internal_directions(
    positions: NDArray[np.float64], masses: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Orthonormal mass-weighted displacements without translation and rotation, as columns."""
    centered = positions - masses @ positions / masses.sum()
    rigid = []
    for axis in np.eye(3):
        rigid.append(np.tile(axis, (len(masses), 1)))
        rigid.append(np.cross(axis, centered))
    weighted = np.array(rigid) * np.sqrt(masses)[:, None]
    left, values, _ = np.linalg.svd(weighted.reshape(6, -1).T, full_matrices=True)
    rank = int((values > 1e-6 * values[0]).sum())
    return np.asarray(left[:, rank:])


def bond_lengths_and_angles(
    system: System, positions: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Lengths of all bonds [Å] and angles between bonds [degrees].

    Parameters
    ----------
    system
        Has the bonds.
    positions
        [Å], shape ``(..., n_atoms, 3)``.

    Returns
    -------
    lengths : ndarray
        Shape ``(..., n_bonds)``.
    angles : ndarray
        Shape ``(..., n_angles)``.
    """
    bonds = system.bonds
    lengths = np.linalg.norm(positions[..., bonds[:, 0], :] - positions[..., bonds[:, 1], :],
                             axis=-1)  # fmt: skip
    i, j, k = bond_angles(system).T
    first = positions[..., i, :] - positions[..., j, :]
    second = positions[..., k, :] - positions[..., j, :]
    cross = np.linalg.norm(np.cross(first, second), axis=-1)
    return lengths, np.degrees(np.arctan2(cross, (first * second).sum(-1)))


def bond_angles(system: System) -> NDArray[np.int64]:
    """Atoms i, j, k of each angle, j in the middle, shape ``(n_angles, 3)``."""
    neighbors: dict[int, list[int]] = {}
    for a, b in system.bonds.tolist():
        neighbors.setdefault(a, []).append(b)
        neighbors.setdefault(b, []).append(a)
    found = [
        (i, j, k)
        for j, around in sorted(neighbors.items())
        for i in around
        for k in around
        if i < k
    ]
    return np.array(found, np.int64).reshape(-1, 3)


def proper_torsions(system: System, *, heavy: bool = True) -> NDArray[np.int64]:
    """Atoms of one torsion about each bond, shape ``(n_torsions, 4)``.

    Parameters
    ----------
    system
        Has the bonds.
    heavy
        Only of four atoms that are no hydrogens.
    """
    use = system.numbers > 1 if heavy else np.ones(len(system.numbers), bool)
    neighbors: dict[int, list[int]] = {}
    for a, b in system.bonds.tolist():
        neighbors.setdefault(a, []).append(b)
        neighbors.setdefault(b, []).append(a)
    found = []
    for j, k in system.bonds.tolist():
        before = [i for i in neighbors[j] if i != k and use[i]]
        after = [m for m in neighbors[k] if m != j and use[m]]
        if use[j] and use[k] and before and after and before[0] != after[0]:
            found.append((before[0], j, k, after[0]))
    return np.array(found, np.int64).reshape(-1, 4)


def rmsd(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Root mean square distance of two geometries after superposition [Å].

    References
    ----------
    Kabsch 1976, Acta Cryst. A 32, 922, doi:10.1107/S0567739476001873.
    """
    a, b = first - first.mean(0), second - second.mean(0)
    u, s, vt = np.linalg.svd(a.T @ b)
    s[-1] *= np.sign(np.linalg.det(u @ vt))
    square = (a**2).sum() + (b**2).sum() - 2 * s.sum()
    return math.sqrt(max(0.0, float(square)) / len(a))


def geometry_piece(store: Store, model: Model, name: str) -> Piece:
    """Relaxed geometry and wavenumbers of a molecule, in the arrays of the piece."""

    def measure(folder: Path) -> dict[str, Any]:
        system = load_system(name)
        positions = relax(model, system, system.positions)
        found = frequencies(model, system, positions)
        write_arrays(folder / "arrays.npz", positions=positions, frequencies=found)
        return {"lowest": float(found[0]) if len(found) else None}

    return store.piece(f"geometry of {name}, {model.name}", {"model": model.identity}, measure)


def torsion_piece(store: Store, model: Model, name: str, step: float) -> Piece:
    """A relaxed scan of the torsion of a molecule: angles, geometries and energies.

    From each point to the next one side of the molecule is turned about the bond; then the torsion
    is held by a stiff harmonic restraint while all else relaxes. Energies are those of the model
    alone. The array ``intact`` is whether all bonds still are bonds.
    """
    system = load_system(name)
    torsion = system.torsion
    if torsion is None:
        raise ValueError(f"{name} has no torsion that is marked for a scan")

    def measure(folder: Path) -> dict[str, Any]:
        made = model.system(system.topology, precision="double", charge=system.charge)
        force = openmm.CustomTorsionForce(
            "0.5*k*min(d, 2*pi-d)^2; d=abs(theta-target); pi=3.141592653589793"
        )
        force.addGlobalParameter("k", RESTRAINT)
        force.addGlobalParameter("target", 0.0)
        force.addTorsion(*torsion, [])
        made.addForce(force)
        context = make_context(made, openmm.VerletIntegrator(0.001))
        angles = np.arange(-180.0, 180.0, step)
        frames, x = [], system.positions
        for angle in angles:
            store.clock.check()
            x = turn(system, x, torsion, float(angle))
            context.setPositions(x / ANGSTROM_PER_NM)
            context.setParameter("target", float(np.radians(angle)))
            openmm.LocalEnergyMinimizer.minimize(context, tolerance=2.0, maxIterations=150)
            found = context.getState(positions=True).getPositions(asNumpy=True)._value
            x = np.array(found) * ANGSTROM_PER_NM
            frames.append(x)
        structures = [Structure(system.numbers, x, charge=system.charge) for x in frames]
        energies = [e for e, _ in label(model, structures, precision="double")]
        lengths = bond_lengths_and_angles(system, np.array(frames))[0]
        start = bond_lengths_and_angles(system, system.positions)[0]
        intact = (np.abs(lengths / start - 1) < BOND_CHANGE).all(1)
        write_arrays(
            folder / "arrays.npz", angles=angles, positions=np.array(frames),
            energies=np.array(energies), intact=intact,
        )  # fmt: skip
        return {"barrier": max(energies) - min(energies), "broken": int((~intact).sum())}

    settings = {"model": model.identity, "step": step, "protocol": "turned, then relaxed"}
    return store.piece(f"torsion of {name}, {model.name}", settings, measure)


def turn(
    system: System,
    positions: NDArray[np.float64],
    torsion: tuple[int, int, int, int],
    degrees: float,
) -> NDArray[np.float64]:
    """Positions with one side of a molecule turned about a bond, so that a torsion has this angle.

    Parameters
    ----------
    system
        The molecule.
    positions
        [Å], shape ``(n_atoms, 3)``.
    torsion
        Its four atoms; the side of the last is turned about the bond of the two in the middle,
        which is in no ring.
    degrees
        The angle that it gets.
    """
    _, j, k, _ = torsion
    side, new = {k}, {k}
    while new:
        pairs = [(a, b) for a, b in system.bonds.tolist() if {a, b} != {j, k}]
        new = {b if a in side else a for a, b in pairs if (a in side) != (b in side)}
        side |= new
    if j in side:
        raise ValueError(f"{system.name}: the bond of atoms {j} and {k} is in a ring")
    axis = (positions[k] - positions[j]) / np.linalg.norm(positions[k] - positions[j])
    by = np.radians(degrees) - _torsion_angle(positions[list(torsion)])
    moved = positions.copy()
    arm = positions[sorted(side)] - positions[j]
    along = np.outer(arm @ axis, axis)
    moved[sorted(side)] = (
        positions[j] + along + math.cos(by) * (arm - along) + math.sin(by) * np.cross(axis, arm)
    )
    return moved


def _torsion_angle(x: NDArray[np.float64]) -> float:
    """Angle of four points [rad], with the sign that OpenMM and chemists give it."""
    first, middle, last = x[1] - x[0], x[2] - x[1], x[3] - x[2]
    a, b = np.cross(first, middle), np.cross(middle, last)
    return math.atan2(float(np.linalg.norm(middle) * (first @ b)), float(a @ b))


def dimer_piece(store: Store, model: Model, dimer: Dimer) -> Piece:
    """Interaction energy of a dimer along a distance."""

    def measure(folder: Path) -> dict[str, Any]:
        distances = dimer.distance + DIMER_DISTANCES
        found = label(model, [dimer.at(d) for d in distances] + dimer.apart(), precision="double")
        energies = np.array([e for e, _ in found])
        curve = energies[:-2] - energies[-2:].sum()
        write_arrays(folder / "arrays.npz", distances=distances, energies=curve)
        return {"deepest": float(curve.min()), "at": float(distances[curve.argmin()])}

    return store.piece(f"dimer {dimer.name}, {model.name}", {"model": model.identity}, measure)
