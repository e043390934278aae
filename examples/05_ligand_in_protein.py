# %% [markdown]
# # A ligand in a protein, and a residue of it
#
# The villin headpiece with phenol at its side, in water. First the student computes the ligand and
# the classical force field all else. Then it computes the side chain of a phenylalanine, cut off
# between CA and CB: OpenMM-ML caps the cut bond with a hydrogen that moves with its two atoms.
#
#     python examples/05_ligand_in_protein.py

# %%
import argparse
import time
from pathlib import Path

import numpy as np
import openmm
import torch
from openmm import app, unit
from openmmml import MLPotential

from openmm_mlffd import NoveltyProbe

parser = argparse.ArgumentParser(description="A ligand and a residue with a student.")
parser.add_argument("--steps", type=int, default=500)
parser.add_argument("--model", help="path of a student file; the bundled one by default")
options = parser.parse_args()

torch.set_num_threads(1)  # thirteen atoms are too few for more
STRUCTURES = Path(__file__).parent / "structures"

# %% [markdown]
# ## The classical system
#
# `phenol.xml` has the ligand's template. Its charges and types are those of tyrosine; for a ligand
# of your own, take GAFF or OpenFF parameters. The student replaces bonds, angles, torsions and
# everything between two of the ligand's atoms; between ligand and protein these parameters stay.

# %%
pdb = app.PDBFile(str(STRUCTURES / "villin-phenol.pdb"))
force_field = app.ForceField(
    "amber14-all.xml", "amber14/tip3pfb.xml", str(STRUCTURES / "phenol.xml")
)
modeller = app.Modeller(pdb.topology, pdb.positions)
modeller.addSolvent(force_field, padding=0.8 * unit.nanometer, neutralize=False)
mm_system = force_field.createSystem(
    modeller.topology,
    nonbondedMethod=app.PME,
    nonbondedCutoff=0.8 * unit.nanometer,
    constraints=app.HBonds,
)
print(f"{modeller.topology.getNumAtoms()} atoms")


def make_simulation(topology, system):
    integrator = openmm.LangevinMiddleIntegrator(
        300 * unit.kelvin, 1 / unit.picosecond, 0.5 * unit.femtosecond
    )
    integrator.setRandomNumberSeed(1)
    return app.Simulation(topology, system, integrator, openmm.Platform.getPlatform("CPU"))


classical = make_simulation(modeller.topology, mm_system)
classical.context.setPositions(modeller.positions)
classical.minimizeEnergy(maxIterations=100)
relaxed = classical.context.getState(positions=True).getPositions(asNumpy=True)

# %% [markdown]
# ## The ligand with the student, the side chain with the student

# %%
atoms = list(modeller.topology.atoms())
backbone = {"N", "H", "CA", "HA", "C", "O"}
regions = {
    "phenol": [a.index for a in atoms if a.residue.name == "PHN"],
    "side chain of PHE 17": [
        a.index
        for a in atoms
        if a.residue.name == "PHE" and a.residue.index == 16 and a.name not in backbone
    ],
}
student = {"modelPath": options.model} if options.model else {}
potential = MLPotential("mlffd", **student)

# %% [markdown]
# With `returnInfo=True`, `createMixedSystem` gives the Topology with the caps at its end. They have
# no mass: `computeVirtualSites` puts them where they belong.

# %%
for name, region in regions.items():
    info = potential.createMixedSystem(
        modeller.topology, mm_system, region, device="cpu", returnInfo=True
    )
    system, topology = info["system"], info["topology"]
    n_caps = topology.getNumAtoms() - len(atoms)
    simulation = make_simulation(topology, system)
    positions = np.vstack([relaxed.value_in_unit(unit.nanometer), np.zeros((n_caps, 3))])
    simulation.context.setPositions(positions)
    simulation.context.computeVirtualSites()
    simulation.minimizeEnergy(maxIterations=20)
    simulation.context.setVelocitiesToTemperature(300 * unit.kelvin, 1)
    began = time.perf_counter()
    simulation.step(options.steps)
    seconds = time.perf_counter() - began
    state = simulation.context.getState(positions=True, energy=True)
    sample = NoveltyProbe(system).sample(state)
    print(
        f"{name}: {len(region)} atoms and {n_caps} caps with the student; after {options.steps} "
        f"steps {state.getPotentialEnergy()}, largest novelty {sample.novelty:.2f} (atom "
        f"{sample.atom}); {1e3 * seconds / options.steps:.0f} ms a step"
    )
