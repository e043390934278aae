import math

import numpy as np
import pytest
import torch

from openmm_mlffd.tail import DAMPING, SMEARING, LongRangeTail, shifted
from openmm_mlffd.units import BOHR, COULOMB, HARTREE

CUTOFF = 9.0
PAIR = torch.tensor([[0, 1], [1, 0]])


@pytest.fixture
def tail():
    return LongRangeTail([1, 6, 8], CUTOFF).double()


def pair_energy(tail, r, charges=(0.4, -0.7), species=(0, 2)):
    """Energy of two atoms, by distance [Å]."""
    energies = [
        tail(x.expand(2), torch.tensor(charges).double(), torch.tensor(species), PAIR).sum()
        for x in r
    ]
    return torch.stack(energies)


def derivatives(tail, r, **kwargs):
    r = torch.tensor(r, dtype=torch.float64).requires_grad_()
    energy = pair_energy(tail, r, **kwargs)
    slope = torch.autograd.grad(energy.sum(), r, create_graph=True)[0]
    curvature = torch.autograd.grad(slope.sum(), r)[0]
    return energy.detach().numpy(), slope.detach().numpy(), curvature.numpy()


def test_what_is_subtracted_agrees_to_second_order_at_the_cutoff():
    r = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    found = shifted(torch.tensor(2.0), torch.tensor(-5.0), torch.tensor(7.0), r, 3.0)
    slope = torch.autograd.grad(found, r, create_graph=True)[0]
    assert (found.item(), slope.item()) == (2.0, -5.0)
    assert torch.autograd.grad(slope, r)[0].item() == 7.0


def test_pair_has_smeared_coulomb_and_damped_dispersion(tail):
    """Differences of energies, in which what is linear or quadratic in r is fitted away."""
    r = np.linspace(1.0, 8.5, 40)
    energy = pair_energy(tail, torch.tensor(r)).detach().numpy()
    coulomb = COULOMB * 0.4 * -0.7 * np.array([math.erf(x / (2 * SMEARING)) / x for x in r])
    c6 = math.sqrt(6.5 * 15.6) * HARTREE * BOHR**6
    damping = DAMPING * (0.31 + 0.66)
    rest = energy - (coulomb - c6 / (r**6 + damping**6))
    parabola = np.polyval(np.polyfit(r, rest, 2), r)
    assert np.ptp(energy) > 1.0
    np.testing.assert_allclose(rest, parabola, atol=1e-6)  # constants are of single precision


def test_energy_force_and_its_derivative_vanish_at_the_cutoff(tail):
    at_infinity = pair_energy(tail, torch.tensor([50.0])).item()
    energy, slope, curvature = derivatives(tail, [CUTOFF - 1e-4, CUTOFF - 1e-2, CUTOFF + 1e-3])
    np.testing.assert_allclose(energy, at_infinity, atol=1e-8)
    assert abs(slope[0]) < 1e-9
    assert abs(curvature[0]) < 1e-5
    assert slope[2] == curvature[2] == 0
    assert abs(derivatives(tail, [4.0])[1][0]) > 1e-2


def test_own_charge_costs_the_energy_of_its_neutralising_shell(tail):
    none = torch.zeros((2, 0), dtype=torch.int64)
    charges = torch.tensor([0.5, -1.0], dtype=torch.float64)
    energies = tail(torch.zeros(0).double(), charges, torch.tensor([0, 1]), none)
    # of a point charge 1 / r is shifted by 1/c + 1/c + 1/c at the origin
    expected = -0.5 * COULOMB * np.array([0.25, 1.0]) * 3 / CUTOFF
    np.testing.assert_allclose(energies.detach(), expected, rtol=1e-4)


@pytest.mark.parametrize("cutoff", [10.0, 14.0, 20.0])
def test_energy_of_rock_salt_nears_that_of_madelung_with_the_square_of_the_cutoff(cutoff):
    """The shell stands for the rest of the crystal: no Ewald sum is needed."""
    spacing = 2.8
    tail = LongRangeTail([1, 6], cutoff).double()
    with torch.no_grad():
        tail.log_c6.fill_(-50.0)  # no dispersion
    n = math.ceil(cutoff / spacing)
    grid = np.stack(np.meshgrid(*[np.arange(-n, n + 1)] * 3, indexing="ij"), -1).reshape(-1, 3)
    r = spacing * np.linalg.norm(grid, axis=1)
    near = (r > 0) & (r < cutoff)
    sign, r = (1.0 - 2.0 * (np.abs(grid.sum(1)) % 2))[near], r[near]
    # the ion at the origin; its neighbors are given no edges of their own
    charges = torch.tensor(np.concatenate([[1.0], sign]))
    edges = torch.stack([torch.zeros(len(r), dtype=torch.int64), torch.arange(1, len(r) + 1)])
    species = torch.zeros(len(charges), dtype=torch.int64)
    found = tail(torch.tensor(r), charges, species, edges)[0].item()
    # smeared ions attract their neighbors less
    smeared = sum(s * (math.erf(d / 2) - 1) / d for s, d in zip(sign, r, strict=True))
    expected = 0.5 * COULOMB * (-1.747565 / spacing + smeared)
    assert expected == pytest.approx(-3.862, abs=1e-3)
    assert abs(found - expected) < 24.0 / cutoff**2


def test_energy_is_that_of_all_orders_of_the_atoms(tail):
    r = torch.tensor([3.0])
    one = pair_energy(tail, r, charges=(0.3, 0.1), species=(0, 2))
    other = pair_energy(tail, r, charges=(0.1, 0.3), species=(2, 0))
    assert one.item() == pytest.approx(other.item(), abs=1e-12)


def test_single_precision_is_near_double(tail):
    double = pair_energy(tail, torch.tensor([2.5]))
    single = tail.float()(
        torch.tensor([2.5, 2.5]), torch.tensor([0.4, -0.7]), torch.tensor([0, 2]), PAIR
    ).sum()
    assert single.item() == pytest.approx(double.item(), rel=1e-5)


def test_everything_that_decides_the_energy_is_in_the_file(tail):
    assert sorted(tail.state_dict()) == ["log_c6", "radii"]
