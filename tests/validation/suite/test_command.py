import json
import re

import pytest
from typer.testing import CliRunner

from openmm_mlffd.cli import app
from openmm_mlffd.validation.suite.speed import read_speed
from openmm_mlffd.validation.suite.summary import read_validation

TEACHER = "ase:openmm_mlffd.interfaces.ase_calculator:MLFFDCalculator"


def mlffd(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def command(toy_file, small_data, tmp_path):
    """A whole validation of the toy, with itself as the teacher."""
    return [
        "validate", toy_file, "-o", tmp_path / "out", "--level", "tiny", "--device", "cpu",
        "--data", small_data, "--split", "all", "--training", small_data, "--teacher", TEACHER,
        "--teacher-option", f"model={toy_file}", "--teacher-option", "precision=double",
        "--teacher-option", "device=cpu",
    ]  # fmt: skip


def test_a_validation_from_start_to_end(command, tmp_path):
    out = tmp_path / "out"
    speeds = tmp_path / "speed.json"
    speeds.write_text(json.dumps({"device": "a GPU", "results": [{"atoms": 50, "ms": 0.1234}]}))
    first = mlffd(*command, "--speed", speeds)
    assert first.exit_code == 1, first.output  # it was never trained
    content = read_validation(out)
    assert content["finished"]
    assert not content["passed"]
    assert set(content["status"].values()) == {"finished"}
    by_name = {check["name"]: check for check in content["checks"]}
    assert not by_name["forces: force MAE"]["passed"]
    # it is like itself, in all that is compared
    like = [c for name, c in by_name.items() if name.startswith("against the teacher")]
    assert len(like) >= 4
    assert all(check["passed"] for check in like), [c for c in like if not c["passed"]]
    geometry = content["sections"]["teacher"]["geometries"]["water"]
    assert geometry["rmsd"] < 1e-3
    assert geometry["frequency_mae"] < 0.5
    assert content["sections"]["teacher"]["dimers"]["water–water"]["mae"] < 1e-3

    page = (out / "report.html").read_text("utf-8")
    assert f"{sum(not c['passed'] for c in content['checks'])} of" in page
    assert "0.123" in page
    assert "a GPU" in page
    assert len(page) < 3_000_000
    card = (out / "model_card.md").read_text("utf-8")
    mae = content["sections"]["forces"]["all"]["force_mae"]["value"]
    assert "Student “toy”" in card
    assert re.search(rf"\*\*all\*\* \| \d+ \| {mae:.0f}", card)
    assert (out / "worst" / "worst-01.pml").is_file()

    # again: nothing is measured
    second = mlffd(*command, "--speed", speeds)
    assert " …\n" not in second.output
    again = read_validation(out)
    assert again["checks"] == content["checks"]
    assert again["sections"] == content["sections"]

    both = mlffd("compare", out, out / "validation.json", "-o", tmp_path / "both.html")
    assert both.exit_code == 0, both.output
    assert f"force MAE [meV/Å]  {mae:.0f}" in re.sub(r" +", "  ", both.output).replace(
        "force  MAE  [", "force MAE ["
    )
    assert "force MAE" in (tmp_path / "both.html").read_text("utf-8")


def test_what_time_did_not_allow_is_said_and_resumed(toy_file, tmp_path):
    command = ["validate", toy_file, "-o", tmp_path / "out", "--level", "tiny", "--device", "cpu",
               "--sections", "robustness"]  # fmt: skip
    stopped = mlffd(*command, "--max-minutes", "0")
    assert stopped.exit_code == 3, stopped.output
    content = read_validation(tmp_path / "out")
    assert not content["finished"]
    assert content["status"]["robustness"].startswith("unfinished")
    assert content["status"]["forces"] == "not run: no data set was given (--data)"
    assert "unfinished" in (tmp_path / "out" / "report.html").read_text("utf-8")
    resumed = mlffd(*command)
    assert resumed.exit_code in (0, 1), resumed.output
    assert read_validation(tmp_path / "out")["finished"]


def test_a_report_is_made_from_what_was_measured_elsewhere(toy_file, tmp_path):
    pieces = ["--pieces", tmp_path / "pieces"]
    command = ["validate", toy_file, "--level", "tiny", "--device", "cpu", *pieces]
    elsewhere = [*command, "-o", tmp_path / "elsewhere", "--measure-only"]
    for part in (["--only", "smoothness"], ["--only", "NVE methanol"]):
        result = mlffd(*elsewhere, "--sections", "nve", *part)
        assert result.exit_code == 0, result.output
    assert not list((tmp_path / "elsewhere").iterdir())
    for made in (tmp_path / "pieces").glob("*/made.json"):
        made.write_text(json.dumps({"machine": "a machine far away", "seconds": 1.0}))
    result = mlffd(*command, "-o", tmp_path / "here", "--sections", "nve")
    assert result.output.count(": found") == 4
    assert "…\n" not in result.output
    content = read_validation(tmp_path / "here")
    assert content["status"]["nve"] == "finished"
    assert content["hardware"] == "a machine far away"


def test_a_report_needs_no_teacher_that_measured_elsewhere(toy_file, tmp_path):
    command = ["validate", toy_file, "--level", "tiny", "--device", "cpu", "--sections", "teacher",
               "--pieces", tmp_path / "pieces", "--teacher", TEACHER]  # fmt: skip
    settings = [f"model={toy_file}", "precision=double", "device=cpu"]
    options = [word for pair in settings for word in ("--teacher-option", pair)]
    result = mlffd(*command, *options, "-o", tmp_path / "elsewhere", "--measure-only")
    assert result.exit_code == 0, result.output
    command += ["--teacher-from-pieces", "--teacher-python", tmp_path / "no-python"]
    result = mlffd(*command, "-o", tmp_path / "here")
    assert result.exit_code in (0, 1), result.output
    content = read_validation(tmp_path / "here")
    assert content["status"]["teacher"] == "finished"
    assert "MLFFDCalculator" in content["teacher"]
    for numbers in (tmp_path / "pieces").glob("dimer*MLFFDCalculator*/numbers.json"):
        numbers.unlink()
    assert mlffd(*command, "-o", tmp_path / "here").exit_code == 3
    result = mlffd(*command, "-o", tmp_path / "there", "--pieces", tmp_path / "none")
    assert "holds nothing; without --teacher-from-pieces" in str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sections", "nwe"], "there is no section 'nwe'"),
        (["--sections", "forces"], "section forces needs --data"),
        (["--sections", "nve,teacher"], "section teacher needs --teacher"),
        (["--measure-only", "--only", "nwe"], "no task's name holds 'nwe'; there are 'smoothness'"),
        (["--only", "smoothness"], "--only needs --measure-only"),
        (["--level", "huge"], "level must be one of tiny, smoke, full"),
    ],
)
def test_what_cannot_be_done_is_said(toy_file, tmp_path, arguments, message):
    result = mlffd("validate", toy_file, "-o", tmp_path, "--device", "cpu", *arguments)
    assert result.exit_code != 0
    assert message in str(result.exception)


def test_smoke_and_full_exclude_one_another(toy_file, tmp_path):
    result = mlffd("validate", toy_file, "-o", tmp_path, "--smoke", "--full")
    assert result.exit_code == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no validation is there"), ("x", "not JSON"), ('{"format": "z"}', "has format 'z'")],
)
def test_what_is_no_validation_is_not_compared(tmp_path, content, message):
    if content is not None:
        (tmp_path / "validation.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_validation(tmp_path)


@pytest.mark.parametrize("key", [None, "results", "rows", "runs", "measurements"])
def test_speeds_are_read_whatever_their_names(tmp_path, key):
    rows = [{"system": "water", "ms": 1.5, "list": [1, 2]}, {"atoms": 3}]
    path = tmp_path / "speed.json"
    path.write_text(json.dumps(rows if key is None else {"host": "h", "n": {}, key: rows}))
    context, found = read_speed(path)
    assert context == ({} if key is None else {"host": "h"})
    assert found == [{"system": "water", "ms": 1.5}, {"atoms": 3}]


@pytest.mark.parametrize("text", ["{", '{"a": 1}', "[1, 2]"])
def test_what_holds_no_speeds_is_refused(tmp_path, text):
    (tmp_path / "speed.json").write_text(text)
    with pytest.raises(ValueError, match=r"speed\.json"):
        read_speed(tmp_path / "speed.json")
