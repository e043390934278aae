import numpy as np
import pytest
import torch

pytest.importorskip("warp")

from openmm_mlffd.kernels.neighbor_ops import NeighborOverflow
from openmm_mlffd.rows import VerletRows, check_volume


def make_list(n_atoms=30, *, periodic=True, **settings):
    species = torch.zeros(n_atoms, dtype=torch.int64)
    rows = VerletRows(species, 4.0, 1.0, periodic=torch.tensor([periodic] * 3), **settings)
    positions = np.random.default_rng(0).uniform(0, 9.0, (n_atoms, 3))
    rows.rows.positions.copy_(torch.tensor(positions))
    if periodic:
        rows.rows.cell.copy_(9.0 * torch.eye(3, dtype=torch.float64)[None])
    return rows


def test_list_holds_until_an_atom_moved_more_than_half_the_skin():
    rows = make_list()
    assert not rows.holds(float(rows.moved()))
    rows.build()
    assert rows.n_builds == 1
    assert float(rows.moved()) == 0.0
    rows.rows.positions[3, 1] += 0.499
    assert rows.holds(float(rows.moved()))
    rows.rows.positions[3, 2] += 0.1
    assert not rows.holds(float(rows.moved()))
    rows.rows.positions[3, 1] = float("nan")
    assert not rows.holds(float(rows.moved()))


def test_tensors_stay_where_they_are():
    rows = make_list()
    rows.build()
    places = [t.data_ptr() for t in rows.rows]
    rows.rows.positions.add_(1.0)
    rows.build()
    assert [t.data_ptr() for t in rows.rows] == places


def test_rows_grow_when_atoms_come_closer():
    rows = make_list(150)
    before = rows.capacity
    rows.rows.positions.mul_(0.2)
    rows.build()
    most = int(rows.rows.counts.max())
    assert before < most <= rows.capacity < 1.3 * most + 16
    assert rows.rows.neighbors.shape == (150, rows.capacity)


def test_fixed_capacity_is_an_error_and_the_list_does_not_hold_afterwards():
    rows = make_list(60, capacity=16)
    with pytest.raises(NeighborOverflow, match="neighbors and the list has room for 16"):
        rows.build()
    assert not rows.holds(float(rows.moved()))


def test_more_neighbors_than_can_be_counted_are_an_error():
    rows = make_list(4)
    rows.rows.cell.copy_(0.004 * torch.eye(3, dtype=torch.float64)[None])
    rows.rows.positions.zero_()
    rows.rows.counts[:] = 2**30
    with pytest.raises(NeighborOverflow, match="4 atoms with up to 1342177280 neighbors each"):
        rows.make_room()


def test_flat_boxes_are_refused():
    box = torch.tensor([[3.0, 0, 0], [0, 3, 0], [3, 3, 0]], dtype=torch.float64)
    with pytest.raises(ValueError, match="box of system 0 has no volume"):
        check_volume(box, torch.ones(3, dtype=torch.bool))
    check_volume(box, torch.tensor([True, True, False]))
    check_volume(0 * box, torch.zeros(3, dtype=torch.bool))


def test_cutoff_and_skin_must_make_sense():
    for cutoff, skin in [(0.0, 1.0), (4.0, -0.1), (float("nan"), 1.0)]:
        with pytest.raises(ValueError, match="must be positive and the skin not negative"):
            VerletRows(torch.zeros(2), cutoff, skin, periodic=torch.zeros(3, dtype=torch.bool))
