import itertools

import numpy as np
import pytest
import torch
from ase.neighborlist import primitive_neighbor_list

from openmm_mlffd.kernels.reference import message_sum, neighbor_list

PBCS = list(itertools.product([False, True], repeat=3))


def random_cell(rng, kind):
    """A box of 2.5 to 9 Å: smaller and larger than the cutoff and twice the cutoff."""
    lengths = rng.uniform(2.5, 9.0, 3)
    if kind == "tiny":
        lengths = rng.uniform(1.1, 2.5, 3)
    cell = np.diag(lengths)
    if kind != "orthorhombic":
        cell += rng.uniform(-0.45, 0.45, (3, 3)) * lengths.min()
    if kind == "rotated":
        cell = cell @ np.linalg.qr(rng.normal(size=(3, 3)))[0]
    return cell


def as_set(i, j, shift):
    shifts = map(tuple, np.rint(shift).astype(int).tolist())
    return set(zip(i.tolist(), j.tolist(), shifts, strict=True))


def edges_of(positions, cell, pbc, cutoff):
    edge_index, shift = neighbor_list(
        torch.tensor(positions),
        torch.zeros(len(positions), dtype=torch.int64),
        torch.tensor(cell)[None],
        torch.tensor(pbc)[None],
        cutoff=cutoff,
    )
    assert torch.equal(shift, shift.round())
    found = as_set(*edge_index.numpy(), shift.numpy())
    assert len(found) == edge_index.shape[1]  # none twice
    return found


def edges_by_ase(positions, cell, pbc, cutoff):
    # ASE wants a box with volume where it is not periodic, too, and does not use it
    return as_set(*primitive_neighbor_list("ijS", pbc, cell, positions, cutoff))


@pytest.mark.parametrize("kind", ["orthorhombic", "triclinic", "rotated", "tiny"])
@pytest.mark.parametrize("seed", range(8))
def test_neighbors_are_those_of_ase(kind, seed):
    rng = np.random.default_rng([seed, ord(kind[0])])
    cell = random_cell(rng, kind)
    n_atoms = int(rng.integers(1, 6 if kind == "tiny" else 40))
    positions = rng.uniform(-1.5, 2.5, (n_atoms, 3)) @ cell  # many outside the box
    pbc = PBCS[seed]
    found = edges_of(positions, cell, pbc, cutoff=3.3)
    assert found == edges_by_ase(positions, cell, pbc, 3.3)
    assert found or not all(pbc)


@pytest.mark.parametrize("pbc", PBCS)
def test_box_much_smaller_than_the_cutoff_has_all_images(pbc):
    cell = np.array([[2.1, 0.0, 0.0], [0.7, 2.0, 0.0], [-0.6, 0.5, 2.3]])
    positions = np.array([[0.1, 0.2, 0.3], [1.0, 1.1, 0.9]])
    found = edges_of(positions, cell, pbc, cutoff=5.0)
    assert found == edges_by_ase(positions, cell, pbc, 5.0)
    own_images = [(i, s) for i, j, s in found if i == j]
    assert bool(own_images) == any(pbc)
    assert all(s != (0, 0, 0) for _, s in own_images)


def test_large_molecule_has_the_pairs_of_all_distances():
    # several bins along each axis, a few of them empty
    rng = np.random.default_rng(3)
    positions = rng.uniform(0, [40.0, 12.0, 25.0], (400, 3))
    distances = np.linalg.norm(positions[:, None] - positions, axis=-1)
    pairs = np.argwhere((distances < 4.0) & (distances > 0))
    found = edges_of(positions, np.zeros((3, 3)), [False] * 3, cutoff=4.0)
    assert {(i, j) for i, j, _ in found} == set(map(tuple, pairs.tolist()))


def test_every_edge_is_a_vector_shorter_than_the_cutoff(box):
    n = len(box.numbers)
    edge_index, shift = neighbor_list(
        torch.tensor(box.positions),
        torch.zeros(n, dtype=torch.int64),
        torch.tensor(box.cell)[None],
        torch.ones(1, 3, dtype=torch.bool),
        cutoff=4.0,
    )
    i, j = edge_index.numpy()
    vectors = box.positions[j] + shift.numpy() @ box.cell - box.positions[i]
    lengths = np.linalg.norm(vectors, axis=1)
    assert lengths.max() < 4.0
    assert lengths.min() > 1.0
    volume = abs(np.linalg.det(box.cell))
    assert len(lengths) == pytest.approx(n * n / volume * 4 / 3 * np.pi * 4**3, rel=0.15)


def test_edges_are_sorted_by_receiver_and_come_in_both_directions(box):
    edge_index, shift = neighbor_list(
        torch.tensor(box.positions),
        torch.zeros(len(box.numbers), dtype=torch.int64),
        torch.tensor(box.cell)[None],
        torch.ones(1, 3, dtype=torch.bool),
        cutoff=4.0,
    )
    assert (edge_index[0].diff() >= 0).all()
    i, j = edge_index.numpy()
    assert as_set(i, j, shift.numpy()) == as_set(j, i, -shift.numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batch_has_the_neighbors_of_its_systems(dtype):
    rng = np.random.default_rng(11)
    systems = []
    for pbc in [*PBCS, (True, True, True)]:
        n_atoms = int(rng.integers(1, 25))
        cell = random_cell(rng, "triclinic")
        systems.append((rng.uniform(-1, 2, (n_atoms, 3)) @ cell, cell, pbc))
    count = [len(p) for p, _, _ in systems]
    edge_index, shift = neighbor_list(
        torch.tensor(np.concatenate([p for p, _, _ in systems])).to(dtype),
        torch.repeat_interleave(torch.arange(len(systems)), torch.tensor(count)),
        torch.tensor(np.stack([c for _, c, _ in systems])).to(dtype),
        torch.tensor([p for _, _, p in systems]),
        cutoff=3.0,
    )
    assert shift.dtype == dtype
    i, j = edge_index.numpy()
    owner = np.repeat(np.arange(len(systems)), count)
    assert (owner[i] == owner[j]).all()
    first = np.concatenate([[0], np.cumsum(count)])
    for s, (positions, cell, pbc) in enumerate(systems):
        mine = owner[i] == s
        found = as_set(i[mine] - first[s], j[mine] - first[s], shift.numpy()[mine])
        assert found == edges_by_ase(positions, cell, pbc, 3.0)


def test_more_atoms_than_are_searched_at_a_time_have_all_their_neighbors():
    # 2,197 bins around each atom: 238 atoms at a time
    n, edge = 300, 1.1
    positions = torch.tensor(np.random.default_rng(0).uniform(0, 1, (n, 3)))
    edge_index, shift = neighbor_list(
        positions,
        torch.arange(n),
        (edge * torch.eye(3, dtype=torch.float64)).expand(n, 3, 3),
        torch.ones(n, 3, dtype=torch.bool),
        cutoff=6 * edge - 0.1,
    )
    steps = np.array(list(itertools.product(range(-6, 7), repeat=3)))
    lengths = edge * np.linalg.norm(steps, axis=1)
    expected = ((lengths > 0) & (lengths < 6 * edge - 0.1)).sum()
    assert torch.equal(edge_index[0], torch.arange(n).repeat_interleave(int(expected)))
    assert torch.equal(edge_index[0], edge_index[1])
    assert shift.abs().amax(0).tolist() == [5, 5, 5]


def test_moving_atoms_by_box_vectors_changes_only_the_shifts(box):
    rng = np.random.default_rng(5)
    moves = rng.integers(-3, 4, (len(box.numbers), 3))
    before = edges_of(box.positions, box.cell, [True] * 3, 4.0)
    after = edges_of(box.positions + moves @ box.cell, box.cell, [True] * 3, 4.0)
    moved = {(i, j, tuple((np.array(s) + moves[i] - moves[j]).tolist())) for i, j, s in before}
    assert after == moved


def test_no_atoms_have_no_neighbors():
    edge_index, shift = neighbor_list(
        torch.zeros(0, 3),
        torch.zeros(0, dtype=torch.int64),
        torch.zeros(1, 3, 3),
        torch.zeros(1, 3, dtype=torch.bool),
        cutoff=4.0,
    )
    assert edge_index.shape == (2, 0)
    assert shift.shape == (0, 3)


def test_coincident_atoms_are_neighbors():
    found = edges_of(np.zeros((2, 3)), np.zeros((3, 3)), [False] * 3, 4.0)
    assert found == {(0, 1, (0, 0, 0)), (1, 0, (0, 0, 0))}


def test_flat_box_is_refused_by_name():
    cell = torch.tensor([[[3.0, 0, 0], [0, 3.0, 0], [3.0, 3.0, 0]]])
    with pytest.raises(ValueError, match="box of system 0 has no volume"):
        neighbor_list(
            torch.zeros(1, 3),
            torch.zeros(1, dtype=torch.int64),
            cell,
            torch.ones(1, 3, dtype=torch.bool),
            cutoff=2.0,
        )


def message_inputs(n_atoms, n_edges, n_channels, with_vectors, dtype=torch.float64):
    generator = torch.Generator().manual_seed(n_atoms + n_edges)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    n_messages = 3 if with_vectors else 2
    return (
        random(n_atoms, 2 * n_channels),
        random(n_atoms, 3, n_channels) if with_vectors else None,
        random(n_edges, n_messages * n_channels),
        random(n_edges, 3),
        torch.randint(n_atoms, (2, n_edges), generator=generator),
    )


def message_sum_by_hand(scalars, vectors, filters, directions, edge_index):
    """Equations 7 and 8 of arXiv 2102.03150, one number at a time."""
    n_atoms, n_channels = scalars.shape[0], scalars.shape[1] // 2
    out_scalars = np.zeros((n_atoms, n_channels))
    out_vectors = np.zeros((n_atoms, 3, n_channels))
    for edge, (i, j) in enumerate(edge_index.T.tolist()):
        for channel in range(n_channels):
            a, c = (float(filters[edge, k * n_channels + channel]) for k in (0, 1))
            out_scalars[i, channel] += a * float(scalars[j, channel])
            for axis in range(3):
                y = float(scalars[j, n_channels + channel])
                out_vectors[i, axis, channel] += c * y * float(directions[edge, axis])
                if vectors is not None:
                    b = float(filters[edge, 2 * n_channels + channel])
                    out_vectors[i, axis, channel] += b * float(vectors[j, axis, channel])
    return out_scalars, out_vectors


@pytest.mark.parametrize("with_vectors", [True, False])
@pytest.mark.parametrize(("n_atoms", "n_edges", "n_channels"), [(5, 17, 3), (1, 4, 1), (4, 0, 2)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_message_sum_is_the_sum_over_edges(
    n_atoms, n_edges, n_channels, with_vectors, dtype, tolerance
):
    inputs = message_inputs(n_atoms, n_edges, n_channels, with_vectors, dtype)
    found = message_sum(*inputs)
    for ours, by_hand in zip(found, message_sum_by_hand(*inputs), strict=True):
        assert ours.dtype == dtype
        np.testing.assert_allclose(ours.numpy(), by_hand, atol=tolerance, rtol=0)


def test_atom_without_edges_gets_no_message():
    scalars, vectors, filters, directions, _ = message_inputs(4, 3, 2, True)
    edge_index = torch.tensor([[0, 0, 2], [1, 3, 3]])
    sums = message_sum(scalars, vectors, filters, directions, edge_index)
    for rows in sums:
        assert rows[[1, 3]].eq(0).all()
        assert rows[[0, 2]].ne(0).all()


@pytest.mark.parametrize("with_vectors", [True, False])
def test_message_sum_has_first_and_second_derivatives(with_vectors):
    scalars, vectors, filters, directions, edge_index = message_inputs(3, 5, 2, with_vectors)
    given = [t for t in (scalars, vectors, filters, directions) if t is not None]

    def cubes(*tensors):
        rest = iter(tensors)
        x = next(rest)
        m = next(rest) if with_vectors else None
        sums = message_sum(x, m, next(rest), next(rest), edge_index)
        return sum((s**3).sum() for s in sums)

    inputs = [t.requires_grad_() for t in given]
    assert torch.autograd.gradcheck(cubes, inputs)
    assert torch.autograd.gradgradcheck(cubes, inputs)
