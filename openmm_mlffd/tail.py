"""Long-range tail: Coulomb between smeared charges and dispersion, cut off twice smoothly."""

import math

import torch
from torch import Tensor, nn

from openmm_mlffd.elements import COVALENT_RADII
from openmm_mlffd.units import BOHR, COULOMB, HARTREE

SMEARING = 1.0
"""Width σ of the Gaussian charges [Å]: erf(r / 2σ) / r between two of them."""

DAMPING = 2.0
"""Dispersion levels off within this many times the sum of the covalent radii."""

# of free atoms, in atomic units (Tkatchenko and Scheffler 2009, doi:10.1103/PhysRevLett.102.073005)
_C6 = {1: 6.5, 6: 46.6, 7: 24.2, 8: 15.6, 9: 9.52, 14: 305.0, 15: 185.0, 16: 134.0, 17: 94.6}
_C6_OTHER = 100.0


def shifted(value: Tensor, slope: Tensor, curvature: Tensor, r: Tensor, cutoff: float) -> Tensor:
    """What to subtract from f(r), so that it and two derivatives vanish at the cutoff.

    f(c) + f'(c) (r - c) + ½ f''(c) (r - c)²

    Parameters
    ----------
    value, slope, curvature
        f and its derivatives at the cutoff.
    r
        Distances [Å].
    cutoff
        c [Å].
    """
    x = r - cutoff
    return value + x * (slope + 0.5 * curvature * x)


class LongRangeTail(nn.Module):
    """½ Σ_j of Coulomb and dispersion energies within a cutoff, and the Coulomb energy of a shell.

    Coulomb: k q_i q_j [erf(r / 2σ) / r - shift(r)], with a shift by which energy, force and its
    derivative vanish at the cutoff. It stands for charges on the sphere at the cutoff that
    neutralise what is within, as in the method of Wolf et al. (1999, doi:10.1063/1.478738) and its
    shifted forces (Fennell and Gezelter 2006, doi:10.1063/1.2206581); the part of the atom's own
    charge is -½ k q_i² shift(0). The same for molecules and periodic systems: no Ewald sum, and no
    box in which it would be wrong, but neither any interaction beyond the cutoff.

    Dispersion: -√(C_i C_j) [1 / (r⁶ + d⁶) - shift(r)], d the `DAMPING` times the sum of the
    covalent radii (Becke and Johnson's form), C a coefficient for each element that is trained and
    starts at that of the free atom.

    Parameters
    ----------
    numbers
        Atomic numbers of the model's elements.
    cutoff
        Reach [Å].
    """

    def __init__(self, numbers: list[int], cutoff: float) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.coulomb = COULOMB
        self.width = 2.0 * SMEARING
        c6 = [_C6.get(z, _C6_OTHER) * HARTREE * BOHR**6 for z in numbers]
        self.log_c6 = nn.Parameter(torch.tensor([math.log(c) for c in c6]))
        # on the device, since steps that are replayed cannot fetch from the host, and in the file
        self.register_buffer("radii", torch.tensor([DAMPING * COVALENT_RADII[z] for z in numbers]))

    def forward(
        self, distances: Tensor, charges: Tensor, species: Tensor, edge_index: Tensor
    ) -> Tensor:
        """Energy of each atom [eV], shape ``(n_atoms,)``.

        Parameters
        ----------
        distances
            Softened lengths of the edges [Å], shape ``(n_edges,)``; beyond the cutoff they give 0.
        charges
            Partial charges [e], shape ``(n_atoms,)``.
        species
            Element index of each atom, shape ``(n_atoms,)``.
        edge_index
            Receiver and sender, shape ``(2, n_edges)``.
        """
        receiver, sender = edge_index[0], edge_index[1]
        r = distances.clamp(max=self.cutoff)
        pairs = self.coulomb * charges[receiver] * charges[sender] * self._coulomb(r)
        root = torch.exp(0.5 * self.log_c6)[species].to(r.dtype)
        radii = self.radii[species].to(r.dtype)  # type: ignore[index]
        damping = radii[receiver] + radii[sender]
        pairs = pairs - root[receiver] * root[sender] * self._dispersion(r, damping)
        origin = torch.zeros([1], dtype=r.dtype, device=r.device)
        own = -0.5 * self.coulomb * charges.square() * self._coulomb_shift(origin)
        return own.index_add(0, receiver, 0.5 * pairs)

    def _coulomb(self, r: Tensor) -> Tensor:
        return torch.erf(r / self.width) / r - self._coulomb_shift(r)

    def _coulomb_shift(self, r: Tensor) -> Tensor:
        c = torch.full([1], self.cutoff, dtype=r.dtype, device=r.device)
        x = c / self.width
        gauss = 2.0 / math.sqrt(math.pi) / self.width * torch.exp(-x * x)
        value = torch.erf(x) / c
        slope = (gauss - value) / c
        curvature = -2.0 * gauss / (self.width * self.width) - 2.0 * slope / c
        return shifted(value, slope, curvature, r, self.cutoff)

    def _dispersion(self, r: Tensor, damping: Tensor) -> Tensor:
        d6 = damping**6
        c = self.cutoff
        at_cutoff = 1.0 / (c**6 + d6)
        slope = -6.0 * c**5 * at_cutoff**2
        curvature = (-30.0 * c**4 + 72.0 * c**10 * at_cutoff) * at_cutoff**2
        return 1.0 / (r**6 + d6) - shifted(at_cutoff, slope, curvature, r, c)
