import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("warp")
pytest.importorskip("openmmml")

from openmmml import MLPotential

from openmm_mlffd.bench import floors as floors_module
from openmm_mlffd.bench import run, timing
from openmm_mlffd.bench.compare import OtherDeviceError, slower
from openmm_mlffd.bench.figure import draw
from openmm_mlffd.bench.systems import relaxed, water
from openmm_mlffd.bench.teachers import teacher_times
from openmm_mlffd.engine import FastEvaluator
from openmm_mlffd.evaluator import Evaluator, StudentSource, resolve_device
from openmm_mlffd.modelfile import save_student

ROOT = Path(__file__).parents[2]


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


def test_sizes_are_those_of_whole_molecules(make_bench, monkeypatch):
    monkeypatch.setattr(timing, "N_SAMPLES", 2)
    bench = make_bench(sizes=[13])
    assert bench.run(["speed", "overhead"])
    rows = bench.results["speed"] + bench.results["overhead"]
    assert {row["atoms"] for row in rows} == {12}


def test_size_that_cannot_be_relaxed_is_told_and_the_rest_is_measured(make_bench, monkeypatch):
    monkeypatch.setattr(timing, "N_SAMPLES", 2)

    def broken(evaluator, positions, cell):
        if len(positions) == 12:
            raise RuntimeError("no room")
        return positions

    monkeypatch.setattr(run, "relaxed", broken)
    bench = make_bench(sizes=[12, 15])
    assert not bench.run(["speed"])
    first, *rest = bench.results["speed"]
    assert first == {"atoms": 12, "error": "RuntimeError: no room"}
    assert {row["atoms"] for row in rest} == {15}


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


@pytest.mark.parametrize("section", ["speed", "drift"])
def test_steps_are_those_of_the_student_that_was_named(make_bench, monkeypatch, section):
    monkeypatch.setattr(timing, "N_SAMPLES", 2)
    named = []

    class Recorded(MLPotential):
        def __init__(self, name, **keywords):
            named.append(Path(keywords["modelPath"]))
            super().__init__(name, **keywords)

    monkeypatch.setattr(timing, "MLPotential", Recorded)
    bench = make_bench()
    assert bench.run([section])
    assert {StudentSource.find(path).sha256 for path in named} == {bench.source.sha256}
    assert bench.source.sha256 != StudentSource.find().sha256


def test_callback_and_batches_are_timed(make_bench, monkeypatch):
    monkeypatch.setattr(timing, "N_SAMPLES", 2)
    monkeypatch.setattr(run, "BATCH", (4, 6))
    bench = make_bench(sizes=[12])
    assert bench.run(["overhead", "batch"])
    (overhead,), (batch,) = bench.results["overhead"], bench.results["batch"]
    assert 1e-6 < overhead["callback"] < 0.02
    assert batch["ratio"] == pytest.approx(batch["batch"] / batch["one"])
    assert 0.05 < batch["ratio"] < 20


def test_evaluator_works_again_after_it_was_timed_without_kernels(student):
    numbers, positions, cell = water(30)
    fast = FastEvaluator(student, numbers)
    first, _ = fast.energy_and_forces(positions, cell)
    with fast.without_kernels():
        assert fast.energy_and_forces(positions + 0.1, cell)[0] == first
    assert fast.energy_and_forces(positions * 1.01, cell)[0] != first


def test_teachers_that_are_not_here_are_told(make_bench, monkeypatch):
    monkeypatch.setattr(timing, "N_SAMPLES", 2)
    bench = make_bench(engines=[], teachers=["orb-v2"], teacher_python=lambda name: None)
    if importlib.util.find_spec("orb_models") is not None:
        pytest.skip("orb-models is here")
    assert not bench.run(["speed"])
    assert "mlffd teacher install orb" in bench.results["speed"][-1]["error"]


def test_teacher_s_process_is_timed_by_what_it_says(tmp_path):
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n"
        'echo "loading"\n'
        """echo '{"atoms": 3, "bare": 0.25}'\n"""
        "echo 'ValueError: no more' >&2\n"
        "exit 1\n"
    )
    python.chmod(0o755)
    found = list(teacher_times("orb-v2", [water(3)], device="cpu", python=python, limit=20.0))
    assert found == [{"atoms": 3, "bare": 0.25}, {"error": "orb-v2: ValueError: no more"}]


def test_figure_shows_steps_evaluations_and_floors(tmp_path):
    rows = [{"atoms": n, "engine": "none", "step": 1e-5} for n in (50, 1000)]
    rows += [
        {
            "atoms": n, "engine": "python", "precision": "single", "step": 1e-6 * n,
            "bare": 9e-7 * n, "floor_bytes": 1e-8 * n, "floor_operations": 1e-7 * n,
        }
        for n in (50, 1000)
    ]  # fmt: skip
    rows.append({"atoms": 1000, "engine": "orb-v2", "precision": "random weights", "bare": 0.03})
    draw({"host": {"device": "NVIDIA H100"}, "speed": rows}, tmp_path / "bench.svg")
    assert (tmp_path / "bench.svg").stat().st_size > 10_000
    with pytest.raises(ValueError, match="nothing to draw"):
        draw({"host": {"device": "x"}, "speed": [{"error": "no"}]}, tmp_path / "no.svg")
    assert not (tmp_path / "no.svg").exists()


def stored(device="NVIDIA H100", **changes):
    row = {"atoms": 50, "engine": "python", "precision": "single", "bare": 1e-4, "step": 3e-4}
    return {"host": {"device": device}, "speed": [row | changes], "drift": [{"drift": 5.0}]}


def test_what_became_slower_is_named():
    assert slower(stored("NVIDIA H100 80GB HBM3"), stored()) == []
    assert slower(stored(step=3.4e-4, bare=5e-5), stored()) == []
    (line,) = slower(stored(step=3.6e-4), stored())
    assert line == "speed 50 python single step: 0.360 ms, 20 % more than 0.300 ms"
    with pytest.raises(OtherDeviceError, match="NVIDIA A100, and this is NVIDIA H100"):
        slower(stored(), stored("NVIDIA A100"))
    with pytest.raises(ValueError, match="none of the numbers"):
        slower(stored(atoms=51), stored())


def test_stored_reference_of_the_documentation_can_be_compared_with():
    reference = json.loads((ROOT / "docs" / "bench_reference.json").read_text())
    assert slower(reference, reference) == []
    halved = json.loads(json.dumps(reference))
    for row in halved["speed"]:
        row["step"] = 0.5 * row["step"]
    assert len(slower(reference, halved)) == len(reference["speed"])


def test_comparison_ends_in_an_error_where_something_is_slower(make_bench, tmp_path, capsys):
    bench = make_bench()
    bench.results = stored(step=9e-4)
    (tmp_path / "before.json").write_text(json.dumps(stored()))
    assert not bench.compare(tmp_path / "before.json")
    assert "200 % more than 0.300 ms" in capsys.readouterr().out
    bench.results = stored()
    assert bench.compare(tmp_path / "before.json")


def test_floors_are_those_counted_by_hand(make_student):
    student = make_student()  # 16 channels, 2 interactions
    f, k = 16, 4 / 3 * np.pi * student.cutoff**3 * floors_module.WATER_DENSITY
    # contexts f→f→3f of the second, 3 × f→2f and 2f→f→3f (at last 2f) of both, readout
    sizes = [m.weight.numel() for m in student.network.readout.modules() if hasattr(m, "weight")]
    products = 4 * (4 * f**2 + 2 * (3 * 2 * f**2 + 5 * f**2) - f**2 + sum(sizes))
    edges = k * (f * (3 * 10 * 2 + 2 * 8 + 6) + f * (3 * 10 * 3 + 2 * 14 + 6))
    moved = 2 * (2 * 2 * 4 * f * 4 + 2 * 5 * f * 4 + 2 * k * 20)
    found = floors_module.floors(student)
    assert found.operations_per_atom == pytest.approx(products + edges)
    assert found.bytes_per_atom == pytest.approx(moved)
    assert floors_module.floors(student, precision="mixed").bytes_per_atom < moved
    bytes_s, operations_s = found.seconds("NVIDIA H100 80GB HBM3", 1000)
    assert bytes_s == pytest.approx(1000 * moved / 3.35e12)
    assert operations_s == pytest.approx(1000 * (products + edges) / 67e12)
    assert found.seconds("x86_64", 1000) is None


@pytest.mark.parametrize("changes", [{"sections": "sped"}, {"sizes": "5,x"}, {"engines": "fast"}])
def test_words_that_are_not_known_are_refused(tmp_path, changes):
    given = {"sections": "speed", "sizes": "50", "engines": "python", "precisions": "single"}
    with pytest.raises(ValueError, match=r"is none of|must be numbers"):
        run.run_bench_command(None, **given | changes, device="cpu", output=tmp_path, echo=print)
    assert not list(tmp_path.iterdir())
