# %% [markdown]
# # From labelled structures to a student in OpenMM
#
# The whole way in about a minute on one core: label structures, train, evaluate, simulate. The
# teacher here is a classical force field and the student is tiny, so that nothing has to be
# downloaded; with a machine-learned teacher only the labelling differs.
#
#     python examples/02_train_a_student.py            # files go to demo_output/training
#     python examples/02_train_a_student.py --quick    # too short to learn anything

# %%
import argparse
import logging
from pathlib import Path

import numpy as np
import openmm
import torch
from openmm import app, unit
from openmmml import MLPotential

from openmm_mlffd.modelfile import load_student
from openmm_mlffd.training.batches import StructureSource, make_batch
from openmm_mlffd.training.config import (
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from openmm_mlffd.training.evaluate import evaluate, format_table
from openmm_mlffd.training.hdf5 import Dataset, DatasetWriter, SplitRule, Structures
from openmm_mlffd.training.train import train
from openmm_mlffd.units import ANGSTROM_PER_NM, KJ_PER_MOL_NM_PER_EV_ANGSTROM, KJ_PER_MOL_PER_EV

parser = argparse.ArgumentParser(description="Label structures, train, evaluate, simulate.")
parser.add_argument("--output", type=Path, default=Path("demo_output/training"))
parser.add_argument("--quick", action="store_true", help="too short to learn anything")
options = parser.parse_args()
options.output.mkdir(parents=True, exist_ok=True)
n_frames, epochs = (60, 2) if options.quick else (800, 25)

torch.set_num_threads(1)  # the network is too small for more
logging.basicConfig(level=logging.WARNING)
STRUCTURE = Path(__file__).parent / "structures" / "alanine-dipeptide.pdb"
TEACHER = "amber14 in vacuum (OpenMM)"

# %% [markdown]
# ## 1. Structures and labels
#
# Dynamics at 500 K gives the structures; energies and forces are the teacher's labels, in eV and
# eV/Å. See docs/dataset.md for the fields.

# %%
pdb = app.PDBFile(str(STRUCTURE))
teacher = app.ForceField("amber14-all.xml").createSystem(pdb.topology)
integrator = openmm.LangevinMiddleIntegrator(500, 10, 0.0005)
integrator.setRandomNumberSeed(1)
simulation = app.Simulation(
    pdb.topology, teacher, integrator, openmm.Platform.getPlatform("Reference")
)
simulation.context.setPositions(pdb.positions)
simulation.minimizeEnergy()
simulation.context.setVelocitiesToTemperature(500, 1)
positions, energies, forces = [], [], []
for _ in range(n_frames):
    simulation.step(100)
    state = simulation.context.getState(positions=True, energy=True, forces=True)
    positions.append(state.getPositions(asNumpy=True)._value * ANGSTROM_PER_NM)
    energies.append(state.getPotentialEnergy()._value / KJ_PER_MOL_PER_EV)
    forces.append(state.getForces(asNumpy=True)._value / KJ_PER_MOL_NM_PER_EV_ANGSTROM)

numbers = [atom.element.atomic_number for atom in pdb.topology.atoms()]
n_atoms = len(numbers)
structures = Structures(
    offsets=np.arange(n_frames + 1) * n_atoms,
    atomic_numbers=np.tile(np.array(numbers, "u1"), n_frames),
    positions=np.concatenate(positions).astype("f4"),
    forces=np.concatenate(forces).astype("f4"),
    partial_charges=np.full(n_frames * n_atoms, np.nan, "f4"),
    energy=np.array(energies),
    stress=np.full((n_frames, 3, 3), np.nan, "f4"),
    cell=np.zeros((n_frames, 3, 3)),
    pbc=np.zeros((n_frames, 3), bool),
    total_charge=np.zeros(n_frames, "i2"),
    temperature=np.full(n_frames, 500, "f4"),
    group=np.zeros(n_frames, "i4"),  # these two are filled in by the writer
    split=np.zeros(n_frames, "u1"),
    subset=np.zeros(n_frames, "u1"),
)
dataset_file = options.output / "dipeptide.h5"
dataset_file.unlink(missing_ok=True)
# One molecule only, so each frame is a group of its own. With several molecules, give the same
# group name (the SMILES) to all frames of one, and none will be in two splits.
rule = SplitRule(val=0.1, test=0.1)
with DatasetWriter(dataset_file, teacher=TEACHER, subsets=["dipeptide"], split=rule) as writer:
    writer.append(structures, groups=[f"frame {i}" for i in range(n_frames)])
with Dataset(dataset_file) as dataset:
    counts = {name: len(dataset.in_split(name)) for name in ("train", "val", "test")}
print(f"{dataset_file}: {counts}")

# %% [markdown]
# ## 2. Train
#
# The same as `mlffd train config.yaml`; here the configuration is made in Python.

# %%
config = TrainConfig(
    name="dipeptide",
    output=str(options.output / "run"),
    data=DataConfig(files=[str(dataset_file)]),
    model=ModelConfig(elements=["H", "C", "N", "O"], n_channels=32, n_interactions=2, n_basis=12),
    loss=LossConfig(energy=20.0, stress=0.0),
    optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=20, ema_decay=0.98),
    epochs=epochs,
    batch_atoms=10 * n_atoms,
    validate_every=200,
    device="cpu",
)
(options.output / "run" / "checkpoint.pt").unlink(missing_ok=True)  # start afresh
_, student_file = train(config)
print(f"student: {student_file}")

# %% [markdown]
# ## 3. Evaluate, on frames that it has not seen
#
# The same as `mlffd evaluate student.safetensors dipeptide.h5`.

# %%
student = load_student(student_file)
cpu = torch.device("cpu")
with Dataset(dataset_file) as dataset:
    source = StructureSource([dataset], "test")
    batches = (make_batch(part, student, cpu) for part in source.batches(2000))
    print(format_table(evaluate(student, batches, source.subsets, cpu)))

# %% [markdown]
# ## 4. Simulate
#
# The student file is all that OpenMM needs. Along the student's own trajectory, how far is its
# energy from the teacher's? Only changes mean something, so the mean difference is taken out.

# %%
system = MLPotential("mlffd", modelPath=str(student_file)).createSystem(pdb.topology, device="cpu")
integrator = openmm.LangevinMiddleIntegrator(
    300 * unit.kelvin, 5 / unit.picosecond, 0.5 * unit.femtosecond
)
integrator.setRandomNumberSeed(2)
md = app.Simulation(pdb.topology, system, integrator, openmm.Platform.getPlatform("CPU"))
md.context.setPositions(positions[0] / ANGSTROM_PER_NM)
md.context.setVelocitiesToTemperature(300 * unit.kelvin, 2)
difference = []
for _ in range(5 if options.quick else 50):
    md.step(4 if options.quick else 40)
    state = md.context.getState(positions=True, energy=True)
    simulation.context.setPositions(state.getPositions())
    reference = simulation.context.getState(energy=True).getPotentialEnergy()
    difference.append((state.getPotentialEnergy() - reference)._value / KJ_PER_MOL_PER_EV)
spread = 1e3 * np.std(difference) / n_atoms
time = md.context.getTime().value_in_unit(unit.picosecond)
print(f"{time:.1f} ps with the student: its energy follows the teacher's to {spread:.1f} meV/atom")
