"""Write training/configs/spice_test.inchikeys: molecules of the SPICE test set.

    python tests/data/make_spice_molecules.py mace-omol-0.csv > spice_test.inchikeys

The table is one of those in the folder `spice` of github.com/peastman/mlipbenchmarks, which names
each molecule and its number of atoms. Ligands are named by their codes in the wwPDB's Chemical
Component Dictionary, which the package biotite holds (pip install biotite rdkit); pentapeptides by
their residues, between acetyl and methyl amide. Dimers of the set are left out: it shares their
molecules with SPICE's training set.
"""

import csv
import sys

import biotite.structure.info as info
from biotite.interface.rdkit import to_mol
from rdkit import Chem

from openmm_mlffd.training.generation.peptides import peptide_smiles

HEADER = """\
# Molecules of the SPICE test set (doi:10.5281/zenodo.17620280): first blocks of their InChIKeys.
# Made by tests/data/make_spice_molecules.py from the names in github.com/peastman/mlipbenchmarks.
"""


def molecule_of(name):
    """Molecule of a code, or of residues joined by hyphens."""
    if "-" not in name:
        return to_mol(info.residue(name))
    letters = "".join(info.one_letter_code(residue) for residue in name.split("-"))
    return Chem.MolFromSmiles(peptide_smiles(letters))


def main():
    sys.stdout.write(HEADER)
    with open(sys.argv[1]) as table:
        rows = [row for row in csv.DictReader(table) if " " not in row["name"]]
    for row in rows:
        molecule = molecule_of(row["name"])
        Chem.SanitizeMol(molecule)
        key = Chem.MolToInchiKey(molecule)[:14]
        found = Chem.AddHs(molecule).GetNumAtoms()
        if found != int(row["atoms"]):
            sys.stderr.write(f"{row['name']}: {found} atoms, {row['atoms']} in the table\n")
        sys.stdout.write(f"{key}  # {row['name']}\n")


if __name__ == "__main__":
    main()
