"""The `mlffd` command. Each subcommand imports what it needs inside its function."""

import json
import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

import openmm_mlffd
from openmm_mlffd import cli_data, cli_learn

app = typer.Typer(
    name="mlffd",
    help="Distil a machine-learned force field and run it in OpenMM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # it takes units, such as [ps], for styles and leaves them out
)
app.add_typer(cli_data.app)
app.add_typer(cli_learn.app)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"openmm-mlffd {openmm_mlffd.__version__}")
        raise typer.Exit


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file; see training/configs.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings as key=value, e.g. epochs=3.")
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Measure the speed of each way to train instead.")
    ] = False,
    profile_json: Annotated[
        Path | None, typer.Option(help="With --profile: also write the numbers.")
    ] = None,
    profile_way: Annotated[
        list[str] | None,
        typer.Option(help="With --profile: one of the ways, e.g. fused+compiled+graphed; repeat."),
    ] = None,
) -> None:
    """Train a student; goes on from the checkpoint if there is one.

    Started by torchrun, all its processes train together.
    """
    from openmm_mlffd.training.config import load_config
    from openmm_mlffd.training.train import Trainer, TrainingError

    settings = load_config(config, overrides or [])
    if profile or profile_json is not None:
        from openmm_mlffd.training.profile import WAYS, profile_training

        ways = tuple(profile_way or WAYS)
        for way in set(ways) - set(WAYS):
            raise typer.BadParameter(f"{way} is not one of {', '.join(WAYS)}")
        profile_training(settings, ways=ways, output=profile_json, echo=typer.echo)
        return
    trainer = Trainer(settings)
    try:
        path = trainer.run()
    except TrainingError as error:
        typer.echo(f"mlffd: {error}", err=True)
        raise typer.Exit(1) from error
    if trainer.processes.is_first:
        done = "finished" if trainer.finished else "stopped; the same command goes on"
        typer.echo(f"{done}: {path}")
    trainer.processes.end()


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Bundled name or path of a student.")],
    files: Annotated[list[Path], typer.Argument(help="Dataset files.")],
    split: Annotated[str, typer.Option(help="train, val, test or all.")] = "test",
    precision: Annotated[str, typer.Option(help="single or double.")] = "single",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 … or auto.")] = "auto",
    batch_atoms: Annotated[int, typer.Option(help="Atoms evaluated at a time.")] = 2000,
    output: Annotated[Path | None, typer.Option("--json", help="Also write the numbers.")] = None,
) -> None:
    """Errors of a student on held-out structures, by subset."""
    from openmm_mlffd.engines import open_graphs
    from openmm_mlffd.modelfile import load_student
    from openmm_mlffd.training.batches import StructureSource, prefetch
    from openmm_mlffd.training.evaluate import evaluate as run
    from openmm_mlffd.training.evaluate import format_table
    from openmm_mlffd.training.hdf5 import Dataset
    from openmm_mlffd.training.train import pick_device

    where = pick_device(device)
    potential = load_student(model, device=where, precision=precision)
    source = StructureSource([Dataset(f) for f in files], split)
    batches = prefetch(source.batches(batch_atoms), potential, where)
    table = run(open_graphs(model, precision, where), batches, source.subsets, where)
    typer.echo(
        f"{model} on the {split} split of {', '.join(map(str, files))} ({where}, {precision})"
    )
    typer.echo(format_table(table))
    if output is not None:
        output.write_text(json.dumps(table, indent=1) + "\n")


@app.command()
def info(
    model: Annotated[str | None, typer.Argument(help="Bundled name or path of a student.")] = None,
) -> None:
    """What a student file says of itself; without a name, the bundled students."""
    from dataclasses import asdict

    from openmm_mlffd.modelfile import bundled_students, load_student

    if model is None:
        for name, path in bundled_students().items():
            typer.echo(f"{name}\t{path}")
        return
    typer.echo(json.dumps(asdict(load_student(model).header), indent=1, ensure_ascii=False))


@app.command()
def nve(
    structure: Annotated[Path, typer.Argument(help="PDB or SDF file, with hydrogens.")],
    model: Annotated[str | None, typer.Option(help="Bundled name or path of a student.")] = None,
    picoseconds: Annotated[float, typer.Option(help="Length of each run [ps].")] = 20.0,
    timestep: Annotated[
        list[float] | None, typer.Option(help="Time step [fs], repeatable; 0.5 and 1 by default.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="Temperature [K].")] = 300.0,
    precision: Annotated[str, typer.Option(help="single, mixed or double.")] = "double",
    seed: Annotated[int, typer.Option(help="Seed of the start.")] = 1,
    output: Annotated[Path | None, typer.Option("--json", help="Also write the numbers.")] = None,
) -> None:
    """Is energy conserved? Runs at constant energy in OpenMM; exit code 1 if not."""
    from openmm_mlffd.validation.command import run_nve_command

    passed = run_nve_command(
        structure,
        model=model,
        picoseconds=picoseconds,
        timesteps=timestep or [0.5, 1.0],
        temperature=temperature,
        precision=precision,
        seed=seed,
        output=output,
        echo=typer.echo,
    )
    if not passed:
        raise typer.Exit(1)


@app.command()
def bench(
    model: Annotated[str | None, typer.Argument(help="Bundled name or path of a student.")] = None,
    sections: Annotated[
        str,
        typer.Option(help="What is measured: agreement, overhead, speed, batch, drift, profile."),
    ] = "agreement,overhead,speed,batch,drift",
    sizes: Annotated[str, typer.Option(help="Numbers of atoms.")] = "22,50,1000,5000,25000,100000",
    engines: Annotated[
        str, typer.Option(help="Engines: python, torchscript, eager.")
    ] = "python,eager",
    precisions: Annotated[str, typer.Option(help="Precisions that are timed.")] = "single,mixed",
    teachers: Annotated[
        str, typer.Option(help="Architectures to time beside it, with random weights: orb-v2.")
    ] = "",
    device: Annotated[str | None, typer.Option(help="Torch device.")] = None,
    compare: Annotated[
        Path | None, typer.Option(help="Stored bench.json; exit code 1 if 15 % slower.")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for bench.json and bench.png.")
    ] = Path("bench"),
) -> None:
    """How fast the student is here, and how far its precisions are from float64."""
    from openmm_mlffd.bench.run import run_bench_command
    from openmm_mlffd.training.environments import installed_python

    if not run_bench_command(
        model, sections=sections, sizes=sizes, engines=engines, precisions=precisions,
        device=device, output=output, echo=typer.echo, teachers=teachers,
        teacher_python=installed_python, compare=compare,
    ):  # fmt: skip
        raise typer.Exit(1)


@app.command("compile")
def compile_command(
    model: Annotated[str, typer.Argument(help="Bundled name or path of a student.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write, .pt.")],
    flavour: Annotated[
        str, typer.Option(help="kernels (fused, needs this package) or torch (needs only torch).")
    ] = "kernels",
    precision: Annotated[str, typer.Option(help="single, mixed or double.")] = "single",
    structure: Annotated[
        Path | None, typer.Option(help="PDB, CIF or SDF file of the atoms it is for.")
    ] = None,
) -> None:
    """Write a student as a TorchScript module for TorchForce, GROMACS and C++."""
    from openmm_mlffd.interfaces.torchscript import CompileError, compile_student

    numbers = None
    if structure is not None:
        from openmm_mlffd.validation.structures import atomic_numbers

        numbers = atomic_numbers(structure)
    try:
        found = compile_student(
            model, output, flavour=flavour, precision=precision, numbers=numbers
        )["differences"]
    except CompileError as error:
        typer.echo(f"mlffd: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(
        f"{output}: differs from float64 by {found['energy']:.1e} eV/atom and "
        f"{found['force']:.1e} eV/Å"
    )


@app.command()
def novelty(
    model: Annotated[str, typer.Argument(help="Bundled name or path of a student.")],
    files: Annotated[list[Path], typer.Argument(help="Dataset files that it was trained on.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; beside the student.")
    ] = None,
    structures: Annotated[int, typer.Option(help="Training structures; 0 for all.")] = 6000,
    figure: Annotated[Path | None, typer.Option(help="Also draw novelty and errors, SVG.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 … or auto.")] = "auto",
) -> None:
    """Fit the statistics of the extrapolation alarm, and print what they are worth."""
    from openmm_mlffd.novelty import novelty_path
    from openmm_mlffd.training.novelty import fit_novelty, format_fit
    from openmm_mlffd.training.train import pick_device

    path = novelty_path(model) if output is None else output
    where = pick_device(device)
    fit = fit_novelty(model, files, path, max_structures=structures or None, device=where)
    typer.echo(f"{path}\n{format_fit(fit)}")
    if figure is not None:
        from openmm_mlffd.validation.novelty_figure import draw_novelty

        figure.write_text(draw_novelty(fit.novelty, fit.scores, fit.errors))


@app.command()
def prepare(
    structure: Annotated[Path, typer.Argument(help="PDB, CIF or SDF file, with hydrogens.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="PDB file to write.")],
    model: Annotated[str | None, typer.Option(help="Bundled name or path of a student.")] = None,
    temperature: Annotated[float, typer.Option(help="Temperature [K].")] = 300.0,
    pressure: Annotated[
        float | None, typer.Option(help="Pressure [bar]; constant volume without it.")
    ] = None,
    picoseconds: Annotated[float, typer.Option(help="Length of the equilibration [ps].")] = 2.0,
    hydrogen_mass: Annotated[
        float | None, typer.Option(help="Mass of hydrogens [amu]; 3 allows steps of 1 fs.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of velocities and noise.")] = 1,
) -> None:
    """Minimise, heat and equilibrate a structure, however bad its start."""
    from openmm_mlffd.interfaces.openmm_prepare import PreparationError
    from openmm_mlffd.validation.prepare_command import run_prepare_command

    try:
        run_prepare_command(
            structure,
            output,
            model=model,
            temperature=temperature,
            pressure=pressure,
            picoseconds=picoseconds,
            hydrogen_mass=hydrogen_mass,
            seed=seed,
            echo=typer.echo,
        )
    except PreparationError as error:
        typer.echo(f"mlffd: {error}", err=True)
        raise typer.Exit(1) from error


@app.command()
def mts(
    structure: Annotated[Path, typer.Argument(help="PDB, CIF or SDF file, with hydrogens.")],
    teacher: Annotated[
        str, typer.Option(help="ase:package.module:factory, or the name or path of a student.")
    ],
    teacher_option: Annotated[
        list[str] | None, typer.Option(help="Keyword of the factory as key=value, repeatable.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Bundled name or path of a student.")] = None,
    inner: Annotated[float, typer.Option(help="Time step of the student [fs].")] = 0.5,
    outer: Annotated[
        list[int] | None,
        typer.Option(help="Inner steps for each of the teacher's, repeatable; 2, 4 by default."),
    ] = None,
    picoseconds: Annotated[float, typer.Option(help="Length of each run [ps].")] = 1.0,
    temperature: Annotated[float, typer.Option(help="Temperature [K].")] = 300.0,
    precision: Annotated[str, typer.Option(help="Of the student: single or double.")] = "single",
    seed: Annotated[int, typer.Option(help="Seed of the start.")] = 1,
) -> None:
    """Multiple time steps against the teacher alone: energies, drift and wall time."""
    from openmm_mlffd.training.teachers import parse_options
    from openmm_mlffd.validation.mts import open_teacher, run_mts_command

    run_mts_command(
        structure,
        open_teacher(teacher, parse_options(teacher_option or [])),
        model=model,
        inner=inner,
        outer=outer or [2, 4],
        picoseconds=picoseconds,
        temperature=temperature,
        precision=precision,
        seed=seed,
        echo=typer.echo,
    )


@app.command()
def validate(
    model: Annotated[str, typer.Argument(help="Bundled name or path of a student.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the report.")],
    level: Annotated[
        str, typer.Option(help="smoke (a CPU, minutes), full (a GPU) or tiny (a test).")
    ] = "smoke",
    smoke: Annotated[bool, typer.Option("--smoke", help="The same as --level smoke.")] = False,
    full: Annotated[bool, typer.Option("--full", help="The same as --level full.")] = False,
    data: Annotated[Path | None, typer.Option(help="Dataset file with labels.")] = None,
    split: Annotated[str, typer.Option(help="train, val, test or all of it.")] = "test",
    training: Annotated[
        Path | None, typer.Option(help="Dataset file trained on, if not --data's own split.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="As for `mlffd label`: so3lr, ase:package.module:factory …")
    ] = None,
    teacher_python: Annotated[
        str | None, typer.Option(help="Python that has the teacher; this one by default.")
    ] = None,
    teacher_option: Annotated[
        list[str] | None, typer.Option(help="Setting of the teacher as key=value, repeatable.")
    ] = None,
    teacher_from_pieces: Annotated[
        bool,
        typer.Option(
            "--teacher-from-pieces", help="The teacher is not started: only what is measured."
        ),
    ] = False,
    sections: Annotated[
        str | None,
        typer.Option(help="Only these, by commas: forces,nve,ensembles,stability,teacher …"),
    ] = None,
    pieces: Annotated[
        Path | None, typer.Option(help="Folder of finished pieces; OUTPUT/pieces by default.")
    ] = None,
    speed: Annotated[Path | None, typer.Option(help="JSON of a speed measurement.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …")] = None,
    max_minutes: Annotated[
        float | None, typer.Option(help="Stop after so long; the same command goes on.")
    ] = None,
    run_minutes: Annotated[
        float | None, typer.Option(help="End each simulation after so long, however short it is.")
    ] = None,
    measure_only: Annotated[
        bool, typer.Option("--measure-only", help="No report: for machines without its packages.")
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(help="With --measure-only: tasks whose names hold this text, repeatable."),
    ] = None,
) -> None:
    """Is a student fit for dynamics? Exit code 0: passed, 1: failed, 3: not finished."""
    from openmm_mlffd.validation.suite.command import run_validate_command

    if smoke and full:
        raise typer.BadParameter("--smoke and --full exclude one another")
    finished, passed = run_validate_command(
        model,
        output,
        level="full" if full else "smoke" if smoke else level,
        data=data,
        split=split,
        training=training,
        teacher=teacher,
        teacher_python=teacher_python,
        teacher_options=teacher_option or [],
        teacher_from_pieces=teacher_from_pieces,
        sections=None if sections is None else [s.strip() for s in sections.split(",")],
        pieces=pieces,
        speed=speed,
        device=device,
        max_minutes=max_minutes,
        run_minutes=run_minutes,
        measure_only=measure_only,
        only=only or [],
        echo=typer.echo,
    )
    if not (finished and passed):
        raise typer.Exit(1 if finished else 3)


@app.command()
def stability(
    model: Annotated[str, typer.Argument(help="Bundled name or path of a student.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for stability.json.")],
    picoseconds: Annotated[
        float, typer.Option(help="Length of the molecules' runs [ps]; 0 for none.")
    ] = 100.0,
    box_picoseconds: Annotated[
        float, typer.Option(help="Length of the boxes' runs [ps]; 0 for none.")
    ] = 50.0,
    temperature: Annotated[
        list[float] | None, typer.Option(help="[K], repeatable; 300 and 500 by default.")
    ] = None,
    structure: Annotated[
        list[Path] | None, typer.Option(help="PDB or SDF instead of the suite's, repeatable.")
    ] = None,
    charge: Annotated[
        list[str] | None, typer.Option(help="FILE=CHARGE [e], where it has no formal charges.")
    ] = None,
    timestep: Annotated[float, typer.Option(help="Time step [fs].")] = 0.5,
    teacher: Annotated[
        str | None, typer.Option(help="As for `mlffd label`; asked about bonds that broke.")
    ] = None,
    teacher_python: Annotated[
        str | None, typer.Option(help="Python that has the teacher; this one by default.")
    ] = None,
    teacher_option: Annotated[
        list[str] | None, typer.Option(help="Setting of the teacher as key=value, repeatable.")
    ] = None,
    pieces: Annotated[
        Path | None, typer.Option(help="Folder of finished pieces; OUTPUT/pieces by default.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …")] = None,
    max_minutes: Annotated[
        float | None, typer.Option(help="Stop after so long; the same command goes on.")
    ] = None,
) -> None:
    """Do unseen molecules and boxes stay whole? Exit code 0: yes, 1: no, 3: not finished."""
    from openmm_mlffd.validation.suite.command import run_stability_command

    finished, passed = run_stability_command(
        model,
        output,
        picoseconds=picoseconds,
        box_picoseconds=box_picoseconds,
        temperatures=temperature or [300.0, 500.0],
        structures=structure or [],
        charges=charge or [],
        timestep=timestep,
        teacher=teacher,
        teacher_python=teacher_python,
        teacher_options=teacher_option or [],
        pieces=pieces,
        device=device,
        max_minutes=max_minutes,
        echo=typer.echo,
    )
    if not (finished and passed):
        raise typer.Exit(1 if finished else 3)


@app.command()
def compare(
    reports: Annotated[list[Path], typer.Argument(help="Folders of `mlffd validate`.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="HTML to write.")] = None,
) -> None:
    """Validated students side by side."""
    from openmm_mlffd.validation.suite.compare import compare as run
    from openmm_mlffd.validation.suite.compare import format_text

    report = run(reports)
    for line in format_text(report):
        typer.echo(line)
    if output is not None:
        typer.echo(f"\n{report.write(output)}")


def main() -> None:
    """Entry point: errors a user can act on are one line, others a traceback."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    from openmm_mlffd.memory import keep_freed_memory

    keep_freed_memory()
    try:
        app()
    except (ValueError, OSError) as error:
        typer.echo(f"mlffd: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
