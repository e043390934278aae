"""MMFF94 in OpenMM: many molecules, with a periodic box or without."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import openmm
from numpy.typing import NDArray
from rdkit import Chem

from openmm_mlffd.training.generation.mmff import (
    COULOMB,
    Terms,
    terms_of,
    type_tables,
)
from openmm_mlffd.training.generation.recipe import SamplingConfig
from openmm_mlffd.training.generation.sampling import Sample, SamplingError
from openmm_mlffd.units import ANGSTROM_PER_NM, KJ_PER_MOL_NM_PER_EV_ANGSTROM

_BUFFER = 0.05 / ANGSTROM_PER_NM  # of Coulomb's law [nm]
_VDW = "depth*(1.07*size/(r+0.07*size))^7*(1.12*size^7/(r^7+0.12*size^7)-2)"
_OUT_OF_PLANE = (
    "0.5*k*asin(s)^2; s=(nx*(x4-x2)+ny*(y4-y2)+nz*(z4-z2))/(sqrt(nx^2+ny^2+nz^2)*distance(p2,p4));"
    "nx=(y1-y2)*(z3-z2)-(z1-z2)*(y3-y2); ny=(z1-z2)*(x3-x2)-(x1-x2)*(z3-z2);"
    "nz=(x1-x2)*(y3-y2)-(y1-y2)*(x3-x2)"
)


def build_system(
    molecules: Sequence[Any],
    order: Sequence[int],
    *,
    cell: NDArray[np.float64] | None = None,
    cutoff: float = 9.0,
) -> openmm.System:
    """MMFF94 of molecules, some of them many times.

    Parameters
    ----------
    molecules
        One of each kind, with hydrogens.
    order
        Kind of each molecule of the system.
    cell
        Box vectors as rows, reduced as OpenMM wants them [Å], shape ``(3, 3)``; None for none.
    cutoff
        In a box, of the non-bonded energies [Å], at most half its shortest height; Coulomb
        energies are shifted to zero there.

    Raises
    ------
    SamplingError
        If MMFF94 has no parameters for a molecule.
    """
    terms = [terms_of(molecule) for molecule in molecules]
    table = Chem.GetPeriodicTable()
    masses = [[table.GetAtomicWeight(a.GetAtomicNum()) for a in m.GetAtoms()] for m in molecules]
    system = openmm.System()
    for which in order:
        for mass in masses[which]:
            system.addParticle(mass)
    if cell is not None:
        system.setDefaultPeriodicBoxVectors(*(cell / ANGSTROM_PER_NM).tolist())
        cutoff = min(cutoff, 0.49 * float(np.diag(cell).min()))
    _add_bonded(system, terms, order)
    _add_nonbonded(
        system, terms, order, type_tables(molecules), cutoff if cell is not None else 0.0
    )
    return system


def _add_bonded(system: openmm.System, terms: Sequence[Terms], order: Sequence[int]) -> None:
    stretch = f"(r-r0)^2*(1+c*(r-r0)+7/12*(c*(r-r0))^2); c={-2.0 * ANGSTROM_PER_NM}"
    bend = "0.5*k*(theta-t0)^2*(1-0.4*(theta-t0))"
    mixed = "(a*(distance(p1,p2)-ra)+b*(distance(p3,p2)-rb))*(angle(p1,p2,p3)-t0)"
    torsion = "0.5*(v1*(1+cos(theta))+v2*(1-cos(2*theta))+v3*(1+cos(3*theta)))"
    pair = f"{_VDW}+{COULOMB}*qq/(r+{_BUFFER})"
    forces = {
        "bonds": (openmm.CustomBondForce(f"0.5*k*{stretch}"), ("k", "r0")),
        "angles": (openmm.CustomAngleForce(bend), ("k", "t0")),
        "linear": (openmm.CustomAngleForce("k*(1+cos(theta))"), ("k",)),
        "stretch_bends": (
            openmm.CustomCompoundBondForce(3, mixed),
            ("a", "b", "ra", "rb", "t0"),
        ),
        "out_of_plane": (openmm.CustomCompoundBondForce(4, _OUT_OF_PLANE), ("k",)),
        "torsions": (openmm.CustomTorsionForce(torsion), ("v1", "v2", "v3")),
        "pairs": (openmm.CustomBondForce(pair), ("size", "depth", "qq")),
    }
    for name, (force, parameters) in forces.items():
        kind = type(force).__name__.removeprefix("Custom").removesuffix("Force")
        kind = "Bond" if kind == "CompoundBond" else kind
        for parameter in parameters:
            getattr(force, f"addPer{kind}Parameter")(parameter)
        add = getattr(force, f"add{kind}")
        compound = isinstance(force, openmm.CustomCompoundBondForce)
        first = 0
        for which in order:
            for atoms, values in getattr(terms[which], name):
                places = [first + i for i in atoms]
                values = values[: len(parameters)]
                if compound:
                    add(places, values)
                else:
                    add(*places, values)
            first += len(terms[which].types)
        system.addForce(force)


def _add_nonbonded(
    system: openmm.System,
    terms: Sequence[Terms],
    order: Sequence[int],
    tables: tuple[dict[int, int], NDArray[np.float64], NDArray[np.float64]],
    cutoff: float,
) -> None:
    place, size, depth = tables
    reach = cutoff / ANGSTROM_PER_NM
    shift = 1.0 / (reach + _BUFFER) if cutoff else 0.0
    force = openmm.CustomNonbondedForce(
        f"{_VDW}+{COULOMB}*q1*q2*(1/(r+{_BUFFER})-{shift});"
        "size=sizes(type1,type2); depth=depths(type1,type2)"
    )
    n = len(place)
    force.addTabulatedFunction("sizes", openmm.Discrete2DFunction(n, n, size.T.ravel().tolist()))
    force.addTabulatedFunction("depths", openmm.Discrete2DFunction(n, n, depth.T.ravel().tolist()))
    force.addPerParticleParameter("q")
    force.addPerParticleParameter("type")
    if cutoff:
        force.setNonbondedMethod(openmm.CustomNonbondedForce.CutoffPeriodic)
        force.setCutoffDistance(reach)
        force.setUseSwitchingFunction(True)
        force.setSwitchingDistance(0.85 * reach)
    first = 0
    for which in order:
        own = terms[which]
        for charge, kind in zip(own.charges, own.types, strict=True):
            force.addParticle([charge, place[kind]])
        for i, j in own.exclusions:
            force.addExclusion(first + i, first + j)
        first += len(own.types)
    system.addForce(force)


class OpenmmForces:
    """Forces of a System without a box, for `sampling`.

    Parameters
    ----------
    system
        The System; its energy is that of one thread of the CPU platform.
    """

    def __init__(self, system: openmm.System) -> None:
        self._context = make_context(system, openmm.VerletIntegrator(0.001))

    def energy(self, positions: NDArray[np.float64]) -> float:
        """Energy [kJ/mol]."""
        self._context.setPositions(positions / ANGSTROM_PER_NM)
        state = self._context.getState(getEnergy=True)
        return state.getPotentialEnergy().value_in_unit(openmm.unit.kilojoule_per_mole)

    def __call__(self, positions: NDArray[np.float64]) -> NDArray[np.float64]:
        """Forces [eV/Å]."""
        self._context.setPositions(positions / ANGSTROM_PER_NM)
        forces = self._context.getState(getForces=True).getForces(asNumpy=True)
        return np.asarray(forces._value) / KJ_PER_MOL_NM_PER_EV_ANGSTROM

    def minimize(self, positions: NDArray[np.float64], steps: int) -> NDArray[np.float64]:
        """Positions [Å] after so many steps of minimisation."""
        self._context.setPositions(positions / ANGSTROM_PER_NM)
        openmm.LocalEnergyMinimizer.minimize(self._context, maxIterations=steps)
        found = self._context.getState(getPositions=True).getPositions(asNumpy=True)
        return np.asarray(found._value) * ANGSTROM_PER_NM


def make_context(system: openmm.System, integrator: openmm.Integrator) -> openmm.Context:
    """A Context on one thread: there is one such process for each core."""
    platform = openmm.Platform.getPlatformByName("CPU")
    return openmm.Context(system, integrator, platform, {"Threads": "1"})


def sample_box(
    system: openmm.System,
    positions: NDArray[np.float64],
    config: SamplingConfig,
    temperature: float,
    seed: int,
) -> list[Sample]:
    """Configurations of a periodic System by Langevin dynamics in OpenMM.

    Parameters
    ----------
    system
        The System.
    positions
        Start [Å], shape ``(n_atoms, 3)``.
    config
        Steps and frames.
    temperature
        [K].
    seed
        Of velocities and noise, positive.

    Raises
    ------
    SamplingError
        If the dynamics blow up.
    """
    integrator = openmm.LangevinMiddleIntegrator(temperature, 10.0, config.timestep / 1000.0)
    integrator.setRandomNumberSeed(seed)
    context = make_context(system, integrator)
    context.setPositions(positions / ANGSTROM_PER_NM)
    openmm.LocalEnergyMinimizer.minimize(context, maxIterations=100)
    context.setVelocitiesToTemperature(temperature, seed)
    found = []
    try:
        integrator.step(config.equilibration)
        for _ in range(config.frames):
            integrator.step(config.interval)
            state = context.getState(getPositions=True, getForces=True)
            at = np.asarray(state.getPositions(asNumpy=True)._value) * ANGSTROM_PER_NM
            forces = np.asarray(state.getForces(asNumpy=True)._value)
            forces = forces / KJ_PER_MOL_NM_PER_EV_ANGSTROM
            if not np.isfinite(at).all() or not math.isfinite(float(forces.sum())):
                raise SamplingError("the dynamics blew up")
            if np.linalg.norm(forces, axis=1).max() < config.max_force:
                found.append(Sample(at, temperature))
    except openmm.OpenMMException as error:
        raise SamplingError(f"the dynamics failed: {error}") from error
    return found
