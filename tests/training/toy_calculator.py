"""An ASE calculator for tests, loaded by the teacher's process: some elements are dangerous."""

import os
import signal
import time

import numpy as np
from ase.calculators.calculator import Calculator, all_changes

CRASH, HANG, RAISE, NAN, HOT, PUSHED = 2, 10, 18, 36, 54, 86


class Toy(Calculator):
    """Springs between all atoms, and what else can happen to a teacher."""

    implemented_properties = ["energy", "forces", "stress", "charges"]  # noqa: RUF012

    def __init__(self, stiffness=1.0, pause=0.0):
        super().__init__()
        self.stiffness, self.pause = stiffness, pause

    def calculate(self, atoms=None, properties=None, system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        print("a teacher that talks", flush=True)
        time.sleep(self.pause)
        danger = set(atoms.numbers.tolist())
        if CRASH in danger:
            os.kill(os.getpid(), signal.SIGSEGV)
        if HANG in danger:
            time.sleep(100)
        if RAISE in danger:
            raise ArithmeticError("no convergence")
        x = atoms.positions
        forces = -self.stiffness * (len(x) * x - x.sum(0))
        forces[0, 0] += {NAN: np.nan, PUSHED: 1.0}.get(max(danger), 0.0)
        if HOT in danger:
            forces *= 1e6
        centered = x - x.mean(0)
        self.results = {
            "energy": 0.5 * self.stiffness * len(x) * (centered**2).sum()
            + 10.0 * atoms.info.get("charge", 0),
            "forces": forces,
            "stress": np.arange(6.0) * 1e-3,
            "charges": np.full(len(x), atoms.info.get("charge", 0) / len(x)),
        }


def wrong():
    raise RuntimeError("weights are missing")


class Morse(Calculator):
    """Morse bonds between all atoms; notes each structure in the file TOY_LOG, if that is set."""

    implemented_properties = ["energy", "forces", "stress"]  # noqa: RUF012

    def calculate(self, atoms=None, properties=None, system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        if "TOY_LOG" in os.environ:
            with open(os.environ["TOY_LOG"], "a") as file:
                file.write(f"{atoms.positions.sum():.9f}\n")
        z, x = atoms.numbers, atoms.positions
        depth = 2.0 * np.sqrt(np.log(z[:, None] + 1) * np.log(z + 1))
        rest = 0.5 * (z[:, None] ** (1 / 3) + z ** (1 / 3))
        vectors = x[:, None] - x
        r = np.linalg.norm(vectors, axis=-1) + np.eye(len(z))
        e = np.exp(-1.5 * (r - rest)) * (1 - np.eye(len(z)))
        slope = depth * -3.0 * (e**2 - e)
        self.results = {
            "energy": 0.5 * (depth * (e**2 - 2 * e)).sum(),
            "forces": -((slope / r)[:, :, None] * vectors).sum(1),
            "stress": np.zeros(6),
        }
