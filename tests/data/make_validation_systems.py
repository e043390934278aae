"""Makes the structures of the validation suite: `python tests/data/make_validation_systems.py`.

They are in the repository, in openmm_mlffd/validation/suite/systems; this is how they were made.
Everything is seeded, but other versions of RDKit and OpenMM give other coordinates.
"""

import shutil
from pathlib import Path

import numpy as np
import openmm
from ase import Atoms
from ase.io import write
from openmm import app, unit
from rdkit import Chem
from rdkit.Chem import AllChem

from openmm_mlffd.validation.structures import topology_of

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "openmm_mlffd" / "validation" / "suite" / "systems"
EXAMPLES = ROOT / "examples" / "structures"
SEED = 7

DRUG = "oseltamivir", "CCOC(=O)C1=C[C@@H](OC(CC)CC)[C@H](NC(C)=O)[C@@H](N)C1"

# torsions to scan are in openmm_mlffd/validation/suite/systems.py, as indices of these atoms
MOLECULES = {
    "water": "O",
    "ammonia": "N",
    "methanol": "CO",
    "formaldehyde": "C=O",
    "chloromethane": "CCl",
    "butane": "CCCC",
    "glycol": "OCCO",
    "acetic acid": "CC(=O)O",
    "N-methylacetamide": "CC(=O)NC",
    "dimethyl sulfoxide": "CS(=O)C",
    "ethyl methyl sulfide": "CCSC",
    "benzene": "c1ccccc1",
    "fluorobenzene": "Fc1ccccc1",
    "pyridine": "c1ccncc1",
    "styrene": "C=Cc1ccccc1",
    "trimethyl phosphate": "COP(=O)(OC)OC",
}


def conformer(name: str, smiles: str) -> Chem.Mol:
    """The molecule with hydrogens, embedded with ETKDG and minimised with MMFF94."""
    molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
    parameters = AllChem.ETKDGv3()
    parameters.randomSeed = SEED
    AllChem.EmbedMolecule(molecule, parameters)
    AllChem.MMFFOptimizeMolecule(molecule, maxIters=2000)
    molecule.SetProp("_Name", name)
    return molecule


def write_molecules() -> None:
    write_pdb(conformer(*DRUG), FOLDER / "drug.pdb")
    for name, smiles in MOLECULES.items():
        path = FOLDER / f"molecule-{name.replace(' ', '-')}.pdb"
        write_pdb(conformer(name, smiles), path)


def write_pdb(molecule: Chem.Mol, path: Path) -> None:
    """As a PDB file with CONECT records, which OpenMM reads as it is."""
    topology, positions = topology_of(molecule, path)
    for residue in topology.residues():
        residue.name = "LIG"  # "MET" of methanol would be methionine
    with path.open("w") as file:
        app.PDBFile.writeFile(topology, positions, file)


def write_dimers() -> None:
    """Pairs of molecules near contact; the second is moved along the axis, a unit vector."""

    def atoms(smiles: str) -> Atoms:
        molecule = conformer("", smiles)
        symbols = [a.GetSymbol() for a in molecule.GetAtoms()]
        return Atoms(symbols, molecule.GetConformer().GetPositions())

    def aligned(smiles: str, tip: int, origin: int) -> Atoms:
        """With atom `origin` at zero and atom `tip` on the z axis."""
        found = atoms(smiles)
        found.translate(-found.positions[origin])
        found.rotate(found.positions[tip], "z")
        return found

    water = aligned("O", 1, 0)  # O at zero, a hydrogen on +z
    acceptor = atoms("O")
    acceptor.translate(-acceptor.positions[0])
    acceptor.rotate(acceptor.positions[1:].mean(0), "z")  # its hydrogens point away
    methane = aligned("C", 1, 0)
    other = methane.copy()
    other.rotate(180, "x")
    amide = aligned("CC(=O)NC", 8, 3)  # N at zero, its hydrogen on +z
    stacked = atoms("c1ccccc1")
    stacked.translate(-stacked.positions.mean(0))
    normal = np.cross(stacked.positions[0], stacked.positions[1])
    stacked.rotate(normal, "z")
    shifted = stacked.copy()
    shifted.translate([1.6, 0.0, 0.0])
    pairs = {
        "water–water": (water, acceptor, 2.9),
        "methane–methane": (methane, other, 4.0),
        "amide–water": (amide, acceptor, 2.9),
        "benzene–benzene, stacked": (stacked, shifted, 3.5),
    }
    frames = []
    for name, (first, second, distance) in pairs.items():
        moved = second.copy()
        moved.translate([0.0, 0.0, distance])
        pair = first + moved
        pair.calc = None
        pair.info = {"name": name, "first": len(first), "distance": distance}
        frames.append(pair)
    write(FOLDER / "dimers.xyz", frames, format="extxyz")


def write_solvated_peptide() -> None:
    """Alanine dipeptide in TIP3P water, after 50 ps at 300 K and 1 bar."""
    force_field = app.ForceField("amber14-all.xml", "amber14/tip3p.xml")
    peptide = app.PDBFile(str(EXAMPLES / "alanine-dipeptide.pdb"))
    modeller = app.Modeller(peptide.topology, peptide.positions)
    modeller.addSolvent(force_field, boxSize=openmm.Vec3(1.9, 1.9, 1.9) * unit.nanometer)
    system = force_field.createSystem(
        modeller.topology, nonbondedMethod=app.PME, nonbondedCutoff=0.8 * unit.nanometer
    )
    barostat = openmm.MonteCarloBarostat(1 * unit.bar, 300 * unit.kelvin)
    barostat.setRandomNumberSeed(SEED)
    system.addForce(barostat)
    integrator = openmm.LangevinMiddleIntegrator(300, 1, 0.001)
    integrator.setRandomNumberSeed(SEED)
    platform = openmm.Platform.getPlatform("CPU")
    simulation = app.Simulation(modeller.topology, system, integrator, platform)
    simulation.context.setPositions(modeller.positions)
    simulation.minimizeEnergy()
    simulation.context.setVelocitiesToTemperature(300, SEED)
    simulation.step(50000)
    state = simulation.context.getState(positions=True, enforcePeriodicBox=True)
    simulation.topology.setPeriodicBoxVectors(state.getPeriodicBoxVectors())
    with (FOLDER / "peptide-in-water.pdb").open("w") as file:
        app.PDBFile.writeFile(simulation.topology, state.getPositions(), file)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in ("alanine-dipeptide.pdb", "water-64.pdb"):
        shutil.copy(EXAMPLES / name, FOLDER / name)
    write_molecules()
    write_dimers()
    write_solvated_peptide()
