"""The model card: what a student is, and what was measured of it."""

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from openmm_mlffd.validation.report import number, range_text, value_text
from openmm_mlffd.validation.suite.card_facts import (
    domain,
    drift_rows,
    speed_table,
    stability_rows,
    weaknesses,
)
from openmm_mlffd.validation.suite.summary import headlines, read_validation

try:
    import jinja2
except ImportError as error:
    raise ImportError(
        "Jinja2 is needed to write model cards: pip install openmm-mlffd[analysis]"
    ) from error


def write_card(content: Mapping[str, Any], path: str | Path) -> Path:
    """Write a model card in Markdown from the content of `validation.json`.

    Parameters
    ----------
    content
        As `read_validation` gives it.
    path
        File to write.

    Returns
    -------
    Path
        The file.
    """
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
    )
    environment.filters["value"] = lambda c: value_text(c["value"], c["high"], c["unit"])
    environment.filters["range"] = lambda c: range_text(c["low"], c["high"], c["unit"])
    environment.filters["number"] = lambda x: "–" if x is None else number(float(x))
    environment.filters["cell"] = lambda x: str(x).replace("|", "\\|").replace("\n", " ")
    source = (
        files("openmm_mlffd.validation.suite").joinpath("model_card.md.jinja").read_text("utf-8")
    )
    text = environment.from_string(source).render(
        content=content,
        header=content["student"]["header"],
        headlines=headlines(content),
        failed=[check for check in content["checks"] if not check["passed"]],
        forces=content["sections"].get("forces"),
        domain=domain(content),
        weaknesses=weaknesses(content),
        stability=stability_rows(content),
        drift=drift_rows(content),
        speed=speed_table(content),
    )
    path = Path(path)
    path.write_text(text.rstrip() + "\n", encoding="utf-8")
    return path


def run_card_command(validation: Path, output: Path | None, stability: Path | None) -> Path:
    """`mlffd card`: a model card from stored results, without measuring anything.

    Parameters
    ----------
    validation
        Folder of `mlffd validate`, or its `validation.json`.
    output
        File to write; None for `model_card.md` beside the numbers.
    stability
        `stability.json` of `mlffd stability`, whose runs take the place of the validation's.

    Raises
    ------
    ValueError
        If a file is not there or another one, or the runs are of another student.
    """
    content = read_validation(validation)
    if stability is not None:
        found = json.loads(stability.read_text("utf-8"))
        if found.get("student", {}).get("sha256") != content["student"]["sha256"]:
            raise ValueError(f"{stability}: is of another student than {validation}")
        content["sections"]["stability"] = found
        content["status"]["stability"] = "finished"
        content["checks"] = [c for c in content["checks"] if c["section"] != "stability"]
        content["checks"] += [{**c, "section": "stability"} for c in found["checks"]]
    folder = validation if validation.is_dir() else validation.parent
    return write_card(content, output or folder / "model_card.md")
