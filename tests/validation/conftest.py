"""Systems and traces that the validation tests share."""

from collections.abc import Callable

import numpy as np
import openmm
import pytest
from openmm import unit

from openmm_mlffd.validation.conservation import EnergyTrace


@pytest.fixture
def make_trace() -> Callable[..., EnergyTrace]:
    """Traces of 10 atoms from time [ps] and energies [eV]; the kinetic energy is 1 or -1 eV."""

    def make(time, total, *, timestep=0.5, **changes) -> EnergyTrace:
        kinetic = np.where(np.arange(len(time)) % 2, 1.0, -1.0)
        values = {
            "timestep": timestep,
            "time": time,
            "potential": total - kinetic,
            "kinetic": kinetic,
            "shadow": np.full(len(time), np.nan),
            "n_atoms": 10,
            "n_dof": 30,
            "end": np.zeros((10, 3)),
            "seconds_per_step": 0.001,
        }
        return EnergyTrace(**values | changes)

    return make


class Chain:
    """Eight carbon atoms, each pair of neighbors bound by a Morse potential, as a `PythonForce`.

    Energy and forces can be made to disagree: forces times ``scale``, and a push of ``swirl``
    [kJ/mol/nm^2] times the distance from the z axis, at right angles to it, that is the gradient
    of nothing.
    """

    depth, width, length = 400.0, 20.0, 0.15  # kJ/mol, 1/nm, nm

    def __init__(self, scale: float = 1.0, swirl: float = 0.0) -> None:
        self.scale, self.swirl = scale, swirl

    def __call__(self, state):
        x = state.getPositions(asNumpy=True).value_in_unit(unit.nanometer)
        bonds = x[1:] - x[:-1]
        r = np.linalg.norm(bonds, axis=1)
        decay = np.exp(-self.width * (r - self.length))
        energy = self.depth * ((1 - decay) ** 2).sum()
        slope = 2 * self.depth * self.width * (1 - decay) * decay
        pull = bonds * (slope / r)[:, None]
        forces = np.zeros_like(x)
        forces[:-1] += pull
        forces[1:] -= pull
        push = self.swirl * np.column_stack([-x[:, 1], x[:, 0], np.zeros(len(x))])
        return energy, self.scale * forces + push

    def system(self) -> openmm.System:
        system = openmm.System()
        for _ in range(8):
            system.addParticle(12.0)
        system.addForce(openmm.PythonForce(self))
        return system

    def positions(self):
        places = np.zeros((8, 3))
        places[:, 0] = self.length * 0.9 * np.arange(8)
        places[1::2, 1] = 0.065
        return places


@pytest.fixture
def make_chain() -> type[Chain]:
    return Chain
