"""Structures of files: SDF, PDB, and whatever ASE reads."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from openmm_mlffd.training.sources import Frame, SourceError, read_ase, read_sdf
from openmm_mlffd.units import ANGSTROM_PER_NM

FORCE_FIELD = ("amber14-all.xml", "amber14/tip3p.xml")
"""Of PDB files."""

_PH = 7.0


@dataclass(frozen=True)
class Start:
    """A structure of a file, and what is known of its bonds."""

    frame: Frame
    """The structure."""

    molecule: Any = None
    """RDKit molecule, of an SDF."""

    system: Any = None
    """OpenMM System, of a PDB whose residues the force field knows."""


def count_structures(path: Path, *, add_hydrogens: bool, charge: int) -> int:
    """Number of structures of a file; errors as `read_starts`."""
    return len(read_starts(path, add_hydrogens, charge))


@lru_cache(maxsize=4)
def read_starts(path: Path, add_hydrogens: bool, charge: int) -> list[Start]:
    """Structures of a file.

    Parameters
    ----------
    path
        SDF, PDB, or a file that ASE reads.
    add_hydrogens
        Add hydrogens that an SDF or a PDB lacks, instead of refusing the file.
    charge
        Total charge [e] of structures of which the file does not say it.

    Raises
    ------
    SourceError
        If the file is missing, empty, not readable, or lacks hydrogens.
    """
    if not path.is_file():
        raise SourceError(f"{path}: there is no such file")
    if path.suffix.lower() in (".sdf", ".mol"):
        return [
            Start(frame, molecule)
            for frame, molecule in read_sdf(path, add_hydrogens=add_hydrogens)
        ]
    if path.suffix.lower() in (".pdb", ".ent"):
        return [read_pdb(path, add_hydrogens=add_hydrogens, charge=charge)]
    return [Start(frame) for frame in read_ase(path, charge)]


def read_pdb(path: Path, *, add_hydrogens: bool, charge: int) -> Start:
    """The first model of a PDB file.

    Hydrogens of residues that OpenMM knows are those at pH 7; other atoms keep their places. The
    total charge is that of the force field if it knows all residues.

    Raises
    ------
    SourceError
        If the file is not readable, lacks hydrogens, or has atoms of unknown elements.
    """
    from openmm import app, unit

    try:
        pdb = app.PDBFile(str(path))
    except Exception as error:  # OpenMM raises whatever the line makes it
        raise SourceError(f"{path}: OpenMM cannot read it ({error})") from error
    modeller = app.Modeller(pdb.topology, pdb.positions)
    before = modeller.topology.getNumAtoms()
    if not before:
        raise SourceError(f"{path}: has no atoms")
    modeller.addHydrogens(pH=_PH)
    missing = modeller.topology.getNumAtoms() - before
    if missing and not add_hydrogens:
        raise SourceError(
            f"{path}: {missing} hydrogens are missing; write them out, or let them be added "
            "(hydrogens: add)"
        )
    _check_residues(modeller.topology, path)
    system, total = _parametrize(modeller.topology)
    positions = np.array(modeller.positions.value_in_unit(unit.nanometer)) * ANGSTROM_PER_NM
    vectors = modeller.topology.getPeriodicBoxVectors()
    cell = None
    if vectors is not None:
        cell = np.array(vectors.value_in_unit(unit.nanometer)) * ANGSTROM_PER_NM
    frame = Frame(
        numbers=np.array([a.element.atomic_number for a in modeller.topology.atoms()]),
        positions=positions,
        charge=charge if total is None else total,
        group=path.stem,
        subset=path.stem,
        cell=cell,
        pbc=(cell is not None,) * 3,
    )
    return Start(frame, system=system)


def _check_residues(topology: Any, path: Path) -> None:
    for residue in topology.residues():
        elements = [a.element for a in residue.atoms()]
        if None in elements:
            raise SourceError(f"{path}: residue {residue.name} has an atom without an element")
        symbols = {e.symbol for e in elements}
        if symbols >= {"C"} and "H" not in symbols and len(elements) > 3:
            raise SourceError(
                f"{path}: residue {residue.name} has carbon and no hydrogens, and OpenMM does "
                "not know where they belong; write them out"
            )


def _parametrize(topology: Any) -> tuple[Any, int | None]:
    """System and total charge by the force field; None if it lacks a residue."""
    import openmm
    from openmm import app

    periodic = topology.getPeriodicBoxVectors() is not None
    method = app.CutoffPeriodic if periodic else app.NoCutoff
    settings = {"nonbondedMethod": method, "constraints": None, "rigidWater": False}
    if periodic:
        shortest = min(
            v[k].value_in_unit(openmm.unit.nanometer)
            for k, v in enumerate(topology.getPeriodicBoxVectors())
        )
        settings["nonbondedCutoff"] = min(0.9, 0.49 * shortest)
    try:
        system = app.ForceField(*FORCE_FIELD).createSystem(topology, **settings)
    except ValueError:
        return None, None
    force = next(f for f in system.getForces() if isinstance(f, openmm.NonbondedForce))
    charges = [
        force.getParticleParameters(i)[0].value_in_unit(openmm.unit.elementary_charge)
        for i in range(system.getNumParticles())
    ]
    return system, round(sum(charges))
