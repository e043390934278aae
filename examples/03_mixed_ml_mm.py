# %% [markdown]
# # A student for the peptide, a classical force field for the water
#
# `createMixedSystem` computes the peptide with the student and everything else, the interaction
# between the two included, with the classical force field (mechanical embedding).
#
#     python examples/03_mixed_ml_mm.py

# %%
import argparse
import sys
from pathlib import Path

import openmm
import torch
from openmm import app, unit
from openmmml import MLPotential

parser = argparse.ArgumentParser(description="A peptide with a student in classical water.")
parser.add_argument("--steps", type=int, default=1000)
parser.add_argument("--model", help="path of a student file; the bundled one by default")
options = parser.parse_args()

torch.set_num_threads(1)  # the peptide is too small for more
STRUCTURE = Path(__file__).parent / "structures" / "alanine-dipeptide.pdb"

# %% [markdown]
# ## The classical system
#
# Bonds to hydrogen are constrained; `createMixedSystem` removes the constraints within the peptide.

# %%
pdb = app.PDBFile(str(STRUCTURE))
force_field = app.ForceField("amber14-all.xml", "amber14/tip3pfb.xml")
modeller = app.Modeller(pdb.topology, pdb.positions)
modeller.addSolvent(force_field, padding=0.9 * unit.nanometer)
mm_system = force_field.createSystem(
    modeller.topology,
    nonbondedMethod=app.PME,
    nonbondedCutoff=0.8 * unit.nanometer,
    constraints=app.HBonds,
)
solute = [a.index for a in modeller.topology.atoms() if a.residue.name in ("ACE", "ALA", "NME")]
print(
    f"{len(solute)} atoms with the student, {modeller.topology.getNumAtoms() - len(solute)} without"
)

# %% [markdown]
# ## The mixed system
#
# Minimise with the classical force field first: far from what it has seen, a student knows
# nothing. Then 0.5 fs steps, because the peptide's bonds to hydrogen are free.

# %%
student = {"modelPath": options.model} if options.model else {}
potential = MLPotential("mlffd", **student)
system = potential.createMixedSystem(modeller.topology, mm_system, solute, device="cpu")
print(f"constraints: {mm_system.getNumConstraints()} before, {system.getNumConstraints()} now")


def make_simulation(system):
    integrator = openmm.LangevinMiddleIntegrator(
        300 * unit.kelvin, 1 / unit.picosecond, 0.5 * unit.femtosecond
    )
    integrator.setRandomNumberSeed(1)
    cpu = openmm.Platform.getPlatform("CPU")
    return app.Simulation(modeller.topology, system, integrator, cpu)


classical = make_simulation(mm_system)
classical.context.setPositions(modeller.positions)
classical.minimizeEnergy(maxIterations=200)
relaxed = classical.context.getState(positions=True).getPositions()

simulation = make_simulation(system)
simulation.context.setPositions(relaxed)
simulation.minimizeEnergy(maxIterations=50)
simulation.context.setVelocitiesToTemperature(300 * unit.kelvin, 1)
report = app.StateDataReporter(
    sys.stdout, max(1, options.steps // 5), step=True, potentialEnergy=True, temperature=True,
    speed=True,
)  # fmt: skip
simulation.reporters.append(report)
simulation.step(options.steps)
