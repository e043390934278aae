"""Short-range repulsion that pushes clashing atoms apart."""

import torch
from torch import Tensor, nn

from openmm_mlffd.elements import COVALENT_RADII
from openmm_mlffd.radial import smooth_cutoff
from openmm_mlffd.units import BOHR, COULOMB

SHORTEST_RANGE = 1.0
"""The repulsion of small pairs, such as two hydrogens, reaches at least this far [Å]."""


class ZBL(nn.Module):
    """Universal screened nuclear repulsion of Ziegler, Biersack and Littmark (1985).

    E(r) = COULOMB Z_i Z_j / r · φ(r / a) · cutoff(r / c), with φ a sum of four exponentials,
    a = 0.8854 bohr / (Z_i^0.23 + Z_j^0.23), and c the sum of the covalent radii, at least
    `SHORTEST_RANGE`: next to nothing at the length of a single bond, up to 4 eV at that of a
    triple bond (the network learns the rest), a wall within. Nothing to train.

    Parameters
    ----------
    numbers
        Atomic numbers of the model's elements, in the order of its species.

    Raises
    ------
    ValueError
        If an element has no covalent radius (beyond curium).
    """

    def __init__(self, numbers: list[int]) -> None:
        super().__init__()
        if not all(0 < z < len(COVALENT_RADII) for z in numbers):
            raise ValueError(
                f"elements must be from hydrogen to Z = {len(COVALENT_RADII) - 1}, got {numbers}"
            )
        # neither buffers, which .float() would round, nor lists, which TorchScript would
        self._numbers = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        radii = [COVALENT_RADII[z] for z in numbers]
        self._radii = torch.tensor(radii, dtype=torch.float64, device="cpu")
        self.shortest_range = SHORTEST_RANGE
        self.screening_length = 0.8854 * BOHR
        self.coulomb = COULOMB

    def forward(self, distances: Tensor, species_i: Tensor, species_j: Tensor) -> Tensor:
        """Energy of each pair [eV], shape ``(n_edges,)``, from softened distances [Å]."""
        z, radii = self._numbers.to(distances), self._radii.to(distances)
        z_i, z_j = z[species_i], z[species_j]
        reach = (radii[species_i] + radii[species_j]).clamp(min=self.shortest_range)
        x = distances * (z_i**0.23 + z_j**0.23) / self.screening_length
        screening = (
            0.18175 * torch.exp(-3.19980 * x)
            + 0.50986 * torch.exp(-0.94229 * x)
            + 0.28022 * torch.exp(-0.40290 * x)
            + 0.02817 * torch.exp(-0.20162 * x)
        )
        return self.coulomb * z_i * z_j / distances * screening * smooth_cutoff(distances / reach)
