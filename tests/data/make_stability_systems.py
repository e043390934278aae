"""Makes the structures of the stability section: `python tests/data/make_stability_systems.py`.

Drugs and peptides that are not in the training split of the bundled student's data, alone and in
water; they are in the repository, in openmm_mlffd/validation/suite/systems. With a data set as
argument, the script refuses molecules whose skeleton is in its training split. Everything is
seeded, but other versions of RDKit and OpenMM give other coordinates.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import openmm
from openmm import app, unit
from rdkit import Chem
from rdkit.Chem import AllChem
from rdkit.rdBase import BlockLogs

from openmm_mlffd.training.generation.peptides import peptide_smiles
from openmm_mlffd.training.generation.recipe import load_recipe
from openmm_mlffd.training.generation.run import generate
from openmm_mlffd.training.hdf5 import Dataset
from openmm_mlffd.validation.structures import topology_of
from openmm_mlffd.validation.suite.systems import BOXES, UNSEEN

FOLDER = Path(__file__).parents[2] / "openmm_mlffd" / "validation" / "suite" / "systems"
EXCLUDED = Path(__file__).parents[2] / "training" / "configs" / "stability.inchikeys"
SEED = 7

DRUGS = {
    "apixaban": "COc1ccc(-n2nc(C(N)=O)c3c2C(=O)N(c2ccc(N4CCCCC4=O)cc2)CC3)cc1",
    "artemisinin": "CC1CCC2C(C)C(=O)OC3OC4(C)CCC1C23OO4",
    "caffeine": "Cn1c(=O)c2c(ncn2C)n(C)c1=O",
    "camptothecin": "CC[C@@]1(O)C(=O)OCc2c1cc1-c3nc4ccccc4cc3Cn1c2=O",
    "ciprofloxacin": "O=C(O)c1cn(C2CC2)c2cc(N3CCNCC3)c(F)cc2c1=O",
    "dimethyl fosfomycin": "C[C@@H]1O[C@@H]1P(=O)(OC)OC",
    "dolutegravir": "C[C@@H]1CCO[C@@H]2Cn3cc(C(=O)NCc4ccc(F)cc4F)c(=O)c(O)c3C(=O)N12",
    "losartan": "CCCCc1nc(Cl)c(CO)n1Cc1ccc(-c2ccccc2-c2nnn[nH]2)cc1",
    "molnupiravir": "CC(C)C(=O)OC[C@H]1O[C@@H](n2ccc(NO)nc2=O)[C@H](O)[C@@H]1O",
    "nirmatrelvir": "CC1(C)[C@@H]2[C@H]1[C@@H](C(=O)N[C@@H](C[C@@H]1CCNC1=O)C#N)N(C2)C(=O)"
    "[C@@H](NC(=O)C(F)(F)F)C(C)(C)C",
    "remdesivir": "CCC(CC)COC(=O)[C@H](C)N[P@](=O)(OC[C@H]1O[C@@](C#N)(c2ccc3c(N)ncnn23)"
    "[C@H](O)[C@@H]1O)Oc1ccccc1",
    "vildagliptin": "N#C[C@@H]1CCCN1C(=O)CNC12CC3CC(CC(O)(C3)C1)C2",
}
PEPTIDES = ("AAAAAA", "CTNVI", "EWLHC", "MKFQ", "NGPWT", "PQGTY", "WGSD", "YPRH")

# solutes in water: name of the box, SMILES
SOLUTES = {
    "caffeine in water": DRUGS["caffeine"],
    "molnupiravir in water": DRUGS["molnupiravir"],
    "zwitterion GSA in water": peptide_smiles("GSA", "zwitterion"),
}
RECIPE = """
name: box
seed: {seed}
subsets:
  box:
    kind: boxes
    sources: [{{file: solute.smi}}]
    count: 1
    edges: [14.5, 15.0]
    triclinic: 0.0
    densities: [1.2, 1.22]
    sampling: {{frames: 1, equilibration: 1000, temperatures: [300.0]}}
"""


def molecules() -> dict[str, str]:
    """SMILES of all molecules, by name."""
    peptides = {f"peptide {letters}": peptide_smiles(letters) for letters in PEPTIDES}
    return DRUGS | peptides


def conformer(smiles: str) -> Chem.Mol:
    """The molecule with hydrogens, embedded with ETKDG and minimised with MMFF94."""
    molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
    parameters = AllChem.ETKDGv3()
    parameters.randomSeed = SEED
    if AllChem.EmbedMolecule(molecule, parameters):
        raise RuntimeError(f"no conformer of {smiles}")
    AllChem.MMFFOptimizeMolecule(molecule, maxIters=5000)
    return molecule


def write_molecule(smiles: str, path: Path) -> None:
    """As a PDB file with CONECT records, which OpenMM reads as it is."""
    topology, positions = topology_of(conformer(smiles), path)
    for residue in topology.residues():
        residue.name = "LIG"
    with path.open("w") as file:
        app.PDBFile.writeFile(topology, positions, file)


def write_box(smiles: str, path: Path) -> None:
    """A solute in water after 1 ps at 300 K with MMFF94."""
    smiles = Chem.MolToSmiles(Chem.MolFromSmiles(smiles))  # the order that the recipe gives atoms
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "solute.smi").write_text(smiles + "\n")
        (place / "recipe.yaml").write_text(RECIPE.format(seed=SEED))
        summary = generate(load_recipe(place / "recipe.yaml", []), place / "out", progress=False)
        with Dataset(summary.dataset, unlabelled=True) as dataset:
            structure = dataset.read(0, 1)
    solute = Chem.AddHs(Chem.MolFromSmiles(smiles))
    topology = topology_of(conformer(smiles), path)[0]
    for residue in topology.residues():
        residue.name = "LIG"
    n = solute.GetNumAtoms()
    chain = topology.addChain()
    for _ in range((len(structure.atomic_numbers) - n) // 3):
        residue = topology.addResidue("HOH", chain)
        oxygen = topology.addAtom("O", app.element.oxygen, residue)
        for name in ("H1", "H2"):
            topology.addBond(oxygen, topology.addAtom(name, app.element.hydrogen, residue))
    numbers = [a.element.atomic_number for a in topology.atoms()]
    assert numbers == structure.atomic_numbers.tolist()
    vectors = [openmm.Vec3(*row) for row in (structure.cell[0] / 10.0).tolist()]
    topology.setPeriodicBoxVectors(vectors * unit.nanometer)
    with path.open("w") as file:
        app.PDBFile.writeFile(topology, structure.positions.astype(float) * unit.angstrom, file)


def write_excluded(path: Path) -> None:
    """InChIKeys of all of them, which recipes of training data leave out."""
    everything = (molecules() | SOLUTES).values()
    keys = sorted({Chem.MolToInchiKey(Chem.MolFromSmiles(smiles)) for smiles in everything})
    head = "# Molecules and peptides of the stability test (tests/data/make_stability_systems.py)"
    path.write_text("\n".join([f"{head} as InChIKeys.", *keys]) + "\n")


def refuse_seen(data: Path) -> None:
    """Raise if the skeleton of a molecule is in the training split of a data set."""
    with Dataset(data) as dataset:
        names, structures = dataset.group_names(), dataset.in_split("train")
        groups = np.concatenate(
            [block.group for block in dataset.blocks(4096)]
        )[structures]  # fmt: skip
    seen = set()
    with BlockLogs():
        for group in np.unique(groups):
            for part in names[group].split("."):
                molecule = Chem.MolFromSmiles(part)
                if molecule is not None:
                    seen.add(Chem.MolToInchiKey(molecule)[:14])
    for name, smiles in (molecules() | SOLUTES).items():
        if Chem.MolToInchiKey(Chem.MolFromSmiles(smiles))[:14] in seen:
            raise RuntimeError(f"{name} is in the training split of {data}")


if __name__ == "__main__":
    for data in sys.argv[1:]:
        refuse_seen(Path(data))
    assert tuple(molecules()) == UNSEEN
    write_excluded(EXCLUDED)
    for name, smiles in molecules().items():
        write_molecule(smiles, FOLDER / f"unseen-{name.replace(' ', '-')}.pdb")
    for name, smiles in SOLUTES.items():
        write_box(smiles, FOLDER / BOXES[name])
