"""`mlffd generate`: a recipe in, a file of structures out, with nothing lost on the way."""

import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from openmm_mlffd.training.generation.build import Made, Order, make_shard
from openmm_mlffd.training.generation.plan import Task, plan
from openmm_mlffd.training.generation.recipe import BoxesConfig, LoadedRecipe
from openmm_mlffd.training.hdf5 import SplitRule, Structures, concatenate
from openmm_mlffd.training.parallel import WorkerLost, Workers, run_all
from openmm_mlffd.training.shards import (
    MANIFEST,
    FolderError,
    Kind,
    Manifest,
    Writing,
    locked,
    merge_shards,
    publish,
    remove_leftovers,
    write_shard,
    writing,
)
from openmm_mlffd.training.sources import Frame, pack

KIND = Kind("mlffd-generation", "structures.h5", "generated", "generating")
PLAN = "plan.json"
BOXES_PER_SHARD = 20
"""One box takes as long as so many molecules, and shards are to take alike."""

_REASONS_SHOWN = 10


class Tally(NamedTuple):
    """What was made of a subset, and what it took."""

    subset: str
    systems: int
    """In the shards that were made."""

    planned: int
    """In the recipe."""

    structures: int
    atoms: int
    seconds: float
    """Of the workers, all of them together."""


class Summary(NamedTuple):
    """What a run came to."""

    dataset: Path | None
    """The merged file; None if there is nothing in it."""

    tallies: list[Tally]
    """By subset."""

    failures: list[tuple[int, str]]
    """Place in the plan of each system without structures, and why."""

    new: int = 0
    """Structures that were made in this run; the others were there."""


class Timed(NamedTuple):
    """A shard, and how long it took."""

    made: Made
    seconds: float


def make_timed(order: Order) -> Timed:
    """`make_shard` with a watch."""
    start = time.perf_counter()
    made = make_shard(order)
    return Timed(made, time.perf_counter() - start)


def generate(
    loaded: LoadedRecipe,
    folder: str | Path,
    *,
    workers: Workers | None = None,
    fraction: float = 1.0,
    progress: bool = True,
) -> Summary:
    """Make all structures of a recipe; goes on where an earlier run of the folder stopped.

    Parameters
    ----------
    loaded
        The recipe.
    folder
        Where shards, manifest, plan and, in the end, ``structures.h5`` are written.
    workers
        Who works; None for one process. The result does not depend on it.
    fraction
        Of the shards of each subset; a later run may make more of them.
    progress
        Show a progress bar.

    Raises
    ------
    FolderError
        If the folder holds another recipe, or cannot be written, or workers are lost.
    SourceMissing
        If a source of molecules is not there or has too few.
    """
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"the fraction must be above 0 and at most 1, got {fraction}")
    folder = Path(folder)
    identity = {"recipe": loaded.settings}
    with locked(folder, KIND):
        manifest = Manifest(KIND, folder, loaded.recipe.name, identity)
        remove_leftovers(folder, KIND)
        orders = list(_orders(loaded, _planned(loaded, manifest)))
        chosen = [o for name in loaded.subsets for o in _part(orders, name, fraction)]
        todo = [o for o in chosen if not manifest.is_done(o.name)]
        common = Writing(None, list(loaded.subsets), SplitRule(), _origin(loaded))
        if todo:
            _make(manifest, common, orders, todo, workers or Workers(), progress=progress)
        dataset = merge_shards(manifest, common)
        new = sum(manifest.content["shards"][o.name]["count"] for o in todo)
    return Summary(dataset, _tally(manifest, orders), manifest.failures(), new)


def _origin(loaded: LoadedRecipe) -> str:
    import openmm
    import rdkit

    from openmm_mlffd import __version__

    return (
        f"recipe {loaded.recipe.name}, seed {loaded.recipe.seed}, openmm-mlffd {__version__}, "
        f"RDKit {rdkit.__version__}, OpenMM {openmm.__version__}"
    )


def _planned(loaded: LoadedRecipe, manifest: Manifest) -> list[Task]:
    """The plan of the folder, made and written first if it is not there."""
    path = manifest.folder / PLAN
    if path.exists() and "plan" in manifest.content:
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
            return [Task(*row) for row in rows]
        except ValueError as error:
            raise FolderError(f"{path}: is damaged ({error}); choose a new folder") from error
    tasks = plan(loaded)
    temporary = path.with_name(f".{PLAN}.tmp")
    with writing(path, KIND):
        temporary.write_text(json.dumps(tasks, ensure_ascii=False), encoding="utf-8")
        publish(temporary, path)
    manifest.content["plan"] = {"systems": len(tasks)}
    manifest.save()
    return tasks


def _orders(loaded: LoadedRecipe, tasks: list[Task]) -> Iterator[Order]:
    """Shards of neighbouring systems of one subset."""
    first, number = 0, 0
    while first < len(tasks):
        subset = tasks[first].subset
        size = loaded.recipe.shard_size
        if isinstance(loaded.subsets[subset], BoxesConfig):
            size = max(1, size // BOXES_PER_SHARD)
        last = first
        while last < len(tasks) and last - first < size and tasks[last].subset == subset:
            last += 1
        name = f"shard-{number:05d}.h5"
        folder = str(loaded.folder.resolve())
        yield Order(name, loaded.settings, folder, first, tasks[first:last])
        first, number = last, number + 1


def _part(orders: list[Order], subset: str, fraction: float) -> list[Order]:
    """A fraction of the shards of a subset, spread evenly, at least one."""
    own = [o for o in orders if o.tasks[0].subset == subset]
    n = max(1, round(fraction * len(own)))
    return [own[int(i)] for i in np.unique(np.linspace(0, len(own) - 1, n).round())] if own else []


def _make(
    manifest: Manifest,
    common: Writing,
    orders: list[Order],
    todo: list[Order],
    workers: Workers,
    *,
    progress: bool,
) -> None:
    total, rest = (sum(len(o.tasks) for o in os) for os in (orders, todo))
    with (
        tqdm(total=rest, unit=" systems", disable=None if progress else True) as bar,
        closing(run_all(make_timed, iter(todo), workers)) as outcomes,
    ):
        if rest < total:
            bar.set_description(f"{rest} of {total}")
        for order, outcome in outcomes:
            timed = outcome.result
            if isinstance(outcome.error, WorkerLost):
                timed = _halve(order, workers)
            elif outcome.error is not None:
                raise outcome.error
            _keep(manifest, common, order, timed)
            bar.update(len(order.tasks))
            bar.set_postfix(failed=len(manifest.failures()))


def _halve(order: Order, workers: Workers) -> Timed:
    """A shard that takes its process down: in halves, until the system to blame stands alone."""
    if len(order.tasks) == 1:
        reason = "the process that worked at it ended"
        task = order.tasks[0]
        return Timed(Made([], [(order.first, f"{task.subset} #{task.number}: {reason}")]), 0.0)
    middle = len(order.tasks) // 2
    halves = [
        order._replace(tasks=order.tasks[:middle]),
        order._replace(tasks=order.tasks[middle:], first=order.first + middle),
    ]
    parts = []
    for half in halves:
        ((_, outcome),) = run_all(make_timed, [half], workers)
        if isinstance(outcome.error, WorkerLost):
            parts.append(_halve(half, workers))
        elif outcome.error is not None:
            raise outcome.error
        else:
            parts.append(outcome.result)
    frames = [f for part in parts for f in part.made.frames]
    failures = [f for part in parts for f in part.made.failures]
    return Timed(Made(frames, failures), sum(part.seconds for part in parts))


def _keep(manifest: Manifest, common: Writing, order: Order, timed: Timed) -> None:
    frames = timed.made.frames
    structures = _structures(frames, common.subsets) if frames else None
    entry: dict[str, Any] = {"count": 0, "sha256": None}
    if structures is not None:
        entry = write_shard(manifest, order.name, common, structures, [f.group for f in frames])
    entry |= {
        "subset": order.tasks[0].subset,
        "systems": len(order.tasks),
        "atoms": sum(len(f.numbers) for f in frames),
        "seconds": round(timed.seconds, 3),
        "failures": [list(f) for f in timed.made.failures],
    }
    manifest.add(order.name, entry)


def _structures(frames: list[Frame], subsets: list[str]) -> Structures:
    return concatenate(pack(frame, subsets) for frame in frames)


def _tally(manifest: Manifest, orders: list[Order]) -> list[Tally]:
    planned = Counter(task.subset for order in orders for task in order.tasks)
    shards = manifest.content["shards"].values()
    tallies = []
    for subset, n in planned.items():
        own = [entry for entry in shards if entry["subset"] == subset]
        sums = {k: sum(e[k] for e in own) for k in ("systems", "count", "atoms", "seconds")}
        tallies.append(
            Tally(subset, sums["systems"], n, sums["count"], sums["atoms"], sums["seconds"])
        )
    return tallies


def format_summary(summary: Summary) -> str:
    """A summary as text: what was made, what it took, and what the whole recipe would take."""
    lines = [
        f"{summary.dataset or 'nothing was written'}",
        f"  {'subset':16s} {'systems':>14s} {'structures':>11s} {'atoms':>10s} "
        f"{'ms each':>8s} {'whole':>8s} {'hours':>6s}",
    ]
    whole = hours = 0.0
    for tally in summary.tallies:
        if not tally.systems:
            continue
        factor = tally.planned / tally.systems
        whole += tally.structures * factor
        hours += tally.seconds * factor / 3600.0
        lines.append(
            f"  {tally.subset:16s} {tally.systems:6d}/{tally.planned:<7d} {tally.structures:11d} "
            f"{tally.atoms:10d} {1000 * tally.seconds / max(1, tally.structures):8.1f} "
            f"{tally.structures * factor:8.0f} {tally.seconds * factor / 3600.0:6.2f}"
        )
    systems, planned, structures, atoms = (
        sum(getattr(t, name) for t in summary.tallies)
        for name in ("systems", "planned", "structures", "atoms")
    )
    seconds = sum(t.seconds for t in summary.tallies)
    lines.append(
        f"{structures} structures with {atoms} atoms, of {systems} of {planned} systems, in "
        f"{seconds:.0f} s of workers' time ({structures / max(seconds, 1e-9):.1f} structures/s)"
    )
    if systems < planned:
        lines.append(
            f"extrapolated by subset, the whole recipe: {whole:.0f} structures in {hours:.2f} h of "
            "one worker"
        )
    if summary.failures:
        lines.append(f"{len(summary.failures)} systems failed ({MANIFEST} lists them):")
        reasons = Counter(r.split("): ")[-1].split(": ", 1)[-1] for _, r in summary.failures)
        lines += [f"  {n} × {reason}" for reason, n in reasons.most_common(_REASONS_SHOWN)]
    return "\n".join(lines)
