"""The command that compares multiple time steps with the teacher alone."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from openmm_mlffd.cli import app
from openmm_mlffd.validation.mts import open_teacher, run_mts_command

PEPTIDE = Path(__file__).parents[2] / "examples" / "structures" / "alanine-dipeptide.pdb"


def test_names_of_teachers_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"ase:package\.module:factory, not ase:emt"):
        open_teacher("ase:emt", {})
    with pytest.raises(ValueError, match=r"ase:ase\.calculators\.emt:EMTT: .*EMTT"):
        open_teacher("ase:ase.calculators.emt:EMTT", {})
    with pytest.raises(ValueError, match="has no options, got dtype"):
        open_teacher("default", {"dtype": "float32"})
    assert open_teacher("ase:ase.calculators.emt:EMT", {"asap_cutoff": True}).parameters.asap_cutoff


@pytest.mark.slow
def test_a_teacher_that_is_the_student_changes_nothing_but_the_time_step():
    lines = []
    runs = run_mts_command(
        PEPTIDE, "default", model=None, inner=0.5, outer=[2], picoseconds=0.05, temperature=300.0,
        precision="double", seed=1, echo=lines.append,
    )  # fmt: skip
    assert [run.name for run in runs] == [
        "teacher alone, 0.5 fs", "both, 1 fs / 0.5 fs", "teacher alone, 1 fs",
    ]  # fmt: skip
    plain, both, coarse = (run.conservation for run in runs)
    # the correction is nothing, so that only the short step counts
    assert both.rms == pytest.approx(plain.rms, rel=0.2)
    assert coarse.rms > 3.0 * plain.rms
    assert len(lines) == 4 + len(runs)


def test_the_command_says_what_it_needs():
    result = CliRunner().invoke(app, ["mts", str(PEPTIDE)])
    assert result.exit_code == 2
    assert "--teacher" in result.output
