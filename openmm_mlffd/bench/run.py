"""The benchmark: sections that are measured one after the other, printed and stored as JSON."""

import importlib.util
import json
import logging
import platform as host
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import torch
from numpy.typing import NDArray

import openmm_mlffd
from openmm_mlffd.bench import agreement, timing
from openmm_mlffd.bench.compare import slower
from openmm_mlffd.bench.figure import draw
from openmm_mlffd.bench.floors import floors
from openmm_mlffd.bench.systems import Structure, relaxed, water
from openmm_mlffd.bench.teachers import WEIGHTS, teacher_times
from openmm_mlffd.engines import PRECISIONS, open_evaluator
from openmm_mlffd.evaluator import Evaluator, StudentSource, resolve_device
from openmm_mlffd.painn import PaiNN

SECTIONS = ("agreement", "overhead", "speed", "batch", "drift", "profile")
ENGINES = ("python", "torchscript", "eager")
BATCH = (32, 50)
"""Systems and atoms in each, of the section "batch"."""

_TEACHER_LIMIT = 150.0  # s

_logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Bench:
    """What to measure, and what was."""

    source: StudentSource
    """The student."""

    output: Path
    """Folder for ``bench.json``."""

    sizes: Sequence[int]
    """Numbers of atoms."""

    engines: Sequence[str] = ENGINES
    """Of `ENGINES`."""

    precisions: Sequence[str] = ("single", "mixed")
    """Of the engines that have them."""

    device: torch.device = field(default_factory=resolve_device)
    """Of the student."""

    teachers: Sequence[str] = ()
    """Teachers' architectures to be timed in the section "speed"."""

    teacher_python: Callable[[str], Path | None] = lambda name: None
    """Python of the environment of a teacher; None for this one."""

    echo: Callable[[str], object] = _logger.info
    """Where each line goes."""

    results: dict[str, Any] = field(default_factory=dict)
    """By section, as they are stored."""

    def run(self, sections: Sequence[str]) -> bool:
        """Measure; whether nothing failed. What fails is told and does not stop the rest."""
        unknown = sorted(set(sections) - set(SECTIONS))
        if unknown:
            raise ValueError(f"there is no section {unknown[0]!r}; there are {', '.join(SECTIONS)}")
        self.output.mkdir(parents=True, exist_ok=True)
        self.results["host"] = _describe(self.device)
        self.echo(" ".join(f"{k}: {v}" for k, v in self.results["host"].items()))
        fine = True
        for name in sections:
            rows = self.results[name] = []
            self.echo(f"\n== {name}")
            start = time.perf_counter()
            for row in getattr(self, f"_{name}")():
                rows.append(row)
                fine &= "error" not in row
                self.echo("  ".join(f"{k} {_short(v)}" for k, v in row.items()))
                self._store()
            self.echo(f"({time.perf_counter() - start:.0f} s)")
        if any("step" in row or "bare" in row for row in self.results.get("speed", [])):
            if importlib.util.find_spec("matplotlib") is None:
                self.echo("no figure: pip install matplotlib")
            else:
                draw(self.results, self.output / "bench.png")
        return fine

    def compare(self, reference: Path) -> bool:
        """Tell what is slower than in a stored benchmark; whether nothing is."""
        found = slower(self.results, json.loads(reference.read_text()))
        for line in found:
            self.echo(f"slower than {reference}: {line}")
        if not found:
            self.echo(f"nothing is slower than {reference}")
        return not found

    @property
    def platform(self) -> str:
        """OpenMM's platform for the device."""
        return "CUDA" if self.device.type == "cuda" else "Reference"

    def _store(self) -> None:
        (self.output / "bench.json").write_text(json.dumps(self.results, indent=1) + "\n")

    def _guarded(
        self, row: dict[str, Any], measure: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """The row with what was measured, or with the reason why not."""
        try:
            return row | measure()
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            return row | {"error": "out of memory"}
        except Exception as error:
            if "out of memory" in str(error):
                torch.cuda.empty_cache()
                return row | {"error": "out of memory"}
            self.echo("".join(traceback.format_exception(error)[-6:]))
            return row | {"error": f"{type(error).__name__}: {str(error)[:300]}"}

    def _agreement(self) -> Iterator[dict[str, Any]]:
        potential = self.source.load(device=self.device, precision="double")
        for name, s in agreement.structures(potential).items():
            exact = Evaluator(potential, s.numbers).compute(s.positions, s.cell)
            for precision in agreement.PRECISIONS:
                yield self._guarded(
                    {"structure": name, "precision": precision},
                    partial(agreement.deviation, potential, s, exact, precision),
                )

    def _structures(self) -> Iterator[tuple[Structure, dict[str, Any] | None]]:
        """Relaxed water of each size; or, as it is, with the row that says why not."""
        for n in self.sizes:
            structure = water(n)
            relax = partial(self._relaxed, structure)
            found = self._guarded(
                {"atoms": len(structure.numbers)},
                lambda relax=relax: {"positions": relax()},  # type: ignore[misc]
            )
            positions = found.pop("positions", None)
            if positions is None:
                yield structure, found
            else:
                yield structure._replace(positions=positions), None

    def _relaxed(self, structure: Structure) -> NDArray[np.float64]:
        numbers = structure.numbers.tolist()
        evaluator = open_evaluator(self.source, numbers, device=self.device)
        return relaxed(evaluator, structure.positions, structure.cell)

    def _overhead(self) -> Iterator[dict[str, Any]]:
        for n in self.sizes:
            s, precision = water(n), self.precisions[0]
            measure = partial(timing.callback_time, self.source, s, precision)
            row: dict[str, Any] = {"atoms": len(s.numbers), "engine": "python"}
            row["precision"] = precision
            yield self._guarded(
                row,
                lambda measure=measure: {"callback": measure()["median"]},  # type: ignore[misc]
            )

    def _batch(self) -> Iterator[dict[str, Any]]:
        potential = self.source.load(device=self.device, precision="double")
        n_systems, n_atoms = BATCH
        row: dict[str, Any] = {"systems": n_systems, "atoms": n_atoms, "precision": "single"}
        yield self._guarded(row, partial(timing.batch_time, potential, n_systems, n_atoms))

    def _speed(self) -> Iterator[dict[str, Any]]:
        structures = []
        for s, failed in self._structures():
            if failed:
                yield failed
                continue
            structures.append(s)
            n = len(s.numbers)  # whole molecules: not quite what was asked for
            empty = partial(self._step, s, None, "single")
            yield self._guarded({"atoms": n, "engine": "none"}, empty)
            for engine in self.engines:
                for precision in self.precisions if engine != "eager" else ("single",):
                    row: dict[str, Any] = {"atoms": n, "engine": engine, "precision": precision}
                    if engine != "torchscript":  # the evaluation is that of "python"
                        row = self._guarded(row, partial(self._bare, s, engine, precision))
                    if "error" not in row:
                        row = self._guarded(row, partial(self._step, s, engine, precision))
                    yield row
        for name in self.teachers:
            for row in teacher_times(
                name, structures, device=str(self.device), python=self.teacher_python(name),
                limit=_TEACHER_LIMIT,
            ):  # fmt: skip
                yield {"engine": name, "precision": WEIGHTS} | row

    def _bare(self, structure: Structure, engine: str, precision: str) -> dict[str, Any]:
        def make() -> Any:
            return open_evaluator(
                self.source,
                structure.numbers.tolist(),
                kernels="fused" if engine == "python" else "eager",
                precision=precision,
                device=self.device,
            )

        atoms = len(structure.numbers)
        memory = timing.device_memory(make, structure)
        evaluator = make()
        found = timing.evaluation_time(evaluator, structure)
        rebuilt = timing.evaluation_time(evaluator, structure, shift=2.0)
        return {
            "bare": found["median"], "bare_fastest": found["fastest"], "n_bare": found["n"],
            "ns_per_atom": 1e9 * found["median"] / atoms, "bare_rebuilt": rebuilt["median"],
        } | self._floors(precision, atoms) | {
            f"{name}_bytes_per_atom": value / atoms for name, value in memory.items()
        }  # fmt: skip

    def _floors(self, precision: str, n_atoms: int) -> dict[str, float]:
        """The least that bytes and operations can take, where the device is known."""
        potential = self.source.load(precision="double")
        if not isinstance(potential.network, PaiNN):
            return {}
        least = floors(potential, precision=precision)
        found = least.seconds(self.results["host"]["device"], n_atoms)
        times = {} if found is None else {"floor_bytes": found[0], "floor_operations": found[1]}
        return {
            "bytes_per_atom": least.bytes_per_atom, "operations_per_atom": least.operations_per_atom
        } | times  # fmt: skip

    def _step(self, structure: Structure, engine: str | None, precision: str) -> dict[str, Any]:
        found = timing.step_time(
            self.source, structure, engine=engine, precision=precision, platform=self.platform,
            device=str(self.device),
        )  # fmt: skip
        return {"step": found["median"], "step_fastest": found["fastest"], "n_step": found["n"]}

    def _drift(self) -> Iterator[dict[str, Any]]:
        small = self.device.type == "cpu"
        structure = water(51 if small else 999)
        structure = structure._replace(positions=self._relaxed(structure))
        for precision in ("single", "mixed"):
            measure = partial(
                agreement.energy_drift, self.source, structure, precision, platform=self.platform,
                n_steps=100 if small else 10_000,
            )  # fmt: skip
            yield self._guarded({"atoms": len(structure.numbers), "precision": precision}, measure)

    def _profile(self) -> Iterator[dict[str, Any]]:
        if self.device.type != "cuda":
            self.echo("needs a GPU")
            return
        potential = self.source.load(device=self.device, precision="double")
        for structure, failed in self._structures():
            if failed:
                yield failed
                continue
            for precision in self.precisions:
                row: dict[str, Any] = {"atoms": len(structure.numbers), "precision": precision}
                measure = partial(agreement.kernel_times, potential, structure, precision)
                found = self._guarded(row, lambda measure=measure: {"kernels": measure()})  # type: ignore[misc]
                for entry in found.pop("kernels", []):
                    yield row | entry
                if "error" in found:
                    yield found


def run_bench_command(
    model: str | None,
    *,
    sections: str,
    sizes: str,
    engines: str,
    precisions: str,
    device: str | None,
    output: Path,
    echo: Callable[[str], object],
    teachers: str = "",
    teacher_python: Callable[[str], Path | None] = lambda name: None,
    compare: Path | None = None,
) -> bool:
    """What `mlffd bench` does; lists are separated by commas. Whether all is well.

    Raises
    ------
    ValueError
        If a word or a number in the lists is not known, or the device or student is not there.
    """
    for words, known in [
        (sections, SECTIONS), (engines, ENGINES), (precisions, PRECISIONS),
    ]:  # fmt: skip
        for word in words.split(","):
            if word not in known:
                raise ValueError(f"{word!r} is none of {', '.join(known)}")
    if not all(n.isdecimal() and int(n) > 1 for n in sizes.split(",")):
        raise ValueError(f"sizes must be numbers of atoms with commas between, got {sizes!r}")
    if compare is not None and not compare.is_file():
        raise ValueError(f"there is no stored benchmark {compare}")
    bench = Bench(
        source=StudentSource.find(model),
        output=output,
        sizes=[int(n) for n in sizes.split(",")],
        engines=engines.split(","),
        precisions=precisions.split(","),
        device=resolve_device(device),
        teachers=[name for name in teachers.split(",") if name],
        teacher_python=teacher_python,
        echo=echo,
    )
    fine = bench.run(sections.split(","))
    if compare is not None:
        fine &= bench.compare(compare)
    return fine


def _describe(device: torch.device) -> dict[str, str]:
    name = host.processor() or host.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "device": name,
        "torch": torch.__version__,
        "openmm": openmm.Platform.getOpenMMVersion(),
        "openmm_mlffd": openmm_mlffd.__version__,
    }


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float | np.floating) else str(value)
