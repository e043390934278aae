from pathlib import Path

import numpy as np
import pytest
from openmm import unit
from rdkit import Chem
from rdkit.Chem import AllChem

from openmm_mlffd.validation.structures import StructureError, formal_charge, read_structure

EXAMPLES = Path(__file__).parents[2] / "examples" / "structures"


def write(path, smiles, *, hydrogens=True, flat=False):
    molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
    AllChem.EmbedMolecule(molecule, randomSeed=1)
    if not hydrogens:
        molecule = Chem.RemoveHs(molecule)
    if flat:
        AllChem.Compute2DCoords(molecule)
    with Chem.SDWriter(str(path)) as writer:
        writer.write(molecule)
    return molecule


def test_an_sdf_keeps_its_hydrogens_order_and_coordinates(tmp_path):
    path = tmp_path / "paracetamol.sdf"
    molecule = write(path, "CC(=O)Nc1ccc(O)cc1")
    topology, positions = read_structure(path)
    assert topology.getNumAtoms() == 20
    assert topology.getNumBonds() == 20
    elements = [atom.element.symbol for atom in topology.atoms()]
    assert elements == [atom.GetSymbol() for atom in molecule.GetAtoms()]
    expected = molecule.GetConformer().GetPositions()
    np.testing.assert_allclose(positions.value_in_unit(unit.angstrom), expected, atol=1e-4)


def test_implicit_hydrogens_are_refused_and_counted(tmp_path):
    path = tmp_path / "paracetamol.sdf"
    write(path, "CC(=O)Nc1ccc(O)cc1", hydrogens=False)
    with pytest.raises(StructureError, match=r"9 hydrogens are implicit.*addCoords=True"):
        read_structure(path)


@pytest.mark.parametrize("smiles", ["ClC(Cl)(Cl)Cl", "O=C=O"])
def test_molecules_without_any_hydrogen_pass(tmp_path, smiles):
    write(tmp_path / "molecule.sdf", smiles)
    topology, _ = read_structure(tmp_path / "molecule.sdf")
    assert topology.getNumAtoms() == Chem.MolFromSmiles(smiles).GetNumAtoms()


def test_formal_charges_are_kept(tmp_path):
    write(tmp_path / "acetate.sdf", "CC(=O)[O-]")
    topology, _ = read_structure(tmp_path / "acetate.sdf")
    assert sum(atom.formalCharge for atom in topology.atoms()) == formal_charge(topology) == -1
    assert formal_charge(read_structure(EXAMPLES / "alanine-dipeptide.pdb")[0]) is None


def test_flat_coordinates_are_refused(tmp_path):
    write(tmp_path / "flat.sdf", "CCO", flat=True)
    with pytest.raises(StructureError, match="not three-dimensional"):
        read_structure(tmp_path / "flat.sdf")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.pdb", None, "no such file"),
        ("some.xyz", "1\n\nH 0 0 0\n", r"must end in \.pdb"),
        ("broken.sdf", "nothing\n", "not a molecule"),
    ],
)
def test_other_files_are_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(StructureError, match=message):
        read_structure(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "n_atoms", "n_bonds", "periodic"),
    [
        ("alanine-dipeptide.pdb", 22, 21, False),
        ("pramipexole.sdf", 31, 32, False),
        ("water-64.pdb", 192, 128, True),
    ],
)
def test_the_structures_of_the_examples_are_complete(name, n_atoms, n_bonds, periodic):
    topology, positions = read_structure(EXAMPLES / name)
    assert topology.getNumAtoms() == len(positions) == n_atoms
    assert topology.getNumBonds() == n_bonds
    assert (topology.getPeriodicBoxVectors() is not None) is periodic
