import json

import numpy as np
import pytest

pytest.importorskip("warp")
pytest.importorskip("openmmml")

from openmm_mlffd.bench import run, timing
from openmm_mlffd.bench.systems import relaxed, water
from openmm_mlffd.evaluator import Evaluator, StudentSource, resolve_device
from openmm_mlffd.modelfile import save_student


@pytest.fixture
def make_bench(tmp_path, make_student, make_header):
    def make(**settings):
        path = tmp_path / "toy.safetensors"
        save_student(path, make_student(), make_header())
        return run.Bench(
            source=StudentSource.find(path),
            output=tmp_path / "out",
            device=resolve_device("cpu"),
            echo=print,
            **{"sizes": [12], "engines": ["python"], "precisions": ["single"]} | settings,
        )

    return make


@pytest.mark.parametrize("n_atoms", [3, 50, 1000, 5000])
def test_water_has_the_density_of_a_liquid_and_whole_molecules(n_atoms):
    numbers, positions, cell = water(n_atoms)
    n = round(n_atoms / 3)
    assert numbers.tolist() == [8, 1, 1] * n
    assert np.linalg.det(cell) == pytest.approx(29.9 * n)
    bonds = positions.reshape(n, 3, 3)[:, 1:] - positions.reshape(n, 3, 3)[:, :1]
    assert np.abs(np.linalg.norm(bonds, axis=2) - 0.96).max() < 1e-12
    angles = np.degrees(np.arccos((bonds[:, 0] * bonds[:, 1]).sum(1) / 0.96**2))
    assert np.abs(angles - 104.5).max() < 1e-6


def test_relaxed_positions_have_less_energy(student):
    numbers, positions, cell = water(30)
    evaluator = Evaluator(student, numbers)
    found = relaxed(evaluator, positions, cell, n_steps=20)
    before, after = (evaluator.compute(x, cell).energy for x in (positions, found))
    assert after < before - 0.1


def test_speed_is_printed_and_stored(make_bench, monkeypatch, capsys):
    monkeypatch.setattr(timing, "N_SAMPLES", 2)
    bench = make_bench(engines=["python", "eager"])
    assert bench.run(["speed"])
    stored = json.loads((bench.output / "bench.json").read_text())
    assert stored["host"]["torch"]
    assert [row["engine"] for row in stored["speed"]] == ["none", "python", "eager"]
    for row in stored["speed"][1:]:
        assert 0 < row["bare_fastest"] <= row["bare"] < 10
        assert 0 < row["step_fastest"] <= row["step"] < 10
    assert "engine eager" in capsys.readouterr().out


def test_what_fails_is_told_and_the_rest_is_measured(make_bench, monkeypatch):
    monkeypatch.setattr(timing, "N_SAMPLES", 2)

    def broken(*args, **kwargs):
        raise RuntimeError("no more time")

    monkeypatch.setattr(timing, "evaluation_time", broken)
    bench = make_bench()
    assert not bench.run(["speed"])
    rows = json.loads((bench.output / "bench.json").read_text())["speed"]
    assert "error" not in rows[0]
    assert rows[1]["error"] == "RuntimeError: no more time"


@pytest.mark.parametrize("changes", [{"sections": "sped"}, {"sizes": "5,x"}, {"engines": "fast"}])
def test_words_that_are_not_known_are_refused(tmp_path, changes):
    given = {"sections": "speed", "sizes": "50", "engines": "python", "precisions": "single"}
    with pytest.raises(ValueError, match=r"is none of|must be numbers"):
        run.run_bench_command(None, **given | changes, device="cpu", output=tmp_path, echo=print)
    assert not list(tmp_path.iterdir())
