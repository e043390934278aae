import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from openmm_mlffd import cli
from openmm_mlffd.training.teacher_worker import unknown_labels
from openmm_mlffd.validation.suite.command import parse_charges
from openmm_mlffd.validation.suite.frames import read_xyz
from openmm_mlffd.validation.suite.models import python_system
from openmm_mlffd.validation.suite.plan import EnsembleRun, StabilityPlan, make_plan
from openmm_mlffd.validation.suite.stability import (
    BoxJudge,
    box_runs,
    measure_stability,
    molecule_runs,
    molecules_piece,
)
from openmm_mlffd.validation.suite.stability_section import result, run_stability, stability_checks
from openmm_mlffd.validation.suite.store import Clock, OutOfTime, read_arrays
from openmm_mlffd.validation.suite.systems import BOXES, FOLDER, UNSEEN, load_system

PLAN = StabilityPlan(picoseconds=0.4, box_picoseconds=0.0, molecules=("methanol",), boxes=(),
                     temperatures=(300.0,))  # fmt: skip


IONS = {"peptide EWLHC": -1, "peptide MKFQ": 1, "peptide WGSD": -1, "peptide YPRH": 1}


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

    def system(self, topology, *, precision="single", charge=0):
        return python_system(self, topology, precision, charge)


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


class Told:
    """A model that notes the total charges it is told, and refuses those that it does not know."""

    name, identity = "told", "told"

    def __init__(self, model, known):
        self.model, self.known, self.charges = model, known, set()

    def label(self, batch, *, precision="single"):
        self.charges |= set(batch.total_charge.tolist())
        labels = self.model.label(batch, precision=precision)
        labels.failure[~np.isin(batch.total_charge, self.known)] = "no such charge"
        return labels

    def system(self, topology, *, precision="single", charge=0):
        return python_system(self, topology, precision, charge)


def settings_of(job, name):
    (path,) = job.store.folder.glob(f"{name}*/settings.json")
    return json.loads(path.read_text())


@pytest.fixture
def methanol_file(tmp_path):
    """Methanol in a file that says nothing of charges."""
    lines = (FOLDER / "molecule-methanol.pdb").read_text().splitlines()
    path = tmp_path / "methanol.pdb"
    atoms = ("ATOM", "HETATM")
    path.write_text("\n".join(x[:78] if x.startswith(atoms) else x for x in lines) + "\n")
    return path


def test_teacher_is_told_the_charge(make_job, methanol, methanol_file):
    name = str(methanol_file)
    plan = replace(PLAN, picoseconds=2.0, molecules=(name,), charges={name: -1})
    student, teacher = Leaving(methanol, push=0.005), Told(methanol, known=[-1])
    job = make_job(student, stability=plan, teacher=teacher)
    (run,) = measure_stability(job)["molecules"].values()
    assert run["teacher"]["keeps"]
    assert teacher.charges == {-1}
    assert settings_of(job, "teacher-on")["charges"] == [-1]


def test_pieces_of_neutral_molecules_are_found_again(make_job, methanol, methanol_file, toy):
    plan = replace(PLAN, picoseconds=2.0, molecules=(str(methanol_file),))
    student, teacher = Leaving(methanol, push=0.005), Told(methanol, known=[0])
    job = make_job(student, stability=plan, teacher=teacher)
    measure_stability(job)
    assert teacher.charges == {0}
    asked, ran = settings_of(job, "teacher-on"), settings_of(job, "stability-of")
    common = {"model", "name", "version"}
    assert set(asked) - common == {"teacher", "positions", "closed"}
    kept = {"runs", "positions", "picoseconds", "timestep", "look", "stretched", "held"}
    assert set(ran) - common == kept
    # a student is told of no charge, so that its runs are the same whatever it is
    ions = replace(PLAN, picoseconds=0.05, molecules=("peptide WGSD",))
    job = make_job(toy, stability=ions, folder="ions")
    molecules_piece(job, 0, molecule_runs(job)[0])
    assert set(settings_of(job, "stability-of")) - common == kept


def test_bond_that_the_teacher_refuses_to_judge_counts(make_job, methanol):
    teacher = Told(methanol, known=[1])
    job = make_job(
        Leaving(methanol, push=0.005), stability=replace(PLAN, picoseconds=2.0), teacher=teacher
    )
    found = run_stability(job)
    (run,) = found.numbers["molecules"].values()
    assert "no such charge" in result(run)
    assert not found.passed
    # it is not kept: a teacher that answers is asked again
    teacher.known = [0]
    (run,) = measure_stability(job)["molecules"].values()
    assert run["teacher"]["keeps"]


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
        assert (system.numbers.sum() - system.charge) % 2 == 0
        assert system.charge == IONS.get(system.name, 0)
    for name in BOXES:
        box = load_system(name)
        assert box.cell is not None
        assert box.charge == 0
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


def test_charge_of_a_file(methanol_file):
    assert load_system(str(methanol_file)).charge == 0
    ion = load_system(str(methanol_file), charge=-1)
    assert ion.charge == ion.structure.charge == -1
    said = str(FOLDER / "unseen-peptide-WGSD.pdb")
    assert load_system(said).charge == load_system(said, charge=-1).charge == -1
    with pytest.raises(ValueError, match=r"of \+1 e was given.* add up to -1 e"):
        load_system(said, charge=1)


def test_charge_of_a_repeated_box(tmp_path):
    path = tmp_path / "box.pdb"
    lines = (FOLDER / "molecule-methanol.pdb").read_text().replace("O0+", "O1-").splitlines()
    box = "CRYST1   20.000   20.000   20.000  90.00  90.00  90.00 P 1           1 "
    path.write_text("\n".join([box, *(x for x in lines if "CRYST1" not in x)]) + "\n")
    assert load_system(str(path), (2, 1, 1)).charge == -2


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["methanol.pdb"], "given as FILE=CHARGE"),
        (["methanol.pdb=-0.5"], "whole number, got 'methanol.pdb=-0.5'"),
        (["ethanol.pdb=1"], "no --structure is called so; there is .*methanol.pdb"),
        (["methanol.pdb=1", "methanol.pdb=-1"], "was given a charge before"),
        (["peptide.pdb=1"], "add up to -1 e"),
    ],
)
def test_charges_that_make_no_sense_are_errors(
    toy_file, methanol_file, tmp_path, monkeypatch, pairs, message
):
    monkeypatch.chdir(tmp_path)
    peptide = (FOLDER / "unseen-peptide-WGSD.pdb").read_text()
    (tmp_path / "peptide.pdb").write_text(peptide)
    arguments = [x for pair in pairs for x in ("--charge", pair)]
    command = ["stability", str(toy_file), "-o", "out", "--structure", methanol_file.name,
               "--structure", "peptide.pdb", "--device", "cpu"]  # fmt: skip
    outcome = CliRunner().invoke(cli.app, [*command, *arguments])
    assert outcome.exit_code == 1
    assert re.search(message, str(outcome.exception))
    assert not Path("out").exists()  # it is said before anything is done


def test_charges_on_the_command_line_reach_the_runs(toy_file, methanol_file, tmp_path, monkeypatch):
    jobs = []

    def measure(job):
        jobs.append(job)
        raise OutOfTime("seen")

    monkeypatch.setattr("openmm_mlffd.validation.suite.command.measure_stability", measure)
    box = FOLDER / "water-64.pdb"
    outcome = CliRunner().invoke(cli.app, [
        "stability", str(toy_file), "-o", str(tmp_path / "out"), "--device", "cpu",
        "--structure", str(methanol_file), "--charge", f"{methanol_file}=-1",
        "--structure", str(box), "--charge", f"{box}=1",
    ])  # fmt: skip
    assert outcome.exit_code == 3, outcome.output
    (runs,) = molecule_runs(jobs[0])
    assert [run.system.charge for run in runs] == [-1, -1]
    assert [run.charge for run in box_runs(jobs[0])] == [1]


def test_charges_are_named_as_the_structures_are(methanol_file):
    structures = [methanol_file, Path("folder/a=b.pdb")]
    found = parse_charges([f"{methanol_file}=+2", "./folder/a=b.pdb=-1"], structures)
    assert found == {str(methanol_file): 2, "folder/a=b.pdb": -1}
