"""Coulomb energies of a few charges that change among many that do not, in double precision.

Imports neither openmm nor openmmml.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from openmm_mlffd.units import COULOMB

METHODS = ("exact", "cutoff", "periodic cutoff", "ewald")
"""All pairs; OpenMM's reaction field, without and with a box; Ewald's sum."""

PERIODIC = ("periodic cutoff", "ewald")
"""Those of them that need a box."""

WIDTH = 3.5
"""α times the cutoff of the Ewald sum; what is left out is some 1e-6 of a pair's energy."""

_LARGEST = 4_000_000  # numbers in an array


class Interaction(NamedTuple):
    """Energy of the charges, and its derivatives."""

    energy: Tensor
    """[eV], a scalar."""

    potentials: Tensor
    """Derivative by each charge that changes [eV/e], shape (n,)."""

    forces: Tensor
    """Forces on these charges, as long as they are what they are [eV/Å], shape (n, 3)."""

    others: Tensor
    """Forces on the charges that do not change [eV/Å], shape (m, 3)."""


class Surroundings:
    """Charges that do not change, and how others interact with them.

    With Ewald's sum the charges that change interact with their own images and those of one
    another too; they do not interact within the nearest image, where a student knows all. In a
    box that is charged as a whole there is OpenMM's neutralising background.

    Parameters
    ----------
    charges
        [e], shape ``(m,)``, float64.
    method
        One of `METHODS`.
    cutoff
        Of the reaction field [Å].
    dielectric
        Relative permittivity beyond that.
    """

    def __init__(
        self, charges: Tensor, method: str, cutoff: float = 10.0, dielectric: float = 78.3
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        self.charges = charges
        self.method = method
        self.cutoff = cutoff
        self._k_rf = (dielectric - 1.0) / (2.0 * dielectric + 1.0) / cutoff**3
        self._c_rf = 3.0 * dielectric / (2.0 * dielectric + 1.0) / cutoff
        self._known: tuple[list[list[float]], _Reciprocal] | None = None

    @property
    def periodic(self) -> bool:
        """Whether there are images."""
        return self.method in PERIODIC

    def interact(self, charges: Tensor, x: Tensor, y: Tensor, box: Tensor | None) -> Interaction:
        """Energy and derivatives.

        Parameters
        ----------
        charges
            Charges that change [e], shape ``(n,)``, float64.
        x, y
            Positions of these and of the others [Å], shapes ``(n, 3)`` and ``(m, 3)``.
        box
            Box vectors as rows, reduced as OpenMM's are [Å], shape ``(3, 3)``; not looked at
            without periodicity.

        Raises
        ------
        ValueError
            If the cutoff is more than half of the box.
        """
        if not self.periodic:
            return self._pairs(charges, x, y, None)
        assert box is not None
        if self.method == "ewald":
            reciprocal = self._reciprocal(box)
            parts = (
                self._pairs(charges, x, y, box, reciprocal.alpha),
                reciprocal.images(charges, x, box),
                reciprocal.sum(self.charges, charges, x, y),
            )
            return Interaction(*(sum(p[1:], p[0]) for p in zip(*parts, strict=True)))
        if 2.0 * self.cutoff > float(box.diagonal().min()):
            raise ValueError(
                f"the cutoff of {self.cutoff:.2f} Å is more than half of the box, whose edges are "
                f"{', '.join(f'{x:.2f}' for x in box.diagonal().tolist())} Å"
            )
        return self._pairs(charges, x, y, box)

    def _reciprocal(self, box: Tensor) -> "_Reciprocal":
        key = box.tolist()
        known = self._known  # one immutable object: threads may share this one
        if known is None or known[0] != key:
            known = self._known = (key, _Reciprocal(box))
        return known[1]

    def _pairs(
        self, charges: Tensor, x: Tensor, y: Tensor, box: Tensor | None, alpha: float = 0.0
    ) -> Interaction:
        """The sum over pairs of one that changes and one that does not."""
        potentials, forces = torch.zeros_like(charges), torch.zeros_like(x)
        others = torch.zeros_like(y)
        for part in range(0, len(y), max(1, _LARGEST // max(1, 3 * len(x)))):
            here = slice(part, part + max(1, _LARGEST // max(1, 3 * len(x))))
            away = y[here].unsqueeze(0) - x.unsqueeze(1)  # (n, part, 3)
            if box is not None:
                away = nearest_image(away, box)
            r = away.square().sum(2).sqrt()
            value, slope = self._pair_energy(r, alpha, box)
            value = value * self.charges[here]
            potentials += COULOMB * value.sum(1)
            pull = COULOMB * charges.unsqueeze(1) * self.charges[here] * slope / r
            on_pairs = pull.unsqueeze(2) * away
            forces += on_pairs.sum(1)
            others[here] = -on_pairs.sum(0)
        return Interaction((charges * potentials).sum(), potentials, forces, others)

    def _pair_energy(self, r: Tensor, alpha: float, box: Tensor | None) -> tuple[Tensor, Tensor]:
        """Energy of two unit charges in units of `COULOMB`, and its derivative."""
        inverse = 1.0 / r
        if self.method == "exact":
            return inverse, -inverse.square()
        if self.method == "ewald":
            assert box is not None
            value = torch.erfc(alpha * r) * inverse
            gauss = 2.0 * alpha / math.sqrt(math.pi) * torch.exp(-(alpha * r).square())
            near = r < WIDTH / alpha
            return value * near, -(value + gauss) * inverse * near
        near = r < self.cutoff
        value = inverse + self._k_rf * r.square() - self._c_rf
        return value * near, (2.0 * self._k_rf * r - inverse.square()) * near


class _Reciprocal:
    """Waves of a box, and sums over them. Immutable."""

    def __init__(self, box: Tensor) -> None:
        width = float(box.diagonal().min())
        self.alpha = WIDTH / (0.5 * width)
        largest = 2.0 * WIDTH * self.alpha
        self._volume = float(box.diagonal().prod())
        waves = 2.0 * math.pi * torch.linalg.inv(box).T  # rows
        lengths = torch.linalg.norm(box, dim=1).tolist()
        ranges = [int(largest * length / (2.0 * math.pi)) for length in lengths]
        axes = [torch.arange(-n, n + 1, dtype=torch.float64, device=box.device) for n in ranges]
        n = torch.cartesian_prod(*axes)
        half = n[len(n) // 2 + 1 :]  # of each wave and its opposite only one
        k = half @ waves
        square = k.square().sum(1)
        kept = square <= largest**2
        self._k, square = k[kept], square[kept]
        self._weights = (
            COULOMB * 4.0 * math.pi / self._volume
            * torch.exp(-square / (4.0 * self.alpha**2)) / square
        )  # fmt: skip

    def sum(self, fixed: Tensor, charges: Tensor, x: Tensor, y: Tensor) -> Interaction:
        """Interaction by waves, and by the neutralising background."""
        phase = x @ self._k.T
        cos, sin = phase.cos(), phase.sin()
        own_cos, own_sin = charges @ cos, charges @ sin
        all_cos, all_sin = own_cos.clone(), own_sin.clone()
        others = torch.zeros_like(y)
        w = 2.0 * self._weights
        size = max(1, _LARGEST // len(self._k))
        for part in range(0, len(y), size):
            here = slice(part, part + size)
            phase = y[here] @ self._k.T
            c, s = phase.cos(), phase.sin()
            q = fixed[here]
            all_cos += q @ c
            all_sin += q @ s
            others[here] = q.unsqueeze(1) * ((s * (w * own_cos) - c * (w * own_sin)) @ self._k)
        potentials = cos @ (w * all_cos) + sin @ (w * all_sin)
        forces = charges.unsqueeze(1) * ((sin * (w * all_cos) - cos * (w * all_sin)) @ self._k)
        # with its own waves each charge interacts twice
        energy = (charges * potentials).sum()
        energy = energy - 0.5 * (w * (own_cos.square() + own_sin.square())).sum()
        background = -math.pi * COULOMB / (self._volume * self.alpha**2)
        total = charges.sum()
        energy = energy + background * total * (fixed.sum() + 0.5 * total)
        return Interaction(energy, potentials + background * (fixed.sum() + total), forces, others)

    def images(self, charges: Tensor, x: Tensor, box: Tensor) -> Interaction:
        """What takes the charges' own interaction within the nearest image out of the waves."""
        n = len(x)
        away = nearest_image(x.unsqueeze(0) - x.unsqueeze(1), box)
        r = away.square().sum(2).sqrt() + torch.eye(n, dtype=x.dtype, device=x.device)
        other = 1.0 - torch.eye(n, dtype=x.dtype, device=x.device)
        value = -torch.erf(self.alpha * r) / r * other
        gauss = 2.0 * self.alpha / math.sqrt(math.pi)
        slope = (-value - gauss * torch.exp(-(self.alpha * r).square())) / r * other
        potentials = COULOMB * (value @ charges - gauss * charges)
        pull = COULOMB * charges.unsqueeze(1) * charges * slope / r
        return Interaction(
            0.5 * (charges * potentials).sum(),
            potentials,
            (pull.unsqueeze(2) * away).sum(1),
            torch.zeros((1, 3), dtype=x.dtype, device=x.device),
        )


def nearest_image(vectors: Tensor, box: Tensor) -> Tensor:
    """The vectors to the nearest images, if these are closer than half of the box.

    Parameters
    ----------
    vectors
        [Å], shape ``(..., 3)``.
    box
        Box vectors as rows, reduced as OpenMM's are [Å], shape ``(3, 3)``.
    """
    for axis in (2, 1, 0):
        turns = torch.round(vectors[..., axis] / box[axis, axis])
        vectors = vectors - turns.unsqueeze(-1) * box[axis]
    return vectors
