import json
import sys

import numpy as np
import pytest

pytest.importorskip("h5py")

import h5py

from openmm_mlffd import __version__, cli
from openmm_mlffd.modelfile import bundled_students, load_student
from openmm_mlffd.training.hdf5 import Dataset


@pytest.fixture
def mlffd(monkeypatch, capsys):
    """Run the command; returns exit code, output and error output."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["mlffd", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        return exit_.value.code or 0, captured.out, captured.err

    return run


@pytest.fixture
def starter(data_folder, tmp_path):
    """The sample with the schema of the starter set."""
    with Dataset(data_folder / "sample.h5") as dataset:
        everything, names = dataset.read(0, len(dataset)), dataset.group_names()
        subsets = dataset.subsets
    path = tmp_path / "starter.h5"
    with h5py.File(path, "w") as file:
        file.attrs.update({"schema": "so3lr-starter/2", "teacher": "SO3LR"})
        same = "offsets atomic_numbers positions forces partial_charges energy cell stress subset"
        for name in same.split():
            file[name] = getattr(everything, name)
        file["total_charge"] = everything.total_charge.astype("i1")
        file["sampling_temperature"] = everything.temperature.astype("i2")
        file["pbc"] = everything.pbc.all(1)
        file["molecule"] = everything.group
        file["smiles"] = np.array(names, dtype=h5py.string_dtype())
        file["subset"].attrs["names"] = subsets
    return path


def write_config(folder, *lines):
    settings = [
        f"output: {folder / 'run'}",
        "model: {n_channels: 4, n_interactions: 1, n_basis: 4, cutoff: 4.0}",
        "device: cpu",
        "batch_atoms: 500",
        "epochs: 1",
        *lines,
    ]
    (folder / "run.yaml").write_text("\n".join(settings))
    return folder / "run.yaml"


def test_version_and_help(mlffd):
    assert mlffd("--version") == (0, f"openmm-mlffd {__version__}\n", "")
    code, out, _ = mlffd("--help")
    assert code == 0
    for command in ("data", "train", "evaluate", "info"):
        assert command in out


def test_help_has_the_units(mlffd):
    code, out, _ = mlffd("nve", "--help")
    assert code == 0
    assert "[ps]" in out
    assert "[fs]" in out


def test_from_starter_set_to_an_evaluated_student(mlffd, starter, tmp_path):
    data = tmp_path / "data.h5"
    split = ["--val", 0.2, "--test", 0.2, "--seed", 3]
    assert mlffd("data", "import", starter, "-o", data, *split) == (
        0,
        f"{data}: 104 structures\n",
        "",
    )
    with Dataset(data) as dataset:
        n_test = len(dataset.in_split("test"))
        assert dataset.attributes["split_seed"] == 3
    code, out, _ = mlffd("data", "info", data)
    assert code == 0
    rows = {line.split()[0]: line.split() for line in out.splitlines()}
    assert int(rows["dimer"][1]) == 317
    assert sum(int(n) for n in rows["dimer"][2:]) == 16

    config = write_config(tmp_path, f"data: {{files: [{data}]}}")
    code, out, _ = mlffd("train", config, "name=tiny", "optimizer.warmup_steps=2")
    student = tmp_path / "run" / "student.safetensors"
    assert (code, out.splitlines()[-1]) == (0, f"finished: {student}")
    assert load_student(student).header.name == "tiny"

    numbers = tmp_path / "errors.json"
    code, out, _ = mlffd("evaluate", student, data, "--device", "cpu", "--json", numbers)
    assert code == 0
    table = json.loads(numbers.read_text())
    assert table["all"]["structures"] == n_test > 5
    assert f"{table['all']['force_mae']:.1f}" in out
    code, out, _ = mlffd("info", student)
    assert json.loads(out)["teacher"] == "SO3LR"


def test_training_that_is_stopped_says_how_to_go_on(mlffd, data_folder, tmp_path):
    config = write_config(tmp_path, f"data: {{files: [{data_folder / 'sample.h5'}]}}")
    code, out, _ = mlffd("train", config, "max_minutes=0")
    assert code == 0
    assert "stopped; the same command goes on" in out
    code, out, _ = mlffd("train", config)
    assert code == 0
    assert "finished" in out


def test_info_lists_the_bundled_students(mlffd):
    code, out, _ = mlffd("info")
    assert code == 0
    assert [line.split("\t")[0] for line in out.splitlines()] == list(bundled_students())
    code, out, _ = mlffd("info", "default")
    assert json.loads(out)["name"] == "default"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "nothing"], "nothing: neither a file nor a bundled student"),
        (["train", "{tmp}/no.yaml"], "no.yaml: cannot be read"),
        (["train", "{tmp}/run.yaml", "epoch=3"], "unknown setting 'epoch'; did you mean 'epochs'?"),
        (["train", "{tmp}/run.yaml"], "no.h5: not a readable HDF5 file"),
        (["data", "info", "{tmp}/run.yaml"], "run.yaml: not a readable HDF5 file"),
        (["data", "import", "{tmp}/no.h5", "-o", "{tmp}/x.h5"], "no.h5"),
        (["data", "import", "{sample}", "-o", "{tmp}/x.h5"], "'so3lr-starter/2' is needed"),
        (["evaluate", "default", "{tmp}/no.h5"], "no.h5: not a readable HDF5 file"),
        (["evaluate", "default", "{sample}", "--split", "all", "--device", "cuda:7"], "cuda:7"),
        (["evaluate", "default", "{sample}", "--split", "tset"], "split must be one of train"),
    ],
)
def test_error_that_a_user_can_act_on_is_one_line(mlffd, tmp_path, data_folder, arguments, message):
    write_config(tmp_path, f"data: {{files: [{tmp_path / 'no.h5'}]}}")
    places = {"tmp": tmp_path, "sample": data_folder / "sample.h5"}
    code, out, err = mlffd(*(a.format(**places) for a in arguments))
    assert code == 1
    assert out == ""
    assert err.startswith("mlffd: ")
    assert message in err
    assert err.count("\n") == 1


def test_training_that_cannot_go_on_is_one_line(mlffd, data_folder, tmp_path):
    (tmp_path / "bad.h5").write_bytes((data_folder / "sample.h5").read_bytes())
    with h5py.File(tmp_path / "bad.h5", "a") as file:
        file["forces"][:] = np.nan
    config = write_config(tmp_path, f"data: {{files: [{tmp_path / 'bad.h5'}]}}", "batch_atoms: 40")
    config.write_text(config.read_text().replace("batch_atoms: 500\n", ""))
    code, _, err = mlffd("train", config, "checkpoint_every=25")
    assert code == 1
    assert "mlffd: 25 steps had a loss or gradient that is not finite" in err
    assert "Traceback" not in err
