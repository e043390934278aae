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
    labels_only: Annotated[
        bool, typer.Option("--labels-only", help="End when a round has labels; do not train.")
    ] = False,
) -> None:
    """Explore with a student, label what it does not know, train it; exit code 3: unfinished."""
    from openmm_mlffd.training.active.config import load_active
    from openmm_mlffd.training.active.loop import run_active

    outcome = run_active(
        load_active(config, overrides or []), max_minutes=max_minutes, labels_only=labels_only,
        echo=typer.echo,
    )  # fmt: skip
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


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(help="YAML file; see training/configs/sweep.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings of the sweep as key=value.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Points whose names hold this text, repeatable.")
    ] = None,
    max_minutes: Annotated[
        float | None, typer.Option(help="Begin no point that would end later.")
    ] = None,
) -> None:
    """Train, evaluate and time many students; goes on where it stopped. Exit code 3: not all."""
    from openmm_mlffd.training.sweep import run_sweep

    if not run_sweep(
        file, overrides=overrides or [], only=only or [], max_minutes=max_minutes, echo=typer.echo
    ):
        raise typer.Exit(3)


@app.command()
def pareto(
    folders: Annotated[list[Path], typer.Argument(help="Folders of `mlffd sweep`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Figure to write, .svg.")],
    against: Annotated[
        str,
        typer.Option(help="Against what: speed, evaluation, structures, minutes or steps."),
    ] = "speed",
    atoms: Annotated[int, typer.Option(help="Size whose time per step is taken.")] = 1000,
    split: Annotated[str, typer.Option(help="Of the errors: val or test.")] = "test",
) -> None:
    """Error against time per step, or learning curves, as figure and table."""
    from openmm_mlffd.training.plots import run_pareto

    typer.echo(run_pareto(folders, output, against=against, atoms=atoms, split=split))


@app.command()
def card(
    validation: Annotated[Path, typer.Argument(help="Folder of `mlffd validate`.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; model_card.md there.")
    ] = None,
    stability: Annotated[
        Path | None, typer.Option(help="stability.json of `mlffd stability`, to be in it, too.")
    ] = None,
) -> None:
    """Write a student's model card from stored results; measures nothing."""
    from openmm_mlffd.validation.suite.card import run_card_command

    typer.echo(run_card_command(validation, output, stability))
