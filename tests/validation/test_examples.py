"""Each example runs to its end, in its shortest form."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(folder, name, *arguments):
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert result.returncode in (0, 1), result.stderr
    return result


def test_the_demo_writes_its_report_and_its_numbers(tmp_path):
    result = run(tmp_path, "01_demo.py", "--quick", "--output", "out")
    content = json.loads((tmp_path / "out" / "numbers.json").read_text())
    assert set(content["systems"]) == {"alanine dipeptide", "pramipexole", "water"}
    # too short for the drift to mean anything, but not for the others
    for check in content["checks"]:
        assert check["passed"] or "drift" in check["name"], check
    passed = all(check["passed"] for check in content["checks"])
    assert result.returncode == (0 if passed else 1)
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert content["student"]["sha256"] in page
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"water.dcd", "water.csv", "pramipexole.dcd", "alanine-dipeptide-nve-0.5fs.csv"} <= names


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("02_train_a_student.py", ["--quick", "--output", "out"], "follows the teacher's"),
        ("03_mixed_ml_mm.py", ["--steps", "10"], "constraints:"),
        ("04_ase.py", ["--steps", "5"], "GPa"),
        ("05_ligand_in_protein.py", ["--steps", "10"], "14 atoms and 1 caps"),
        ("06_multiple_time_steps.py", ["--picoseconds", "0.02"], "teacher every 2 fs"),
    ],
)
def test_the_other_examples_run(tmp_path, name, arguments, said):
    result = run(tmp_path, name, *arguments)
    assert result.returncode == 0, result.stderr
    assert said in result.stdout
