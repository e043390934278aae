"""Repulsion of atoms that have more bonded neighbors than any that the student was trained on."""

from typing import Final

import torch
from torch import Tensor, nn

from openmm_mlffd.elements import COVALENT_RADII

BONDED = 1.0
"""Neighbors up to this share of the sum of the covalent radii count as one."""

FREE = 1.6
"""Neighbors beyond this share do not count."""

STRENGTH = 50.0
"""Energy of each neighbor too many [eV]."""

SOFTNESS = 0.3
"""Excess of neighbors below which the energy rises slowly."""

NO_LIMIT = 1000.0
"""Limit of an element that is not in the training data."""


class Crowding(nn.Module):
    """E_i = STRENGTH x³ / (x² + SOFTNESS²), x the excess of atom i's coordination over its limit.

    The coordination is the sum over the neighbors of 1 - t³ (10 - 15 t + 6 t²), where t goes from
    0 to 1 as the distance goes from `BONDED` to `FREE` covalent distances. The limits are those of
    the training data, so there the term is zero; where atoms are crowded as in no data, the network
    says anything, and this keeps it from making that a bound state. Nothing to train; two
    continuous derivatives.

    Parameters
    ----------
    numbers
        Atomic numbers of the model's elements, in the order of its species.
    limits
        Largest coordination of each element that costs nothing.

    Raises
    ------
    ValueError
        If there is not one positive limit for each element.
    """

    __jit_unused_properties__: Final = ("limits",)

    def __init__(self, numbers: list[int], limits: list[float]) -> None:
        super().__init__()
        if len(limits) != len(numbers) or not all(limit > 0.0 for limit in limits):
            raise ValueError(
                f"one positive coordination limit is needed for each of {len(numbers)} elements, "
                f"got {limits}"
            )
        # neither buffers, which .float() would round, nor lists, which TorchScript would
        self._limits = torch.tensor(limits, dtype=torch.float64, device="cpu")
        radii = [COVALENT_RADII[z] for z in numbers]
        self._radii = torch.tensor(radii, dtype=torch.float64, device="cpu")
        self.bonded, self.free = BONDED, FREE
        self.strength, self.softness = STRENGTH, SOFTNESS

    @property
    def limits(self) -> list[float]:
        """Largest coordination of each element that costs nothing."""
        return self._limits.tolist()

    def coordination(
        self, distances: Tensor, receiver: Tensor, sender: Tensor, species: Tensor
    ) -> Tensor:
        """Coordination of each atom, shape ``(n_atoms,)``.

        Parameters
        ----------
        distances
            Softened distances [Å], shape ``(n_edges,)``.
        receiver, sender
            Atoms of each edge, shape ``(n_edges,)``.
        species
            Element index of each atom, shape ``(n_atoms,)``.
        """
        radii = self._radii.to(distances)[species]
        share = distances / (radii[receiver] + radii[sender])
        t = ((share - self.bonded) / (self.free - self.bonded)).clamp(min=0.0, max=1.0)
        counted = 1.0 - t * t * t * (10.0 + t * (6.0 * t - 15.0))
        zeros = torch.zeros([species.shape[0]], dtype=distances.dtype, device=distances.device)
        return zeros.index_add(0, receiver, counted)

    def forward(
        self, distances: Tensor, receiver: Tensor, sender: Tensor, species: Tensor
    ) -> Tensor:
        """Energy of each atom [eV], shape ``(n_atoms,)``; arguments as of `coordination`."""
        found = self.coordination(distances, receiver, sender, species)
        excess = (found - self._limits.to(found)[species]).clamp(min=0.0)
        return self.strength * excess**3 / (excess * excess + self.softness**2)
