import numpy as np
import pytest
import torch

from openmm_mlffd.crowding import NO_LIMIT
from openmm_mlffd.potential import edge_vectors
from openmm_mlffd.radial import softened_distances
from openmm_mlffd.training.batches import StructureSource, make_batch
from openmm_mlffd.training.hdf5 import Dataset, SplitRule
from openmm_mlffd.training.references import (
    COORDINATION_MARGIN,
    fit_references,
    measure_coordination,
)

CPU = torch.device("cpu")
OFFSETS = {1: -13.6, 6: -1029.4, 8: -2043.7}
ALL = SplitRule(val=0.0, test=0.0)


@pytest.fixture
def toy(make_student):
    return make_student(elements=["H", "C", "O"], references=[0.0] * 3)


def planted(structures, potential, noise=0.0):
    """Energies that are offsets plus repulsion plus noise per atom."""
    batch = make_batch(structures, potential, CPU)
    repulsion = potential.repulsion_energies(batch.graph, edge_vectors(batch.graph))
    atoms = np.array([OFFSETS[z] for z in structures.atomic_numbers]) + repulsion.numpy()
    energy = np.add.reduceat(atoms, structures.offsets[:-1])
    rng = np.random.default_rng(0)
    return structures._replace(
        energy=energy + noise * np.diff(structures.offsets) * rng.normal(size=len(energy))
    )


def fitted(path, potential, **settings):
    source = StructureSource([Dataset(path)], "train")
    return fit_references(source, potential, CPU, **settings)


def test_planted_offsets_are_found_beside_the_repulsion(make_structures, write_dataset, toy):
    path = write_dataset(planted(make_structures(60), toy), split=ALL)
    assert fitted(path, toy) == pytest.approx(list(OFFSETS.values()), abs=1e-6)


def test_offsets_are_found_within_the_noise_per_atom(make_structures, write_dataset, toy):
    path = write_dataset(planted(make_structures(400), toy, noise=0.05), split=ALL)
    assert fitted(path, toy) == pytest.approx(list(OFFSETS.values()), abs=0.05)


def test_references_that_are_set_do_not_matter(make_structures, write_dataset, toy):
    path = write_dataset(planted(make_structures(60), toy), split=ALL)
    before = fitted(path, toy)
    toy.references = [5.0, 6.0, 7.0]
    assert fitted(path, toy) == before


def test_element_that_does_not_occur_gets_zero(make_structures, write_dataset, make_student, toy):
    path = write_dataset(planted(make_structures(60), toy), split=ALL)
    larger = make_student(elements=["H", "C", "N", "O"])
    expected = [OFFSETS[1], OFFSETS[6], 0.0, OFFSETS[8]]
    assert fitted(path, larger) == pytest.approx(expected, abs=1e-6)


def test_element_that_comes_late_in_the_file_is_found_in_a_part_of_it(
    make_structures, write_dataset, toy
):
    structures = make_structures(600)
    n_early = structures.offsets[500]
    early = structures.atomic_numbers[:n_early]
    early[early == 8] = 6
    path = write_dataset(planted(structures, toy), split=ALL)
    found = fitted(path, toy, n_structures=100)
    assert found == pytest.approx(list(OFFSETS.values()), abs=1e-4)


def crowded(path, potential):
    """Energy of crowding of each atom of the training split [eV]."""
    found = []
    for structures in StructureSource([Dataset(path)], "train").batches(100):
        graph = make_batch(structures, potential, CPU).graph
        distances = softened_distances(edge_vectors(graph))
        found.append(potential.crowding(distances, *graph.edge_index, graph.species))
    return torch.cat(found)


def test_limits_of_coordination_leave_the_data_alone_and_only_just(
    make_structures, write_dataset, toy
):
    path = write_dataset(make_structures(40), split=ALL)
    limits = measure_coordination(StructureSource([Dataset(path)], "train"), toy, CPU)
    toy.coordination_limits = limits
    assert not crowded(path, toy).any()
    for element in range(3):
        less = [x - 1.01 * COORDINATION_MARGIN * (i == element) for i, x in enumerate(limits)]
        toy.coordination_limits = less
        assert crowded(path, toy).any()


def test_limits_of_coordination_are_never_less_than_those_that_there_are(
    make_structures, write_dataset, make_student
):
    path = write_dataset(make_structures(40), split=ALL)
    source = StructureSource([Dataset(path)], "train")
    student = make_student(elements=["H", "C", "N", "O"], references=[0.0] * 4)
    fresh = measure_coordination(source, student, CPU)
    assert fresh[2] == NO_LIMIT
    student.coordination_limits = [fresh[0] + 1.0, 0.1, 3.0, NO_LIMIT]
    found = measure_coordination(source, student, CPU)
    assert found == pytest.approx([fresh[0] + 1.0, fresh[1], 3.0, fresh[3]])
