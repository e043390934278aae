"""Clashing molecules pushed apart with their bonds held, before a student ever sees them."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

try:
    import openmm
    from openmm import unit
except ImportError as error:
    raise ImportError(f"OpenMM is needed ({error}): pip install 'openmm-mlffd[openmm]'") from error

from openmm_mlffd.elements import COVALENT_RADII
from openmm_mlffd.units import ANGSTROM_PER_NM, KJ_PER_MOL_PER_EV

CLASH = 0.5
"""Atoms more than three bonds apart clash if they are closer than the sum of their covalent radii
and this [Å]: 1.8 Å for two oxygens, 1.5 Å for oxygen and hydrogen. Hydrogen bonds are longer."""

CONTACT = 0.85
"""If there is a clash, atoms are pushed to the sum of their covalent radii and this [Å]: 2.2 Å for
two oxygens, so that the student does not begin on the slope of its repulsion."""

_STIFFNESS = 40.0  # of bonds, eV/Å²
_REPULSION = 4.0  # of contacts, eV/Å²
_BOND_RANGE = (0.8, 1.25)  # lengths within these shares of the sum of the radii are kept


def untangle(
    topology: Any, system: openmm.System, positions: Any
) -> tuple[NDArray[np.float64], int]:
    """Push clashing atoms apart, with bonds and the distances across angles held.

    A student knows nothing of atoms that clash: its repulsion drives them apart, but may tear
    hydrogens off on the way. Here nothing acts but springs. Atoms of residues whose bonds are not
    in the Topology are left alone.

    Parameters
    ----------
    topology
        The Topology, with bonds.
    system
        The System: masses, box and constraints; not changed.
    positions
        Anything that OpenMM takes.

    Returns
    -------
    positions
        [nm], shape (n_atoms, 3). The same as before if nothing clashes.
    n_clashes
        Pairs of atoms that were too close.

    Raises
    ------
    ValueError
        If there are not as many positions as particles.
    """
    start = _nanometers(positions)
    if len(start) != system.getNumParticles():
        raise ValueError(
            f"positions of {system.getNumParticles()} particles are needed, got {len(start)}"
        )
    bonds = [(b.atom1.index, b.atom2.index) for b in topology.bonds()]
    numbers = [a.element.atomic_number if a.element else 0 for a in topology.atoms()]
    radii = _contact_radii(topology, system, numbers, bonds)
    periodic = system.usesPeriodicBoundaryConditions()
    model = openmm.System()
    model.setDefaultPeriodicBoxVectors(*system.getDefaultPeriodicBoxVectors())
    for i in range(system.getNumParticles()):
        model.addParticle(0.0 if system.isVirtualSite(i) else system.getParticleMass(i))
    less = (CONTACT - CLASH) / ANGSTROM_PER_NM
    counter = _contacts("step(s-r); s=r1+r2-less", radii, bonds, periodic, less=less)
    counter.setForceGroup(1)
    model.addForce(counter)
    model.addForce(
        _contacts("k*step(s-r)*(s-r)^2; s=r1+r2", radii, bonds, periodic, k=_spring(_REPULSION))
    )
    model.addForce(_springs(numbers, bonds, start * ANGSTROM_PER_NM, system, periodic))
    context = openmm.Context(
        model, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference")
    )
    context.setPositions(start)
    n_clashes = round(context.getState(energy=True, groups={1}).getPotentialEnergy()._value)
    if n_clashes == 0:
        return start, 0
    model.removeForce(0)
    context.reinitialize()
    context.setPositions(start)
    openmm.LocalEnergyMinimizer.minimize(context, 10.0, 2000)
    end = context.getState(positions=True).getPositions(asNumpy=True)
    return np.array(end.value_in_unit(unit.nanometer)), n_clashes


def _contact_radii(
    topology: Any, system: openmm.System, numbers: list[int], bonds: list[tuple[int, int]]
) -> NDArray[np.float64]:
    """Half of `CONTACT` and the covalent radius [Å]; 0 for what is to be left alone."""
    radii = np.array([COVALENT_RADII[z] + 0.5 * CONTACT if z else 0.0 for z in numbers])
    bonded = {i for bond in bonds for i in bond}
    for residue in topology.residues():
        atoms = [a.index for a in residue.atoms()]
        if len(atoms) > 1 and not bonded.issuperset(atoms):
            radii[atoms] = 0.0
    sites = [system.isVirtualSite(i) for i in range(system.getNumParticles())]
    radii[np.flatnonzero(sites)] = 0.0
    return radii


def _contacts(
    expression: str,
    radii: NDArray[np.float64],
    bonds: list[tuple[int, int]],
    periodic: bool,
    **parameters: float,
) -> openmm.CustomNonbondedForce:
    force = openmm.CustomNonbondedForce(expression)
    force.addPerParticleParameter("r")
    for name, value in parameters.items():
        force.addGlobalParameter(name, value)
    for radius in radii / ANGSTROM_PER_NM:
        force.addParticle([radius])
    force.createExclusionsFromBonds(bonds, 3)
    force.setCutoffDistance(2.0 * radii.max(initial=0.1) / ANGSTROM_PER_NM)
    method = force.CutoffPeriodic if periodic else force.CutoffNonPeriodic
    force.setNonbondedMethod(method)
    return force


def _springs(
    numbers: list[int],
    bonds: list[tuple[int, int]],
    positions: NDArray[np.float64],
    system: openmm.System,
    periodic: bool,
) -> openmm.HarmonicBondForce:
    """Springs for bonds, and for atoms that share a neighbor."""
    force = openmm.HarmonicBondForce()
    force.setUsesPeriodicBoundaryConditions(periodic)
    neighbors: dict[int, list[int]] = {}
    lengths: dict[tuple[int, int], float] = {}
    box = system.getDefaultPeriodicBoxVectors()
    cell = np.array([row.value_in_unit(unit.angstrom) for row in box])

    def distance(i: int, j: int) -> float:
        vector = positions[j] - positions[i]
        if periodic:
            vector = vector - np.round(vector @ np.linalg.inv(cell)) @ cell
        return float(np.linalg.norm(vector))

    for i, j in bonds:
        usual = COVALENT_RADII[numbers[i]] + COVALENT_RADII[numbers[j]]
        found = distance(i, j)
        if (
            not (numbers[i] and numbers[j])
            or _BOND_RANGE[0] * usual < found < _BOND_RANGE[1] * usual
        ):
            usual = found
        lengths[min(i, j), max(i, j)] = usual
        neighbors.setdefault(i, []).append(j)
        neighbors.setdefault(j, []).append(i)
    for around in neighbors.values():
        for k, i in enumerate(around):
            for j in around[:k]:
                lengths.setdefault((min(i, j), max(i, j)), distance(i, j))
    for (i, j), length in lengths.items():
        force.addBond(i, j, length / ANGSTROM_PER_NM, 2.0 * _spring(_STIFFNESS))
    return force


def _spring(stiffness: float) -> float:
    """A force constant [kJ/mol/nm²] of one in eV/Å²."""
    return stiffness * KJ_PER_MOL_PER_EV * ANGSTROM_PER_NM**2


def _nanometers(positions: Any) -> NDArray[np.float64]:
    if unit.is_quantity(positions):
        return np.array(positions.value_in_unit(unit.nanometer))
    return np.array(
        [p.value_in_unit(unit.nanometer) if unit.is_quantity(p) else p for p in positions],
        dtype=np.float64,
    )
