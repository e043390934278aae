import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import psutil
import pytest
from ase import Atoms
from ase.io import write

from openmm_mlffd import cli
from openmm_mlffd.training.hdf5 import Dataset, Structures, take
from openmm_mlffd.training.label import LabelError, Limits, TeacherChoice, format_summary, label
from openmm_mlffd.training.parallel import Workers
from openmm_mlffd.training.sources import FirstOf, SourceError, open_source
from openmm_mlffd.training.teachers import TeacherError

CRASH, RAISE, NAN, HOT, PUSHED = 2, 18, 36, 54, 86  # what toy_calculator.py cannot stand
FULL_DISK = """
import resource, signal, sys
from openmm_mlffd.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
main()
"""


@pytest.fixture
def write_frames(tmp_path):
    """Write small structures as extended XYZ; every k-th holds an atom of some element."""

    def write_(n=24, *, danger=None, every=5, name="frames.xyz"):
        rng = np.random.default_rng(n)
        frames = []
        for i in range(n):
            size = 2 + i % 4
            numbers = rng.choice([1, 6, 8], size)
            if danger is not None and i % every == 2:
                numbers[0] = danger
            frames.append(Atoms(numbers, rng.normal(size=(size, 3)), info={"group": f"g{i % 6}"}))
        write(tmp_path / name, frames, format="extxyz")
        return tmp_path / name

    return write_


def contents(path):
    with Dataset(path) as dataset:
        return dataset.read(0, len(dataset)), dataset.group_names(), dataset.attributes


def assert_same_files(found, expected):
    (ours, our_groups, our_attributes), (theirs, their_groups, their_attributes) = found, expected
    assert our_groups == their_groups
    assert our_attributes == their_attributes
    for name in Structures._fields:
        assert getattr(ours, name).tobytes() == getattr(theirs, name).tobytes(), name


def command(source, folder, teacher, *options):
    arguments = ["label", source, "-o", folder, "--teacher", teacher, *options]
    return [sys.executable, "-m", "openmm_mlffd.cli", *map(str, arguments)]


def run(source, folder, teacher, **settings):
    limits = settings.pop("limits", None)
    shard_size = settings.pop("shard_size", 10)
    workers = settings.pop("workers", None)
    choice = TeacherChoice(name=teacher, **settings)
    return label(
        open_source(source),
        folder,
        choice,
        limits=limits,
        shard_size=shard_size,
        workers=workers,
        progress=False,
    )


# labels


def test_every_structure_is_labelled_and_keeps_its_place(toy_path, write_frames, tmp_path):
    summary = run(write_frames(), tmp_path / "out", toy_path)
    assert summary[:4] == (tmp_path / "out" / "dataset.h5", 24, [], 24)
    assert summary.starting > 0
    found, groups, attributes = contents(summary.dataset)
    source, names = open_source(tmp_path / "frames.xyz").read(0, 24)
    np.testing.assert_array_equal(found.positions, source.positions)
    assert [groups[g] for g in found.group] == names
    assert attributes["teacher"].startswith("ASE calculator toy_calculator:Toy()")
    for i in range(24):
        x = found.positions[found.offsets[i] : found.offsets[i + 1]].astype(float)
        energy = 0.5 * len(x) * ((x - x.mean(0)) ** 2).sum()
        assert found.energy[i] == pytest.approx(energy, abs=1e-12)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [s["count"] for s in manifest["shards"].values()] == [10, 10, 4]


def test_dataset_is_labelled_anew_with_its_groups_and_split(toy_path, data_folder, tmp_path):
    sample = data_folder / "sample.h5"
    options = {"charge_key": "charge"}
    limits = Limits(max_force=1e4, max_net_force=1.0)
    summary = run(sample, tmp_path / "out", toy_path, options=options, limits=limits, shard_size=50)
    assert summary.labelled == 104
    ours, our_groups, our_attributes = contents(summary.dataset)
    theirs, their_groups, their_attributes = contents(sample)
    assert our_groups == their_groups
    for name in ("offsets", "positions", "cell", "pbc", "total_charge", "group", "split", "subset"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)
    assert our_attributes.pop("teacher") != their_attributes.pop("teacher")
    assert our_attributes == their_attributes
    assert abs(ours.energy - theirs.energy).min() > 1.0
    np.testing.assert_array_equal(np.isnan(ours.stress), np.isnan(theirs.stress))


def test_so3lr_relabels_the_sample(teacher_python, data_folder, tmp_path):
    summary = run(data_folder / "sample.h5", tmp_path / "out", "so3lr", python=teacher_python)
    assert summary.failures == []
    (ours, _, our_attributes), (theirs, _, their_attributes) = (
        contents(summary.dataset),
        contents(data_folder / "sample.h5"),
    )
    assert our_attributes == their_attributes
    np.testing.assert_allclose(ours.forces, theirs.forces, rtol=0, atol=1e-3)
    np.testing.assert_allclose(ours.energy, theirs.energy, rtol=0, atol=1e-4)


# failures


@pytest.mark.parametrize(
    ("danger", "reason"),
    [
        (CRASH, "the teacher's process was ended by SIGSEGV"),
        (RAISE, "ArithmeticError: no convergence"),
        (NAN, "forces are not finite"),
        (HOT, "eV/Å, above 100"),
        (PUSHED, "net force of 1.000 eV/Å, above 0.1"),
    ],
)
def test_bad_structures_are_listed_and_the_others_kept(
    toy_path, write_frames, tmp_path, danger, reason
):
    good = run(write_frames(22, name="good.xyz"), tmp_path / "good", toy_path)
    bad = run(write_frames(22, danger=danger), tmp_path / "bad", toy_path)
    assert [i for i, _ in bad.failures] == [2, 7, 12, 17]
    assert all(reason in r for _, r in bad.failures)
    assert bad.labelled == 18
    assert "4 failed (manifest.json lists them)" in format_summary(bad)
    kept = [i for i in range(22) if i % 5 != 2]
    found, expected = contents(bad.dataset)[0], contents(good.dataset)[0]
    np.testing.assert_array_equal(np.diff(found.offsets), np.diff(expected.offsets)[kept])
    # a rerun finds the failures in the manifest, without a teacher
    again = run(tmp_path / "frames.xyz", tmp_path / "bad", toy_path, python="/no/python")
    assert again == bad._replace(new=0, starting=0.0)


def test_run_without_any_label_says_so(toy_path, write_frames, tmp_path):
    summary = run(write_frames(6, danger=NAN, every=1), tmp_path / "out", toy_path)
    assert summary.labelled == 6  # i % 1 is never 2: none is dangerous
    frames = write_frames(3, danger=NAN, every=3, name="three.xyz")
    limits = Limits(max_force=1e-9)
    summary = run(frames, tmp_path / "none", toy_path, limits=limits)
    assert summary.dataset is None
    assert format_summary(summary).startswith("nothing was written: 0 structures labelled")


@pytest.mark.parametrize("n", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_teacher_that_crashes_on_every_fiftieth_structure_loses_no_other(
    toy_path, write_frames, tmp_path, n
):
    summary = run(
        write_frames(n, danger=CRASH, every=50), tmp_path / "out", toy_path, shard_size=40
    )
    assert [i for i, _ in summary.failures] == list(range(2, n, 50))
    assert all("SIGSEGV" in reason for _, reason in summary.failures)
    assert summary.labelled == n - n // 50
    found, _, _ = contents(summary.dataset)
    source, _ = open_source(tmp_path / "frames.xyz").read(0, n)
    keep = np.array([i for i in range(n) if i % 50 != 2])
    np.testing.assert_array_equal(found.positions, take(source, keep).positions)


# on a cluster


def kill_a_worker(folder, killed):
    """Once there are two shards, end a process of the cluster."""
    while len(list(folder.glob("shard-*"))) < 2:
        time.sleep(0.01)
    for child in psutil.Process().children(recursive=True):
        if "spawn_main" in " ".join(child.cmdline()):
            child.kill()
            killed.append(child.pid)
            return


def test_worker_of_a_cluster_that_is_killed_loses_nothing(toy_path, write_frames, tmp_path):
    frames, killed = write_frames(60, danger=NAN, every=20), []
    expected = run(frames, tmp_path / "here", toy_path, shard_size=5)
    thread = threading.Thread(target=kill_a_worker, args=(tmp_path / "there", killed), daemon=True)
    (tmp_path / "there").mkdir()
    thread.start()
    summary = run(
        frames,
        tmp_path / "there",
        toy_path,
        shard_size=5,
        workers=Workers(cluster="local:2"),
        options={"pause": 0.02},
    )
    thread.join(10)
    assert len(killed) == 1
    assert summary.failures == expected.failures
    ours, theirs = contents(summary.dataset), contents(expected.dataset)
    assert "pause=0.02" in ours[2].pop("teacher")
    theirs[2].pop("teacher")
    assert_same_files(ours, theirs)


@pytest.mark.parametrize(
    ("cluster", "message"),
    [
        ("local", "the number of workers is missing"),
        ("local:0", "the number of workers is missing"),
        ("pbs:3", "no cluster is called 'pbs:3'; write local:4"),
        ("ssh:", "names no host"),
    ],
)
def test_cluster_that_is_none_is_refused(toy_path, write_frames, tmp_path, cluster, message):
    with pytest.raises(ValueError, match=message):
        run(write_frames(4), tmp_path / "out", toy_path, workers=Workers(cluster=cluster))


def test_several_teachers_give_the_labels_of_one(toy_path, write_frames, tmp_path):
    frames = write_frames(40, danger=RAISE, every=10)
    one = run(frames, tmp_path / "one", toy_path, shard_size=6)
    two = run(frames, tmp_path / "two", toy_path, shard_size=6, workers=Workers(count=2))
    assert one.failures == two.failures
    assert_same_files(contents(one.dataset), contents(two.dataset))


# going on


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_run_killed_at_any_moment_goes_on_to_the_same_result(
    toy_path, write_frames, tmp_path, kills
):
    frames = write_frames(15 * kills, danger=CRASH, every=40)
    options = ("--shard-size", 3, "--teacher-option", "pause=0.01")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(frames, whole, toy_path, *options), check=True, capture_output=True)
    rng = np.random.default_rng(kills)
    progress = []
    for _ in range(kills):
        process = subprocess.Popen(
            command(frames, killed, toy_path, *options),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        # some moments are in the start, most are while shards are written
        deadline, before = time.monotonic() + 60, len(list(killed.glob("shard-*")))
        while time.monotonic() < deadline and process.poll() is None:
            if len(list(killed.glob("shard-*"))) > before:
                break
            time.sleep(0.002)
        time.sleep(rng.uniform(0.0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.wait()
        progress.append(len(list(killed.glob("shard-*"))))
    assert 0 < progress[0] < 5 * kills
    subprocess.run(command(frames, killed, toy_path, *options), check=True, capture_output=True)
    assert_same_files(contents(killed / "dataset.h5"), contents(whole / "dataset.h5"))
    ours, theirs = (json.loads((f / "manifest.json").read_text()) for f in (killed, whole))
    assert ours == theirs
    assert not [f for f in killed.iterdir() if f.name not in {g.name for g in whole.iterdir()}]


def test_whole_shards_are_not_labelled_again(toy_path, write_frames, tmp_path):
    frames = write_frames()
    run(frames, tmp_path / "out", toy_path)
    before = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "out").glob("*.h5")}
    run(frames, tmp_path / "out", toy_path, python="/no/python")
    assert {f.name: f.stat().st_mtime_ns for f in (tmp_path / "out").glob("*.h5")} == before


@pytest.mark.parametrize("damage", ["cut", "flip", "remove", "remove dataset"])
def test_damaged_shard_is_labelled_again(toy_path, write_frames, tmp_path, damage):
    frames, out = write_frames(), tmp_path / "out"
    expected = contents(run(frames, out, toy_path).dataset)
    shard = out / ("dataset.h5" if damage == "remove dataset" else "shard-00001.h5")
    before = shard.read_bytes()
    if damage == "cut":
        shard.write_bytes(before[:5000])
    elif damage == "flip":
        shard.write_bytes(before[:9000] + bytes([before[9000] ^ 1]) + before[9001:])
    else:
        shard.unlink()
    summary = run(frames, out, toy_path)
    assert shard.read_bytes() == before
    assert_same_files(contents(summary.dataset), expected)


@pytest.mark.skipif(os.name != "posix", reason="limits of the size of files are POSIX")
@pytest.mark.parametrize(
    ("limit", "file"), [(100, "manifest.json"), (20_000, "shard-00000.h5"), (83_000, "dataset.h5")]
)
def test_full_disk_is_an_error_that_loses_nothing(toy_path, write_frames, tmp_path, limit, file):
    frames, out = write_frames(40), tmp_path / "out"
    arguments = command(frames, out, toy_path, "--shard-size", 10)[3:]
    failed = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(limit), *arguments], capture_output=True, text=True
    )
    assert failed.returncode == 1
    assert failed.stderr.startswith(f"mlffd: {out / file}: cannot be written")
    assert failed.stderr.count("\n") == 1
    assert not (out / "dataset.h5").exists()
    assert len(list(out.glob("shard-*"))) == (4 if file == "dataset.h5" else 0)
    summary = run(frames, out, toy_path)
    expected = run(frames, tmp_path / "other", toy_path)
    assert_same_files(contents(summary.dataset), contents(expected.dataset))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": "ase:toy_calculator:wrong"}, "was labelled with teacher ase:toy_calculator:T"),
        ({"options": {"stiffness": 2.0}}, r"was labelled with options \{\}, not \{'stiffness'"),
        ({"limits": Limits(max_force=5.0)}, "was labelled with limits"),
        ({"shard_size": 5}, "was labelled with shard_size 10, not 5"),
    ],
)
def test_folder_of_another_run_is_refused(toy_path, write_frames, tmp_path, change, message):
    frames = write_frames()
    run(frames, tmp_path / "out", toy_path)
    settings = {"teacher": toy_path} | change
    with pytest.raises(LabelError, match=message):
        run(frames, tmp_path / "out", settings.pop("teacher"), **settings)


def test_folder_of_other_structures_or_files_is_refused(toy_path, write_frames, tmp_path):
    run(write_frames(), tmp_path / "out", toy_path)
    with pytest.raises(LabelError, match="was labelled with input"):
        run(write_frames(23), tmp_path / "out", toy_path)
    with pytest.raises(LabelError, match=r"but no manifest\.json"):
        run(write_frames(), tmp_path, toy_path)
    (tmp_path / "out" / "manifest.json").write_text("{")
    with pytest.raises(LabelError, match="is damaged"):
        run(write_frames(), tmp_path / "out", toy_path)


def test_teacher_that_changed_its_version_is_refused(toy_path, write_frames, tmp_path):
    frames, out = write_frames(), tmp_path / "out"
    run(frames, out, toy_path)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["description"] = "an older one"
    (out / "manifest.json").write_text(json.dumps(manifest))
    (out / "shard-00002.h5").unlink()
    with pytest.raises(LabelError, match="was labelled by 'an older one', which now is"):
        run(frames, out, toy_path)


def test_folder_is_for_one_process_at_a_time(toy_path, write_frames, tmp_path):
    fcntl = pytest.importorskip("fcntl", reason="no locks on this system")
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(LabelError, match="another process is labelling here"):
            run(write_frames(), tmp_path / "out", toy_path)


def test_teacher_that_cannot_start_leaves_a_folder_to_go_on_with(toy_path, write_frames, tmp_path):
    frames = write_frames()
    with pytest.raises(TeacherError, match="cannot be started"):
        run(frames, tmp_path / "out", toy_path, python="/no/python")
    assert run(frames, tmp_path / "out", toy_path).labelled == 24


# the command


def test_command_labels_and_says_how_many(toy_path, write_frames, tmp_path, monkeypatch, capsys):
    arguments = command(write_frames(12, danger=NAN), tmp_path / "out", toy_path)[3:]
    monkeypatch.setattr(sys, "argv", ["mlffd", *arguments, "--teacher-option", "stiffness=0.5"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert not exit_.value.code
    out = capsys.readouterr().out
    assert out.startswith(f"{tmp_path / 'out' / 'dataset.h5'}: 10 structures labelled\n2 failed")
    assert "  2 × forces are not finite" in out
    line = (
        r"12 structures in ([\d.]+) s \(([\d.]+) per second; ([\d.]+) after the ([\d.]+) s of "
        r"starting\); largest memory \d+\.\d\d GB"
    )
    total, rate, later, starting = map(float, re.search(line, out).groups())
    assert starting <= total
    assert 12 / rate == pytest.approx(total, abs=0.06)  # times are printed to 0.1 s
    assert later > rate
    assert "(stiffness=0.5)" in contents(tmp_path / "out" / "dataset.h5")[2]["teacher"]


def test_first_structures_are_those_of_the_whole_file(
    toy_path, write_frames, tmp_path, monkeypatch, capsys
):
    source = write_frames(24)
    whole = contents(run(source, tmp_path / "whole", toy_path).dataset)[0]
    for n, count in ((13, 13), (100, 24)):
        arguments = command(source, tmp_path / f"{n}", toy_path, "--first", n)[3:]
        monkeypatch.setattr(sys, "argv", ["mlffd", *arguments])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        assert not exit_.value.code
        assert f"dataset.h5: {count} structures labelled" in capsys.readouterr().out
        found = contents(tmp_path / f"{n}" / "dataset.h5")[0]
        np.testing.assert_array_equal(found.energy, whole.energy[:count])
        np.testing.assert_array_equal(found.forces, whole.forces[: found.offsets[-1]])
    with pytest.raises(LabelError, match="'first': 13}, not "):
        run(source, tmp_path / "13", toy_path, shard_size=1000)


def test_none_of_the_structures_is_refused(toy_path, write_frames):
    with pytest.raises(SourceError, match=r"frames\.xyz: .* at least 1 is taken, not 0"):
        FirstOf(open_source(write_frames(3)), 0)
