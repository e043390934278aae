"""Packed dataset files."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from openmm_mlffd.training.hdf5 import Dataset, DatasetError
from openmm_mlffd.training.pack import pack, unpack

SAMPLE = Path(__file__).parents[1] / "data" / "sample.h5"


def test_unpacked_dataset_is_the_packed_one(tmp_path):
    pack(SAMPLE, tmp_path / "s.pack")
    unpack(tmp_path / "s.pack", tmp_path / "s.h5")
    with h5py.File(SAMPLE) as before, h5py.File(tmp_path / "s.h5") as after:
        assert set(before) == set(after)
        for name in before:
            a, b = before[name][:], after[name][:]
            assert a.dtype == b.dtype
            if a.dtype.kind == "f":
                np.testing.assert_allclose(b, a, rtol=0, atol=1e-5, equal_nan=True)
            else:
                np.testing.assert_array_equal(b, a)
    with Dataset(SAMPLE) as before, Dataset(tmp_path / "s.h5") as after:
        assert before.subsets == after.subsets
        assert before.teacher == after.teacher
    assert (tmp_path / "s.pack").stat().st_size < 0.5 * SAMPLE.stat().st_size


def test_numbers_that_are_not_rounded_are_not_packed(tmp_path):
    copy = tmp_path / "s.h5"
    copy.write_bytes(SAMPLE.read_bytes())
    with h5py.File(copy, "r+") as file:
        values = file["forces"][:]
        values[0, 0] += 3e-4
        del file["forces"]
        file["forces"] = values
    with pytest.raises(DatasetError, match="forces are not rounded to 3 decimals"):
        pack(copy, tmp_path / "s.pack")


def test_packed_file_that_is_cut_off_is_refused(tmp_path):
    pack(SAMPLE, tmp_path / "s.pack")
    content = (tmp_path / "s.pack").read_bytes()
    (tmp_path / "half.pack").write_bytes(content[:-100])
    with pytest.raises(DatasetError, match="ends within"):
        unpack(tmp_path / "half.pack", tmp_path / "s.h5")
    assert not (tmp_path / "s.h5").exists()
