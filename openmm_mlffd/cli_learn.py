"""The parts of the `mlffd` command that train many students, or one again and again."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def active(
    config: Annotated[Path, typer.Argument(help="YAML file; see training/configs/active.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings as key=value, e.g. rounds=5.")
    ] = None,
    max_minutes: Annotated[
        float | None, typer.Option(help="Stop after so long; the same command goes on.")
    ] = None,
) -> None:
    """Explore with a student, label what it does not know, train it; exit code 3: unfinished."""
    from openmm_mlffd.training.active.config import load_active
    from openmm_mlffd.training.active.loop import run_active

    outcome = run_active(
        load_active(config, overrides or []), max_minutes=max_minutes, echo=typer.echo
    )
    typer.echo(f"current student: {outcome.student}")
    if not outcome.finished:
        raise typer.Exit(3)
