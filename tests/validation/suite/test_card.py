import copy
import json
import sys

import pytest

from openmm_mlffd import cli
from openmm_mlffd.validation.suite.card import run_card_command, write_card
from openmm_mlffd.validation.suite.card_facts import domain, weaknesses


def interval(value, low=None, high=None):
    return {"value": value, "low": value if low is None else low, "high": value if high is None
            else high}  # fmt: skip


def row(mae, low=None, **changes):
    return {"structures": 9, "force_mae": interval(mae, low, mae), "force_rmse": interval(2 * mae),
            "energy_mae": interval(1.0), "angle": interval(2.0), "stress_relative": interval(4.0),
            **changes}  # fmt: skip


def run(**changes):
    return {"system": "caffeine", "atoms": 24, "kelvin": 500.0, "picoseconds": 100.0,
            "planned_picoseconds": 100.0,
            "temperature": 499.0, "longest_bond": 1.2, "failure": "", "broken": None,
            **changes}  # fmt: skip


@pytest.fixture
def content():
    """Numbers of a validation, as they are stored."""
    nve = {"timestep": 0.5, "duration": 60.0, "slope": 0.31, "slope_error": 0.2,
           "slope_kt": 0.004, "slope_kt_error": 0.003, "drift_over_kinetic_std": 0.01}  # fmt: skip
    return {
        "student": {
            "name": "toy", "sha256": "abc",
            "header": {
                "architecture": {"kind": "painn", "n_interactions": 3}, "cutoff": 5.0,
                "elements": ["H", "C", "P"], "teacher": "SO3LR", "licence": "MIT",
                "created_with": "x", "dataset": {"files": ["a.h5"], "train_structures": 12345},
            },
        },
        "teacher": None, "level": "full", "finished": True, "passed": False, "hardware": "a GPU",
        "status": {"forces": "finished", "teacher": "not run: no teacher was given"},
        "checks": [
            {"name": "forces: stress error", "value": 7.8, "unit": "%", "high": 5.0, "low": 0.0,
             "passed": False, "section": "forces"},
        ],
        "sections": {
            "forces": {
                "split": "test", "data": "a.h5", "all": row(34.0),
                "subsets": {"drugs": row(33.0), "ions": row(80.0, 60.0)},
                "elements": {
                    "C": row(40.0, atoms=5000, rms_label=1.0, largest=0.9),
                    "P": row(174.0, 40.0, atoms=18, rms_label=3.5, largest=2.9),
                },
            },
            "nve": {"runs": {"a drug": {"runs": [nve], "halving_ratios": []}}},
            "stability": {
                "molecules": {
                    "caffeine, 500 K": run(),
                    "peptide, 500 K": run(broken=[1, 2, "N1 – H2"],
                                          teacher={"keeps": True, "stretch": 1.0}),
                },
                "boxes": {"water, NPT 300 K": run(kelvin=300.0, failure="after 3 ps: NaN")},
            },
            "speed": {"systems": [{"system": "a drug", "atoms": 50, "ms_per_step": 0.3,
                                   "ns_per_day": 144.0}]},
        },
    }  # fmt: skip


def test_card_has_what_was_stored_and_nothing_else(content, tmp_path):
    text = write_card(content, tmp_path / "card.md").read_text("utf-8")
    for piece in (
        "| licence of the weights | MIT |",
        "| atoms feel one another up to | 15 Å (3 interactions); nothing beyond acts",
        "| trained on | 12,345 structures of a.h5 |",
        "| stability tested at | 300 K, 500 K |",
        "| P | 18 | 174 (40.0 to 174) | 2.90 | 3.50 |",
        "| caffeine, 500 K | 100 | 499 | 1.20 | whole |",
        "| water, NPT 300 K | 100 | 499 | 1.20 | EXPLODED after 3 ps: NaN |",
        "| a drug | 0.500 | 60.0 | 0.00400 ± 0.00300 | 0.310 ± 0.200 | 0.0100 |",
        "| a drug | 50 | 0.300 | 144 |",
        "Measured on a GPU.",
    ):
        assert piece in text, piece


def test_weaknesses_are_those_of_the_numbers(content):
    assert weaknesses(content) == [
        "forces: stress error: 7.80 %; it has to be at most 5 %.",
        "Forces of ions: MAE 80.0 meV/Å (at least 60.0 with 95 % confidence), 34.0 of everything.",
        "Few atoms among the labelled structures, so that errors are uncertain: P (18).",
        "peptide, 500 K: BROKE N1 – H2; the teacher keeps it (1.0 of its first length).",
        "water, NPT 300 K: EXPLODED after 3 ps: NaN.",
        "Not measured, or not to the end: teacher.",
    ]
    content["sections"]["stability"]["molecules"]["caffeine, 500 K"]["picoseconds"] = 40.0
    assert (
        "1 stability runs were ended before their time, the shortest after 40.0 of 100 ps."
        in weaknesses(content)
    )
    sound = copy.deepcopy(content)
    sound["checks"], sound["status"], sound["sections"] = [], {"nve": "finished"}, {}
    assert weaknesses(sound) == ["None that the checks above would show."]
    sound["level"] = "smoke"
    assert "short form" in weaknesses(sound)[0]


def test_card_of_a_validation_without_the_newer_sections(content, tmp_path):
    content["sections"] = {}
    content["student"]["header"]["architecture"] |= {"tail": True, "message_cutoff": 4.5}
    text = write_card(content, tmp_path / "card.md").read_text("utf-8")
    assert "## Stability" not in text
    assert "13.5 Å (3 interactions); a Coulomb and dispersion tail to 5 Å" in text
    content["student"]["header"] = None
    assert "not recorded" in domain(content)[0][1]


def test_card_is_written_anew_from_stored_results(content, tmp_path, monkeypatch):
    stability = content["sections"].pop("stability")
    stored = content | {"format": "mlffd-validation", "version": 1}
    (tmp_path / "validation.json").write_text(json.dumps(stored))
    more = stability | {"student": {"sha256": "abc"}, "checks": [
        {"name": "runs that exploded", "value": 1.0, "unit": "", "high": 0.0, "low": 0.0,
         "passed": False}
    ]}  # fmt: skip
    (tmp_path / "stability.json").write_text(json.dumps(more))
    monkeypatch.setattr(sys, "argv", [
        "mlffd", "card", str(tmp_path), "--stability", str(tmp_path / "stability.json"),
    ])  # fmt: skip
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert not exit_.value.code
    text = (tmp_path / "model_card.md").read_text("utf-8")
    assert "EXPLODED after 3 ps: NaN" in text
    assert "| runs that exploded | 1 " in text
    more["student"]["sha256"] = "another"
    (tmp_path / "stability.json").write_text(json.dumps(more))
    with pytest.raises(ValueError, match="is of another student"):
        run_card_command(tmp_path, None, tmp_path / "stability.json")
