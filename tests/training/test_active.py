import json
import multiprocessing
import os
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.optimize import FIRE
from tqdm import tqdm

from openmm_mlffd import cli
from openmm_mlffd.modelfile import load_student, read_header
from openmm_mlffd.training.active.config import load_active
from openmm_mlffd.training.active.curate import choose, known_fingerprints, repeats_for
from openmm_mlffd.training.active.explore import Students, batches_of, explore
from openmm_mlffd.training.active.loop import run_active
from openmm_mlffd.training.active.starts import HeldOut, Starts, read_starts
from openmm_mlffd.training.config import (
    ConfigError,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from openmm_mlffd.training.datasets.survey import fingerprints
from openmm_mlffd.training.hdf5 import Dataset, DatasetWriter, SplitRule, concatenate
from openmm_mlffd.training.label import TeacherChoice, label
from openmm_mlffd.training.novelty import fit_novelty
from openmm_mlffd.training.sources import Frame, open_source, pack
from openmm_mlffd.training.train import Trainer

TOYS = Path(__file__).parent
TEACHER = "ase:toy_calculator:Morse"
RULE = SplitRule(val=0.2, test=0.15)


def clusters(count, width):
    """Relaxed clusters of three to five atoms, displaced by so much [Å]."""
    sys.path.insert(0, str(TOYS))
    try:
        from toy_calculator import Morse
    finally:
        sys.path.remove(str(TOYS))
    rng = np.random.default_rng(0)
    for i in range(count):
        atoms = Atoms(rng.choice([1, 6, 8], 3 + i % 3), calculator=Morse())
        atoms.positions = rng.normal(scale=1.2, size=(len(atoms), 3))
        FIRE(atoms, logfile=None).run(fmax=0.2, steps=200)
        for _ in range(4):
            moved = atoms.positions + width * rng.normal(size=(len(atoms), 3))
            yield f"cluster {i}", atoms.numbers.copy(), moved


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Labelled clusters, and a student that was trained on them for a moment."""
    folder = tmp_path_factory.mktemp("world")
    old = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = str(TOYS)
    try:
        frames = list(clusters(30, 0.05))
        packed = [pack(Frame(z, x, 0, name, "clusters"), ["clusters"]) for name, z, x in frames]
        with DatasetWriter(
            folder / "bare.h5", teacher=None, subsets=["clusters"], split=RULE
        ) as writer:
            writer.append(concatenate(packed), [name for name, *_ in frames])
        choice = TeacherChoice(name=TEACHER)
        label(open_source(folder / "bare.h5"), folder / "labels", choice, progress=False)
    finally:
        os.environ["PYTHONPATH"] = old
    data = folder / "labels" / "dataset.h5"
    trainer = Trainer(
        TrainConfig(
            output=str(folder / "run"), data=DataConfig(files=[str(data)]),
            model=ModelConfig(
                elements=["H", "C", "O"], n_channels=16, n_interactions=1, n_basis=8, cutoff=4.5
            ),
            optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=10, ema_decay=0.95),
            epochs=40, batch_atoms=60, device="cpu",
        )
    )  # fmt: skip
    student = trainer.run()
    fit_novelty(student, [data], student.with_suffix(".novelty"), strict=False)
    return folder, data, student


@pytest.fixture
def write_config(world, tmp_path):
    """A configuration of a loop on the clusters; lines are added to it."""
    folder, data, student = world

    def write(*lines, name="active.yaml"):
        text = f"""
        student: {student}
        data: [{data}]
        output: {tmp_path / "loop"}
        rounds: 2
        device: cpu
        explore:
          starts: [{folder / "bare.h5"}]
          max_starts: 8
          temperatures: [300.0, 6000.0]
          stretched: 1.25
          picoseconds: 0.04
          look: 4
          spacing: 0.008
          batch_atoms: 24
        curate: {{max_frames: 10}}
        teacher: {{name: "{TEACHER}", shard_size: 4}}
        training:
          share: 0.3
          epochs: 8
          batch_atoms: 120
          checkpoint_every: 5
          loss: {{energy: 5.0}}
          optimizer: {{learning_rate: 1.0e-3, warmup_steps: 5, ema_decay: 0.95}}
        """
        lines = [line[8:] for line in text.splitlines()] + list(lines)
        (tmp_path / name).write_text("\n".join(lines))
        return tmp_path / name

    return write


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(TOYS))


def training_groups(path, subset=None):
    with Dataset(path) as dataset:
        names = dataset.group_names()
        mine = dataset.in_split("train")
        everything = dataset.read(0, len(dataset))
        if subset is not None:
            mine = [i for i in mine if dataset.subsets[dataset.subset[i]] == subset]
        return {names[everything.group[i]] for i in mine}


def test_loop_labels_what_is_unknown_and_the_student_learns_it(world, write_config, tmp_path):
    config = load_active(write_config())
    said = []
    outcome = run_active(config, echo=said.append)
    assert outcome.finished
    assert len(outcome.rounds) == 2
    first = outcome.rounds[0]
    assert first["labelled"] == first["explored"]["frames"] > 3
    assert first["explored"]["failures"], "at 6,000 K some clusters break"
    errors = first["errors"]
    assert errors["after"]["new"]["force_mae"] < errors["before"]["new"]["force_mae"]
    # each round starts from the student of the one before, if that was accepted
    if first["accepted"]:
        assert outcome.rounds[1]["begun_with"] != first["begun_with"]
    assert read_header(outcome.student).training["initial"]["sha256"]
    load_student(outcome.student)
    # nothing is labelled that has a label
    files = [tmp_path / f"loop/round-00{k}/labels/dataset.h5" for k in (1, 2)]
    assert len(known_fingerprints([world[1], *files])) == 120 + sum(
        r["labelled"] for r in outcome.rounds
    )
    assert "| held out, before |" in (tmp_path / "loop/round-001/round.md").read_text()
    assert (tmp_path / "loop/rounds.md").read_text().count("\n| ") == 2
    # given again, nothing is done again
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "loop").rglob("*.h5")}
    again = run_active(config, echo=said.append)
    assert again.rounds == outcome.rounds
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "loop").rglob("*.h5")}

    # new frames of held-out molecules never enter training
    left_out = outcome.rounds[0]["explored"]["starts_left_out"]
    held = {f"cluster {i}" for i in range(30)} - training_groups(world[1])
    assert sum(left_out.values()) == 4 * len(held) > 0
    assert training_groups(tmp_path / "loop/round-001/train.h5", "active")
    assert not training_groups(tmp_path / "loop/round-001/train.h5") & held


def test_molecule_of_the_test_split_is_known_by_its_smiles_and_by_its_composition():
    held = HeldOut(
        SplitRule(0.0, 0.0), "teacher", frozenset({"CCO", "OCC"}), frozenset({"C2 H6 O1"})
    )
    ethanol = np.array([6, 6, 8, 1, 1, 1, 1, 1, 1], "u1")
    assert held.reason("C(O)C", ethanol)  # another SMILES of it
    assert held.reason("C2 H6 O1", ethanol)  # a file that does not say which isomer it is
    assert not held.reason("COC", ethanol)
    assert not held.reason("C1 H4", ethanol[:5])


def test_nothing_to_start_from_is_said(world):
    held = HeldOut.of([str(world[1])])
    with pytest.raises(ConfigError, match=r"nothing to start from in .*elements that the student"):
        read_starts([str(world[0] / "bare.h5")], held, [7])


def test_committee_collects_where_its_members_disagree(world, write_config, tmp_path):
    data = world[1]
    other = Trainer(
        TrainConfig(
            output=str(tmp_path / "other"), data=DataConfig(files=[str(data)]), seed=5,
            model=ModelConfig(
                elements=["H", "C", "O"], n_channels=16, n_interactions=1, n_basis=8, cutoff=4.5
            ),
            epochs=5, batch_atoms=120, device="cpu",
        )
    ).run()  # fmt: skip
    overrides = ["rounds=1", f"explore.committee=[{other}]", "explore.threshold=0.05"]
    outcome = run_active(load_active(write_config(), overrides), echo=lambda _: None)
    (result,) = outcome.rounds
    assert result["explored"]["threshold"] == 0.05
    assert result["explored"]["largest_score"] > 0.05
    assert len(result["begun_with"]) == len(result["trained"]) == 2
    assert (tmp_path / "loop/round-001/student-1.safetensors").exists()


def test_boxes_are_explored_and_keep_their_box(world, write_config):
    cell = 7.0 * np.eye(3)
    _, numbers, positions = next(clusters(1, 0.02))
    box = pack(
        Frame(numbers, positions + 3.0, 0, "box", "boxes", cell, (True, True, True)), ["boxes"]
    )
    free = pack(Frame(numbers, positions, 0, "free", "boxes"), ["boxes"])
    starts = Starts(concatenate([free, box]), ["free", "box"], {})
    config = load_active(write_config(), ["explore.threshold=0.0"])
    students = Students([world[2]], "cpu")
    (first, second) = batches_of(starts.structures, [0, 1], 100)
    assert (first, second) == ([0], [1])  # boxes are not run with others
    rng = np.random.default_rng(0)
    frames = explore(starts.structures, second, config.explore, students, rng, lambda _: None)
    assert len(frames.time) > 2
    choice = choose([frames], starts, config.curate, set())
    assert choice.structures.pbc.all()
    np.testing.assert_array_equal(choice.structures.cell[0], cell)
    assert set(choice.groups) == {"box"}
    # the same again is known, and is not labelled twice
    assert choose([frames], starts, config.curate, set(fingerprints(choice.structures))) is None


def test_labels_of_another_teacher_are_refused(world, write_config, tmp_path):
    with (
        Dataset(world[1]) as dataset,
        DatasetWriter(
            tmp_path / "other.h5", teacher="another", subsets=dataset.subsets, split=RULE
        ) as writer,
    ):
        everything, names = dataset.read(0, len(dataset)), dataset.group_names()
        writer.append(everything, [names[g] for g in everything.group])
    config = load_active(write_config(), ["rounds=1", f"data=[{tmp_path / 'other.h5'}]"])
    with pytest.raises(ConfigError, match="the data have labels of 'another', the new ones"):
        run_active(config, echo=lambda _: None)
    assert not list(Path(config.output).rglob("batch-*.npz"))  # before anything was explored


def test_student_that_got_worse_is_not_accepted(write_config, tmp_path, world):
    config = load_active(write_config(), ["rounds=1", "accept.tolerance=-0.9"])
    stopped = run_active(config, max_minutes=0.0, echo=lambda _: None)
    assert (stopped.finished, stopped.rounds) == (False, [])
    outcome = run_active(config, echo=lambda _: None)
    assert outcome.finished
    assert not outcome.rounds[0]["accepted"]
    assert outcome.student == world[2]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("explore.temperature=[300]", "did you mean 'explore.temperatures'"),
        ("training.share=1.0", "training.share is a share between 0 and 1"),
        ("accept.split=train", "accept.split must be val or test"),
        ("accept.terms=[speed]", "accept.terms must be of force_mae"),
        ("explore.pull=1.5", "explore.pull is a share from 0 to 1, got 1.5"),
        ("explore.picoseconds=0", "explore.picoseconds must be positive"),
    ],
)
def test_wrong_setting_is_refused(write_config, override, message):
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        load_active(write_config(), [override])


def test_labels_only_ends_before_the_training_and_can_be_gone_on_with(write_config, tmp_path):
    config, said = load_active(write_config(), ["rounds=1"]), []
    outcome = run_active(config, labels_only=True, echo=said.append)
    labels = tmp_path / "loop/round-001/labels/dataset.h5"
    assert outcome.finished
    assert not outcome.rounds
    assert said[-1] == f"{labels}: labels of round 1; no training was wanted"
    with Dataset(labels) as dataset:
        assert len(dataset) > 3
    before = labels.stat().st_mtime_ns
    assert not (tmp_path / "loop/round-001/train-0").exists()
    assert len(run_active(config, echo=said.append).rounds) == 1
    assert labels.stat().st_mtime_ns == before


def test_other_settings_in_the_same_folder_are_refused(write_config):
    run_active(load_active(write_config()), max_minutes=0.0, echo=lambda _: None)
    with pytest.raises(ConfigError, match="was begun with other settings for seed"):
        run_active(load_active(write_config(), ["seed=1"]), echo=lambda _: None)


@pytest.mark.parametrize(
    ("n_old", "n_new", "repeats"), [(800, 200, 1), (800, 100, 2), (800, 1, 20), (0, 5, 1)]
)
def test_new_frames_are_repeated_to_be_their_share(write_config, n_old, n_new, repeats):
    config = load_active(write_config(), ["training.share=0.2"]).training
    assert repeats_for(n_old, n_new, config) == repeats


def run_alone(config):
    """As in a process of its own: without the lock of progress bars of one that was killed."""
    tqdm.set_lock(threading.RLock())
    run_active(config)


def test_killed_at_each_stage_the_same_command_goes_on(write_config, tmp_path, monkeypatch):
    log = tmp_path / "labelled.txt"
    monkeypatch.setenv("TOY_LOG", str(log))
    path = write_config()
    place = tmp_path / "loop/round-001"
    stages = ("explore/batch-0000.npz", "curate.json", "labels/shard-00000.h5",
              "train-0/checkpoint.pt", "trained-0.json")  # fmt: skip
    kills = 0
    for stage in stages:
        # forked, since an import takes longer than a stage
        process = multiprocessing.get_context("fork").Process(
            target=run_alone, args=(load_active(path, ["rounds=1"]),)
        )
        process.start()
        while process.is_alive() and not (place / stage).exists():
            time.sleep(0.005)
        if process.is_alive():
            process.kill()
            kills += 1
        process.join()
        assert (place / stage).exists()
    assert kills >= 4
    assert not (place / "round.json").exists()
    monkeypatch.setattr(sys, "argv", ["mlffd", "active", str(path), "rounds=1"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert not exit_.value.code
    result = json.loads((place / "round.json").read_text())
    labels = log.read_text().split()
    assert result["labelled"] == len(set(labels))
    # at most a shard that was being listed, and one that was at work
    assert len(labels) - len(set(labels)) <= 2 * 4
    # as if it had never been ended
    other = load_active(path, ["rounds=1", f"output={tmp_path / 'whole'}"])
    whole = run_active(other, echo=lambda _: None).rounds[0]
    assert whole["explored"] == result["explored"]
    assert whole["errors"] == result["errors"]
