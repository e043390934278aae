import threading

import numpy as np
import pytest
import torch

from openmm_mlffd.potential import edge_vectors
from openmm_mlffd.training.batches import StructureSource, make_batch, prefetch
from openmm_mlffd.training.hdf5 import Dataset, SplitRule

CPU = torch.device("cpu")


@pytest.fixture
def datasets(make_structures, write_dataset):
    """Two files whose subsets have different names and order."""
    rule = SplitRule(val=0.2, test=0.2)
    one = write_dataset(make_structures(70, seed=1), name="one.h5", subsets=("b", "c"), split=rule)
    two = write_dataset(make_structures(50, seed=2), name="two.h5", subsets=("a", "b"), split=rule)
    return [Dataset(one), Dataset(two)]


def sources(datasets, split, **settings):
    """The same source held in memory, and read in blocks."""
    return (
        StructureSource(datasets, split, block_size=5, **settings),
        StructureSource(datasets, split, block_size=5, memory_gb=0.0, **settings),
    )


def energies(batches):
    return [batch.energy.tolist() for batch in batches]


def test_in_memory_and_streamed_sources_have_the_same_structures_in_every_epoch(datasets):
    memory, streamed = sources(datasets, "train")
    assert memory.in_memory
    assert not streamed.in_memory
    expected = np.concatenate([d.read(0, len(d)).energy[d.in_split("train")] for d in datasets])
    for source in (memory, streamed):
        assert len(source) == len(expected)
        orders = []
        for epoch in range(3):
            batches = source.batches(20, rng=np.random.default_rng([0, epoch]))
            orders.append([e for batch in energies(batches) for e in batch])
            assert sorted(orders[-1]) == sorted(expected)
        assert orders[0] != orders[1] != orders[2]
        in_order = [e for batch in energies(source.batches(20)) for e in batch]
        assert in_order == expected.tolist()


@pytest.mark.parametrize("streamed", [False, True])
def test_order_is_decided_by_the_generator(datasets, streamed):
    source = sources(datasets, "train")[streamed]
    first, again, other = (
        energies(source.batches(20, rng=np.random.default_rng(seed))) for seed in (0, 0, 1)
    )
    assert first == again != other


@pytest.mark.parametrize("streamed", [False, True])
def test_starting_at_a_batch_is_passing_over_those_before(datasets, streamed):
    source = sources(datasets, "train")[streamed]
    every = energies(source.batches(20, rng=np.random.default_rng(3)))
    assert len(every) > 10
    for first in (1, 4, len(every) - 1, len(every), len(every) + 5):
        rest = energies(source.batches(20, rng=np.random.default_rng(3), first=first))
        assert rest == every[first:]


@pytest.mark.parametrize("streamed", [False, True])
def test_batches_hold_at_most_so_many_atoms_unless_one_structure_has_more(datasets, streamed):
    source = sources(datasets, "all")[streamed]
    sizes = [np.diff(b.offsets) for b in source.batches(6, rng=np.random.default_rng(0))]
    assert all(s.sum() <= 6 or len(s) == 1 for s in sizes)
    assert max(s.sum() for s in sizes) > 6
    filled = [np.diff(b.offsets).sum() for b in source.batches(40)]
    assert np.mean(filled) > 30


@pytest.mark.parametrize("streamed", [False, True])
def test_subsets_of_several_files_are_merged_by_name(datasets, streamed):
    source = sources(datasets, "all")[streamed]
    assert source.subsets == ["a", "b", "c"]
    named = {}
    for batch in source.batches(30):
        named |= zip(batch.energy, batch.subset, strict=True)
    for dataset in datasets:
        everything = dataset.read(0, len(dataset))
        for energy, subset in zip(everything.energy, everything.subset, strict=True):
            assert source.subsets[named[energy]] == dataset.subsets[subset]


def test_random_part_of_the_structures_depends_on_the_seed(datasets):
    parts = [
        sources(datasets, "train", max_structures=20, seed=seed)[streamed]
        for seed, streamed in ((0, False), (0, True), (1, False))
    ]
    chosen = [sorted(e for batch in energies(p.batches(30)) for e in batch) for p in parts]
    assert [len(c) for c in chosen] == [20, 20, 20]
    assert chosen[0] == chosen[1] != chosen[2]


def test_empty_split_is_named_with_its_files(make_structures, write_dataset):
    path = write_dataset(make_structures(3), split=SplitRule(val=0.0, test=0.0))
    with pytest.raises(ValueError, match=r"no structure is in the split 'val' of .*data.h5"):
        StructureSource([Dataset(path)], "val")


def test_batch_holds_what_the_file_holds(data_folder, make_student):
    student = make_student(elements=["H", "C", "N", "O", "S", "F", "Cl", "P"], references=[0.0] * 8)
    dataset = Dataset(data_folder / "sample.h5")
    structures = dataset.read(0, len(dataset))
    batch = make_batch(structures, student, CPU)
    numbers = torch.tensor(student.numbers)[batch.graph.species].numpy()
    np.testing.assert_array_equal(numbers, structures.atomic_numbers)
    np.testing.assert_array_equal(batch.graph.positions, structures.positions.astype("f8"))
    np.testing.assert_array_equal(batch.forces, structures.forces.astype("f8"))
    np.testing.assert_array_equal(batch.energy, structures.energy)
    np.testing.assert_array_equal(batch.n_atoms, np.diff(structures.offsets))
    periodic = structures.pbc.all(1)
    volume = np.linalg.det(structures.cell[periodic])
    np.testing.assert_allclose(
        batch.virial[periodic], structures.stress[periodic] * volume[:, None, None], rtol=1e-12
    )
    assert batch.virial[~periodic].isnan().all()
    assert batch.graph.edge_shift.ne(0).any()
    assert edge_vectors(batch.graph).norm(dim=1).max() < student.cutoff
    owner = batch.graph.system
    assert torch.equal(owner[batch.graph.edge_index[0]], owner[batch.graph.edge_index[1]])


def test_unknown_element_in_the_data_is_named(datasets, make_student):
    student = make_student(elements=["H", "C"], references=[0.0, 0.0])
    source = StructureSource(datasets, "all")
    with pytest.raises(ValueError, match="the model does not know O"):
        list(prefetch(source.batches(30), student, CPU))


# prefetching


def test_prefetched_batches_come_in_order(datasets, student):
    source = StructureSource(datasets, "all")
    expected = energies(source.batches(15))
    assert len(expected) > 20  # many more than wait at a time
    found = [batch.energy.tolist() for batch in prefetch(source.batches(15), student, CPU)]
    assert found == expected


def test_error_of_the_reader_reaches_the_trainer(datasets, student):
    def broken():
        yield from list(StructureSource(datasets, "all").batches(15))[:2]
        raise OSError("disk gone")

    batches = prefetch(broken(), student, CPU)
    next(batches)
    next(batches)
    with pytest.raises(OSError, match="disk gone"):
        next(batches)


def test_thread_ends_when_the_reader_stops_early(datasets, student):
    before = threading.active_count()
    batches = prefetch(StructureSource(datasets, "all").batches(5), student, CPU)
    next(batches)
    assert threading.active_count() == before + 1
    batches.close()
    assert threading.active_count() == before
