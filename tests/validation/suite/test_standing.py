import re
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from openmm_mlffd.cli import app
from openmm_mlffd.validation.suite.measure import list_tasks
from openmm_mlffd.validation.suite.plan import make_plan
from openmm_mlffd.validation.suite.standing import format_standing, standing
from openmm_mlffd.validation.suite.summary import read_validation

WORDS = re.compile(r'"([^"]+)"|(\w+)')
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "validate_on_gpu.sh"


def validate(model, folder, *options):
    arguments = ["validate", model, "-o", folder / "out", "--pieces", folder / "pieces",
                 "--level", "tiny", "--device", "cpu", *options]  # fmt: skip
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code in (0, 1, 3), result.output
    return result


def test_pieces_say_before_the_report_what_it_will_say(toy_file, tmp_path):
    sections = ["--sections", "nve,ensembles,stability"]
    validate(toy_file, tmp_path, *sections, "--measure-only")
    found = standing(tmp_path / "pieces")
    assert all(numbers["finished"] for numbers in found.values())
    validate(toy_file, tmp_path, *sections)
    report = read_validation(tmp_path / "out")["sections"]
    run = report["nve"]["runs"]["methanol, double"]["runs"][0]
    mine = next(v for k, v in found.items() if k.startswith("NVE methanol, double 0.25 fs"))
    for key in ("slope", "slope_error", "slope_kt", "slope_of_atomization", "rms"):
        assert mine[key] == pytest.approx(run[key])
    run = report["ensembles"]["methanol, NVT 300 K"]
    mine = next(v for k, v in found.items() if k.startswith("student methanol, NVT"))
    for key in ("picoseconds", "temperature", "temperature_error"):
        assert mine[key] == pytest.approx(run[key])
    assert mine["longest_bond"] == pytest.approx(run["longest_bond"], rel=1e-4)
    lines = list(format_standing(found))
    assert any(re.search(r"NVE methanol.* 0.05/0.05 ps done slope ", line) for line in lines)
    assert any("stability of 2 molecules" in line and "longest bond" in line for line in lines)


def test_a_piece_that_was_cut_off_says_how_far_it_came(toy_file, tmp_path):
    sections = ["--sections", "ensembles", "--measure-only"]
    validate(toy_file, tmp_path, *sections)
    folder = next((tmp_path / "pieces").glob("student-methanol*"))
    (folder / "numbers.json").unlink()
    (numbers,) = standing(tmp_path / "pieces").values()
    assert not numbers["finished"]
    assert numbers["picoseconds"] == pytest.approx(0.2)


def test_the_parts_of_the_script_are_all_tasks_of_the_full_plan(make_job, toy):
    job = replace(make_job(toy, teacher=toy), plan=make_plan("full"))
    script = SCRIPT.read_text("utf-8")
    boxes = [a or b for a, b in WORDS.findall(re.search(r"for box in (.+?); do", script)[1])]
    parts = re.findall(
        r"(?:measure|with_teacher) (?:\"[^\"]+\"|\S+) (\w+)((?: \"[^\"]+\"| \w+)*)", script
    )
    taken: dict[str, list[str]] = {}
    for section, words in parts:
        texts = [a or b for a, b in WORDS.findall(words)]
        if texts == ["stability $box"]:
            texts = [f"stability {box}" for box in boxes]
        tasks = list(list_tasks(job, [section]))
        for text in texts:
            assert any(text in task for task in tasks), text
        taken.setdefault(section, []).extend(
            t for t in tasks if not texts or any(text in t for text in texts)
        )
    # the student's side of what is compared with a teacher is that of another section
    taken["teacher"] += [t for t in list_tasks(job, ["teacher"]) if t.startswith("student")]
    assert set(taken) == {"nve", "ensembles", "stability", "teacher", "robustness", "speed"}
    for section, tasks in taken.items():
        assert sorted(tasks) == sorted(list_tasks(job, [section]))
