"""How fast training is, and where its time goes: `mlffd train CONFIG --profile`."""

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from openmm_mlffd.training.config import TrainConfig
from openmm_mlffd.training.train import Trainer

WAYS = (
    "plain",
    "cached",
    "graphed",
    "compiled",
    "compiled+graphed",
    "fused+graphed",
    "fused+compiled+graphed",
)
"""Batches made on the host; edges held on the device; steps replayed; operations compiled; both;
the same with messages by fused kernels."""

_TOP = 12


@dataclass(frozen=True)
class Timing:
    """Speed of one way to train."""

    way: str
    """One of `WAYS`."""

    atoms_per_second: float
    """Over whole steps, data included."""

    step_ms: float
    """Time of a step [ms]."""

    preparation_s: float
    """Time until the first step is done: edges, compiler, recording [s]."""

    busy: float | None
    """Share of the time in which the GPU computes; None on the CPU."""

    launches: float
    """Kernels, or operations on the CPU, in a step."""

    waste: float
    """Share of the edges' places that are padding."""

    memory_gb: float | None
    """Largest memory of the GPU in use [GB]."""

    top: list[tuple[str, float]]
    """Kernels or operations that take most time, and their share of a step's computing."""

    note: str
    """What did not work as asked for; empty if all did."""


def variants(
    config: TrainConfig, ways: tuple[str, ...] = WAYS
) -> Iterator[tuple[str, TrainConfig]]:
    """The configuration for each way to train."""
    for way in ways:
        resident = config.data.resident_gb or 24.0
        yield (
            way,
            replace(
                config,
                data=replace(config.data, resident_gb=0.0 if way == "plain" else resident),
                compile="on" if "compiled" in way else "off",
                cuda_graph="graphed" in way,
                fused="on" if "fused" in way else "off",
            ),
        )


def measure(config: TrainConfig, way: str, *, n_steps: int = 40, n_profiled: int = 5) -> Timing:
    """Time steps of a configuration, which writes nothing that is kept.

    Parameters
    ----------
    config
        As of `variants`.
    way
        Its name.
    n_steps
        Steps that are timed, after as many as it takes to be ready.
    n_profiled
        Steps that are looked into afterwards.
    """
    with tempfile.TemporaryDirectory() as folder, _tf32(config.tf32):
        trainer = Trainer(replace(config, output=folder))
        on_gpu = trainer.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(trainer.device)

        def wait() -> None:
            if on_gpu:
                torch.cuda.synchronize(trainer.device)

        steps = trainer.steps()
        started = time.perf_counter()
        next(steps)
        wait()
        preparation = time.perf_counter() - started
        _advance(steps, min(5, n_steps))
        wait()
        started = time.perf_counter()
        n_atoms = _advance(steps, n_steps)
        wait()
        seconds = time.perf_counter() - started
        busy, launches, top = _look_into(steps, n_profiled, wait, on_gpu, seconds / n_steps)
        return Timing(
            way=way,
            atoms_per_second=n_atoms / seconds,
            step_ms=1e3 * seconds / n_steps,
            preparation_s=preparation,
            busy=busy,
            launches=launches,
            waste=trainer.padding,
            memory_gb=torch.cuda.max_memory_allocated(trainer.device) / 1e9 if on_gpu else None,
            top=top,
            note=trainer.shortfall,
        )


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, allowed
    try:
        yield
    finally:
        matmul.allow_tf32 = before


def _advance(steps: Iterator[int], n: int) -> int:
    return sum(next(steps) for _ in range(n))


def _look_into(
    steps: Iterator[int], n: int, wait: Callable[[], None], on_gpu: bool, step_s: float
) -> tuple[float | None, float, list[tuple[str, float]]]:
    """Share of time in kernels, kernels per step, and the largest of them."""
    activities = [ProfilerActivity.CPU]
    if on_gpu:
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as found:
        _advance(steps, n)
        wait()
    times: dict[str, float] = {}
    count = 0
    for event in found.events():
        is_kernel = event.device_type == torch.autograd.DeviceType.CUDA
        if is_kernel != on_gpu:
            continue
        microseconds = event.device_time_total if on_gpu else event.self_cpu_time_total
        times[event.name] = times.get(event.name, 0.0) + microseconds
        count += 1
    total = sum(times.values())
    top = sorted(((k[:80], v / max(total, 1e-9)) for k, v in times.items()), key=lambda x: -x[1])
    busy = min(1.0, total * 1e-6 / n / step_s) if on_gpu else None
    return busy, count / n, top[:_TOP]


def profile_training(
    config: TrainConfig,
    *,
    ways: tuple[str, ...] = WAYS,
    n_steps: int = 40,
    output: Path | None = None,
    echo: Callable[[str], None],
) -> list[Timing]:
    """Measure all ways to train, print a table, and write it as JSON if asked to."""
    found: list[Timing] = []
    echo(
        f"{'way':22s} {'atoms/s':>9s} {'ms/step':>8s} {'busy':>5s} {'kernels':>8s} {'padding':>7s} "
        f"{'GB':>5s} {'ready after':>11s}"
    )
    for way, variant in variants(config, ways):
        t = measure(variant, way, n_steps=n_steps)
        found.append(t)
        busy = "-" if t.busy is None else f"{100 * t.busy:.0f}%"
        memory = "-" if t.memory_gb is None else f"{t.memory_gb:.1f}"
        echo(
            f"{t.way:22s} {t.atoms_per_second:9.0f} {t.step_ms:8.2f} {busy:>5s} {t.launches:8.0f} "
            f"{100 * t.waste:6.1f}% {memory:>5s} {t.preparation_s:9.1f} s"
            + (f"  {t.note}" if t.note else "")
        )
    best = max(found, key=lambda t: t.atoms_per_second)
    echo(f"where the time goes, {best.way}:")
    for name, part in best.top:
        echo(f"  {100 * part:5.1f}%  {name}")
    if output is not None:
        output.write_text(json.dumps(describe(found, config), indent=1) + "\n")
    return found


def describe(timings: list[Timing], config: TrainConfig) -> dict[str, Any]:
    """Timings with the hardware and the versions that they are true for."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "device": gpu or "cpu",
        "torch": torch.__version__,
        "batch_atoms": config.batch_atoms,
        "tf32": config.tf32,
        "mixed_precision": config.mixed_precision,
        "timings": [vars(t) for t in timings],
    }
