"""The bundled student at distances it was never trained on."""

import itertools

import pytest
import torch

from openmm_mlffd import load_student
from openmm_mlffd.elements import COVALENT_RADII, symbol
from openmm_mlffd.graph import build_graph
from openmm_mlffd.modelfile import bundled_students

STUDENT = load_student(precision="double")
PAIRS = list(itertools.combinations_with_replacement(STUDENT.numbers, 2))


def dimers(numbers, distances, student=STUDENT):
    """Energy [eV] and force that pushes apart [eV/Å] of two atoms at each distance [Å]."""
    n = len(distances)
    positions = torch.zeros((n, 2, 3), dtype=torch.float64)
    positions[:, 1, 0] = distances
    graph = build_graph(
        positions.reshape(-1, 3),
        student.species(torch.tensor(list(numbers) * n)),
        cutoff=student.cutoff,
        cell=torch.zeros((n, 3, 3)),
        pbc=torch.zeros((n, 3), dtype=torch.bool),
        system=torch.arange(n).repeat_interleave(2),
    )
    prediction = student(graph)
    return prediction.energy, prediction.forces[1::2, 0]


@pytest.mark.parametrize("pair", PAIRS, ids=["-".join(map(symbol, p)) for p in PAIRS])
def test_atoms_that_clash_push_apart(pair):
    bond = sum(COVALENT_RADII[z] for z in pair)
    energy, force = dimers(pair, torch.arange(0.05, 0.7 * bond, 0.01, dtype=torch.float64))
    assert (force > 0.1).all()
    assert (energy[:-1] > energy[1:]).all()


@pytest.mark.parametrize("pair", PAIRS, ids=["-".join(map(symbol, p)) for p in PAIRS])
def test_coincident_atoms_have_finite_energy_and_no_force(pair):
    energy, force = dimers(pair, torch.tensor([0.0, 1.5], dtype=torch.float64))
    assert energy.isfinite().all()
    assert energy[0] > energy[1] + 100.0
    assert force[0] == 0.0


@pytest.mark.parametrize("name", bundled_students())
@pytest.mark.parametrize("pair", PAIRS, ids=["-".join(map(symbol, p)) for p in PAIRS])
def test_no_dent_of_the_wall_can_be_reached(name, pair):
    """From 0.72 bond lengths inwards, energy rises 5 eV above free atoms before it falls."""
    student = load_student(name, precision="double")
    bond = sum(COVALENT_RADII[z] for z in pair)
    places = torch.arange(0.05, 0.72 * bond, 0.0025, dtype=torch.float64)
    energy = dimers(pair, torch.cat([places, torch.tensor([20.0])]), student)[0]
    inwards = (energy[:-1] - energy[-1]).flip(0)
    falls = (inwards[1:] < inwards[:-1]).nonzero()[:, 0]
    assert inwards.max() > 20.0
    if len(falls):
        assert inwards[falls[0]] > 5.0
