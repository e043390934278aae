import subprocess
import sys

import h5py
import numpy as np
import pytest

from openmm_mlffd.training.hdf5 import (
    SPLITS,
    UNITS,
    Dataset,
    DatasetError,
    DatasetWriter,
    SplitRule,
    Structures,
    concatenate,
    take,
)


def assert_same(found, expected, *, but=()):
    for name in Structures._fields:
        if name not in but:
            ours, theirs = getattr(found, name), getattr(expected, name)
            assert ours.dtype == theirs.dtype, name
            np.testing.assert_array_equal(ours, theirs, err_msg=name)


# round trip


def test_what_is_written_is_read_to_the_bit(make_structures, write_dataset):
    structures = make_structures(30)
    path = write_dataset(structures)
    with Dataset(path) as dataset:
        assert len(dataset) == 30
        assert dataset.teacher == "toy"
        assert dataset.subsets == ["a", "b"]
        np.testing.assert_array_equal(dataset.n_atoms, np.diff(structures.offsets))
        assert_same(dataset.read(0, 30), structures, but=("group", "split"))
        assert [dataset.group_names()[g] for g in dataset.read(0, 30).group] == [
            f"molecule {i}" for i in range(30)
        ]


def test_parts_are_read_with_their_own_offsets(make_structures, write_dataset):
    structures = make_structures(30)
    with Dataset(write_dataset(structures)) as dataset:
        part = dataset.read(7, 19)
        assert part.offsets[0] == 0
        assert_same(part, take(structures, np.arange(7, 19)), but=("group", "split"))
        blocks = list(dataset.blocks(size=7))
        assert [len(b.energy) for b in blocks] == [7, 7, 7, 7, 2]
        assert_same(concatenate(blocks), dataset.read(0, 30))


def test_blocks_that_are_appended_follow_one_another(make_structures, tmp_path):
    parts = [make_structures(n, seed=n) for n in (5, 1, 9)]
    with DatasetWriter(
        tmp_path / "a.h5", teacher="toy", subsets=["a", "b"], split=SplitRule()
    ) as writer:
        for k, part in enumerate(parts):
            writer.append(part, [f"{k}-{i % 3}" for i in range(len(part.energy))])
    with Dataset(tmp_path / "a.h5") as dataset:
        assert_same(dataset.read(0, 15), concatenate(parts), but=("group", "split"))
        assert dataset.group_names() == ["0-0", "0-1", "0-2", "1-0", "2-0", "2-1", "2-2"]


def test_taking_structures_keeps_their_atoms(make_structures):
    structures = make_structures(10)
    order = np.array([7, 2, 2, 9])
    taken = take(structures, order)
    np.testing.assert_array_equal(taken.energy, structures.energy[order])
    for new, old in enumerate(order):
        ours = slice(*taken.offsets[new : new + 2])
        theirs = slice(*structures.offsets[old : old + 2])
        np.testing.assert_array_equal(taken.forces[ours], structures.forces[theirs])


# split


def test_groups_are_never_split_and_keep_their_place_in_other_files(make_structures, write_dataset):
    structures, rng = make_structures(60), np.random.default_rng(0)
    groups = [f"molecule {i // 3}" for i in range(60)]
    order = rng.permutation(60)
    rule = SplitRule(val=0.3, test=0.3)
    one = write_dataset(structures, groups, split=rule)
    other = write_dataset(
        take(structures, order), [groups[i] for i in order], name="other.h5", split=rule
    )
    places = []
    for path in (one, other):
        with Dataset(path) as dataset:
            names, found = dataset.group_names(), {}
            for group, split in zip(dataset.read(0, 60).group, dataset.split, strict=True):
                found.setdefault(names[group], set()).add(int(split))
        assert all(len(splits) == 1 for splits in found.values())
        places.append(found)
    assert places[0] == places[1]
    assert {s for splits in places[0].values() for s in splits} == {0, 1, 2}


def test_fractions_of_the_split_are_those_asked_for():
    rule = SplitRule(val=0.05, test=0.1)
    count = np.bincount([rule(f"C{i}") for i in range(20000)], minlength=3) / 20000
    np.testing.assert_allclose(count, [0.85, 0.05, 0.1], atol=0.006)


def test_split_depends_on_the_seed_and_on_nothing_else():
    names = [f"C{i}" for i in range(300)]
    first, again, other = (
        [SplitRule(val=0.2, test=0.2, seed=seed)(n) for n in names] for seed in (0, 0, 1)
    )
    assert first == again != other
    # kept forever: a group must not wander from test to train between versions
    assert "".join(str(s) for s in first[:30]) == GOLDEN_SPLIT


GOLDEN_SPLIT = "102000000020000021110010112011"


@pytest.mark.parametrize(("val", "test"), [(-0.1, 0.1), (0.5, 0.5), (0.1, -0.01)])
def test_split_that_leaves_nothing_is_refused(val, test):
    with pytest.raises(ValueError, match="fractions that leave something to train on"):
        SplitRule(val=val, test=test)


def test_splits_are_disjoint_and_complete(make_structures, write_dataset):
    with Dataset(write_dataset(make_structures(60), split=SplitRule(val=0.3, test=0.3))) as dataset:
        parts = [dataset.in_split(name) for name in SPLITS]
        assert all(len(part) > 5 for part in parts)
        np.testing.assert_array_equal(np.sort(np.concatenate(parts)), dataset.in_split("all"))
        with pytest.raises(ValueError, match="split must be one of train, val, test or all"):
            dataset.in_split("training")


# writing that fails


def test_interrupted_writing_leaves_nothing(make_structures, tmp_path):
    def write():
        with DatasetWriter(
            tmp_path / "a.h5", teacher="toy", subsets=["a", "b"], split=SplitRule()
        ) as writer:
            writer.append(make_structures(4), list("abcd"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert not list(tmp_path.iterdir())


WRITE_FOREVER = """
import sys
from openmm_mlffd.training.hdf5 import Dataset, DatasetWriter, SplitRule
part = Dataset(sys.argv[1]).read(0, 12)
with DatasetWriter(sys.argv[2], teacher="toy", subsets=["a", "b"], split=SplitRule()) as writer:
    while True:
        writer.append(part, [str(i) for i in range(12)])
        print("appended", flush=True)
"""


def test_killed_writing_leaves_no_dataset_and_can_be_repeated(
    make_structures, write_dataset, tmp_path
):
    source, target = write_dataset(make_structures(12), name="source.h5"), tmp_path / "data.h5"
    command = [sys.executable, "-c", WRITE_FOREVER, str(source), str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        for _ in range(3):
            assert process.stdout.readline() == b"appended\n"
        process.kill()
    assert not target.exists()
    write_dataset(make_structures(4))
    with Dataset(target) as dataset:
        assert len(dataset) == 4
    assert set(tmp_path.iterdir()) == {source, target}


def test_existing_file_is_not_overwritten(make_structures, write_dataset):
    path = write_dataset(make_structures())
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match=r"data.h5 exists; remove it"):
        write_dataset(make_structures(seed=1))
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["positions", "energy", "forces"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_label_that_is_not_finite_is_refused_with_its_row(
    make_structures, write_dataset, name, value
):
    structures = make_structures()
    getattr(structures, name)[3] = value
    with pytest.raises(
        DatasetError, match=f"{name} holds values that are not finite, first in row 3"
    ):
        write_dataset(structures)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"forces": np.zeros((3, 3), "f4")}, "forces must have shape"),
        ({"energy": np.zeros((12, 1))}, "energy must have shape"),
        ({"subset": np.full(12, 2, "u1")}, "subset 2 has no name"),
        ({"offsets": np.zeros(13, "i8")}, "offsets must be 13 numbers that rise from 0"),
        ({"offsets": np.arange(5)}, "offsets must be 13 numbers that rise from 0"),
    ],
)
def test_arrays_that_disagree_are_refused(make_structures, write_dataset, change, message):
    with pytest.raises(DatasetError, match=message):
        write_dataset(make_structures()._replace(**change))


# files that cannot be used


def test_missing_file_and_other_formats_are_named(tmp_path):
    with pytest.raises(DatasetError, match=r"no.h5: not a readable HDF5 file"):
        Dataset(tmp_path / "no.h5")
    (tmp_path / "text.h5").write_text("hello")
    with pytest.raises(DatasetError, match=r"text.h5: not a readable HDF5 file"):
        Dataset(tmp_path / "text.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file.attrs["schema"] = "so3lr-starter/2"
    with pytest.raises(DatasetError, match=r"other.h5: .*convert it with `mlffd data import`"):
        Dataset(tmp_path / "other.h5")


@pytest.mark.parametrize("part", [0.0, 0.3, 0.6, 0.99])
def test_truncated_file_is_refused(make_structures, write_dataset, part):
    path = write_dataset(make_structures())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(DatasetError, match=r"data.h5: not a readable HDF5 file"):
        Dataset(path)


@pytest.mark.parametrize("name", ["positions", "forces", "energy", "split", "offsets"])
def test_damaged_chunk_is_noticed_and_named(make_structures, write_dataset, name):
    path = write_dataset(make_structures(40))
    with h5py.File(path) as file:
        chunk = file[name].id.get_chunk_info(0)
    whole = bytearray(path.read_bytes())
    whole[chunk.byte_offset + chunk.size // 2] ^= 4
    path.write_bytes(whole)
    with pytest.raises(DatasetError, match=rf"data.h5: {name} is damaged"):
        Dataset(path).read(0, 40)


@pytest.mark.parametrize("name", UNITS)
def test_other_units_are_refused(make_structures, write_dataset, name):
    path = write_dataset(make_structures())
    with h5py.File(path, "a") as file:
        file[name].attrs["units"] = "nm"
    with pytest.raises(DatasetError, match=f"{name} must be in .*, the file says 'nm'"):
        Dataset(path)


def test_newer_version_is_refused(make_structures, write_dataset):
    path = write_dataset(make_structures())
    with h5py.File(path, "a") as file:
        file.attrs["version"] = 2
    with pytest.raises(DatasetError, match="version 2, 'mlffd-dataset' version 1 is needed"):
        Dataset(path)


def test_missing_and_short_arrays_are_named(make_structures, write_dataset):
    path = write_dataset(make_structures())
    with h5py.File(path, "a") as file:
        file["forces"].resize(5, axis=0)
    with pytest.raises(DatasetError, match=r"forces must have shape \(\d+, 3\), it has \(5, 3\)"):
        Dataset(path)
    with h5py.File(path, "a") as file:
        del file["forces"], file["group_names"]
    with pytest.raises(DatasetError, match="lacks group_names, forces; was its writing cut off"):
        Dataset(path)


def test_sample_is_what_it_claims_to_be(data_folder):
    # real labels: the forces of a molecule add up to nothing, and stress is known in boxes only
    with Dataset(data_folder / "sample.h5") as dataset:
        everything = dataset.read(0, len(dataset))
    system = np.repeat(np.arange(len(everything.energy)), np.diff(everything.offsets))
    net = np.zeros((len(everything.energy), 3))
    np.add.at(net, system, everything.forces)
    assert np.abs(net).max() < 0.05
    periodic = everything.pbc.all(1)
    assert 0 < periodic.sum() < len(periodic)
    assert (np.isfinite(everything.stress).all((1, 2)) == periodic).all()
    assert np.abs(everything.forces).max() > 3
