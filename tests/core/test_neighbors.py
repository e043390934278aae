from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from openmm_mlffd.graph import build_graph
from openmm_mlffd.neighbors import VerletList

CUTOFF = 3.0
CELL = torch.tensor([[5.0, 0.0, 0.0], [2.2, 5.5, 0.0], [-1.7, 2.0, 4.7]], dtype=torch.float64)
PERIODICITY = {
    "molecule": (None, None),
    "box": (CELL, None),
    "slab": (CELL, torch.tensor([True, True, False])),
    "wire": (CELL, torch.tensor([False, True, False])),
    "small box": (0.4 * CELL, None),
    "cell ignored": (CELL, torch.tensor([False, False, False])),
}


@pytest.fixture(params=PERIODICITY)
def box(request):
    return PERIODICITY[request.param]


def random_positions(n_atoms=20, seed=0):
    return torch.tensor(np.random.default_rng(seed).random((n_atoms, 3)) @ CELL.numpy())


def edges(graph):
    """The edges of a graph as a sorted list."""
    shift = graph.edge_shift.round().long().tolist()
    return sorted(
        (i, j, tuple(s)) for i, j, s in zip(*graph.edge_index.tolist(), shift, strict=True)
    )


def fresh(positions, cell=None, pbc=None):
    species = torch.zeros(len(positions), dtype=torch.int64)
    return build_graph(positions, species, cutoff=CUTOFF, cell=cell, pbc=pbc)


def updated(neighbors, positions, cell=None, pbc=None):
    species = torch.zeros(len(positions), dtype=torch.int64)
    return neighbors.graph(positions, species, cell=cell, pbc=pbc)


@pytest.mark.parametrize("skin", [0.0, 0.4, 1.5])
@pytest.mark.parametrize("shifted", [False, True])
def test_the_edges_are_those_of_a_fresh_list_at_every_step_of_a_walk(box, skin, shifted):
    cell, pbc = box
    rng = np.random.default_rng(1)
    neighbors = VerletList(CUTOFF, skin)
    positions = random_positions()
    velocities = torch.tensor(rng.normal(scale=0.03, size=positions.shape))
    periodic = cell is not None and (pbc is None or bool(pbc.any()))
    n_edges = set()
    for step in range(25):
        positions = positions + velocities
        now = positions
        if shifted and periodic and step % 5 == 0:  # atoms wander into other images
            vectors = torch.where(torch.ones(3, dtype=bool) if pbc is None else pbc, 1.0, 0.0)
            images = torch.tensor(rng.integers(-3, 4, positions.shape), dtype=torch.float64)
            now = positions + (images * vectors) @ cell
        graph, expected = updated(neighbors, now, cell, pbc), fresh(now, cell, pbc)
        assert edges(graph) == edges(expected)
        assert graph.cell.equal(expected.cell)
        assert graph.system.equal(expected.system)
        n_edges.add(len(edges(graph)))
    assert len(n_edges) > 1  # neighbors came and went
    if skin > 1.0 and not shifted:
        assert neighbors.n_builds < 10


def test_edges_are_sorted_by_receiver(box):
    receiver = updated(VerletList(CUTOFF, 0.5), random_positions(), *box).edge_index[0]
    assert len(receiver)
    assert (receiver.diff() >= 0).all()


def test_the_list_is_built_when_an_atom_has_moved_more_than_half_the_skin_in_all():
    neighbors = VerletList(CUTOFF, 0.5)
    positions = random_positions()
    updated(neighbors, positions, CELL)
    step = torch.zeros_like(positions)
    step[3, 1] = 0.1
    builds = []
    for _ in range(6):
        positions = positions + step
        updated(neighbors, positions, CELL)
        builds.append(neighbors.n_builds)
    assert builds == [1, 1, 2, 2, 2, 3]


def test_a_changed_box_periodicity_or_number_of_atoms_builds_the_list():
    neighbors = VerletList(CUTOFF, 2.0)
    positions = random_positions()
    slab = torch.tensor([True, True, False])
    changes = [
        (positions, CELL, None),
        (positions, CELL * 1.001, None),
        (positions, CELL, None),
        (positions, CELL, slab),
        (positions, None, None),
        (positions[:-1], None, None),
    ]
    for n, change in enumerate(changes, start=1):
        for _ in range(2):
            assert edges(updated(neighbors, *change)) == edges(fresh(*change))
            assert neighbors.n_builds == n


def test_positions_changed_in_place_are_noticed():
    neighbors = VerletList(CUTOFF, 0.5)
    positions, cell = random_positions(), CELL.clone()
    updated(neighbors, positions, cell)
    positions += torch.linspace(0, 3, positions.numel()).reshape(positions.shape)
    assert edges(updated(neighbors, positions, cell)) == edges(fresh(positions, cell))
    cell *= 1.2
    assert edges(updated(neighbors, positions, cell)) == edges(fresh(positions, cell))


def test_lists_have_nothing_in_common():
    one, other = VerletList(CUTOFF, 0.5), VerletList(CUTOFF, 0.5)
    a, b = random_positions(seed=0), random_positions(seed=1)
    for _ in range(3):
        assert edges(updated(one, a)) == edges(fresh(a))
        assert edges(updated(other, b)) == edges(fresh(b))
    assert one.n_builds == other.n_builds == 1


def test_threads_may_share_a_list():
    neighbors = VerletList(CUTOFF, 0.5)
    structures = [random_positions(seed=s) for s in range(8)] * 6
    expected = [edges(fresh(p, CELL)) for p in structures]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda p: edges(updated(neighbors, p, CELL)), structures))
    assert found == expected


@pytest.mark.parametrize("n_atoms", [0, 1, 2])
def test_few_atoms_far_apart_have_no_edges(n_atoms):
    neighbors = VerletList(CUTOFF)
    positions = torch.zeros((n_atoms, 3), dtype=torch.float64)
    positions[:, 0] = 50.0 * torch.arange(n_atoms)
    for _ in range(2):
        graph = updated(neighbors, positions)
        assert graph.edge_index.shape == (2, 0)
        assert graph.edge_shift.shape == (0, 3)


def test_a_box_without_volume_is_refused_and_the_list_stays_usable():
    neighbors = VerletList(CUTOFF)
    positions = random_positions()
    with pytest.raises(ValueError, match="no volume"):
        updated(neighbors, positions, torch.zeros(3, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="need a cell"):
        updated(neighbors, positions, None, torch.tensor([True, False, False]))
    assert edges(updated(neighbors, positions, CELL)) == edges(fresh(positions, CELL))


@pytest.mark.parametrize(("cutoff", "skin"), [(0.0, 1.0), (-1.0, 1.0), (5.0, -0.1), (5.0, np.nan)])
def test_senseless_distances_are_refused(cutoff, skin):
    with pytest.raises(ValueError, match="cutoff must be positive"):
        VerletList(cutoff, skin)
