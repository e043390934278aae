import numpy as np
import pytest
import torch
from scipy import constants

from openmm_mlffd.elements import COVALENT_RADII
from openmm_mlffd.repulsion import SHORTEST_RANGE, ZBL

NUMBERS = [1, 6, 8, 17, 79]
PAIRS = [(1, 1), (1, 6), (1, 8), (6, 6), (6, 8), (8, 17), (17, 17), (1, 79), (79, 79)]


def pair_energy(r, a, b):
    species = [torch.full((len(r),), NUMBERS.index(z)) for z in (a, b)]
    return ZBL(NUMBERS)(torch.as_tensor(r), *species)


def reach(a, b):
    return max(SHORTEST_RANGE, COVALENT_RADII[a] + COVALENT_RADII[b])


def zbl_by_hand(r, a, b):
    """Universal potential of Ziegler, Biersack and Littmark in SI, cut off smoothly [eV]."""
    bohr = constants.value("Bohr radius") * 1e10
    x = r / (0.8854 * bohr / (a**0.23 + b**0.23))
    c = [0.18175, 0.50986, 0.28022, 0.02817]
    d = [3.1998, 0.94229, 0.4029, 0.20162]
    screening = sum(ck * np.exp(-dk * x) for ck, dk in zip(c, d, strict=True))
    coulomb = constants.e / (4 * constants.pi * constants.epsilon_0) * 1e10
    y = np.minimum(r / reach(a, b), 1.0)
    return coulomb * a * b / r * screening * (1 - 28 * y**6 + 48 * y**7 - 21 * y**8)


@pytest.mark.parametrize("pair", PAIRS)
def test_energy_is_that_of_ziegler_biersack_and_littmark(pair):
    r = np.linspace(0.02, 3.5, 200)
    found = pair_energy(r, *pair).numpy()
    np.testing.assert_allclose(found, zbl_by_hand(r, *pair), rtol=1e-8, atol=1e-9)
    assert found[0] > 100


@pytest.mark.parametrize("pair", PAIRS)
def test_pairs_repel_at_every_distance_within_reach(pair):
    r = torch.linspace(0.01, 0.99 * reach(*pair), 300, dtype=torch.float64, requires_grad=True)
    slope = torch.autograd.grad(pair_energy(r, *pair).sum(), r)[0]
    assert (slope < 0).all()


@pytest.mark.parametrize("pair", PAIRS)
def test_energy_and_force_are_continuous_where_the_repulsion_ends(pair):
    end = reach(*pair)
    r = torch.tensor([end - 1e-5, end + 1e-5], dtype=torch.float64, requires_grad=True)
    energy = pair_energy(r, *pair)
    slope = torch.autograd.grad(energy.sum(), r)[0]
    assert energy.abs().max() < 1e-9
    assert slope.abs().max() < 1e-6
    assert slope[1] == 0


def test_energy_is_symmetric_in_the_two_atoms():
    r = np.linspace(0.1, 1.5, 20)
    assert torch.equal(pair_energy(r, 6, 79), pair_energy(r, 79, 6))


@pytest.mark.parametrize(("pair", "bond"), [((6, 6), 1.54), ((1, 6), 1.09), ((1, 8), 0.96)])
def test_single_bonds_cost_next_to_nothing(pair, bond):
    assert pair_energy(np.array([bond]), *pair) < 0.02


@pytest.mark.parametrize(("pair", "bond"), [((1, 1), 0.74), ((6, 6), 1.20), ((6, 8), 1.13)])
def test_shortest_bonds_cost_a_few_electronvolts_and_half_of_them_ten_times_that(pair, bond):
    # H2, acetylene and carbon monoxide
    whole, half = pair_energy(np.array([bond, bond / 2]), *pair).tolist()
    assert 0 < whole < 4
    assert half > 10 * whole


@pytest.mark.parametrize("numbers", [[0], [1, 97], [-1]])
def test_element_without_a_radius_is_refused(numbers):
    with pytest.raises(ValueError, match="elements must be from hydrogen to Z = 96"):
        ZBL(numbers)
