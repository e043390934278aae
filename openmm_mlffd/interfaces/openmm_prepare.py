"""Start a simulation well: clashes pushed apart, minimised, heated slowly, equilibrated."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

try:
    import openmm
    from openmm import unit
    from openmmml import MLPotential
except ImportError as error:
    raise ImportError(
        f"OpenMM and OpenMM-ML are needed ({error}): pip install 'openmm-mlffd[openmm]'"
    ) from error

from openmm_mlffd.elements import COVALENT_RADII
from openmm_mlffd.interfaces.openmm_alarm import NoveltyProbe, Sample
from openmm_mlffd.interfaces.openmm_topology import describe
from openmm_mlffd.interfaces.openmm_untangle import untangle
from openmm_mlffd.modelfile import ModelFileError
from openmm_mlffd.units import (
    ANGSTROM_PER_NM,
    BOLTZMANN,
    KJ_PER_MOL_NM_PER_EV_ANGSTROM,
    KJ_PER_MOL_PER_EV,
)

CALM_FORCE = 10.0
"""Below this largest force [eV/Å] the structure is left to the minimiser."""

LARGEST_MOVE = 0.05
"""No atom moves farther [Å] in one of the first steps, however large its force."""

PUSH_STEPS = 400
"""At most so many of these steps."""

LEASH = 0.3
"""No atom moves farther [Å] from where it is in one call of OpenMM's minimiser, whose first trial
moves the atoms by 10 Å in all, however small the forces: far enough to find holes."""

BROKEN = 1.5
"""A bond longer than this many times the sum of the covalent radii is broken."""

_MOBILITY = 0.01  # Å per eV/Å, where forces are small
_HEATING_STEP = 0.25  # fs
_HEATING_STAGES = 10
_WALL = 1e8  # of the leash, kJ/mol/nm⁴
_LEASHED_CALLS = 50
_LEASHED_ITERATIONS = 200
_SHAKE = 0.02  # Å; the first trial squeezes a perfectly symmetric molecule into a point
_MINIMUM = 10.0  # kJ/mol/nm, root mean square; it is heated next


class PreparationError(RuntimeError):
    """A structure that cannot be brought to rest; the message says what became of it."""


@dataclass(frozen=True)
class Stage:
    """How things stood at the end of a stage."""

    name: str
    """What was done."""

    energy: float
    """Potential energy [eV]."""

    largest_force: float
    """Largest force on an atom [eV/Å]."""

    temperature: float
    """[K], from the kinetic energy; 0 where nothing moves."""


@dataclass(frozen=True)
class Preparation:
    """A structure that is ready to be simulated."""

    system: openmm.System
    """The System, with hydrogen masses as asked for, without barostat."""

    state: openmm.State
    """Positions, velocities and box, for `context.setState` or to be stored as XML."""

    stages: list[Stage]
    """What was done."""

    timestep: float
    """Advised time step [fs]."""

    advice: list[str]
    """Sentences for the user."""


def prepare(
    topology: Any,
    positions: Any,
    *,
    system: openmm.System | None = None,
    temperature: float = 300.0,
    pressure: float | None = None,
    picoseconds: float = 2.0,
    hydrogen_mass: float | None = None,
    model: str | None = None,
    platform: str | None = None,
    seed: int = 1,
    max_novelty: float | None = None,
    progress: Callable[[str], None] | None = None,
    **keywords: Any,
) -> Preparation:
    """Bring a structure to a temperature, and a box to a pressure, from a start however bad.

    First, atoms that clash are pushed apart with their bonds held, without the student
    (`untangle`). Then its forces are capped: no atom moves farther than `LARGEST_MOVE` in a step,
    until the largest force is below `CALM_FORCE`. Then, from places shaken by 0.02 Å, OpenMM's
    minimiser, with each atom on a leash of `LEASH`, which must not end in what is like nothing
    known; then Langevin dynamics with short steps and strong friction, from 50 K to the
    temperature; then with the advised step.

    Parameters
    ----------
    topology
        The Topology. Its bonds must still be there in the end.
    positions
        Where to start; anything that OpenMM takes.
    system
        The System, such as a mixed one; None to make it from the Topology with a student.
    temperature
        [K].
    pressure
        [bar], in a periodic box; None for constant volume.
    picoseconds
        Length of the equilibration [ps]; heating takes half as long in addition.
    hydrogen_mass
        Mass of hydrogen atoms [amu], taken from the atom that each is bound to; None leaves them.
    model
        Name of a bundled student, or path of a student file; None is the bundled default.
    platform
        Name of an OpenMM platform; None for OpenMM's choice.
    seed
        Of velocities and noise.
    max_novelty
        Largest novelty of an atom, after minimisation and at the end; None for the threshold at
        which a `NoveltyReporter` stops a run, ``float('inf')`` for no limit. Students without
        statistics have none.
    progress
        Told the name of each stage.
    keywords
        As for ``createSystem``.

    Raises
    ------
    ValueError
        If hydrogens are missing (says how to add them), the student does not know an element, or
        an argument makes no sense.
    PreparationError
        If a bond broke on the way, or an atom is more novel than it may be: the start was too bad
        for a student, or fell into a hole of its energy.
    """
    if system is None:
        system = MLPotential("mlffd", model=model).createSystem(topology, **keywords)
    elif keywords or model is not None:
        raise TypeError(f"with a System, there is no use for {', '.join(keywords) or 'model'}")
    if pressure is not None and not system.usesPeriodicBoundaryConditions():
        raise ValueError("a pressure needs a Topology with a box")
    if not temperature > 0.0 or not picoseconds >= 0.0:
        raise ValueError(
            f"a positive temperature and a length that is not negative are needed, got "
            f"{temperature} K and {picoseconds} ps"
        )
    if hydrogen_mass is not None:
        repartition_hydrogen_mass(system, topology, hydrogen_mass)
    run = _Run(system, topology, platform, seed, progress or (lambda _: None), max_novelty)
    timestep = advised_timestep(system)
    run.push_apart(positions)
    run.minimise()
    run.heat(temperature, 0.5 * picoseconds)
    run.equilibrate(temperature, pressure, picoseconds, timestep)
    return Preparation(system, run.state, run.stages, timestep, run.advice(timestep))


def advised_timestep(system: openmm.System) -> float:
    """Time step [fs] for the lightest particle of a System that is not constrained.

    0.5 fs with hydrogens, 1 fs with hydrogens of 3 amu, 2 fs without hydrogens.
    """
    constrained = set()
    for i in range(system.getNumConstraints()):
        constrained.update(system.getConstraintParameters(i)[:2])
    masses = [
        system.getParticleMass(i).value_in_unit(unit.dalton)
        for i in range(system.getNumParticles())
        if i not in constrained
    ]
    lightest = min((m for m in masses if m > 0.0), default=np.inf)
    if lightest < 2.9:
        return 0.5
    return 1.0 if lightest < 9.0 else 2.0


def repartition_hydrogen_mass(system: openmm.System, topology: Any, mass: float) -> None:
    """Make hydrogens heavier, and the atoms that they are bound to lighter by as much.

    Parameters
    ----------
    system
        The System; changed.
    topology
        Its Topology, with bonds.
    mass
        Mass of a hydrogen [amu].

    Raises
    ------
    ValueError
        If an atom would have less mass than its hydrogens, or a hydrogen has no bond.
    """
    done = set()
    for bond in topology.bonds():
        for light, heavy in ((bond.atom1, bond.atom2), (bond.atom2, bond.atom1)):
            if _number(light) != 1 or _number(heavy) == 1:
                continue
            done.add(light.index)
            old = system.getParticleMass(light.index).value_in_unit(unit.dalton)
            rest = system.getParticleMass(heavy.index).value_in_unit(unit.dalton) - (mass - old)
            if not rest > mass > 0.0:
                raise ValueError(
                    f"hydrogens of {mass} amu leave {rest:.2f} amu to {describe(heavy)}"
                )
            system.setParticleMass(light.index, mass)
            system.setParticleMass(heavy.index, rest)
    lone = [a for a in topology.atoms() if _number(a) == 1 and a.index not in done]
    if lone:
        raise ValueError(
            f"{describe(lone[0])} has no bond in the Topology, so that nothing can give it mass"
        )


class _Run:
    """One structure on its way, and where it stands."""

    def __init__(
        self,
        system: openmm.System,
        topology: Any,
        platform: str | None,
        seed: int,
        progress: Callable[[str], None],
        max_novelty: float | None,
    ) -> None:
        self.system = system
        self.stages: list[Stage] = []
        self.state: openmm.State = None
        self._topology = topology
        self._platform = platform
        self._seed = seed
        self._progress = progress
        self._max_novelty = max_novelty
        self._probe: NoveltyProbe | None = None
        self._unmeasured = ""
        try:
            self._probe = NoveltyProbe(system)
        except (ModelFileError, ValueError, openmm.OpenMMException) as error:
            self._unmeasured = str(error)
        masses = [system.getParticleMass(i)._value for i in range(system.getNumParticles())]
        self._mobile = np.array(masses) > 0.0
        removed = 3 * any(isinstance(f, openmm.CMMotionRemover) for f in system.getForces())
        dof = 3 * int(self._mobile.sum()) - system.getNumConstraints() - removed
        self._dof = max(1, dof)
        self._context = self._make_context(self.system, openmm.VerletIntegrator(0.001))

    def push_apart(self, positions: Any) -> None:
        """Clashes first, then steepest descent with a largest move until forces are small."""
        self._progress("pushing apart")
        context = self._context
        start, n_clashes = untangle(self._topology, self.system, positions)
        context.setPositions(start)
        context.computeVirtualSites()
        for step in range(PUSH_STEPS + 1):
            state = context.getState(positions=True, forces=True)
            forces = state.getForces(asNumpy=True)._value / KJ_PER_MOL_NM_PER_EV_ANGSTROM
            forces[~self._mobile] = 0.0
            length = np.linalg.norm(forces, axis=1)
            if length.max(initial=0.0) < CALM_FORCE or step == PUSH_STEPS:
                break
            move = forces * np.minimum(_MOBILITY, LARGEST_MOVE / np.maximum(length, 1e-9))[:, None]
            context.setPositions(state.getPositions(asNumpy=True)._value + move / ANGSTROM_PER_NM)
            if self.system.getNumConstraints():
                context.applyConstraints(1e-5)
            context.computeVirtualSites()
        self._finish(f"{n_clashes} clashes pushed apart, {step} steps")

    def minimise(self) -> None:
        """OpenMM's minimiser, with each atom on a leash that is fixed anew in each call."""
        self._progress("minimising")
        leash = _leash(self._mobile, self.system.usesPeriodicBoundaryConditions())
        # not in a copy of the System: not all forces can be copied
        index = self.system.addForce(leash)
        try:
            context = self._make_context(self.system, openmm.VerletIntegrator(0.001))
            end = self._minimise_leashed(context, leash)
            del context  # before the force that it refers to
        finally:
            self.system.removeForce(index)
        self._context.setPositions(end)
        self._finish("minimised")
        self._check_bonds("after minimisation")
        self._check_novelty("after minimisation")

    def _minimise_leashed(
        self, context: openmm.Context, leash: openmm.CustomExternalForce
    ) -> NDArray[np.float64]:
        """Positions at the end [nm]."""
        atoms = np.flatnonzero(self._mobile)
        start = np.array(self.state.getPositions(asNumpy=True)._value)
        context.setPeriodicBoxVectors(*self.state.getPeriodicBoxVectors())
        shake = np.random.default_rng(self._seed).normal(size=(len(atoms), 3))
        start[atoms] += _SHAKE / ANGSTROM_PER_NM * shake
        for _ in range(_LEASHED_CALLS):
            for k, i in enumerate(atoms):
                leash.setParticleParameters(k, int(i), start[i])
            leash.updateParametersInContext(context)
            context.setPositions(start)
            openmm.LocalEnergyMinimizer.minimize(context, _MINIMUM, _LEASHED_ITERATIONS)
            end = context.getState(positions=True).getPositions(asNumpy=True)._value
            moved = np.linalg.norm(end[atoms] - start[atoms], axis=1).max(initial=0.0)
            start = end
            if moved * ANGSTROM_PER_NM < 0.1 * LEASH:
                break
        return np.array(start)

    def heat(self, temperature: float, picoseconds: float) -> None:
        """Langevin dynamics from 50 K upwards."""
        integrator = openmm.LangevinMiddleIntegrator(50.0, 10.0, _HEATING_STEP * unit.femtosecond)
        self._start(self.system, integrator)
        self._context.setVelocitiesToTemperature(min(50.0, temperature), self._seed)
        n_steps = max(1, round(picoseconds * 1e3 / _HEATING_STEP / _HEATING_STAGES))
        for goal in np.linspace(min(50.0, temperature), temperature, _HEATING_STAGES):
            self._progress(f"heating, {goal:.0f} K")
            integrator.setTemperature(goal)
            integrator.step(n_steps)
        self._finish(f"heated to {temperature:g} K")
        self._check_bonds("while it was heated")

    def equilibrate(
        self, temperature: float, pressure: float | None, picoseconds: float, timestep: float
    ) -> None:
        """Langevin dynamics as it will go on, with a barostat if there is a pressure."""
        self._progress("equilibrating")
        system = self.system
        if pressure is not None:
            system = openmm.XmlSerializer.clone(system)
            barostat = openmm.MonteCarloBarostat(pressure, temperature, 25)
            barostat.setRandomNumberSeed(self._seed)
            system.addForce(barostat)
        integrator = openmm.LangevinMiddleIntegrator(temperature, 1.0, timestep * unit.femtosecond)
        self._start(system, integrator)
        integrator.step(round(picoseconds * 1e3 / timestep))
        box = "" if pressure is None else f" and {pressure:g} bar"
        self._finish(f"equilibrated at {temperature:g} K{box}")
        self._check_bonds("in the equilibration")
        self._check_novelty("in the equilibration")

    def advice(self, timestep: float) -> list[str]:
        """What to do next, and what to beware of."""
        lines = [f"time step: {timestep:g} fs with these masses"]
        if timestep < 1.0:
            lines.append("with hydrogens of 3 amu (hydrogen_mass=3) it may be 1 fs")
        if self._probe is None:
            return [*lines, f"novelty was not measured: {self._unmeasured}"]
        sample = self._probe.sample(self.state)
        header = self._probe.novelty.header
        verdict = "the student knows such surroundings"
        if sample.novelty > header.warn:
            verdict = (
                f"more than the {header.warn:.1f} of nearly all held-out atoms: look at atom "
                f"{sample.atom}, and watch the run with a NoveltyReporter"
            )
        return [*lines, f"largest novelty: {sample.novelty:.1f}, {verdict}"]

    def _make_context(self, system: openmm.System, integrator: Any) -> openmm.Context:
        if hasattr(integrator, "setRandomNumberSeed"):
            integrator.setRandomNumberSeed(self._seed)
        if self._platform is None:
            return openmm.Context(system, integrator)
        return openmm.Context(system, integrator, openmm.Platform.getPlatform(self._platform))

    def _start(self, system: openmm.System, integrator: Any) -> None:
        self._context = self._make_context(system, integrator)
        self._context.setPeriodicBoxVectors(*self.state.getPeriodicBoxVectors())
        self._context.setPositions(self.state.getPositions())
        if self.system.getNumConstraints():
            self._context.applyConstraints(1e-5)
        self._context.setVelocities(self.state.getVelocities())

    def _finish(self, name: str) -> None:
        self.state = self._context.getState(
            positions=True, velocities=True, forces=True, energy=True
        )
        forces = self.state.getForces(asNumpy=True)._value / KJ_PER_MOL_NM_PER_EV_ANGSTROM
        kinetic = self.state.getKineticEnergy()._value / KJ_PER_MOL_PER_EV
        stage = Stage(
            name,
            self.state.getPotentialEnergy()._value / KJ_PER_MOL_PER_EV,
            float(np.linalg.norm(forces[self._mobile], axis=1).max(initial=0.0)),
            2.0 * kinetic / self._dof / BOLTZMANN,
        )
        self.stages.append(stage)
        if not np.isfinite([stage.energy, stage.largest_force]).all():
            raise PreparationError(f"the energy is not finite when {name}")

    def _check_bonds(self, when: str) -> None:
        bonds = [b for b in self._topology.bonds() if _number(b.atom1) and _number(b.atom2)]
        if not bonds:
            return
        lengths = _bond_lengths(bonds, self.state, self.system.usesPeriodicBoundaryConditions())
        radii = [COVALENT_RADII[_number(b.atom1)] + COVALENT_RADII[_number(b.atom2)] for b in bonds]
        worst = int(np.argmax(lengths / radii))
        if lengths[worst] > BROKEN * radii[worst]:
            raise PreparationError(
                f"the bond of {describe(bonds[worst].atom1)} and {describe(bonds[worst].atom2)} "
                f"is {lengths[worst]:.2f} Å long {when}: the structure came apart. Minimise it "
                "with a classical force field first, which cannot break bonds"
            )

    def _check_novelty(self, when: str) -> None:
        """Holes of the energy keep bonds within their lengths, but are like nothing known."""
        if self._probe is None:
            return
        stop = self._probe.novelty.header.stop if self._max_novelty is None else self._max_novelty
        sample: Sample = self._probe.sample(self.state)
        if not sample.novelty <= stop:
            raise PreparationError(
                f"atom {sample.atom} has novelty {sample.novelty:.1f} {when}, beyond {stop:.1f}: "
                "the student knows nothing like its surroundings, and may have fallen into a hole "
                "of its energy. Minimise with a classical force field first; if the structure is "
                "right as it is, pass a larger max_novelty"
            )


def _leash(mobile: NDArray[np.bool_], periodic: bool) -> openmm.CustomExternalForce:
    """Nothing within `LEASH` of a place, a steep wall beyond."""
    square = "(x-x0)^2+(y-y0)^2+(z-z0)^2"
    if periodic:
        square = "periodicdistance(x,y,z,x0,y0,z0)^2"
    force = openmm.CustomExternalForce(f"wall*max(0,far-reach^2)^2; far={square}")
    force.addGlobalParameter("wall", _WALL)
    force.addGlobalParameter("reach", LEASH / ANGSTROM_PER_NM)
    for name in ("x0", "y0", "z0"):
        force.addPerParticleParameter(name)
    for i in np.flatnonzero(mobile):
        force.addParticle(int(i), [0.0, 0.0, 0.0])
    return force


def _bond_lengths(bonds: list[Any], state: openmm.State, periodic: bool) -> NDArray[np.float64]:
    positions = state.getPositions(asNumpy=True)._value * ANGSTROM_PER_NM
    first, second = np.array([(b.atom1.index, b.atom2.index) for b in bonds]).T
    vectors = positions[second] - positions[first]
    if periodic:
        box = state.getPeriodicBoxVectors(asNumpy=True)._value * ANGSTROM_PER_NM
        vectors = vectors - np.round(vectors @ np.linalg.inv(box)) @ box
    return np.linalg.norm(vectors, axis=1)


def _number(atom: Any) -> int:
    return 0 if atom.element is None else int(atom.element.atomic_number)
