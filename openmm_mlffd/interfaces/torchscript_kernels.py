"""The engine of compiled students with the fused kernels; the only part that needs Warp."""

import math

import torch
from torch import Tensor, nn

import openmm_mlffd.kernels.ops  # noqa: F401 (registers torch.ops.mlffd)
from openmm_mlffd.fast import FastPotential, Rows
from openmm_mlffd.potential import Potential
from openmm_mlffd.rows import DENSITY, MOST_SLOTS, SMALLEST_BINNED


class FusedEngine(nn.Module):
    """Energy [eV] and forces [eV/Å] of one system, its neighbors searched in every call.

    Nothing is kept between calls, so threads and systems may share an instance.

    Parameters
    ----------
    potential
        The student in double precision.
    precision, remember
        As of `FastPotential`.
    """

    def __init__(self, potential: Potential, *, precision: str, remember: bool) -> None:
        super().__init__()
        self.fast = FastPotential(potential, precision=precision, remember=remember)
        self.cutoff = potential.cutoff
        self.smallest_binned = SMALLEST_BINNED
        self.most_slots = MOST_SLOTS
        self.expected = 4 / 3 * math.pi * potential.cutoff**3 * DENSITY

    def forward(
        self, positions: Tensor, species: Tensor, cell: Tensor, pbc: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Of one system: positions and cell in Å, zero where not periodic."""
        n, device = positions.shape[0], positions.device
        box, periodic = cell.unsqueeze(0), pbc.unsqueeze(0).contiguous()
        system = torch.zeros([n], dtype=torch.int32, device=device)
        first = torch.tensor([0, n], dtype=torch.int32, device=device)
        room = 16 * math.ceil(1.25 * self.expected / 16.0)
        neighbors, images, reverse, counts = torch.ops.mlffd.neighbor_rows(
            positions, box, periodic, system, first, self.cutoff, room, n > self.smallest_binned
        )
        most = int(counts.max())
        if most > room:
            room = most
            if room * n > self.most_slots:
                raise RuntimeError(f"{n} atoms with up to {most} neighbors each are too many")
            neighbors, images, reverse, counts = torch.ops.mlffd.neighbor_rows(
                positions, box, periodic, system, first, self.cutoff, room,
                n > self.smallest_binned,
            )  # fmt: skip
        rows = Rows(
            positions, species.to(torch.int32), system, box, neighbors, images, reverse, counts
        )
        found = self.fast(rows, False)
        return found.energy[0], found.forces
