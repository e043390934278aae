"""Dynamics with SO3LR through its own ASE calculator, run by a Python that has So3krates-torch.

    python so3lr_md.py cuda --waters 64,216 --seconds 20

Water boxes at 300 K, first Langevin, then without a thermostat: time of a step and drift of the
total energy. Needs nothing of this project.
"""

import argparse
import time

import numpy as np
import torch
from ase import Atoms, units
from ase.build import molecule
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.md.verlet import VelocityVerlet
from ase.optimize import FIRE
from so3krates_torch.calculator.so3 import SO3LRCalculator

TIMESTEP = 0.5 * units.fs


def water_box(n, rng):
    """Waters on a grid at 1 g/cm3, turned at random."""
    side = int(np.ceil(n ** (1 / 3)))
    edge = (n * 29.9) ** (1 / 3)
    grid = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), -1).reshape(-1, 3)[:n]
    box = Atoms(cell=[edge] * 3, pbc=True)
    for place in grid:
        one = molecule("H2O")
        one.rotate(rng.uniform(0, 360), rng.normal(size=3))
        one.translate(place * edge / side - one.positions[0])
        box += one
    return box


def timed(dynamics, seconds):
    """Run for so long; steps, and time of one [ms]."""
    dynamics.run(3)
    steps, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        dynamics.run(5)
        steps += 5
    return steps, 1e3 * (time.perf_counter() - began) / steps


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("device")
    parser.add_argument("--waters", default="64,216")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64"))
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    calculator = SO3LRCalculator(
        device=options.device,
        r_max_lr=12.0,
        dispersion_energy_cutoff_lr_damping=2.0,
        default_dtype=options.dtype,
    )
    for n in map(int, options.waters.split(",")):
        atoms = water_box(n, rng)
        atoms.calc = calculator
        FIRE(atoms, logfile=None).run(fmax=0.5, steps=50)
        MaxwellBoltzmannDistribution(atoms, temperature_K=300, rng=rng)
        warm = Langevin(
            atoms, TIMESTEP, temperature_K=300, friction=0.02 / units.fs, rng=rng, fixcm=False
        )
        timed(warm, options.seconds / 2)
        free = VelocityVerlet(atoms, TIMESTEP)
        energy = atoms.get_total_energy()
        steps, step = timed(free, options.seconds / 2)
        drift = 1e3 * (atoms.get_total_energy() - energy) / len(atoms)
        print(
            f"atoms {len(atoms)}  {options.dtype}  step {step:.2f} ms  "
            f"{atoms.get_temperature():.0f} K  drift {drift:+.3f} meV/atom in {steps} steps",
            flush=True,
        )
    if options.device.startswith("cuda"):
        print(f"largest GPU memory {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
