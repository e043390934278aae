"""The model card: what a student is, and what was measured of it."""

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from openmm_mlffd.validation.report import number
from openmm_mlffd.validation.suite.summary import headlines

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
    )
    path = Path(path)
    path.write_text(text.rstrip() + "\n", encoding="utf-8")
    return path
