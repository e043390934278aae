import copy
import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from openmm_mlffd import cli
from openmm_mlffd.training import plots, sweep
from openmm_mlffd.training.batches import make_batch
from openmm_mlffd.training.config import ConfigError, TrainConfig
from openmm_mlffd.training.loss import TERMS
from openmm_mlffd.training.shards import locked
from openmm_mlffd.training.step import TrainingStep
from openmm_mlffd.training.sweep import KIND, load_sweep, run_sweep
from openmm_mlffd.training.targets import count_totals, training_batch

CONFIGS = Path(__file__).parents[2] / "training" / "configs"


def point(name, step, force_mae, **changes):
    """A stored point: time per step at 1,000 atoms [ms], error [meV/Å]."""
    errors = {"all": {"force_mae": force_mae, "energy_mae": force_mae / 20}}
    rows = [
        {"atoms": 50, "engine": "none", "step": 1e-5},
        {"atoms": 50, "engine": "python", "precision": "single", "step": 2e-4},
        {
            "atoms": 999,
            "engine": "python",
            "precision": "single",
            "step": 1e-3 * step,
            "bare": 4e-4 * step,
        },
        {"atoms": 5000, "engine": "python", "precision": "single", "error": "out of memory"},
    ]
    return {
        "format": "mlffd-sweep-point", "version": 1, "name": name, "minutes": 4.0, "settings": [],
        "architecture": {}, "cutoff": 5.0, "weights": 100_000, "steps": 1000,
        "train_structures": 5000, "student": "", "errors": {"val": errors, "test": errors},
        "speed": {"host": {"device": "a GPU"}, "rows": rows}, **changes,
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """Four students: one is both slower and worse than another."""
    points = [
        point("fast", 0.3, 60.0), point("middle", 0.6, 40.0, minutes=8.0),
        point("bad", 0.8, 50.0, train_structures=500), point("slow", 2.0, 30.0),
        point("untimed", 1.0, 20.0, speed=None, minutes=None),
    ]  # fmt: skip
    for content in points:
        place = tmp_path / "points" / content["name"]
        place.mkdir(parents=True)
        (place / "point.json").write_text(json.dumps(content))
    return tmp_path / "points"


def test_front_has_those_that_none_is_faster_and_better_than(folder):
    dots = plots.dots_of(plots.read_points([folder]), against="speed", atoms=1000, split="test")
    assert [d.name for d in dots] == ["fast", "middle", "bad", "slow"]
    assert [d.x for d in dots] == pytest.approx([0.3, 0.6, 0.8, 2.0])
    assert [d.name for d in plots.front_of(dots)] == ["fast", "middle", "slow"]
    alone = plots.dots_of(plots.read_points([folder]), against="evaluation", atoms=50, split="val")
    assert [d.x for d in alone] == pytest.approx([0.12, 0.24, 0.32, 0.8])
    assert "per evaluation at about 50 atoms" in plots.format_dots(
        alone, against="evaluation", atoms=50
    )
    at_50 = plots.dots_of(plots.read_points([folder]), against="speed", atoms=60, split="val")
    assert {d.x for d in at_50} == {0.2}


def test_pareto_writes_figure_and_table(folder, tmp_path, monkeypatch, capsys):
    output = tmp_path / "figures" / "pareto.svg"
    monkeypatch.setattr(sys, "argv", ["mlffd", "pareto", str(folder), "-o", str(output)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert not exit_.value.code
    assert output.read_text().count("<svg") == 1
    table = output.with_suffix(".md").read_text()
    assert table in capsys.readouterr().out
    assert "| slow | 2 | 30.0 |" in table
    assert table.count("front") == 3
    assert "a GPU" in table
    assert "Without time per step [ms] or errors on the split test: untimed." in table
    assert output.read_text() == plots.draw(
        plots.dots_of(plots.read_points([folder]), against="speed", atoms=1000, split="test"),
        against="speed", atoms=1000,
    )  # fmt: skip


def test_learning_curves_are_drawn_against_structures_and_time(folder):
    points = plots.read_points([folder])
    curve = plots.dots_of(points, against="structures", atoms=1000, split="test")
    assert curve[0].name == "bad"
    assert len(curve) == 5
    by_steps = plots.dots_of(points, against="steps", atoms=1000, split="test")
    assert {d.x for d in by_steps} == {1000.0}
    by_time = plots.dots_of(points, against="minutes", atoms=1000, split="test")
    assert by_time[-1].name == "middle"
    assert "untimed" not in {d.name for d in by_time}  # it was given steps
    assert "| untimed | 1,000 | 20.0 | 1.00 | 100,000 | 1000 | – | 5000 |" in plots.format_dots(
        by_steps, against="steps", atoms=1000
    )
    assert "middle" in plots.format_dots(by_time, against="minutes", atoms=1000)


def test_numbers_at_logarithmic_axes_have_room():
    axes = Figure(figsize=(5.6, 4.0)).add_subplot()
    axes.set(xscale="log", yscale="log", xlim=(600, 150_000), ylim=(40, 160))
    for axis in (axes.xaxis, axes.yaxis):
        plots._label_ticks(axis)
    axes.figure.canvas.draw()
    shown = [
        [
            t.get_text()
            for t in axis.get_ticklabels(which="both")
            if low <= t.get_position()[n] <= up
        ]
        for n, (axis, (low, up)) in enumerate(
            [(axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())]
        )
    ]
    assert [t for t in shown[0] if t] == [
        "1,000", "2,000", "5,000", "10,000", "20,000", "50,000", "100,000"
    ]  # fmt: skip
    assert {"40", "50", "60", "70", "80", "90", "100"} <= set(shown[1])


def test_nothing_to_draw_is_said(folder, tmp_path):
    with pytest.raises(ValueError, match=r"ends in \.svg, not .*pareto\.png"):
        plots.run_pareto(
            [folder], tmp_path / "pareto.png", against="speed", atoms=1000, split="test"
        )
    with pytest.raises(ValueError, match=r"no point\.json in .*nowhere"):
        plots.read_points([tmp_path / "nowhere"])
    with pytest.raises(
        ValueError, match="drawn against speed, evaluation, structures, minutes, steps"
    ):
        plots.dots_of([], against="colour", atoms=1000, split="test")
    with pytest.raises(ValueError, match="no student has errors on the split 'train'"):
        plots.dots_of(plots.read_points([folder]), against="speed", atoms=1000, split="train")


@pytest.mark.parametrize("name", ["sweep.yaml", "learning_curve.yaml"])
def test_bundled_sweeps_can_be_read(name):
    config, points = load_sweep(CONFIGS / name)
    assert len(points) >= 8
    assert len({p.name for p in points}) == len(points)
    assert config.output.startswith("runs/")


def test_unknown_setting_of_a_point_is_refused(tmp_path):
    (tmp_path / "sweep.yaml").write_text(
        f"base: {CONFIGS / 'sweep_base.yaml'}\npoints: {{a: {{model.n_chanels: 8}}}}"
    )
    with pytest.raises(ConfigError, match=r"did you mean 'model\.n_channels'"):
        load_sweep(tmp_path / "sweep.yaml")


def test_steps_of_a_sweep_or_of_a_point_take_the_place_of_its_time(tmp_path):
    (tmp_path / "sweep.yaml").write_text(
        f"base: {CONFIGS / 'sweep_base.yaml'}\nsteps: 70\n"
        "points: {a: {model.n_channels: 8}, b: {steps: 30}}"
    )
    _, points = load_sweep(tmp_path / "sweep.yaml")
    assert points[0].overrides == ["model.n_channels=8", "fit_steps=70"]
    assert points[1].overrides == ["fit_steps=30"]
    with pytest.raises(ConfigError, match="fit_steps must be positive, got 0"):
        load_sweep(tmp_path / "sweep.yaml", ["steps=0"])


def test_points_of_other_processes_are_left_to_them(data_folder, tmp_path, monkeypatch):
    (tmp_path / "sweep.yaml").write_text(
        f"base: {CONFIGS / 'sweep_base.yaml'}\noutput: {tmp_path / 'out'}\npoints: {{a: {{}}}}"
    )
    monkeypatch.setattr(sweep, "SCRIPT", tmp_path / "none.sh")
    said = []
    with locked(tmp_path / "out" / "a", KIND):
        assert not run_sweep(tmp_path / "sweep.yaml", echo=said.append)
    assert said == ["a: another process is at it"]


def test_point_that_was_trained_without_times_is_timed_later(tmp_path, monkeypatch):
    (tmp_path / "sweep.yaml").write_text(
        f"base: {CONFIGS / 'sweep_base.yaml'}\noutput: {tmp_path / 'out'}\npoints: {{a: {{}}}}"
    )
    stored = tmp_path / "out" / "a" / "point.json"
    stored.parent.mkdir(parents=True)
    stored.write_text(json.dumps(point("a", 1.0, 30.0, speed=None)))
    asked, said = [], []

    def bench(student, folder, sizes, echo):
        asked.append((student, list(sizes)))
        return {"host": {"device": "a GPU"}, "speed": [{"atoms": 50, "step": 1e-3}], "more": 1}

    monkeypatch.setattr(sweep, "_bench", bench)
    run = partial(run_sweep, tmp_path / "sweep.yaml", echo=said.append)
    assert run(overrides=["sizes=[]"])
    assert run(overrides=["sizes=[50]"])
    assert run(overrides=["sizes=[50]"])
    assert asked == [(stored.with_name("student.safetensors"), [50])]
    assert said == ["a: done before", "a: timed", "a: done before"]
    found = json.loads(stored.read_text())
    assert found["speed"] == {"host": {"device": "a GPU"}, "rows": [{"atoms": 50, "step": 1e-3}]}
    assert found["errors"]["test"]["all"]["force_mae"] == 30.0


@pytest.mark.slow
def test_sweep_trains_evaluates_and_goes_on(data_folder, tmp_path, monkeypatch):
    (tmp_path / "base.yaml").write_text(f"""
data: {{files: [{data_folder / "sample.h5"}]}}
model: {{n_interactions: 1, n_basis: 4, cutoff: 3.0, crowding: false}}
optimizer: {{warmup_steps: 1, ema_decay: 0.5}}
device: cpu
batch_atoms: 1000
validate_every: 1000
""")
    (tmp_path / "sweep.yaml").write_text(f"""
base: base.yaml
output: {tmp_path / "out"}
minutes: 0.12
reserve: 6.0
sizes: []
points:
  a: {{model.n_channels: 4}}
  b: {{model.n_channels: 6, minutes: 50}}
""")
    monkeypatch.delenv("DATA", raising=False)
    said = []
    done = run_sweep(tmp_path / "sweep.yaml", max_minutes=1.0, echo=said.append)
    assert not done  # of b there was no time
    content = json.loads((tmp_path / "out/a/point.json").read_text())
    assert content["architecture"]["n_channels"] == 4
    assert content["errors"]["test"]["all"]["force_mae"] > 0
    assert content["weights"] > 50
    assert content["steps"] >= 1
    assert run_sweep(tmp_path / "sweep.yaml", only=["a"], echo=said.append)
    assert said[-1] == "a: done before"


@pytest.mark.parametrize("name", ["small", "default", "large", "sweep"])
def test_shapes_of_the_bundled_configurations_run_in_the_fused_kernels(name, predict, ethanol):
    """Fused and plain evaluation agree for every shape that is trained."""
    pytest.importorskip("warp")
    import numpy as np

    from openmm_mlffd.engine import FastEvaluator
    from openmm_mlffd.modelfile import StudentHeader, make_potential
    from openmm_mlffd.training.config import load_config
    from openmm_mlffd.training.header import architecture_of

    if name == "sweep":
        _, points = load_sweep(CONFIGS / "sweep.yaml")
        configs = [load_config(CONFIGS / "sweep_base.yaml", p.overrides) for p in points
                   if not p.name.endswith("-tail")]  # fmt: skip
    else:
        configs = [load_config(CONFIGS / f"{name}.yaml")]
    for config in configs:
        header = StudentHeader(
            name=name, architecture=architecture_of(config.model), elements=config.model.elements,
            references=[0.0] * len(config.model.elements), cutoff=config.model.cutoff,
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(1)
            potential = make_potential(header).double().eval()
        plain = predict(potential, ethanol)
        found = FastEvaluator(potential, ethanol.numbers, precision="double").predict(
            ethanol.positions
        )
        np.testing.assert_allclose(found.forces, plain.forces.detach(), rtol=0, atol=1e-9)
        assert float(found.energy - plain.energy) == pytest.approx(0.0, abs=1e-9)
        assert plain.forces.abs().max() > 1e-3


@pytest.mark.parametrize(
    "shape",
    [
        {"n_channels": 64, "n_interactions": 2, "cutoff": 4.5},
        {"n_channels": 192, "n_interactions": 4, "cutoff": 5.0},
        {"n_channels": 256, "n_interactions": 3, "cutoff": 6.0},
    ],
    ids=str,
)
def test_training_graph_of_the_bundled_shapes_is_that_of_autograd(
    make_student, make_structures, shape
):
    student = make_student(elements=["H", "C", "O"], references=[0.0] * 3, **shape).train()
    batch = training_batch(make_batch(make_structures(4), student, torch.device("cpu")), student)
    step = TrainingStep(student, copy.deepcopy(student), TrainConfig(data=None))
    arguments = (list(batch), count_totals(batch, 0.3).double(), torch.ones(len(TERMS)).double())
    terms, gradient = step.loss_gradient(step.weights, *arguments)
    traced = step.loss_gradient.traced(step.weights, *arguments)
    with torch.no_grad():
        same, written_out = traced([w.detach() for w in step.weights], *arguments)
    torch.testing.assert_close(same, terms, rtol=1e-10, atol=0)
    scale = max(float(g.abs().max()) for g in gradient)
    for a, b in zip(gradient, written_out, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10 * scale)
