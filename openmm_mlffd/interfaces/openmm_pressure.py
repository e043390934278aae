"""Virial and pressure of a Context that holds a student."""

import copy
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

try:
    import openmm
    from openmm import unit
except ImportError as error:
    raise ImportError(f"OpenMM is needed ({error}): pip install 'openmm-mlffd[openmm]'") from error

from openmm_mlffd.evaluator import Evaluator
from openmm_mlffd.interfaces.openmm_embedding import ElectrostaticEmbedding
from openmm_mlffd.interfaces.openmm_force import StudentComputation
from openmm_mlffd.interfaces.openmm_stored import package_functions, student_functions
from openmm_mlffd.units import (
    ANGSTROM_PER_NM,
    BAR_PER_EV_PER_CUBIC_ANGSTROM,
    FEMTOSECONDS_PER_TIME_UNIT,
    KJ_PER_MOL_PER_EV,
)

_STRAIN = 5e-4
"""Of the finite differences: two-sided, on either side and at twice the distance."""

# forces without an energy
_SILENT = (
    openmm.CMMotionRemover,
    openmm.AndersenThermostat,
    openmm.MonteCarloBarostat,
    openmm.MonteCarloAnisotropicBarostat,
    openmm.MonteCarloMembraneBarostat,
    openmm.MonteCarloFlexibleBarostat,
)


class Pressure(NamedTuple):
    """Pressure of a Context at one moment. Averages over a run mean something, one does not."""

    bar: float
    """Pressure [bar], a third of the trace of the tensor."""

    tensor: NDArray[np.float64]
    """Pressure tensor [bar], symmetric, shape (3, 3)."""

    virial: NDArray[np.float64]
    """dE/dε, ε the strain of atoms and box [eV], symmetric, shape (3, 3)."""

    kinetic: NDArray[np.float64]
    """Σ m v ⊗ v [eV], shape (3, 3); its trace is twice the kinetic energy that OpenMM reports."""

    volume: float
    """[Å^3]."""


class Barometer:
    """Measures the pressure of Contexts of one System.

    Where students are the only forces, the virial is the students' own: one evaluation. Where
    there are other forces, or virtual sites (caps of cut bonds), it is the derivative of the
    energy by finite differences, on the Reference platform with students in double precision: 24
    evaluations, for small systems.

    Parameters
    ----------
    system
        The System; not changed.

    Raises
    ------
    ValueError
        If the System is not periodic, or has constraints: their forces are in no virial. Use
        `openmm.MonteCarloBarostat.computeCurrentPressure` for these.
    """

    def __init__(self, system: openmm.System) -> None:
        if not system.usesPeriodicBoundaryConditions():
            raise ValueError("the pressure needs a periodic System")
        if system.getNumConstraints():
            raise ValueError(
                f"the System has {system.getNumConstraints()} constraints, whose forces are in no "
                "virial; MonteCarloBarostat.computeCurrentPressure(context) has the pressure of "
                "whole molecules instead"
            )
        masses = [
            system.getParticleMass(i).value_in_unit(unit.dalton)
            for i in range(system.getNumParticles())
        ]
        self._masses = np.array(masses)
        functions = student_functions(system)
        energetic = {
            i for i, force in enumerate(system.getForces()) if not isinstance(force, _SILENT)
        }
        sites = any(system.isVirtualSite(i) for i in range(system.getNumParticles()))
        plain = all(isinstance(f, StudentComputation) for f in functions.values())
        self._evaluators: list[tuple[Evaluator, list[int] | None]] = []
        self._copy: openmm.Context | None = None
        if energetic == set(functions) and plain and not sites:
            self._evaluators = [(f.start(), f.settings["atoms"]) for f in functions.values()]
        else:
            self._copy = _double_precision_context(system)

    def measure(self, context: openmm.Context) -> Pressure:
        """Pressure of a Context where it is now; the Context is not changed.

        Raises
        ------
        openmm.OpenMMException
            If the energy cannot be computed.
        """
        state = context.getState(positions=True, velocities=True, parameters=True, energy=True)
        positions = state.getPositions(asNumpy=True).value_in_unit(unit.nanometer)
        box = state.getPeriodicBoxVectors(asNumpy=True).value_in_unit(unit.nanometer)
        if self._copy is None:
            virial = self._virial_of_students(positions * ANGSTROM_PER_NM, box * ANGSTROM_PER_NM)
        else:
            virial = _virial_by_differences(self._copy, state, np.array(positions), np.array(box))
        velocities = state.getVelocities(asNumpy=True).value_in_unit(
            unit.angstrom / unit.femtosecond
        )
        velocities = np.array(velocities) * FEMTOSECONDS_PER_TIME_UNIT
        kinetic = np.einsum("i,ij,ik->jk", self._masses, velocities, velocities)
        # leapfrogs hold velocities of half a step earlier, but know the energy of now
        energy = state.getKineticEnergy()._value / KJ_PER_MOL_PER_EV
        trace = float(np.trace(kinetic))
        if trace > 0.0:
            kinetic *= 2.0 * energy / trace
        volume = abs(float(np.linalg.det(box * ANGSTROM_PER_NM)))
        tensor = (kinetic - virial) / volume * BAR_PER_EV_PER_CUBIC_ANGSTROM
        return Pressure(float(np.trace(tensor)) / 3, tensor, virial, kinetic, volume)

    def _virial_of_students(
        self, positions: NDArray[np.float64], cell: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        virial = np.zeros((3, 3))
        for evaluator, atoms in self._evaluators:
            virial += evaluator.compute(
                positions if atoms is None else positions[atoms], cell
            ).virial
        return virial


def pressure(context: openmm.Context) -> Pressure:
    """Pressure and virial of a periodic Context that holds a student, at this moment.

    Parameters
    ----------
    context
        The Context; not changed.

    Returns
    -------
    Pressure
        P = (Σ m v ⊗ v − dE/dε) / V.

    Raises
    ------
    ValueError
        If the System is not periodic, or has constraints.

    See Also
    --------
    Barometer : for more than one measurement; it loads the student once.
    """
    return Barometer(context.getSystem()).measure(context)


def _double_precision_context(system: openmm.System) -> openmm.Context:
    system = copy.deepcopy(system)
    for index, function in sorted(package_functions(system).items(), reverse=True):
        if not isinstance(function, StudentComputation | ElectrostaticEmbedding):
            continue
        old = system.getForce(index)
        settings = dict(function.settings) | {"precision": "double"}
        force = openmm.PythonForce(type(function)(settings))  # type: ignore[arg-type]
        force.setUsesPeriodicBoundaryConditions(old.usesPeriodicBoundaryConditions())
        force.setParticles(list(old.getParticles()))
        system.removeForce(index)
        system.addForce(force)
    return openmm.Context(
        system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference")
    )


def _virial_by_differences(
    context: openmm.Context,
    state: Any,
    positions: NDArray[np.float64],
    box: NDArray[np.float64],
) -> NDArray[np.float64]:
    for name, value in state.getParameters().items():
        context.setParameter(name, value)
    virial = np.zeros((3, 3))
    weights = ((-2, 1.0), (-1, -8.0), (1, 8.0), (2, -1.0))
    # below the diagonal only: OpenMM's boxes have nothing above it, and energies do not change
    # with rotations
    for i, j in ((0, 0), (1, 1), (2, 2), (1, 0), (2, 0), (2, 1)):
        for steps, weight in weights:
            strain = np.eye(3)
            strain[i, j] += steps * _STRAIN
            context.setPeriodicBoxVectors(*box @ strain)
            context.setPositions(positions @ strain)
            context.computeVirtualSites()
            energy = context.getState(energy=True).getPotentialEnergy()._value / KJ_PER_MOL_PER_EV
            virial[i, j] += weight * energy / (12 * _STRAIN)
    return virial + np.tril(virial, -1).T
