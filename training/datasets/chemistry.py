"""Names and charges of molecules from SMILES."""

from typing import Any


def name_and_charge(smiles: str) -> tuple[str, int | None]:
    """Canonical SMILES without atom numbers and explicit hydrogens, and the total charge [e].

    Text that is no SMILES is given back as it is, with None for the charge.
    """
    from rdkit import Chem
    from rdkit.rdBase import BlockLogs

    with BlockLogs():
        settings: Any = Chem.SmilesParserParams()
        settings.removeHs = False
        molecule: Any = Chem.MolFromSmiles(smiles, settings)
        if molecule is None:
            return smiles, None
        charge = Chem.GetFormalCharge(molecule)
        for atom in molecule.GetAtoms():
            atom.SetAtomMapNum(0)
        return str(Chem.MolToSmiles(Chem.RemoveHs(molecule))), int(charge)
