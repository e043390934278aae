# %% [markdown]
# # Multiple time steps: a slow teacher, less often
#
# The student computes the forces of every step of 0.5 fs; every 2 fs a slow teacher says what the
# student lacks. The energy is the teacher's.
#
#     python examples/06_multiple_time_steps.py
#
# Here the teacher is the student itself and what it cannot have, the Coulomb energy of distant
# charges. Any ASE calculator does; `mlffd mts` compares one with its plain dynamics.

# %%
import argparse
import time
from pathlib import Path

import numpy as np
import openmm
import torch
from ase.calculators.calculator import Calculator, all_changes
from openmm import app

from openmm_mlffd import MLFFDCalculator, respa_integrator, respa_system

parser = argparse.ArgumentParser(description="A peptide with multiple time steps.")
parser.add_argument("--picoseconds", type=float, default=0.2)
parser.add_argument("--model", help="path of a student file; the bundled one by default")
options = parser.parse_args()

torch.set_num_threads(1)  # the peptide is too small for more
STRUCTURE = Path(__file__).parent / "structures" / "alanine-dipeptide.pdb"
COULOMB = 14.3996454  # e²/4πε₀ [eV Å]


# %% [markdown]
# ## The teacher
#
# Amber's charges, switched on between 5 Å, where the student ends, and 8 Å.


# %%
class LongRange(Calculator):
    """The student, and the Coulomb energy of point charges that are far from one another."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012

    def __init__(self, student, charges):
        super().__init__()
        self.student = student
        self.products = COULOMB * charges[:, None] * charges

    def calculate(self, atoms=None, properties=None, system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        vectors = self.atoms.positions[None] - self.atoms.positions[:, None]
        r = np.linalg.norm(vectors, axis=-1) + np.eye(len(vectors))
        x = ((r - 5.0) / 3.0).clip(0.0, 1.0)
        switch, slope = x**3 * (10 - 15 * x + 6 * x**2), 10 * x**2 * (1 - x) ** 2
        energies = self.products * switch / r
        derivatives = self.products * (slope / r - switch / r**2)
        far = (derivatives / r)[:, :, None] * vectors
        self.results = {
            "energy": self.student.get_potential_energy(self.atoms) + 0.5 * energies.sum(),
            "forces": self.student.get_forces(self.atoms) + far.sum(1),
        }


pdb = app.PDBFile(str(STRUCTURE))
classical = app.ForceField("amber14-all.xml").createSystem(pdb.topology)
nonbonded = next(f for f in classical.getForces() if isinstance(f, openmm.NonbondedForce))
charges = np.array(
    [nonbonded.getParticleParameters(i)[0]._value for i in range(nonbonded.getNumParticles())]
)
teacher = LongRange(MLFFDCalculator(options.model, device="cpu"), charges)

# %% [markdown]
# ## The system, and runs at constant energy

# %%
student = {"modelPath": options.model} if options.model else {}
system = respa_system(pdb.topology, teacher, device="cpu", **student)
cpu = openmm.Platform.getPlatform("CPU")
prepared = openmm.Context(system, openmm.LangevinMiddleIntegrator(300, 10, 0.0005), cpu)
prepared.setPositions(pdb.positions)
openmm.LocalEnergyMinimizer.minimize(prepared, maxIterations=50)
prepared.setVelocitiesToTemperature(300, 1)
prepared.getIntegrator().step(100)
start = prepared.getState(positions=True, velocities=True)

for outer, inner_steps in ((0.5, 1), (1.0, 2), (2.0, 4)):
    integrator = respa_integrator(outer, inner_steps)
    context = openmm.Context(system, integrator, cpu)
    context.setState(start)
    totals, began = [], time.perf_counter()
    for _ in range(max(2, round(options.picoseconds * 1e3 / outer))):
        integrator.step(1)
        state = context.getState(energy=True)
        totals.append((state.getPotentialEnergy() + state.getKineticEnergy())._value)
    seconds = time.perf_counter() - began
    print(
        f"teacher every {outer:g} fs: total energy {np.mean(totals):.3f} ± {np.std(totals):.3f} "
        f"kJ/mol, {seconds / options.picoseconds:.1f} s/ps"
    )
