"""Make `warm_dipeptide.npz`: alanine dipeptide at 300 K, after 4,000 Langevin steps of 1 fs.

    python tests/data/make_warm_dipeptide.py

Random numbers differ between platforms and the student may have changed, so the result is another
state of the same ensemble each time. From the stored one it is hard to conserve energy.
"""

from pathlib import Path

import numpy as np
import openmm
from openmm import app, unit
from openmmml import MLPotential

from openmm_mlffd.validation.structures import read_structure

HERE = Path(__file__).parent
SEED = 20


def main() -> None:
    structure = HERE.parents[1] / "examples" / "structures" / "alanine-dipeptide.pdb"
    topology, positions = read_structure(structure)
    system = MLPotential("mlffd").createSystem(topology, device="cpu")
    integrator = openmm.LangevinMiddleIntegrator(
        300 * unit.kelvin, 5 / unit.picosecond, 1 * unit.femtosecond
    )
    integrator.setRandomNumberSeed(SEED)
    simulation = app.Simulation(topology, system, integrator, openmm.Platform.getPlatform("CPU"))
    simulation.context.setPositions(positions)
    simulation.minimizeEnergy(maxIterations=200)
    simulation.context.setVelocitiesToTemperature(300 * unit.kelvin, SEED)
    simulation.step(4000)
    state = simulation.context.getState(positions=True, velocities=True)
    arrays = {
        "positions": state.getPositions(asNumpy=True)._value,  # nm
        "velocities": state.getVelocities(asNumpy=True)._value,  # nm/ps
    }
    np.savez(HERE / "warm_dipeptide.npz", **arrays)


if __name__ == "__main__":
    main()
