import h5py
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from openmm_mlffd.training.datasets.combine import rule_of
from openmm_mlffd.training.datasets.convert import convert, format_of
from openmm_mlffd.training.hdf5 import Dataset, DatasetError
from openmm_mlffd.units import BOHR, HARTREE

NAMES = {"extxyz": "a.xyz", "db": "a.db", "spice": "a.hdf5"}


@pytest.fixture
def sample(data_folder):
    return data_folder / "sample.h5"


def contents(path):
    with Dataset(path) as dataset:
        return (
            dataset.read(0, len(dataset)),
            dataset.group_names(),
            dataset.subsets,
            dataset.teacher,
        )


@pytest.mark.parametrize("format_", ["extxyz", "db"])
def test_everything_comes_back_from_files_of_ase(sample, tmp_path, format_):
    other, back = tmp_path / NAMES[format_], tmp_path / "back.h5"
    assert convert(sample, other) == (104, 0)
    with Dataset(sample) as dataset:
        assert convert(other, back, split=rule_of(dataset)) == (104, 0)
    (ours, our_groups, our_subsets, our_teacher) = contents(back)
    (theirs, groups, subsets, teacher) = contents(sample)
    assert our_teacher == teacher
    assert [our_groups[g] for g in ours.group] == [groups[g] for g in theirs.group]
    assert [our_subsets[s] for s in ours.subset] == [subsets[s] for s in theirs.subset]
    for name in ("offsets", "atomic_numbers", "pbc", "total_charge", "temperature", "split"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)
    # eight decimals of XYZ
    for name in ("positions", "forces", "partial_charges", "energy", "cell", "stress"):
        np.testing.assert_allclose(
            getattr(ours, name), getattr(theirs, name), rtol=0, atol=1e-6, err_msg=name
        )


def test_molecules_come_back_from_the_layout_of_spice(sample, tmp_path):
    spice, back = tmp_path / "a.hdf5", tmp_path / "back.h5"
    assert convert(sample, spice, output_format="spice") == (100, 4)  # there are no boxes
    assert convert(spice, back) == (100, 0)
    ours, our_groups, our_subsets, teacher = contents(back)
    theirs, groups, subsets, their_teacher = contents(sample)
    assert teacher == their_teacher
    found = {}
    for i in range(100):
        own = slice(ours.offsets[i], ours.offsets[i + 1])
        found[round(float(ours.energy[i]), 6), own.stop - own.start] = (i, own)
    assert len(found) == 100
    for i in np.flatnonzero(~theirs.pbc.any(1)):
        own = slice(theirs.offsets[i], theirs.offsets[i + 1])
        k, mine = found[round(float(theirs.energy[i]), 6), own.stop - own.start]
        np.testing.assert_array_equal(ours.atomic_numbers[mine], theirs.atomic_numbers[own])
        np.testing.assert_allclose(ours.positions[mine], theirs.positions[own], atol=1e-5)
        np.testing.assert_allclose(ours.forces[mine], theirs.forces[own], atol=1e-5)
        np.testing.assert_allclose(ours.partial_charges[mine], theirs.partial_charges[own])
        assert our_subsets[ours.subset[k]] == subsets[theirs.subset[i]]
        assert ours.total_charge[k] == theirs.total_charge[i]
        assert our_groups[ours.group[k]] == groups[theirs.group[i]]


def test_units_of_spice_are_those_that_its_paper_says(tmp_path):
    with h5py.File(tmp_path / "spice.hdf5", "w") as file:
        molecule = file.create_group("ammonium")
        smiles = "[H:2][N+:1]([H:3])([H:4])[H:5]"
        molecule.create_dataset("smiles", data=[smiles], dtype=h5py.string_dtype())
        molecule["atomic_numbers"] = np.array([7, 1, 1, 1, 1], "i2")
        molecule["conformations"] = np.arange(30.0).reshape(2, 5, 3)
        molecule["conformations"].attrs["units"] = "bohr"
        molecule["dft_total_energy"] = np.array([-56.0, -57.0])
        molecule["dft_total_gradient"] = np.ones((2, 5, 3))
    convert(tmp_path / "spice.hdf5", tmp_path / "out.h5")
    found, groups, subsets, _ = contents(tmp_path / "out.h5")
    assert groups == ["[NH4+]"]
    assert subsets == ["spice"]
    assert found.total_charge.tolist() == [1, 1]
    np.testing.assert_allclose(found.energy, [-56.0 * HARTREE, -57.0 * HARTREE])
    np.testing.assert_allclose(found.positions[-1], np.array([27, 28, 29]) * BOHR, rtol=1e-6)
    np.testing.assert_allclose(found.forces, -HARTREE / BOHR, rtol=1e-6)
    with h5py.File(tmp_path / "spice.hdf5", "a") as file:
        file["ammonium/conformations"].attrs["units"] = "angstrom"
    with pytest.raises(DatasetError, match="conformations must be in bohr, the file says 'angst"):
        convert(tmp_path / "spice.hdf5", tmp_path / "again.h5")
    assert not (tmp_path / "again.h5").exists()


def test_structures_without_labels_become_a_file_without_labels(tmp_path):
    write(tmp_path / "a.xyz", [Atoms("OHH", np.eye(3))] * 2, format="extxyz")
    convert(tmp_path / "a.xyz", tmp_path / "a.h5", charge=2)
    with Dataset(tmp_path / "a.h5", unlabelled=True) as dataset:
        assert not dataset.labelled
        assert dataset.read(0, 2).total_charge.tolist() == [2, 2]


def test_file_that_is_partly_labelled_is_refused(tmp_path):
    some = Atoms("OHH", np.eye(3))
    some.calc = SinglePointCalculator(some, energy=1.0, forces=np.zeros((3, 3)))
    write(tmp_path / "a.xyz", [some, Atoms("OHH", np.eye(3))], format="extxyz")
    with pytest.raises(DatasetError, match="some structures have an energy and some have none"):
        convert(tmp_path / "a.xyz", tmp_path / "a.h5")


def test_nothing_is_overwritten_or_guessed(sample, tmp_path):
    (tmp_path / "a.xyz").touch()
    with pytest.raises(FileExistsError, match=r"a\.xyz exists"):
        convert(sample, tmp_path / "a.xyz")
    with pytest.raises(ValueError, match="say the format, one of dataset, extxyz, db, spice"):
        convert(sample, tmp_path / "a.txt")
    with pytest.raises(ValueError, match="got 'hdf'"):
        format_of(sample, "hdf")
    with pytest.raises(DatasetError, match="there is no such file"):
        convert(tmp_path / "no.xyz", tmp_path / "b.h5")
