"""The parts of the `mlffd` command that make data: structures, labels, dataset files."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()
data = typer.Typer(help="Dataset files.", no_args_is_help=True)
app.add_typer(data, name="data")
teacher_app = typer.Typer(help="Environments of teachers.", no_args_is_help=True)
app.add_typer(teacher_app, name="teacher")


@data.command("import")
def data_import(
    sources: Annotated[list[Path], typer.Argument(help="Files with the schema so3lr-starter/2.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Dataset file to write.")],
    val: Annotated[float, typer.Option(help="Fraction of the molecules for validation.")] = 0.02,
    test: Annotated[float, typer.Option(help="Fraction of the molecules for testing.")] = 0.03,
    seed: Annotated[int, typer.Option(help="Seed of the split.")] = 0,
) -> None:
    """Convert SO3LR starter sets into one dataset file, split by molecule."""
    from openmm_mlffd.training.hdf5 import SplitRule
    from openmm_mlffd.training.starter import import_starter

    n = import_starter(sources, output, split=SplitRule(val=val, test=test, seed=seed))
    typer.echo(f"{output}: {n} structures")


@data.command("info")
def data_info(file: Annotated[Path, typer.Argument(help="Dataset file.")]) -> None:
    """What a dataset file holds, by subset and split."""
    from openmm_mlffd.training.hdf5 import SPLITS, Dataset

    with Dataset(file, unlabelled=True) as dataset:
        typer.echo(f"{file}: {len(dataset)} structures, {dataset.offsets[-1]} atoms")
        for key, value in dataset.attributes.items():
            typer.echo(f"  {key}: {value}")
        typer.echo(f"  {'subset':14s} {'atoms':>9s} " + " ".join(f"{s:>8s}" for s in SPLITS))
        for index, name in enumerate(dataset.subsets):
            mine = dataset.subset == index
            counts = [int((mine & (dataset.split == k)).sum()) for k in range(len(SPLITS))]
            atoms = int(dataset.n_atoms[mine].sum())
            typer.echo(f"  {name:14s} {atoms:9d} " + " ".join(f"{n:8d}" for n in counts))


@data.command("stats")
def data_stats(
    files: Annotated[list[Path], typer.Argument(help="Dataset files.")],
) -> None:
    """Sizes, elements, forces and temperatures, by subset."""
    from openmm_mlffd.training.datasets.survey import format_stats, survey

    typer.echo(format_stats(survey(files, judge=False)))


@data.command("validate")
def data_validate(
    files: Annotated[list[Path], typer.Argument(help="Dataset files.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Page with histograms (HTML) to write.")
    ] = None,
    max_force: Annotated[float, typer.Option(help="Largest force on an atom [eV/Å].")] = 100.0,
    max_net_force: Annotated[float, typer.Option(help="Largest sum of forces [eV/Å].")] = 0.1,
) -> None:
    """Look for duplicates and what is not physical; exit code 1 if there is any."""
    from openmm_mlffd.training.datasets.survey import Bounds, format_findings, survey

    found = survey(files, Bounds(max_force=max_force, max_net_force=max_net_force))
    typer.echo(format_findings(found))
    if output is not None:
        from openmm_mlffd.training.datasets.page import write_page

        write_page(found, output)
        typer.echo(f"{output}: written")
    if found.findings:
        raise typer.Exit(1)


_Val = Annotated[float | None, typer.Option(help="Fraction of the groups for validation.")]
_Test = Annotated[float | None, typer.Option(help="Fraction of the groups for testing.")]
_Seed = Annotated[int | None, typer.Option(help="Seed of the split.")]


@data.command("merge")
def data_merge(
    files: Annotated[list[Path], typer.Argument(help="Dataset files.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Dataset file to write.")],
    val: _Val = None,
    test: _Test = None,
    seed: _Seed = None,
    exclude: Annotated[
        list[Path] | None,
        typer.Option(help="File of InChIKeys or SMILES whose molecules are left out, repeatable."),
    ] = None,
    exclude_held_out: Annotated[
        list[Path] | None,
        typer.Option(help="Dataset whose validation and test molecules are left out, repeatable."),
    ] = None,
) -> None:
    """One file of several; what comes twice is taken once. Keeps the split unless told."""
    from openmm_mlffd.training.datasets.combine import choose_rule, merge

    rule = choose_rule(val, test, seed)
    if exclude or exclude_held_out:
        from openmm_mlffd.training.generation.exclusion import Exclusion

        unwanted = Exclusion(exclude or (), exclude_held_out or ())
        merged = merge(files, output, split=rule, wanted=lambda group: group not in unwanted)
    else:
        merged = merge(files, output, split=rule)
    said = f", {merged.excluded} of molecules to exclude" if exclude or exclude_held_out else ""
    typer.echo(
        f"{output}: {merged.structures} structures, {merged.duplicates} duplicates{said} left out"
    )


@data.command("split")
def data_split(
    file: Annotated[Path, typer.Argument(help="Dataset file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write to.")],
    val: _Val = None,
    test: _Test = None,
    seed: _Seed = None,
) -> None:
    """Files train.h5, val.h5 and test.h5 of one. Keeps the split unless told."""
    from openmm_mlffd.training.datasets.combine import choose_rule, split_file

    for name, n in split_file(file, output, split=choose_rule(val, test, seed)).items():
        typer.echo(f"{output / name}.h5: {n} structures" if n else f"{name}: none")


@data.command("convert")
def data_convert(
    source: Annotated[Path, typer.Argument(help="File to read.")],
    output: Annotated[Path, typer.Argument(help="File to write.")],
    source_format: Annotated[
        str | None, typer.Option("--from", help="dataset, extxyz, db or spice; by default seen.")
    ] = None,
    output_format: Annotated[
        str | None, typer.Option("--to", help="The same; by default from the name.")
    ] = None,
    charge: Annotated[
        int, typer.Option(help="Total charge [e] of structures of which the file does not say it.")
    ] = 0,
    val: _Val = None,
    test: _Test = None,
    seed: _Seed = None,
) -> None:
    """Dataset files to and from extended XYZ, ASE databases (.db) and SPICE's HDF5."""
    from openmm_mlffd.training.datasets.combine import choose_rule
    from openmm_mlffd.training.datasets.convert import convert

    n, left_out = convert(
        source,
        output,
        source_format=source_format,
        output_format=output_format,
        charge=charge,
        split=choose_rule(val, test, seed),
    )
    rest = f", {left_out} periodic ones left out" if left_out else ""
    typer.echo(f"{output}: {n} structures{rest}")


@app.command()
def generate(
    recipe: Annotated[Path, typer.Argument(help="YAML file; see training/configs/broad.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings as key=value, e.g. seed=2.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder; the recipe's name by default.")
    ] = None,
    fraction: Annotated[float, typer.Option(help="Make this fraction; go on with more later.")] = 1,
    workers: Annotated[int, typer.Option(help="Processes.")] = 1,
    cluster: Annotated[
        str | None, typer.Option(help="Dask: local:4, ssh:HOST,HOST, slurm:20, tcp://HOST:8786.")
    ] = None,
    cluster_option: Annotated[
        list[str] | None, typer.Option(help="Setting of the cluster as key=value, repeatable.")
    ] = None,
) -> None:
    """Make structures to be labelled; goes on where it stopped."""
    from openmm_mlffd.training.generation.recipe import load_recipe
    from openmm_mlffd.training.generation.run import format_summary
    from openmm_mlffd.training.generation.run import generate as run
    from openmm_mlffd.training.parallel import choose_workers
    from openmm_mlffd.training.usage import Watch

    watch = Watch()
    loaded = load_recipe(recipe, overrides or [])
    summary = run(
        loaded,
        output or Path(loaded.recipe.name),
        workers=choose_workers(workers, cluster, cluster_option or []),
        fraction=fraction,
    )
    typer.echo(format_summary(summary))
    typer.echo(watch.report(summary.new))
    if summary.dataset is None:
        raise typer.Exit(1)


@teacher_app.command("install")
def teacher_install(
    name: Annotated[str, typer.Argument(help="so3lr, gfn2-xtb, orb or fennix.")],
    python: Annotated[
        str | None, typer.Option(help="Python to make it with; this one by default.")
    ] = None,
    pip: Annotated[
        list[str] | None,
        typer.Option(help="Further argument of pip, repeatable: --pip torch==2.13.0."),
    ] = None,
) -> None:
    """Make an environment of its own for a teacher, where `mlffd label` finds it."""
    from openmm_mlffd.training.environments import install

    typer.echo(install(name, python=python, pip_arguments=pip or [], echo=typer.echo))


@app.command()
def label(
    structures: Annotated[
        Path, typer.Argument(help="HDF5 file of `mlffd generate`, SDF, or a file that ASE reads.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for shards and dataset.")],
    teacher: Annotated[
        str,
        typer.Option(
            help="so3lr, so3lr-stock, gfn2-xtb, fennix, orb-NAME or ase:package.module:factory."
        ),
    ],
    teacher_python: Annotated[
        str | None,
        typer.Option(help="Python that has the teacher; what was installed for it, else this one."),
    ] = None,
    teacher_option: Annotated[
        list[str] | None, typer.Option(help="Setting of the teacher as key=value, repeatable.")
    ] = None,
    charge: Annotated[
        int, typer.Option(help="Total charge [e] of structures of which the file does not say it.")
    ] = 0,
    max_force: Annotated[float, typer.Option(help="Larger forces [eV/Å] are failures.")] = 100.0,
    max_net_force: Annotated[
        float, typer.Option(help="Larger sums of forces [eV/Å] are failures.")
    ] = 0.1,
    batch_atoms: Annotated[
        int | None, typer.Option(help="Atoms given to the teacher at a time.")
    ] = None,
    shard_size: Annotated[int, typer.Option(help="Structures per shard, at most 1000.")] = 1000,
    timeout: Annotated[float, typer.Option(help="Longest time for a batch [s].")] = 600.0,
    add_hydrogens: Annotated[
        bool, typer.Option("--add-hydrogens", help="Add the implicit hydrogens of an SDF.")
    ] = False,
    first: Annotated[
        int | None, typer.Option(help="Label only so many structures, the first ones of the file.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes of the teacher.")] = 1,
    cluster: Annotated[
        str | None, typer.Option(help="Dask: local:4, ssh:HOST,HOST, slurm:20, tcp://HOST:8786.")
    ] = None,
    cluster_option: Annotated[
        list[str] | None, typer.Option(help="Setting of the cluster as key=value, repeatable.")
    ] = None,
) -> None:
    """Label structures with a teacher; goes on where it stopped."""
    from openmm_mlffd.training.environments import installed_python
    from openmm_mlffd.training.label import Limits, TeacherChoice, format_summary
    from openmm_mlffd.training.label import label as run
    from openmm_mlffd.training.parallel import choose_workers
    from openmm_mlffd.training.sources import FirstOf, open_source
    from openmm_mlffd.training.teachers import parse_options
    from openmm_mlffd.training.usage import Watch

    installed = installed_python(teacher)
    choice = TeacherChoice(
        name=teacher,
        options=parse_options(teacher_option or []),
        python=teacher_python or (str(installed) if installed else None),
        timeout=timeout,
        batch_atoms=batch_atoms,
    )
    watch = Watch()
    source = open_source(structures, charge=charge, add_hydrogens=add_hydrogens)
    summary = run(
        source if first is None else FirstOf(source, first),
        output,
        choice,
        limits=Limits(max_force=max_force, max_net_force=max_net_force),
        shard_size=shard_size,
        workers=choose_workers(workers, cluster, cluster_option or []),
    )
    typer.echo(format_summary(summary))
    typer.echo(watch.report(summary.new, summary.starting))
    if summary.dataset is None:
        raise typer.Exit(1)
