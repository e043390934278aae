import numpy as np
import pytest
import torch

from openmm_mlffd.potential import edge_vectors
from openmm_mlffd.training.batches import StructureSource, make_batch
from openmm_mlffd.training.hdf5 import Dataset, SplitRule
from openmm_mlffd.training.references import fit_references

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
