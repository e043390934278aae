"""The least that an evaluation can cost: bytes through memory and operations, by the sizes alone.

What is counted, for each atom and evaluation of energy and forces, with F channels, T interactions
and k neighbors within the cutoff:

- *Matrix products*: those of the network, forward and backward by its input (twice the forward),
  two operations for each weight. The context of the first interaction depends on the element only
  and is a table.
- *Edges*: a filter is a spline of degree 5 (10 operations for each of its channels forward, 20 with
  its derivative backward). A message is 14 F operations, 8 F in the first interaction, where there
  are no vectors yet; backward it is that again, and 6 F for the gradient by the edge.
- *Bytes*: between messages, states (4 F numbers) and features (5 F, in the first interaction a
  table) are written once and read once, in both directions; for each edge, an index (4 bytes) and
  direction and distance (16 bytes) are read by each of the 2 T messages. Gathers of neighbors'
  features, which a cache serves, are not in it, nor is anything that only a part of the
  implementations writes.

A floor is no goal: nothing runs at the peak of a device.
"""

import math
from typing import NamedTuple

from torch import nn

from openmm_mlffd.painn import PaiNN
from openmm_mlffd.potential import Potential

WATER_DENSITY = 3 / 29.9
"""Atoms in a cubic Å of water, as `systems.water` makes it."""

_DEGREE = 5
_PEAKS = {  # bytes and float32 operations in a second, of the maker's data sheets (SXM)
    "H100": (3.35e12, 67e12),
    "H200": (4.8e12, 67e12),
    "A100": (2.0e12, 19.5e12),
}


class Floors(NamedTuple):
    """Least cost of an evaluation, for each atom."""

    bytes_per_atom: float
    """Through the device's memory."""

    operations_per_atom: float
    """Of floating-point numbers; a multiplication and an addition are two."""

    def seconds(self, device: str, n_atoms: int) -> tuple[float, float] | None:
        """Times of the bytes and of the operations at the peak of a device, if that is known."""
        for name, (bandwidth, speed) in _PEAKS.items():
            if name in device:
                return (
                    n_atoms * self.bytes_per_atom / bandwidth,
                    n_atoms * self.operations_per_atom / speed,
                )
        return None


def floors(
    potential: Potential, *, precision: str = "single", density: float = WATER_DENSITY
) -> Floors:
    """Count for a student.

    Parameters
    ----------
    potential
        The student, a PaiNN.
    precision
        "single", "mixed" (features in two bytes) or "double".
    density
        Atoms in a cubic Å, from which the number of neighbors follows.

    Raises
    ------
    ValueError
        If the student is a variant of PaiNN.
    """
    network = potential.network
    if not isinstance(network, PaiNN):
        raise ValueError("floors are those of PaiNN, and this student is a variant of it")
    size = {"single": 4, "mixed": 4, "double": 8}[precision]
    feature_size = 2 if precision == "mixed" else size
    f, t = network.embedding.weight.shape[1], len(network.interactions)
    k = 4 / 3 * math.pi * potential.cutoff**3 * density
    products = 4 * (sum(_weights(network, i) for i in range(t)) + _size(network.readout))
    products -= 4 * f * f  # after the last mixing nobody asks for vectors
    operations, moved = float(products), 0.0
    for i in range(t):
        n_filters, message = (2 * f, 8 * f) if i == 0 else (3 * f, 14 * f)
        forward = 2 * _DEGREE * n_filters + message
        backward = 4 * _DEGREE * n_filters + message + 6 * f
        operations += k * (forward + backward)
        features = 0 if i == 0 else 5 * f * feature_size
        moved += 2 * (2 * 4 * f * size + 2 * features + k * 20)
    return Floors(moved, operations)


def _weights(network: PaiNN, i: int) -> float:
    """Multiplications of the i-th interaction's matrix products and of the mixing after it."""
    interaction, mixing = network.interactions[i], network.mixings[i]
    own = 0 if i == 0 else _size(interaction.context)
    return own + 3 * _size(mixing.project) + _size(mixing.context)


def _size(module: object) -> int:
    assert isinstance(module, nn.Module)
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))
