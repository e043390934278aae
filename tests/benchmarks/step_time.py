"""Time per step in OpenMM and agreement between platforms and precisions, printed as a table.

    python tests/benchmarks/step_time.py Reference,CUDA

The peptide and water boxes; energies and forces are compared with the first platform's.
"""

import sys
import time
from pathlib import Path

import numpy as np
import openmm
from openmm import app, unit
from openmmml import MLPotential

from openmm_mlffd.interfaces.openmm_factory import MLFFDPotentialImplFactory
from openmm_mlffd.units import KJ_PER_MOL_NM_PER_EV_ANGSTROM, KJ_PER_MOL_PER_EV

PEPTIDE = Path(__file__).parents[2] / "examples" / "structures" / "alanine-dipeptide.pdb"
LARGEST_ON_CPU = 200


def make_potential():
    """The potential, also where the package is not installed and has no entry point."""
    try:
        return MLPotential("mlffd")
    except ValueError:
        MLPotential.registerImplFactory("mlffd", MLFFDPotentialImplFactory())
        return MLPotential("mlffd")


def make_water(n_molecules):
    modeller = app.Modeller(app.Topology(), [] * unit.nanometer)
    modeller.addSolvent(app.ForceField("tip3p.xml"), numAdded=n_molecules, model="tip3p")
    return modeller.topology, modeller.positions


def make_context(platform, precision, topology, positions):
    system = make_potential().createSystem(topology, precision=precision)
    integrator = openmm.LangevinMiddleIntegrator(
        300 * unit.kelvin, 1 / unit.picosecond, 0.5 * unit.femtosecond
    )
    context = openmm.Context(system, integrator, openmm.Platform.getPlatform(platform))
    context.setPositions(positions)
    return context, integrator


def time_step(context, integrator, n_steps):
    """Mean time of a step [ms], after a short minimisation and a warm-up."""
    openmm.LocalEnergyMinimizer.minimize(context, maxIterations=20)
    context.setVelocitiesToTemperature(300 * unit.kelvin, 1)
    integrator.step(max(5, n_steps // 10))
    start = time.perf_counter()
    integrator.step(n_steps)
    context.getState(getEnergy=True)
    return (time.perf_counter() - start) / n_steps * 1e3


def main():
    platforms = sys.argv[1].split(",") if len(sys.argv) > 1 else ["CPU"]
    pdb = app.PDBFile(str(PEPTIDE))
    cases = [("alanine dipeptide", pdb.topology, pdb.positions)]
    cases += [(f"{n} waters", *make_water(n)) for n in (64, 333)]
    first = {}
    for platform in platforms:
        for name, topology, positions in cases:
            n_atoms = topology.getNumAtoms()
            if platform != "CUDA" and n_atoms > LARGEST_ON_CPU:
                continue
            for precision in ("single", "double"):
                context, integrator = make_context(platform, precision, topology, positions)
                state = context.getState(getEnergy=True, getForces=True)
                energy = state.getPotentialEnergy()._value / KJ_PER_MOL_PER_EV
                forces = state.getForces(asNumpy=True)._value / KJ_PER_MOL_NM_PER_EV_ANGSTROM
                energy_0, forces_0 = first.setdefault(name, (energy, forces))
                n_steps = 10 if platform != "CUDA" else 100_000 // (n_atoms + 200)
                step = time_step(context, integrator, n_steps)
                what = f"{platform:10s} {precision:7s} {name:18s} {n_atoms:5d} atoms"
                worst = np.abs(forces - forces_0).max()
                agreement = f"ΔE {energy - energy_0:+.1e} eV  max|ΔF| {worst:.1e} eV/Å"
                print(f"{what} {step:9.3f} ms/step  {agreement}", flush=True)


if __name__ == "__main__":
    main()
