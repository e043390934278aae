"""Make the starting structures of the examples: `python examples/structures/make_structures.py`.

They are in the repository; this is how they were made. Everything is seeded, but other versions
of RDKit and OpenMM give other coordinates.
"""

from pathlib import Path

import numpy as np
import openmm
from openmm import app, unit
from rdkit import Chem
from rdkit.Chem import AllChem

FOLDER = Path(__file__).parent
SEED = 7

# Pramipexole, given for Parkinson's disease: 31 atoms of H, C, N and S. Its group is in the test
# split of the training data (`SplitRule()` with its SMILES), and no charge state, stereoisomer
# or complex of it is in the training split.
PRAMIPEXOLE = "CCCN[C@H]1CCc2nc(N)sc2C1"

ALANINE_DIPEPTIDE = "CC(=O)N[C@@H](C)C(=O)NC"
# residue, name and names of the hydrogens of each heavy atom, in the order of the SMILES
ALANINE_DIPEPTIDE_ATOMS = [
    ("ACE", "CH3", "H1 H2 H3"),
    ("ACE", "C", ""),
    ("ACE", "O", ""),
    ("ALA", "N", "H"),
    ("ALA", "CA", "HA"),
    ("ALA", "CB", "HB1 HB2 HB3"),
    ("ALA", "C", ""),
    ("ALA", "O", ""),
    ("NME", "N", "H"),
    ("NME", "C", "H1 H2 H3"),
]

PHENOL = "Oc1ccccc1"
# in the order of the SMILES, named like tyrosine's
PHENOL_ATOMS = ["OH", "CZ", "CE1", "CD1", "CG", "CD2", "CE2"]

N_WATERS = 64


def conformer(smiles: str) -> Chem.Mol:
    """The molecule with hydrogens, embedded with ETKDG and minimised with MMFF94."""
    molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
    parameters = AllChem.ETKDGv3()
    parameters.randomSeed = SEED
    AllChem.EmbedMolecule(molecule, parameters)
    AllChem.MMFFOptimizeMolecule(molecule, maxIters=2000)
    return molecule


def write_pramipexole() -> None:
    """One molecule as SDF, with explicit hydrogens."""
    molecule = conformer(PRAMIPEXOLE)
    molecule.SetProp("_Name", "pramipexole")
    with Chem.SDWriter(str(FOLDER / "pramipexole.sdf")) as writer:
        writer.write(molecule)


def write_alanine_dipeptide() -> None:
    """ACE-ALA-NME as PDB, with the names that force fields know."""
    molecule = conformer(ALANINE_DIPEPTIDE)
    positions = molecule.GetConformer().GetPositions()
    topology = app.Topology()
    chain = topology.addChain()
    ordered, residue = [], None
    for index, (residue_name, name, hydrogens) in enumerate(ALANINE_DIPEPTIDE_ATOMS):
        if residue is None or residue.name != residue_name:
            residue = topology.addResidue(residue_name, chain)
        heavy = molecule.GetAtomWithIdx(index)
        topology.addAtom(name, app.Element.getBySymbol(heavy.GetSymbol()), residue)
        ordered.append(positions[index])
        attached = [a.GetIdx() for a in heavy.GetNeighbors() if a.GetAtomicNum() == 1]
        for hydrogen, h_name in zip(attached, hydrogens.split(), strict=True):
            topology.addAtom(h_name, app.element.hydrogen, residue)
            ordered.append(positions[hydrogen])
    with (FOLDER / "alanine-dipeptide.pdb").open("w") as file:
        app.PDBFile.writeFile(topology, ordered * unit.angstrom, file)


def write_water_box() -> None:
    """A cubic box of TIP3P water after 100 ps at 300 K and 1 bar."""
    force_field = app.ForceField("amber14/tip3p.xml")
    modeller = app.Modeller(app.Topology(), [] * unit.nanometer)
    modeller.addSolvent(force_field, numAdded=N_WATERS)
    system = force_field.createSystem(
        modeller.topology, nonbondedMethod=app.PME, nonbondedCutoff=0.5 * unit.nanometer
    )
    barostat = openmm.MonteCarloBarostat(1 * unit.bar, 300 * unit.kelvin)
    barostat.setRandomNumberSeed(SEED)
    system.addForce(barostat)
    integrator = openmm.LangevinMiddleIntegrator(300, 1, 0.002)
    integrator.setRandomNumberSeed(SEED)
    platform = openmm.Platform.getPlatform("CPU")
    simulation = app.Simulation(modeller.topology, system, integrator, platform)
    simulation.context.setPositions(modeller.positions)
    simulation.minimizeEnergy()
    simulation.context.setVelocitiesToTemperature(300, SEED)
    simulation.step(50000)
    state = simulation.context.getState(positions=True, enforcePeriodicBox=True)
    simulation.topology.setPeriodicBoxVectors(state.getPeriodicBoxVectors())
    with (FOLDER / "water-64.pdb").open("w") as file:
        app.PDBFile.writeFile(simulation.topology, state.getPositions(), file)


def write_villin_with_phenol() -> None:
    """The villin headpiece of OpenMM's own test.pdb, without its water, and phenol at its side."""
    pdb = app.PDBFile(str(Path(app.__file__).parent / "data" / "test.pdb"))
    modeller = app.Modeller(pdb.topology, pdb.positions)
    modeller.delete([r for r in modeller.topology.residues() if r.name in ("HOH", "Cl")])
    protein = np.array(modeller.positions.value_in_unit(unit.angstrom))
    heavy = np.array([a.element.atomic_number > 1 for a in modeller.topology.atoms()])
    phenol = conformer(PHENOL)
    place = _snug_place(protein, heavy, phenol.GetConformer().GetPositions())
    modeller.add(_phenol_topology(phenol), place * unit.angstrom)
    force_field = app.ForceField("amber14-all.xml", str(FOLDER / "phenol.xml"))
    system = force_field.createSystem(modeller.topology)
    for index in range(len(protein)):
        system.setParticleMass(index, 0)
    platform = openmm.Platform.getPlatform("Reference")
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), platform)
    context.setPositions(modeller.positions)
    openmm.LocalEnergyMinimizer.minimize(context)
    modeller.topology.setPeriodicBoxVectors(None)
    with (FOLDER / "villin-phenol.pdb").open("w") as file:
        positions = context.getState(positions=True).getPositions()
        app.PDBFile.writeFile(modeller.topology, positions, file)


def _snug_place(protein: np.ndarray, heavy: np.ndarray, molecule: np.ndarray) -> np.ndarray:
    """Positions [Å] of a molecule that touches as much of a protein as it can without clashes."""
    random = np.random.default_rng(SEED)
    best, most = molecule, -1
    low, high = protein.min(0) - 3.0, protein.max(0) + 3.0
    for _ in range(20000):
        rotation = np.linalg.qr(random.normal(size=(3, 3)))[0]
        moved = (molecule - molecule.mean(0)) @ rotation + random.uniform(low, high)
        distances = np.linalg.norm(moved[:, None] - protein, axis=-1)
        contacts = int((distances[:, heavy] < 5.0).any(0).sum())
        if contacts > most and distances.min() > 2.2 and distances[:, heavy].min() > 2.6:
            best, most = moved, contacts
    return best


def _phenol_topology(molecule: Chem.Mol) -> app.Topology:
    topology = app.Topology()
    residue = topology.addResidue("PHN", topology.addChain())
    names = [*PHENOL_ATOMS, *(f"H{name[1:]}" for name in PHENOL_ATOMS if name != "CZ")]
    atoms = [
        topology.addAtom(name, app.Element.getBySymbol(atom.GetSymbol()), residue)
        for name, atom in zip(names, molecule.GetAtoms(), strict=True)
    ]
    for bond in molecule.GetBonds():
        topology.addBond(atoms[bond.GetBeginAtomIdx()], atoms[bond.GetEndAtomIdx()])
    return topology


if __name__ == "__main__":
    write_pramipexole()
    write_alanine_dipeptide()
    write_water_box()
    write_villin_with_phenol()
