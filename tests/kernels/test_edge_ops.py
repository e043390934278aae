import pytest
import torch

pytest.importorskip("warp")

from openmm_mlffd.kernels.edge_ops import largest_move, system_sums

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("counts", [[1], [700], [5000], [3, 0, 40, 1], [0, 0], [600, 2500, 1]])
@pytest.mark.parametrize("with_virial", [False, True])
def test_sums_are_those_of_each_system(counts, with_virial, device):
    terms = torch.randn(7 if with_virial else 1, sum(counts), dtype=torch.float64, device=device)
    lengths = torch.tensor(counts, device=device)
    system = torch.repeat_interleave(torch.arange(len(counts), device=device), lengths)
    energy, virial = system_sums(terms, system.to(torch.int32), len(counts))
    for s, parts in enumerate(terms.split(counts, dim=1)):
        sums = torch.zeros(7, dtype=torch.float64, device=device)
        sums[: len(parts)] = parts.sum(1)
        xx, yy, zz, yz, xz, xy = sums[1:]
        expected = torch.stack([xx, xy, xz, xy, yy, yz, xz, yz, zz]).view(3, 3)
        assert (energy[s] - sums[0]).abs() < 1e-11
        assert (virial[s] - expected).abs().max() < 1e-11


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n_atoms", [1, 31, 129, 1000])
def test_largest_move_is_that_of_the_atom_that_moved_most(n_atoms, device):
    before = torch.randn(n_atoms, 3, dtype=torch.float64, device=device)
    after = before + 0.1 * torch.randn(n_atoms, 3, dtype=torch.float64, device=device)
    expected = (after - before).square().sum(1).max()
    assert (largest_move(after, before) - expected).abs() < 1e-15
    assert largest_move(before, before) == 0.0
    after[n_atoms // 2, 1] = torch.nan
    assert largest_move(after, before) == torch.inf
    assert largest_move(before, torch.full_like(before, torch.inf)) == torch.inf


def test_no_atoms_do_not_move():
    nothing = torch.empty(0, 3, dtype=torch.float64)
    assert largest_move(nothing, nothing) == 0.0


def test_operators_pass_opcheck():
    terms = torch.randn(7, 9, dtype=torch.float64)
    system = torch.tensor([0] * 4 + [1] * 5, dtype=torch.int32)
    torch.library.opcheck(torch.ops.mlffd.system_sums.default, (terms, system, 2))
    moved = torch.randn(5, 3, dtype=torch.float64)
    torch.library.opcheck(torch.ops.mlffd.largest_move.default, (moved, moved + 1.0))
