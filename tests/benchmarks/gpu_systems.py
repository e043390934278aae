"""Systems that `openmm_gpu.py` measures: a peptide, water, a protein with a ligand."""

from pathlib import Path

import numpy as np
import openmm
from openmm import app, unit

STRUCTURES = Path(__file__).parents[2] / "examples" / "structures"


def peptide():
    pdb = app.PDBFile(str(STRUCTURES / "alanine-dipeptide.pdb"))
    return pdb.topology, pdb.positions


def water(n_molecules):
    modeller = app.Modeller(app.Topology(), [] * unit.nanometer)
    modeller.addSolvent(app.ForceField("tip3p.xml"), numAdded=n_molecules, model="tip3p")
    return modeller.topology, modeller.positions


def villin(edge, solvate=True):
    """The villin headpiece with phenol in a cube of water of that edge [nm]; classical System."""
    pdb = app.PDBFile(str(STRUCTURES / "villin-phenol.pdb"))
    force_field = app.ForceField(
        "amber14-all.xml", "amber14/tip3pfb.xml", str(STRUCTURES / "phenol.xml")
    )
    modeller = app.Modeller(pdb.topology, pdb.positions)
    if solvate:
        modeller.addSolvent(force_field, boxSize=openmm.Vec3(edge, edge, edge), neutralize=False)
    else:
        modeller.topology.setPeriodicBoxVectors(edge * np.eye(3) * unit.nanometer)
    classical = force_field.createSystem(
        modeller.topology, nonbondedMethod=app.PME, nonbondedCutoff=0.8 * unit.nanometer
    )
    return modeller.topology, modeller.positions, classical


def temperature(context):
    """[K], from the kinetic energy of what can move: rigid water has no vibrations."""
    system = context.getSystem()
    moving = sum(system.getParticleMass(i)._value > 0.0 for i in range(system.getNumParticles()))
    n_dof = 3 * moving - system.getNumConstraints() - 3
    kinetic = context.getState(energy=True).getKineticEnergy()
    return float(2 * kinetic / (n_dof * unit.MOLAR_GAS_CONSTANT_R) / unit.kelvin)
