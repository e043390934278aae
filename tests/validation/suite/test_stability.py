import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest

from openmm_mlffd import cli
from openmm_mlffd.training.teacher_worker import unknown_labels
from openmm_mlffd.validation.suite.models import python_system
from openmm_mlffd.validation.suite.plan import EnsembleRun, StabilityPlan, make_plan
from openmm_mlffd.validation.suite.stability import (
    BoxJudge,
    measure_stability,
    molecule_runs,
    read_xyz,
)
from openmm_mlffd.validation.suite.stability_section import result, run_stability, stability_checks
from openmm_mlffd.validation.suite.store import Clock, OutOfTime, read_arrays
from openmm_mlffd.validation.suite.systems import BOXES, UNSEEN, load_system

PLAN = StabilityPlan(picoseconds=0.4, box_picoseconds=0.0, molecules=("methanol",), boxes=(),
                     temperatures=(300.0,))  # fmt: skip


class Interrupted(Clock):
    """A clock that stops after so many looks."""

    def __init__(self, looks):
        super().__init__()
        self.looks = looks

    def check(self, seconds=0.0):
        self.looks -= 1
        if self.looks < 0:
            raise OutOfTime("stopped")


@pytest.fixture
def methanol(make_springs):
    """Springs between all atoms of methanol."""
    return make_springs(load_system("methanol").positions)


class Leaving:
    """A model in which the last atom is pushed away from the others with a constant force."""

    name, identity = "leaving", "leaving"

    def __init__(self, springs, push):
        self.springs, self.push = springs, push

    def label(self, batch, *, precision="single"):
        labels = unknown_labels(batch)
        for a, b in zip(batch.offsets[:-1], batch.offsets[1:], strict=True):
            x, rest = batch.positions[a:b], self.springs.rest
            away = x[-1] - x[:-1].mean(0)
            distance = np.linalg.norm(away)
            stretch = np.linalg.norm(x[:-1, None] - x[:-1], axis=-1) - rest[:-1, :-1]
            vectors = x[:-1, None] - x[:-1]
            r = np.linalg.norm(vectors, axis=-1) + np.eye(len(x) - 1)
            forces = np.zeros((len(x), 3))
            forces[:-1] = -20.0 * ((stretch / r)[:, :, None] * vectors).sum(1)
            forces[-1] += self.push * away / distance
            forces[:-1] -= self.push * away / distance / (len(x) - 1)
            labels.forces[a:b] = forces
        labels.energy[:] = self.energy
        return labels

    energy = 0.0

    def system(self, topology, *, precision="single"):
        return python_system(self, topology, precision)


def test_whole_molecules_pass(make_job, methanol):
    plan = replace(PLAN, picoseconds=3.0, temperatures=(200.0, 400.0))
    result_ = run_stability(make_job(methanol, stability=plan))
    assert result_.passed, result_.checks
    runs = result_.numbers["molecules"]
    assert list(runs) == ["methanol, 200 K", "methanol, 400 K"]
    assert all(run["picoseconds"] == pytest.approx(3.0) for run in runs.values())
    assert runs["methanol, 400 K"]["temperature"] > runs["methanol, 200 K"]["temperature"] + 80
    assert all(1.0 < run["longest_bond"] < 1.5 for run in runs.values())
    assert result(runs["methanol, 200 K"]) == "whole"


def test_broken_bond_counts_unless_the_teacher_breaks_it_too(make_job, methanol):
    leaving = Leaving(methanol, push=0.005)
    plan = replace(PLAN, picoseconds=2.0)
    kept = run_stability(make_job(leaving, stability=plan, teacher=methanol))
    (run,) = kept.numbers["molecules"].values()
    assert run["broken"][2] == "O1 – H5"
    assert run["teacher"]["keeps"]
    assert run["teacher"]["stretch"] == pytest.approx(1.0, abs=0.05)
    assert "the teacher keeps it" in result(run)
    assert not kept.passed
    # broken for half a picosecond before the run was ended; frames are on disk
    job = make_job(leaving, stability=plan)
    folder = job.store.folder / run["folder"]
    last = read_xyz(folder / run["suspicious_file"])
    start = load_system("methanol").positions
    assert np.linalg.norm(last[5] - last[1]) > 1.5 * np.linalg.norm(start[5] - start[1])
    assert 5 < run["suspicious_frames"] <= 20
    # without a teacher it counts; with one that breaks it, too, it does not
    (run,) = measure_stability(job)["molecules"].values()
    assert result(run) == "BROKE O1 – H5"
    same = run_stability(make_job(leaving, stability=plan, teacher=leaving))
    assert [c.value for c in same.checks[:2]] == [0.0, 0.0]


def test_explosions_are_told_from_broken_bonds(make_job, methanol):
    leaving = Leaving(methanol, push=0.0)
    leaving.energy = math.nan
    (run,) = measure_stability(make_job(leaving, stability=PLAN))["molecules"].values()
    assert "the energy is not finite" in run["failure"]
    assert run["broken"] is None
    checks = stability_checks({"molecules": {"methanol": run}, "boxes": {}})
    assert not checks[0].passed
    assert "methanol" in checks[0].name


def test_an_interrupted_run_is_that_of_one_that_was_not(make_job, methanol):
    def segments(job):
        return [read_arrays(p) for p in sorted(job.store.folder.glob("*/segment-*.npz"))]

    whole = make_job(methanol, stability=PLAN, folder="whole")
    expected = measure_stability(whole)
    with pytest.raises(OutOfTime):
        measure_stability(make_job(methanol, stability=PLAN, folder="parts", clock=Interrupted(4)))
    job = make_job(methanol, stability=PLAN, folder="parts")
    assert 0 < len(segments(job)) < len(segments(whole))
    found = measure_stability(job)
    assert found == expected
    for mine, theirs in zip(segments(job), segments(whole), strict=True):
        np.testing.assert_array_equal(mine["positions"], theirs["positions"])


def test_structures_of_the_suite_are_whole_and_run_in_one_evaluation(make_job, methanol):
    (runs,) = molecule_runs(make_job(methanol, stability=make_plan("full").stability))
    assert len(runs) == 2 * len(UNSEEN) == 40
    for run in runs:
        system = run.system
        lengths = np.linalg.norm(np.diff(system.positions[system.bonds], axis=1)[:, 0], axis=1)
        assert 0.9 < lengths.min() < lengths.max() < 1.95
        assert len(system.bonds) >= len(system.numbers) - 1
    for name in BOXES:
        box = load_system(name)
        assert box.cell is not None
        lengths = BoxJudge(box, 0.1).lengths(box.positions[None], box.cell[None])
        assert 0.9 < lengths.min() < lengths.max() < 1.95
        density = box.masses.sum() / np.linalg.det(box.cell) / 0.6022
        assert 0.85 < density < 1.15


def test_box_is_judged_by_bonds_that_stay_broken():
    box = load_system("water box")
    judge = BoxJudge(box, frame=0.1)
    positions = np.repeat(box.positions[None], 12, 0)
    cells = np.repeat(box.cell[None], 12, 0)
    parts = [{"positions": positions, "cell": cells}]
    assert judge(parts) == ""
    # moved by a box vector, nothing is broken
    positions[:, 1] += box.cell[0]
    assert judge(parts) == ""
    # for five frames, half a picosecond, a bond may be long
    positions[3:8, 2] += [2.0, 0.0, 0.0]
    assert judge(parts) == ""
    positions[8, 2] += [2.0, 0.0, 0.0]
    assert judge(parts) == "the bond H2 – O0 is broken"


def test_box_that_breaks_ends_early(make_job, methanol, tmp_path):
    from openmm_mlffd.validation.suite.runs import run_and_keep

    job = make_job(methanol)
    run = EnsembleRun(system="methanol", picoseconds=1.0, frame=0.005)
    seen = []

    def stop(parts):
        seen.append(len(parts))
        return "seen enough" if len(seen) == 2 else ""

    trajectory = run_and_keep(job, methanol, run, "x", stop=stop, segments=4)
    assert trajectory.failure == "after 0.5 ps: seen enough"
    assert len(trajectory.time) == 100
    assert seen == [1, 2]


def test_command_runs_given_structures_and_says_what_it_found(
    toy_file, tmp_path, monkeypatch, capsys
):
    from openmm_mlffd.validation.suite.systems import FOLDER

    monkeypatch.setattr(sys, "argv", [
        "mlffd", "stability", str(toy_file), "-o", str(tmp_path / "out"), "--picoseconds", "0.05",
        "--structure", str(FOLDER / "molecule-water.pdb"), "--temperature", "300",
        "--device", "cpu",
    ])  # fmt: skip
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    content = json.loads((tmp_path / "out" / "stability.json").read_text())
    # an untrained student may do anything; the exit code says what the checks say
    assert bool(exit_.value.code) == (not all(c["passed"] for c in content["checks"]))
    assert len(content["molecules"]) == 1
    assert content["boxes"] == {}
    assert "runs that exploded" in capsys.readouterr().out
