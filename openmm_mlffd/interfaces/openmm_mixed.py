"""Mixed Systems in which the student's charges act on the classical atoms."""

import copy
from collections.abc import Callable
from typing import Any

import openmm
from openmm import unit
from openmmml.embeddings import utilities

from openmm_mlffd.charges import has_charges
from openmm_mlffd.interfaces.openmm_embedding import (
    VERSION,
    ElectrostaticEmbedding,
    EmbeddingSettings,
)
from openmm_mlffd.modelfile import StudentHeader

ELECTROSTATIC = "electrostatic"
"""Name of the embedding."""

_METHODS = {
    openmm.NonbondedForce.NoCutoff: "exact",
    openmm.NonbondedForce.CutoffNonPeriodic: "cutoff",
    openmm.NonbondedForce.CutoffPeriodic: "periodic cutoff",
    openmm.NonbondedForce.Ewald: "ewald",
    openmm.NonbondedForce.PME: "ewald",
    openmm.NonbondedForce.LJPME: "ewald",
}
_OTHER_CHARGES = (
    openmm.AmoebaMultipoleForce,
    openmm.AmoebaGeneralizedKirkwoodForce,
    openmm.CustomGBForce,
    openmm.CustomHbondForce,
    openmm.DrudeForce,
    openmm.GBSAOBCForce,
)
_CHARGE_NAMES = {"q", "charge", "charges"}
_ROUNDING = 0.02
"""How far the sum of a molecule's classical charges may be from an integer [e]."""


def classical_part(
    topology: openmm.app.Topology, system: openmm.System, atoms: list[int]
) -> openmm.System:
    """A copy of a System without what the student does, and without the charges of its atoms.

    Parameters
    ----------
    topology
        The Topology.
    system
        The classical System; not changed.
    atoms
        Indices of the student's atoms.
    """
    mixed = utilities.removeBonds(system, topology, atoms, True)
    for force in mixed.getForces():
        if isinstance(force, openmm.NonbondedForce):
            for i, first in enumerate(atoms):
                _, sigma, epsilon = force.getParticleParameters(first)
                force.setParticleParameters(first, 0.0, sigma, epsilon)
                for second in atoms[:i]:
                    force.addException(first, second, 0.0, 1.0, 0.0, True)
            force.setExceptionsUsePeriodicBoundaryConditions(
                system.usesPeriodicBoundaryConditions()
            )
        elif isinstance(force, openmm.CustomNonbondedForce):
            utilities.addCustomNonbondedExclusions(force, atoms)
    return mixed


def embedding_force(
    topology: openmm.app.Topology,
    system: openmm.System,
    atoms: list[int],
    student: dict[str, Any],
) -> openmm.PythonForce:
    """The force between the student's charges and the classical ones.

    Parameters
    ----------
    topology
        The Topology; its bonds say what is a molecule.
    system
        The classical System.
    atoms
        Indices of the student's atoms.
    student
        The settings of `EmbeddingSettings` that say which student, and how it works.

    Raises
    ------
    ValueError
        If a molecule is cut, or the System has charges in a form that cannot be embedded in.
    """
    _refuse_cuts(topology, atoms)
    nonbonded = _nonbonded(system, set(atoms))
    charges = [
        nonbonded.getParticleParameters(i)[0].value_in_unit(unit.elementary_charge)
        for i in range(nonbonded.getNumParticles())
    ]
    inside = set(atoms)
    others = [i for i, charge in enumerate(charges) if charge != 0.0 and i not in inside]
    molecules, totals = _molecules(topology, atoms, charges)
    settings = EmbeddingSettings(
        **student,  # type: ignore[typeddict-item]  # mypy knows no TypedDict in parts
        version=VERSION,
        atoms=[*atoms, *others],
        molecules=molecules,
        totals=totals,
        charges=[charges[i] for i in others],
        method=_METHODS[nonbonded.getNonbondedMethod()],
        cutoff=nonbonded.getCutoffDistance().value_in_unit(unit.angstrom),
        dielectric=nonbonded.getReactionFieldDielectric(),
    )
    function = ElectrostaticEmbedding(settings)
    function.start()  # a damaged student is reported here, not in the first step
    force = openmm.PythonForce(function)
    force.setUsesPeriodicBoundaryConditions(function.periodic)
    force.setParticles(settings["atoms"])
    force.setName("MLFFD electrostatic embedding")
    return force


def check_student(header: StudentHeader, args: dict[str, Any]) -> None:
    """Refuse a student without charges, and keywords that mean nothing here.

    Raises
    ------
    ValueError
        If the student has no charges, or a keyword of cut bonds or of the long range is given.
    """
    if not has_charges(header.architecture):
        raise ValueError(
            f"embedding='electrostatic' needs a student with partial charges, and {header.name!r} "
            "has none: use embedding='mechanical', or a student trained with model.charges=true "
            "and loss.charges"
        )
    if args.get("linkAtomDistances"):
        raise ValueError(
            "linkAtomDistances: embedding='electrostatic' takes whole molecules, there are no cut "
            "bonds to cap"
        )
    if args.get("mlLongRange") is not None:
        raise ValueError(
            "mlLongRange: with embedding='electrostatic' the student's charges have the long range "
            "of the classical System; leave it out"
        )


def interpolated(
    topology: openmm.app.Topology,
    system: openmm.System,
    mixed: openmm.System,
    atoms: list[int],
    forces: Callable[[utilities.InterpolationHelper], None],
) -> openmm.System:
    """A System between the classical one and the mixed one, by ``lambda_interpolate``.

    Parameters
    ----------
    topology
        The Topology.
    system
        The classical System; not changed.
    mixed
        From `classical_part`; used up.
    atoms
        Indices of the student's atoms.
    forces
        Adds the student's forces to an `InterpolationHelper`.
    """
    system = copy.deepcopy(system)
    for force in system.getForces():
        if isinstance(force, openmm.NonbondedForce):  # as in the mixed System
            force.setExceptionsUsePeriodicBoundaryConditions(
                system.usesPeriodicBoundaryConditions()
            )
    helper = utilities.InterpolationHelper()
    forces(helper)
    helper.addMMBondedTerms(system, topology, atoms)
    helper.setupNonbonded(mixed, system)
    helper.setupInterpolation(mixed)
    return mixed


def _refuse_cuts(topology: openmm.app.Topology, atoms: list[int]) -> None:
    cuts = utilities.findLinkBonds(topology, atoms)
    if cuts:
        inside, outside = cuts[0]
        raise ValueError(
            "embedding='electrostatic' takes whole molecules, but the bond between atom "
            f"{inside} and atom {outside} is cut: add the rest of the molecule, or use "
            "embedding='mechanical'"
        )


def _nonbonded(system: openmm.System, inside: set[int]) -> openmm.NonbondedForce:
    """The one force with charges, if there is nothing that embedding would get wrong."""
    found = [f for f in system.getForces() if isinstance(f, openmm.NonbondedForce)]
    if len(found) != 1:
        raise ValueError(
            "embedding='electrostatic' needs a System with one NonbondedForce, and this one has "
            f"{len(found)}"
        )
    for force in system.getForces():
        names = set()
        if isinstance(force, openmm.CustomNonbondedForce):
            n = force.getNumPerParticleParameters()
            names = {force.getPerParticleParameterName(i).lower() for i in range(n)}
        if isinstance(force, _OTHER_CHARGES) or names & _CHARGE_NAMES:
            raise ValueError(
                "embedding='electrostatic' knows the charges of a NonbondedForce only, and the "
                f"{type(force).__name__} has charges of its own, such as those of an implicit "
                "solvent: use embedding='mechanical', or explicit solvent"
            )
    nonbonded = found[0]
    if nonbonded.getNumParticleParameterOffsets() or nonbonded.getNumExceptionParameterOffsets():
        raise ValueError(
            "embedding='electrostatic' needs charges that do not depend on parameters of the "
            "Context: the NonbondedForce has parameter offsets"
        )
    for i in range(nonbonded.getNumExceptions()):
        first, second = nonbonded.getExceptionParameters(i)[:2]
        if (first in inside) != (second in inside):
            raise ValueError(
                "embedding='electrostatic' needs the student's atoms and the others to be "
                f"strangers, but the NonbondedForce has an exception for atoms {first} and {second}"
            )
    return nonbonded


def _molecules(
    topology: openmm.app.Topology, atoms: list[int], charges: list[float]
) -> tuple[list[int], list[int]]:
    """Index of each atom's molecule, and the total charge of each."""
    above = {i: i for i in atoms}

    def root(i: int) -> int:
        while above[i] != i:
            i = above[i]
        return i

    for bond in topology.bonds():
        if bond.atom1.index in above:
            first, second = root(bond.atom1.index), root(bond.atom2.index)
            above[max(first, second)] = min(first, second)
    roots = sorted({root(i) for i in atoms})
    molecules = [roots.index(root(i)) for i in atoms]
    totals = []
    for index in range(len(roots)):
        total = sum(charges[a] for a, m in zip(atoms, molecules, strict=True) if m == index)
        if abs(total - round(total)) > _ROUNDING:
            raise ValueError(
                f"the classical charges of the molecule with atom {roots[index]} add up to "
                f"{total:.3f} e, which is no total charge of a molecule: are bonds missing in the "
                "Topology?"
            )
        totals.append(round(total))
    return molecules, totals
