import json

import numpy as np
import pytest

from openmm_mlffd.validation.suite.store import (
    Clock,
    OutOfTime,
    Store,
    plain,
    read_arrays,
    write_arrays,
)


def test_a_finished_piece_is_not_measured_again(tmp_path):
    calls = []

    def measure(folder):
        calls.append(folder)
        write_arrays(folder / "arrays.npz", x=np.arange(3))
        return {"value": np.float64(2.5), "nothing": np.nan}

    for _ in range(2):
        piece = Store(tmp_path).piece("a piece", {"model": "m"}, measure)
        assert piece.numbers == {"value": 2.5, "nothing": None}
        np.testing.assert_array_equal(piece.arrays()["x"], [0, 1, 2])
    assert len(calls) == 1


@pytest.mark.parametrize("changed", [{"model": "n"}, {"model": "m", "length": 2}])
def test_other_settings_are_another_piece(tmp_path, changed):
    store = Store(tmp_path)
    first = store.piece("piece", {"model": "m"}, lambda _: {"value": 1})
    second = store.piece("piece", changed, lambda _: {"value": 2})
    assert (first.numbers["value"], second.numbers["value"]) == (1, 2)
    assert first.folder != second.folder
    settings = json.loads((second.folder / "settings.json").read_text())
    assert changed.items() <= settings.items()


def test_a_piece_that_stopped_finds_what_it_left(tmp_path):
    def measure(folder):
        done = folder / "half"
        if not done.is_file():
            done.touch()
            raise OutOfTime("no time left")
        return {"resumed": True}

    store = Store(tmp_path)
    with pytest.raises(OutOfTime):
        store.piece("piece", {}, measure)
    assert store.piece("piece", {}, measure).numbers == {"resumed": True}


def test_a_piece_that_was_copied_in_part_is_measured_again(tmp_path):
    measured = []

    def measure(folder):
        measured.append(folder)
        return {"value": 2.0}

    piece = Store(tmp_path).piece("energy", {}, measure)
    (piece.folder / "made.json").unlink()
    assert Store(tmp_path).piece("energy", {}, measure).numbers == {"value": 2.0}
    assert len(measured) == 2


def test_nothing_is_begun_without_time(tmp_path):
    store = Store(tmp_path, clock=Clock(0.0))
    with pytest.raises(OutOfTime, match="the same command goes on"):
        store.piece("piece", {}, lambda _: pytest.fail("was begun"))
    Clock().check(1e9)
    with pytest.raises(OutOfTime):
        Clock(1.0).check(61.0)


def test_an_unfinished_piece_is_measured_again_where_that_is_worth_while(tmp_path):
    store = Store(tmp_path)
    store.piece("run", {}, lambda _: {"length": 1})
    assert store.piece("run", {}, lambda _: {"length": 2}).numbers == {"length": 1}
    again = store.piece("run", {}, lambda _: {"length": 2}, unfinished=lambda n: n["length"] < 2)
    assert again.numbers == {"length": 2}


def test_a_file_is_there_as_a_whole_or_not_at_all(tmp_path):
    write_arrays(tmp_path / "a.npz", x=np.ones(4))

    class Broken:
        def __array__(self, dtype=None, copy=None):
            raise RuntimeError("cannot be written")

    with pytest.raises(RuntimeError, match="cannot be written"):
        write_arrays(tmp_path / "a.npz", x=Broken())
    np.testing.assert_array_equal(read_arrays(tmp_path / "a.npz")["x"], np.ones(4))


def test_what_json_does_not_have_is_refused():
    assert plain({"a": (np.int64(1), np.array([np.inf, 2.0]), None, True, "t")}) == {
        "a": [1, [None, 2.0], None, True, "t"]
    }
    with pytest.raises(TypeError, match="got set"):
        plain({1, 2})
