import numpy as np
import pytest
import torch

pytest.importorskip("warp")

from openmm_mlffd.batched import BatchedEvaluator, FusedGraphs
from openmm_mlffd.evaluator import Evaluator
from openmm_mlffd.graph import build_graph


@pytest.fixture
def systems(ethanol, make_box):
    """Molecules and boxes of several sizes, one of them periodic in two directions only."""
    slab = make_box(12, 5.0, seed=4)
    lone = ethanol._replace(numbers=np.array([8]), positions=np.zeros((1, 3)))
    return [
        (slab.numbers, slab.positions, slab.cell, [True, False, True]),
        tuple(make_box(40, 8.0, seed=1)),
        tuple(ethanol),
        tuple(lone),
        (ethanol.numbers, ethanol.positions + 100.0),
        tuple(make_box(9, 5.0, seed=2)),
        tuple(make_box(150, 13.0, seed=3)),
    ]


def assert_same(found, expected, tolerance=1e-10):
    size = max(1.0, np.abs(expected.forces).max())
    assert abs(found.energy - expected.energy) < tolerance * max(1.0, abs(expected.energy))
    assert np.abs(found.forces - expected.forces).max() < tolerance * size
    assert np.abs(found.virial - expected.virial).max() < tolerance * size * len(found.forces)
    assert np.abs(found.atom_energies - expected.atom_energies).max() < tolerance * size


@pytest.mark.parametrize("batch_atoms", [1, 60, 20_000])
def test_systems_in_a_batch_have_the_values_of_each_alone(student, systems, batch_atoms):
    evaluator = BatchedEvaluator(student, precision="double", batch_atoms=batch_atoms)
    alone = BatchedEvaluator(student, precision="double", batch_atoms=1)
    for found, system in zip(evaluator.evaluate(systems), systems, strict=True):
        assert_same(found, alone.evaluate([system])[0])
        # filters are splines, off by more than rounding
        assert_same(found, Evaluator(student, system[0]).compute(*system[1:]), 1e-8)


def test_the_same_atoms_again_keep_their_neighbors_while_they_move(student, make_box):
    boxes = [make_box(20, 6.0, seed=k) for k in range(4)]
    evaluator = BatchedEvaluator(student, precision="double")
    rng = np.random.default_rng(0)
    positions = [box.positions for box in boxes]
    alone = [Evaluator(student, box.numbers) for box in boxes]
    for _ in range(12):
        positions = [x + rng.normal(0, 0.06, x.shape) for x in positions]
        moved = [(b.numbers, x, b.cell) for b, x in zip(boxes, positions, strict=True)]
        found = evaluator.evaluate(moved)
        for a, one, (_, x, cell) in zip(found, alone, moved, strict=True):
            assert_same(a, one.compute(x, cell), 1e-8)
    (step,) = evaluator._seen.values()
    assert 1 < step.lists.n_builds < 9


def test_nothing_and_wrong_systems(student, ethanol):
    evaluator = BatchedEvaluator(student)
    assert evaluator.evaluate([]) == []
    good = (ethanol.numbers, ethanol.positions)
    broken = ethanol.positions.copy()
    broken[3, 0] = np.inf
    for bad, words in [
        ((ethanol.numbers, ethanol.positions[1:]), "system 1: .* shape"),
        ((ethanol.numbers, broken), "system 1: the position of atom 3 is not finite"),
        ((ethanol.numbers, ethanol.positions, np.zeros((3, 3))), "system 1: .* no volume"),
        ((ethanol.numbers, ethanol.positions, None, [True] * 3), "system 1: .* need a cell"),
        (([], np.zeros((0, 3))), "system 1: atoms"),
        (([79], np.zeros((1, 3))), "79|Au"),
    ]:
        with pytest.raises(ValueError, match=words):
            evaluator.evaluate([good, bad])
    with pytest.raises(ValueError, match="batch_atoms=0"):
        BatchedEvaluator(student, batch_atoms=0)
    assert len(evaluator.evaluate([good])) == 1


def test_graphs_with_fused_kernels_are_as_with_plain_torch(student, make_box, ethanol):
    boxes = [make_box(9, 5.0, seed=2), make_box(30, 7.0, seed=1)]
    numbers = np.concatenate([b.numbers for b in boxes])
    graph = build_graph(
        torch.tensor(np.concatenate([b.positions for b in boxes])),
        student.species(torch.tensor(numbers)),
        cutoff=student.cutoff,
        cell=torch.tensor(np.stack([b.cell for b in boxes])),
        pbc=torch.ones((2, 3), dtype=torch.bool),
        system=torch.tensor([0] * 9 + [1] * 30),
    )
    expected, found = student(graph), FusedGraphs(student, precision="double")(graph)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() < 1e-7
    with pytest.raises(ValueError, match="cannot be trained"):
        FusedGraphs(student).train()


@pytest.mark.gpu
def test_batches_with_captured_graphs_are_as_on_the_cpu(student, make_box):
    boxes = [make_box(20, 6.0, seed=k) for k in range(6)]
    expected = BatchedEvaluator(student, precision="double").evaluate(boxes)
    evaluator = BatchedEvaluator(student.to("cuda"), precision="double")
    for _ in range(4):
        for a, b in zip(evaluator.evaluate(boxes), expected, strict=True):
            assert_same(a, b, 1e-9)
