import h5py
import numpy as np
import pytest

from openmm_mlffd.training.hdf5 import Dataset, DatasetError, SplitRule
from openmm_mlffd.training.starter import import_starter

# subset, molecule and number of atoms of each structure
FIRST = [("mono", "CO", 6), ("mono", "C", 5), ("wet", "CO|water", 9), ("box", "water", 6)]
SECOND = [("box", "water", 3), ("box", "water", 3), ("mono", "C", 5), ("ion", "[NH4+]", 5)]


def write_starter(path, content, *, seed=0, **attributes):
    """A file like those of the starter set."""
    rng = np.random.default_rng(seed)
    count = np.array([n for *_, n in content])
    n, n_atoms = len(content), count.sum()
    subsets = sorted({s for s, *_ in content}, reverse=True)
    smiles = sorted({m for _, m, _ in content})
    periodic = np.array([s == "box" for s, *_ in content])
    stress = rng.normal(size=(n, 3, 3)).astype("f4")
    stress[~periodic] = np.nan
    with h5py.File(path, "w") as file:
        file.attrs.update({"schema": "so3lr-starter/2", "teacher": "SO3LR"} | attributes)
        file["offsets"] = np.concatenate([[0], np.cumsum(count)])
        file["atomic_numbers"] = rng.choice([1, 6, 7, 8], n_atoms).astype("u1")
        file["positions"] = rng.normal(size=(n_atoms, 3)).astype("f4")
        file["forces"] = rng.normal(size=(n_atoms, 3)).astype("f4")
        file["partial_charges"] = rng.normal(size=n_atoms).astype("f4")
        file["energy"] = rng.normal(size=n)
        file["cell"] = periodic[:, None, None] * 9.0 * np.eye(3)
        file["pbc"] = periodic
        file["stress"] = stress
        file["total_charge"] = np.array([m.count("+") for _, m, _ in content], "i1")
        file["sampling_temperature"] = rng.integers(200, 900, n).astype("i2")
        file["subset"] = np.array([subsets.index(s) for s, *_ in content], "u1")
        file["subset"].attrs["names"] = subsets
        file["molecule"] = np.array([smiles.index(m) for _, m, _ in content], "i4")
        file["smiles"] = np.array(smiles, dtype=h5py.string_dtype())


@pytest.fixture
def starter(tmp_path):
    write_starter(tmp_path / "a.h5", FIRST)
    write_starter(tmp_path / "b.h5", SECOND, seed=1)
    return [tmp_path / "a.h5", tmp_path / "b.h5"]


def test_labels_are_taken_over_to_the_bit(starter, tmp_path):
    assert import_starter(starter, tmp_path / "all.h5") == 8
    with Dataset(tmp_path / "all.h5") as dataset:
        found = dataset.read(0, 8)
        assert dataset.teacher == "SO3LR"
    files = [h5py.File(path) for path in starter]
    names = "atomic_numbers positions forces partial_charges energy cell stress total_charge"
    for name in names.split():
        expected = np.concatenate([file[name][:] for file in files])
        np.testing.assert_array_equal(getattr(found, name), expected, err_msg=name)
    np.testing.assert_array_equal(np.diff(found.offsets), [6, 5, 9, 6, 3, 3, 5, 5])
    temperature = np.concatenate([file["sampling_temperature"][:] for file in files])
    np.testing.assert_array_equal(found.temperature, temperature)
    np.testing.assert_array_equal(found.pbc.all(1), [s == "box" for s, *_ in FIRST + SECOND])
    assert found.total_charge.tolist() == [0] * 7 + [1]


def test_molecule_and_its_solvated_forms_are_one_group_and_water_boxes_are_many(starter, tmp_path):
    import_starter(starter, tmp_path / "all.h5", split=SplitRule(val=0.3, test=0.3))
    with Dataset(tmp_path / "all.h5") as dataset:
        names = dataset.group_names()
        found = dataset.read(0, 8)
        groups = [names[g] for g in found.group]
    assert groups == ["CO", "C", "CO", "water #3", "water #4", "water #5", "C", "[NH4+]"]
    assert found.split.tolist() == [SplitRule(val=0.3, test=0.3)(g) for g in groups]


def test_subsets_keep_their_names(starter, tmp_path):
    import_starter(starter, tmp_path / "all.h5")
    with Dataset(tmp_path / "all.h5") as dataset:
        assert dataset.subsets == ["box", "ion", "mono", "wet"]
        names = [dataset.subsets[s] for s in dataset.subset]
    assert names == [s for s, *_ in FIRST + SECOND]


def test_long_files_are_read_in_several_blocks(tmp_path):
    content = [("mono", f"C{i % 7}", 1) for i in range(9000)]
    write_starter(tmp_path / "long.h5", content)
    import_starter([tmp_path / "long.h5"], tmp_path / "all.h5")
    with Dataset(tmp_path / "all.h5") as dataset, h5py.File(tmp_path / "long.h5") as file:
        found = dataset.read(0, 9000)
        np.testing.assert_array_equal(found.energy, file["energy"][:])
        np.testing.assert_array_equal(found.positions, file["positions"][:])
        assert sorted(dataset.group_names()) == [f"C{i}" for i in range(7)]


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        (
            {"schema": "so3lr-starter/1"},
            r"b.h5: has schema 'so3lr-starter/1'.*starter/2' is needed",
        ),
        ({"teacher": "other"}, r"different teachers: \['SO3LR', 'other'\]"),
    ],
)
def test_other_schema_and_mixed_teachers_are_refused(starter, tmp_path, attributes, message):
    write_starter(tmp_path / "b.h5", SECOND, **attributes)
    with pytest.raises(DatasetError, match=message):
        import_starter(starter, tmp_path / "all.h5")
    assert not (tmp_path / "all.h5").exists()
