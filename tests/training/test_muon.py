"""Muon."""

import torch

from openmm_mlffd.training.flat import FlatWeights
from openmm_mlffd.training.muon import Muon, orthogonalized


def test_orthogonalized_matrices_have_singular_values_near_one():
    torch.manual_seed(0)
    for shape in ((2, 8, 8), (1, 24, 8), (3, 8, 24)):
        found = torch.linalg.svdvals(orthogonalized(torch.randn(shape, dtype=torch.float64)))
        assert float(found.min()) > 0.5
        assert float(found.max()) < 1.3


def test_orthogonalized_matrix_has_the_directions_of_the_matrix():
    torch.manual_seed(0)
    matrix = torch.randn(1, 6, 6, dtype=torch.float64)
    u, _, vh = torch.linalg.svd(matrix)
    inside = u.transpose(1, 2) @ orthogonalized(matrix) @ vh.transpose(1, 2)
    torch.testing.assert_close(inside, torch.diag_embed(inside.diagonal(dim1=1, dim2=2)))


def test_muon_moves_matrices_only_and_leaves_adamw_the_rest():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.SiLU(), torch.nn.Linear(6, 1))
    flat = FlatWeights(network)
    muon = Muon(network, flat)
    before = [p.detach().clone() for p in flat.parameters]
    flat.write_gradient([torch.randn_like(p) for p in flat.parameters])
    muon.step(torch.tensor(0.1), torch.tensor(True))
    moved = [bool((p != b).any()) for p, b in zip(flat.parameters, before, strict=True)]
    left = [bool(g.ne(0).any()) for g in flat.views]
    assert moved == [True, False, False, False]  # the last matrix has one row
    assert left == [False, True, True, True]


def test_gradient_that_is_not_finite_moves_nothing():
    network = torch.nn.Sequential(torch.nn.Linear(4, 6))
    flat = FlatWeights(network)
    muon = Muon(network, flat)
    before = flat.weights.detach().clone()
    flat.write_gradient([torch.full_like(p, torch.nan) for p in flat.parameters])
    muon.step(torch.tensor(0.1), torch.tensor(False))
    torch.testing.assert_close(flat.weights.detach(), before, rtol=0, atol=0)
    assert float(muon.sums[0].abs().max()) == 0.0
