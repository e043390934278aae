import numpy as np
import torch

from openmm_mlffd.graph import build_graph
from openmm_mlffd.potential import edge_vectors


def test_without_a_box_nothing_is_periodic(ethanol):
    graph = build_graph(torch.tensor(ethanol.positions), torch.tensor(ethanol.numbers), cutoff=2.5)
    distances = np.linalg.norm(ethanol.positions[:, None] - ethanol.positions, axis=-1)
    assert graph.edge_index.shape[1] == ((distances < 2.5) & (distances > 0)).sum()
    assert graph.cell.eq(0).all()
    assert graph.edge_shift.eq(0).all()
    assert graph.system.eq(0).all()


def test_with_a_box_everything_is_periodic_unless_said_otherwise(box):
    positions, species = torch.tensor(box.positions), torch.zeros(9, dtype=torch.int64)
    cell = torch.tensor(box.cell)
    graph = build_graph(positions, species, cell=cell, cutoff=4.0)
    assert graph.edge_shift.ne(0).any(0).all()
    slab = build_graph(
        positions, species, cell=cell, pbc=torch.tensor([True, True, False]), cutoff=4.0
    )
    assert slab.edge_shift.ne(0).any(0).tolist() == [True, True, False]
    assert slab.cell[0, 2].eq(0).all()
    assert torch.equal(slab.cell[0, :2], cell[:2])


def test_positions_and_box_are_held_in_double_precision(box):
    graph = build_graph(
        torch.tensor(box.positions).float(),
        torch.zeros(9, dtype=torch.int64),
        cell=torch.tensor(box.cell).float(),
        cutoff=4.0,
    )
    assert {graph.positions.dtype, graph.cell.dtype, graph.edge_shift.dtype} == {torch.float64}


def test_edge_vectors_reach_the_image_of_the_sender(box):
    graph = build_graph(
        torch.tensor(box.positions),
        torch.zeros(9, dtype=torch.int64),
        cell=torch.tensor(box.cell),
        cutoff=4.0,
    )
    i, j = graph.edge_index.numpy()
    expected = box.positions[j] - box.positions[i] + graph.edge_shift.numpy() @ box.cell
    np.testing.assert_allclose(edge_vectors(graph).numpy(), expected, atol=1e-12)
    assert edge_vectors(graph).norm(dim=1).max() < 4.0


def test_edge_vectors_use_the_box_of_their_system(box, make_box):
    other = make_box(seed=1, length=6.0)
    both = build_graph(
        torch.tensor(np.concatenate([box.positions, other.positions])),
        torch.zeros(18, dtype=torch.int64),
        cell=torch.tensor(np.stack([box.cell, other.cell])),
        system=torch.arange(2).repeat_interleave(9),
        cutoff=4.0,
    )
    alone = build_graph(
        torch.tensor(other.positions),
        torch.zeros(9, dtype=torch.int64),
        cell=torch.tensor(other.cell),
        cutoff=4.0,
    )
    mine = both.edge_index[0] >= 9
    assert torch.equal(edge_vectors(both)[mine], edge_vectors(alone))
