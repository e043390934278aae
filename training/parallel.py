"""Many pieces of work at once: in processes or threads of this machine, or on a Dask cluster."""

import json
import multiprocessing
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

AHEAD = 2
"""Pieces of work that are given out for each worker, so that none waits."""

Item = TypeVar("Item")
Result = TypeVar("Result")

_CLUSTERS = "local:4, ssh:HOST,HOST, slurm:20 or the address of a scheduler, tcp://HOST:8786"


class WorkerLost(RuntimeError):
    """A process that ended while it worked; the message says at what."""


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Who does the work."""

    count: int = 1
    """Processes or threads of this machine; 0 works without any, one piece after the other."""

    cluster: str | None = None
    """Dask cluster that does it instead, see `cluster_of`."""

    cluster_options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the cluster."""

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError(f"the number of workers must not be negative, got {self.count}")


class Outcome(NamedTuple):
    """What became of a piece of work: a result, or an error."""

    result: Any
    error: BaseException | None


@contextmanager
def cluster_of(text: str, options: Mapping[str, Any]) -> Iterator[tuple[Any, int]]:
    """Client of a Dask cluster, and the number of its workers.

    Parameters
    ----------
    text
        ``local:N``, ``ssh:HOST,HOST``, ``slurm:N`` (jobs, by dask-jobqueue), or the address of a
        scheduler that is there already.
    options
        Keyword arguments of LocalCluster, SSHCluster or SLURMCluster.

    Raises
    ------
    ImportError
        If Dask is not installed.
    ValueError
        If there is no such kind of cluster.
    """
    try:
        from distributed import Client, LocalCluster, SSHCluster
    except ImportError as error:
        raise ImportError(
            "Dask is needed to work on a cluster: pip install 'openmm-mlffd[cluster]'"
        ) from error
    kind, _, rest = text.partition(":")
    settings: dict[str, Any]
    if kind == "local":
        n = _number(rest, text)
        settings = {
            "n_workers": n,
            "threads_per_worker": 1,
            "dashboard_address": None,
        }
        with LocalCluster(**(settings | dict(options))) as cluster, Client(cluster) as client:
            yield client, n
    elif kind == "ssh":
        hosts = [h.strip() for h in rest.split(",") if h.strip()]
        if not hosts:
            raise ValueError(f"{text}: names no host; write {_CLUSTERS}")
        settings = {"worker_options": {"nthreads": 1}}
        # the first is that of the scheduler
        with (
            SSHCluster([hosts[0], *hosts], **(settings | dict(options))) as cluster,
            Client(cluster) as client,
        ):
            yield client, len(hosts)
    elif kind == "slurm":
        try:
            from dask_jobqueue import SLURMCluster
        except ImportError as error:
            raise ImportError(
                "dask-jobqueue is needed for SLURM: pip install 'openmm-mlffd[cluster]'"
            ) from error
        n = _number(rest, text)
        settings = {"cores": 1, "processes": 1, "memory": "4GB"}
        with SLURMCluster(**(settings | dict(options))) as cluster, Client(cluster) as client:
            cluster.scale(jobs=n)
            yield client, n
    elif kind in ("tcp", "tls", "ucx", "ws", "wss"):
        with Client(text, **options) as client:
            yield client, max(1, len(client.scheduler_info()["workers"]))
    else:
        raise ValueError(f"no cluster is called {text!r}; write {_CLUSTERS}")


def _number(rest: str, text: str) -> int:
    if not rest.isdigit() or int(rest) < 1:
        raise ValueError(f"{text}: the number of workers is missing; write {_CLUSTERS}")
    return int(rest)


def run_all(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    workers: Workers,
    *,
    threads: bool = False,
    stop: Callable[[], object] = lambda: None,
) -> Generator[tuple[Item, Outcome]]:
    """Results of a function in the order in which they are ready.

    A few items per worker are taken from the iterable ahead of the results, not more, so that
    both may be larger than memory. An item whose process is lost is tried once more, by itself.

    Parameters
    ----------
    function
        Of a module, so that other processes find it.
    items
        Its arguments, each of them picklable.
    workers
        Who works.
    threads
        Threads instead of processes on this machine: for work that waits for other processes.
    stop
        Called when the results are no longer wanted, to end threads that are at work.

    Yields
    ------
    tuple
        Item and outcome; an exception of the function is its error, and so is `WorkerLost`.
    """
    if workers.cluster is not None:
        with cluster_of(workers.cluster, workers.cluster_options) as (client, n):
            # without its own retries a worker that is lost would take its work with it
            yield from _on(client.get_executor(pure=False, retries=2), function, items, n, [])
        return
    if workers.count == 0:
        for item in items:
            yield item, _outcome(function, item)
        return
    if threads:
        with ThreadPoolExecutor(workers.count) as executor:
            try:
                yield from _on(executor, function, items, workers.count, [])
            except BaseException:
                stop()
                raise
        return
    rest = iter(items)
    while True:
        lost: list[Item] = []
        with _processes(workers.count) as executor:
            yield from _on(executor, function, rest, workers.count, lost)
        if not lost:
            return
        for item in lost:
            with _processes(1) as executor:
                yield item, _wait(executor.submit(function, item))


def _processes(count: int) -> ProcessPoolExecutor:
    # forks of a process with threads may hang, and torch has threads
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))


def _on(
    executor: Executor,
    function: Callable[[Item], Result],
    items: Iterable[Item],
    n_workers: int,
    lost: list[Item],
) -> Iterator[tuple[Item, Outcome]]:
    """Outcomes; where the executor breaks, what it was given goes to `lost`."""
    rest = iter(items)
    running: dict[Future[Result], Item] = {}
    broken = False

    def fill() -> None:
        while not broken and len(running) < AHEAD * n_workers:
            for item in rest:
                running[executor.submit(function, item)] = item
                break
            else:
                return

    try:
        fill()
        while running:
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                item = running.pop(future)
                if isinstance(future.exception(), BrokenExecutor):
                    broken = True
                    lost.append(item)
                    continue
                yield item, _wait(future)
            fill()
    finally:
        for future in running:
            future.cancel()


def _outcome(function: Callable[[Item], Result], item: Item) -> Outcome:
    try:
        return Outcome(function(item), None)
    except Exception as error:
        return Outcome(None, error)


def _wait(future: Future[Result]) -> Outcome:
    try:
        return Outcome(future.result(), None)
    except BrokenExecutor as error:
        return Outcome(None, WorkerLost(f"the process that worked at it ended ({error})"))
    except Exception as error:
        if type(error).__name__ == "KilledWorker":
            return Outcome(None, WorkerLost(f"workers that worked at it ended ({error})"))
        return Outcome(None, error)


def choose_workers(count: int, cluster: str | None, options: list[str]) -> Workers:
    """Workers from what a command was given; the cluster's options are written key=value.

    Values are JSON where they can be, else text.

    Raises
    ------
    ValueError
        If an option has no equals sign, or there are options and no cluster.
    """
    if options and cluster is None:
        raise ValueError("options of a cluster were given, but no cluster")
    values = {}
    for pair in options:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"an option of the cluster is given as key=value, got {pair!r}")
        try:
            values[key.strip()] = json.loads(value)
        except ValueError:
            values[key.strip()] = value
    return Workers(count=count, cluster=cluster, cluster_options=values)
