import json

import numpy as np
import pytest
from openmm import app, unit
from typer.testing import CliRunner

from openmm_mlffd.cli import app as command
from openmm_mlffd.modelfile import save_student


@pytest.fixture
def water_file(tmp_path):
    topology = app.Topology()
    residue = topology.addResidue("HOH", topology.addChain())
    for name, symbol in (("O", "O"), ("H1", "H"), ("H2", "H")):
        topology.addAtom(name, app.Element.getBySymbol(symbol), residue)
    positions = np.array([[0.0, 0.0, 0.0], [0.96, 0.0, 0.0], [-0.24, 0.93, 0.0]])
    with (tmp_path / "water.pdb").open("w") as file:
        app.PDBFile.writeFile(topology, positions * unit.angstrom, file)
    return tmp_path / "water.pdb"


@pytest.fixture
def student_file(tmp_path, make_student, make_header):
    save_student(tmp_path / "toy.safetensors", make_student(), make_header())
    return tmp_path / "toy.safetensors"


def test_nve_prints_and_writes_what_it_measured(water_file, student_file, tmp_path):
    numbers = tmp_path / "numbers.json"
    result = CliRunner().invoke(
        command,
        ["nve", str(water_file), "--model", str(student_file), "--picoseconds", "0.05",
         "--timestep", "0.25", "--timestep", "0.5", "--json", str(numbers)],
    )  # fmt: skip
    content = json.loads(numbers.read_text())
    assert result.exit_code == (0 if all(c["passed"] for c in content["checks"]) else 1)
    assert [run["timestep"] for run in content["runs"]] == [0.25, 0.5]
    assert content["halving_ratios"] == [pytest.approx(4, abs=1)]
    assert content["student"]["name"] == "toy"
    assert "kT/ns/dof" in result.output
    assert "rms(E) ratio" in result.output


def test_nve_of_a_missing_file_is_an_error_with_its_name(student_file):
    result = CliRunner().invoke(command, ["nve", "absent.pdb", "--model", str(student_file)])
    assert result.exit_code != 0
    assert "absent.pdb" in str(result.exception)
