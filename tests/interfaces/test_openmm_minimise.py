"""OpenMM's own minimiser, from symmetric molecules: its first trial moves atoms by 10 Å in all."""

import numpy as np
import openmm
import pytest
from openmm import app
from openmmml import MLPotential
from rdkit import Chem
from rdkit.Chem import AllChem

from openmm_mlffd.modelfile import bundled_students
from openmm_mlffd.units import ANGSTROM_PER_NM

SYMMETRIC = {
    "methane": "C",
    "ammonium": "[NH4+]",
    "tetrafluoromethane": "FC(F)(F)F",
    "tetrachloromethane": "ClC(Cl)(Cl)Cl",
    "cyclopropane": "C1CC1",
    "neopentane": "CC(C)(C)C",
    "tetramethylammonium": "C[N+](C)(C)C",
    "benzene": "c1ccccc1",
    "triazine": "n1cncnc1",
    "hexafluorobenzene": "Fc1c(F)c(F)c(F)c(F)c1F",
    "cyclohexane": "C1CCCCC1",
    "cubane": "C12C3C4C1C5C2C3C45",
    "adamantane": "C1C2CC3CC1CC(C2)C3",
    "diazabicyclooctane": "C1CN2CCN1CC2",
}


def built(smiles):
    """Topology and positions [nm] as force fields make them: perfectly symmetric."""
    molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
    assert AllChem.EmbedMolecule(molecule, randomSeed=1) == 0
    AllChem.MMFFOptimizeMolecule(molecule)
    topology = app.Topology()
    residue = topology.addResidue("LIG", topology.addChain())
    atoms = [
        topology.addAtom(
            f"{a.GetSymbol()}{a.GetIdx()}", app.Element.getByAtomicNumber(a.GetAtomicNum()), residue
        )
        for a in molecule.GetAtoms()
    ]
    for bond in molecule.GetBonds():
        topology.addBond(atoms[bond.GetBeginAtomIdx()], atoms[bond.GetEndAtomIdx()])
    return topology, molecule.GetConformer().GetPositions() / ANGSTROM_PER_NM


@pytest.mark.parametrize("student", bundled_students())
@pytest.mark.parametrize("name", SYMMETRIC)
def test_symmetric_molecules_can_be_minimised(name, student):
    topology, positions = built(SYMMETRIC[name])
    system = MLPotential("mlffd", model=student).createSystem(topology)
    context = openmm.Context(
        system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
    )
    context.setPositions(positions)
    before = context.getState(energy=True).getPotentialEnergy()._value
    openmm.LocalEnergyMinimizer.minimize(context, 10.0, 60)
    state = context.getState(energy=True, positions=True)
    found = state.getPositions(asNumpy=True)._value
    fall = before - state.getPotentialEnergy()._value  # kJ/mol
    assert 0.0 <= fall < 300.0
    pairs = [(b.atom1.index, b.atom2.index) for b in topology.bonds()]
    for i, j in pairs:
        length = np.linalg.norm(positions[i] - positions[j])
        assert np.linalg.norm(found[i] - found[j]) == pytest.approx(length, rel=0.15)
