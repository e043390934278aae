"""Makes heated.npz: a drug molecule heated until it falls apart, with the teacher's forces.

    python tests/data/make_heated.py runs/heated --teacher-python VENV/bin/python

The bundled student drives the molecule, SO3LR labels the frames; the labels do not depend on the
student, so that they serve for others, too. Prints, for each tenth frame, the largest force error
and the largest novelty, and where the alarm comes and where the first error of 10 eV/Å.
"""

import argparse
from pathlib import Path

import numpy as np
import openmm
import torch
from openmm import unit
from openmmml import MLPotential

from openmm_mlffd import NoveltyProbe
from openmm_mlffd.evaluator import Evaluator
from openmm_mlffd.interfaces.openmm_alarm import extended_xyz
from openmm_mlffd.modelfile import load_student
from openmm_mlffd.novelty import NoveltyMeter
from openmm_mlffd.training.hdf5 import Dataset
from openmm_mlffd.training.label import Limits, TeacherChoice, label
from openmm_mlffd.training.sources import open_source
from openmm_mlffd.validation.structures import read_structure

HERE = Path(__file__).parent
N_FRAMES = 240
STEPS = 8  # of 0.25 fs between frames, 40 K hotter each


def heat(path):
    """Frames of a molecule that gets hotter and hotter."""
    topology, positions = read_structure(
        HERE.parents[1] / "examples" / "structures" / "pramipexole.sdf"
    )
    system = MLPotential("mlffd", device="cpu").createSystem(topology)
    integrator = openmm.LangevinMiddleIntegrator(300, 10, 0.25 * unit.femtosecond)
    integrator.setRandomNumberSeed(1)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatform("Reference"))
    context.setPositions(positions)
    openmm.LocalEnergyMinimizer.minimize(context, maxIterations=100)
    context.setVelocitiesToTemperature(300, 1)
    integrator.step(400)
    probe = NoveltyProbe(system)
    with path.open("w") as file:
        for frame in range(N_FRAMES):
            integrator.setTemperature(300 + 40 * frame)
            integrator.step(STEPS)
            state = context.getState(positions=True)
            file.write(
                extended_xyz(probe.numbers, *probe.coordinates(state), probe.measure(state), frame)
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--teacher-python", required=True, help="Python that has SO3LR")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    frames = options.folder / "frames.extxyz"
    heat(frames)
    choice = TeacherChoice(
        name="so3lr", options={}, python=options.teacher_python, timeout=600.0, batch_atoms=None
    )
    summary = label(
        open_source(frames, charge=0),
        options.folder / "labels",
        choice,
        limits=Limits(max_force=1e5, max_net_force=1e3),
        shard_size=1000,
    )
    with Dataset(summary.dataset) as dataset:
        found = dataset.read(0, len(dataset))
    n_atoms = int(found.offsets[1])
    numbers = found.atomic_numbers[:n_atoms]
    positions = found.positions.reshape(-1, n_atoms, 3)[::2]
    forces = found.forces.reshape(-1, n_atoms, 3)[::2]
    np.savez_compressed(
        HERE / "heated.npz", numbers=numbers, positions=positions, forces=forces.round(3)
    )
    evaluator, meter = Evaluator(load_student(), numbers), NoveltyMeter(numbers)
    stop = meter.novelty.header.stop
    rows = [
        (np.linalg.norm(evaluator.compute(x).forces - f, axis=1).max(), meter.measure(x).max())
        for x, f in zip(positions.astype(float), forces, strict=True)
    ]
    for frame, (error, novelty) in enumerate(rows):
        if frame % 10 == 0:
            print(f"frame {frame:4d}  force error {error:8.2f} eV/Å  novelty {novelty:8.2f}")
    errors, scores = np.array(rows).T
    alarm, late = int(np.argmax(scores > stop)), int(np.argmax(errors > 10.0))
    print(f"alarm (novelty {stop:.2f}) at frame {alarm}, first error of 10 eV/Å at frame {late}")
    print(f"largest error before the alarm {errors[:alarm].max():.2f} eV/Å")


if __name__ == "__main__":
    main()
