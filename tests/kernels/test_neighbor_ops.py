import itertools

import numpy as np
import pytest
import torch

pytest.importorskip("warp")

from openmm_mlffd.kernels import reference
from openmm_mlffd.kernels.neighbor_ops import (
    NeighborOverflow,
    check_counts,
    neighbor_rows,
    unpack_images,
)

PBCS = list(itertools.product([False, True], repeat=3))


def random_system(rng, kind, pbc, most=60):
    lengths = rng.uniform(1.1, 2.5, 3) if kind == "tiny" else rng.uniform(2.5, 14.0, 3)
    cell = np.diag(lengths)
    if kind != "orthorhombic":
        cell += rng.uniform(-0.4, 0.4, (3, 3)) * lengths.min()
    if kind == "rotated":
        cell = cell @ np.linalg.qr(rng.normal(size=(3, 3)))[0]
    n_atoms = int(rng.integers(1, 6 if kind == "tiny" else most))
    positions = rng.uniform(-1.5, 2.5, (n_atoms, 3)) @ cell  # many outside the box
    return positions, np.where(np.array(pbc)[:, None], cell, 0.0), pbc


def as_batch(systems):
    count = torch.tensor([len(p) for p, _, _ in systems])
    return (
        torch.tensor(np.concatenate([p for p, _, _ in systems])),
        torch.tensor(np.stack([c for _, c, _ in systems])),
        torch.tensor([p for _, _, p in systems]),
        torch.repeat_interleave(torch.arange(len(systems)), count).to(torch.int32),
        torch.cat([torch.zeros(1, dtype=torch.int64), count.cumsum(0)]).to(torch.int32),
    )


def rows_of(systems, width, binned, capacity=900):
    return neighbor_rows(*as_batch(systems), width, capacity, binned)


def edges_in(rows):
    neighbors, images, _, counts = rows
    filled = torch.arange(neighbors.shape[1]) < counts[:, None]
    receiver = filled.nonzero()[:, 0]
    return torch.cat(
        [receiver[:, None], neighbors[filled].long()[:, None], unpack_images(images[filled])], 1
    )


def edges_by_reference(systems, width):
    positions, cell, pbc, system, _ = as_batch(systems)
    index, shift = reference.neighbor_list(positions, system.long(), cell, pbc, cutoff=width)
    edges = torch.cat([index.T, shift.long()], 1).tolist()
    return torch.tensor(sorted(edges)).reshape(-1, 5)


@pytest.mark.parametrize("binned", [False, True])
@pytest.mark.parametrize("kind", ["orthorhombic", "triclinic", "rotated", "tiny"])
@pytest.mark.parametrize("pbc", PBCS)
def test_rows_are_the_edges_of_the_reference(kind, pbc, binned):
    rng = np.random.default_rng([ord(kind[0]), *pbc])
    systems = [random_system(rng, kind, pbc)]
    found = edges_in(rows_of(systems, 3.3, binned))
    expected = edges_by_reference(systems, 3.3)
    # images are sorted as packed: last box vector first
    order = np.lexsort(found.numpy().T[[2, 3, 4, 1, 0]])
    assert order.tolist() == list(range(len(found)))
    assert sorted(found.tolist()) == expected.tolist()


@pytest.mark.parametrize("binned", [False, True])
def test_batch_has_the_edges_of_its_systems(binned):
    rng = np.random.default_rng(4)
    kinds = ["orthorhombic", "rotated", "tiny", "triclinic"]
    systems = [random_system(rng, kinds[k % 4], pbc) for k, pbc in enumerate(PBCS)]
    systems.insert(3, (np.zeros((0, 3)), np.zeros((3, 3)), (False,) * 3))  # no atoms
    found = edges_in(rows_of(systems, 3.3, binned))
    assert sorted(found.tolist()) == edges_by_reference(systems, 3.3).tolist()


def test_large_box_has_several_bins_and_all_edges():
    rng = np.random.default_rng(1)
    cell = np.array([[24.0, 0, 0], [5.0, 21.0, 0], [-6.0, 4.0, 26.0]])
    systems = [(rng.random((900, 3)) @ cell, cell, (True,) * 3)]
    found = edges_in(rows_of(systems, 4.0, True, capacity=60))
    assert sorted(found.tolist()) == edges_by_reference(systems, 4.0).tolist()
    assert torch.equal(found, edges_in(rows_of(systems, 4.0, False, capacity=60)))


@pytest.mark.parametrize("binned", [False, True])
def test_reverse_slot_is_the_edge_in_the_other_direction(binned):
    rng = np.random.default_rng(10)
    systems = [random_system(rng, kind, (True,) * 3) for kind in ("tiny", "triclinic")]
    neighbors, images, reverse, counts = rows_of(systems, 3.3, binned)
    assert counts.sum() > 300
    shifts = unpack_images(images)
    for i, n in enumerate(counts.tolist()):
        j, back = neighbors[i, :n].long(), reverse[i, :n].long()
        assert (back >= 0).all()
        assert (neighbors[j, back] == i).all()
        assert torch.equal(shifts[j, back], -shifts[i, :n])
        assert (reverse[i, n:] == -1).all()


def test_atoms_many_boxes_away_have_the_same_neighbors():
    rng = np.random.default_rng(2)
    positions, cell, pbc = random_system(rng, "triclinic", (True,) * 3)
    far = positions + rng.integers(-300_000, 300_000, positions.shape) @ cell
    near, away = (edges_in(rows_of([(p, cell, pbc)], 3.3, False)) for p in (positions, far))
    assert torch.equal(near[:, :2], away[:, :2])
    vectors = far[away[:, 1]] + away[:, 2:].numpy() @ cell - far[away[:, 0]]
    assert np.linalg.norm(vectors, axis=1).max() < 3.3


def test_too_many_neighbors_are_counted_and_refused():
    rng = np.random.default_rng(3)
    systems = [(rng.random((40, 3)), np.zeros((3, 3)), (False,) * 3)]
    *_, counts = rows_of(systems, 3.0, False, capacity=16)
    assert counts.tolist() == [39] * 40
    check_counts(counts, 39)
    with pytest.raises(NeighborOverflow, match="atom 0 has 39 neighbors and the list has room for"):
        check_counts(counts, 16)


def test_no_atoms_have_no_rows():
    systems = [(np.zeros((0, 3)), np.zeros((3, 3)), (False,) * 3)]
    for binned in (False, True):
        neighbors, _, _, counts = rows_of(systems, 3.0, binned)
        assert neighbors.shape == (0, 900)
        check_counts(counts, 900)


def test_operator_passes_opcheck():
    rng = np.random.default_rng(5)
    systems = [random_system(rng, "triclinic", (True,) * 3)]
    arguments = (*as_batch(systems), 3.0, 200, True)
    tests = ("test_schema", "test_faketensor")  # rows beyond the count are not initialised
    torch.library.opcheck(torch.ops.mlffd.neighbor_rows.default, arguments, test_utils=tests)


def test_wrong_types_are_refused_by_name():
    positions, cell, pbc, system, first = as_batch([(np.zeros((2, 3)), np.eye(3), (True,) * 3)])
    with pytest.raises(TypeError, match=r"positions must be torch\.float64, got torch\.float32"):
        torch.ops.mlffd.neighbor_rows(positions.float(), cell, pbc, system, first, 3.0, 8, False)
    with pytest.raises(ValueError, match=r"pbc must have the shape \(1, 3\)"):
        torch.ops.mlffd.neighbor_rows(positions, cell, pbc[0], system, first, 3.0, 8, False)


@pytest.mark.gpu
@pytest.mark.parametrize("binned", [False, True])
def test_gpu_gives_what_the_cpu_gives(binned):
    rng = np.random.default_rng(6)
    kinds = ["orthorhombic", "rotated", "tiny", "triclinic"]
    systems = [random_system(rng, kinds[k % 4], pbc) for k, pbc in enumerate(PBCS)]
    arguments = as_batch(systems)
    on_cpu = neighbor_rows(*arguments, 3.3, 900, binned)
    on_gpu = neighbor_rows(*(t.to("cuda") for t in arguments), 3.3, 900, binned)
    counts = on_cpu[3]
    assert torch.equal(on_gpu[3].cpu(), counts)
    filled = torch.arange(900) < counts[:, None]
    for ours, theirs in zip(on_gpu[:3], on_cpu[:3], strict=True):
        assert torch.equal(ours.cpu()[filled], theirs[filled])


@pytest.mark.gpu
def test_large_box_on_a_gpu_has_all_edges():
    rng = np.random.default_rng(1)
    cell = np.array([[44.0, 0, 0], [5.0, 41.0, 0], [-6.0, 4.0, 46.0]])
    arguments = as_batch([(rng.random((8000, 3)) @ cell, cell, (True,) * 3)])
    expected = neighbor_rows(*arguments, 4.0, 80, True)
    found = neighbor_rows(*(t.to("cuda") for t in arguments), 4.0, 80, True)
    filled = torch.arange(80) < expected[3][:, None]
    assert torch.equal(found[3].cpu(), expected[3])
    assert torch.equal(found[0].cpu()[filled], expected[0][filled])
    assert torch.equal(found[2].cpu()[filled], expected[2][filled])
