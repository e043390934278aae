# %% [markdown]
# # The student in ASE
#
# Relaxation, vibrations and dynamics of a drug molecule, and the stress of a box of water.
#
#     python examples/04_ase.py

# %%
import argparse
from pathlib import Path

import ase.io
import numpy as np
import torch
from ase import units
from ase.md.langevin import Langevin
from ase.optimize import LBFGS

from openmm_mlffd import MLFFDCalculator

parser = argparse.ArgumentParser(description="A student in ASE.")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--model", help="path of a student file; the bundled one by default")
options = parser.parse_args()

torch.set_num_threads(1)  # the molecule is too small for more
STRUCTURES = Path(__file__).parent / "structures"

# %% [markdown]
# ## Relax a molecule
#
# ASE reads the SDF with the hydrogens that are in it.

# %%
molecule = ase.io.read(STRUCTURES / "pramipexole.sdf")
molecule.calc = MLFFDCalculator(model=options.model, device="cpu")
start = molecule.get_potential_energy()
LBFGS(molecule, logfile=None).run(fmax=0.02, steps=options.steps)
force = np.linalg.norm(molecule.get_forces(), axis=1).max()
change = molecule.get_potential_energy() - start
print(f"relaxed by {change:.3f} eV to a largest force of {force:.3f} eV/Å")
print(f"energy of each atom: {molecule.get_potential_energies()[:3]} … eV")

# %% [markdown]
# ## Dynamics
#
# From rest: the thermostat brings the molecule to 300 K within its relaxation time of 50 fs.

# %%
dynamics = Langevin(
    molecule,
    0.5 * units.fs,
    temperature_K=300,
    friction=0.02 / units.fs,
    fixcm=False,
    rng=np.random.default_rng(1),
)
dynamics.run(options.steps)
print(f"after {options.steps} steps of 0.5 fs: {molecule.get_temperature():.0f} K")

# %% [markdown]
# ## A periodic box
#
# The stress has ASE's sign and order; its trace gives the pressure of the interactions.

# %%
water = ase.io.read(STRUCTURES / "water-64.pdb")
water.calc = MLFFDCalculator(model=options.model, device="cpu")
stress = water.get_stress()
print(f"water: stress {np.round(stress / units.GPa, 3)} GPa, xx yy zz yz xz xy")
