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


@app.command()
def tune(
    config: Annotated[Path, typer.Argument(help="YAML file of the training.")],
    space: Annotated[Path, typer.Argument(help="YAML file of what is searched, and how long.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings of the training as key=value.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the study.")] = Path(
        "tune"
    ),
) -> None:
    """Search for hyper-parameters; several processes may share a folder. Exit code 3: stopped."""
    from openmm_mlffd.training.tune import run_tune

    if not run_tune(config, space, output, overrides=overrides or [], echo=typer.echo):
        typer.echo("stopped; the same command goes on")
        raise typer.Exit(3)
