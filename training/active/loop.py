"""The loop of `mlffd active`: explore, curate, label, train, judge; round after round.

Each stage leaves a file that gets its name when it is complete, so that the same command goes on
with the first that is not there, however the last one ended.
"""

import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from openmm_mlffd.modelfile import find_student, load_student, read_header
from openmm_mlffd.novelty import novelty_path
from openmm_mlffd.storage import replacing
from openmm_mlffd.training.active import curate
from openmm_mlffd.training.active.config import ActiveConfig
from openmm_mlffd.training.active.explore import (
    Frames,
    Students,
    batches_of,
    explore,
    read_frames,
    threshold_of,
    write_frames,
)
from openmm_mlffd.training.active.report import format_round, format_rounds
from openmm_mlffd.training.active.starts import HeldOut, read_starts
from openmm_mlffd.training.batches import StructureSource, make_batch
from openmm_mlffd.training.config import ConfigError, DataConfig, ModelConfig, TrainConfig
from openmm_mlffd.training.environments import installed_python
from openmm_mlffd.training.evaluate import evaluate
from openmm_mlffd.training.hdf5 import Dataset
from openmm_mlffd.training.header import rounded
from openmm_mlffd.training.label import Limits, TeacherChoice, label
from openmm_mlffd.training.novelty import NEVER, fit_novelty
from openmm_mlffd.training.parallel import Workers
from openmm_mlffd.training.shards import Kind, locked
from openmm_mlffd.training.sources import open_source
from openmm_mlffd.training.train import STUDENT, Trainer, pick_device

log = logging.getLogger(__name__)

KIND = Kind("mlffd-active", "train.h5", "done", "at work")
SETTINGS = "settings.json"
ROUND = "round.json"
_FREE = ("rounds", "device", "output")  # may change between commands

Echo = Callable[[str], object]


class Deadline:
    """The time that a command may take.

    Parameters
    ----------
    minutes
        From now on; None for no limit.
    """

    def __init__(self, minutes: float | None) -> None:
        self._end = None if minutes is None else time.monotonic() + 60.0 * minutes

    def minutes_left(self) -> float | None:
        """None for no limit."""
        return None if self._end is None else max(0.0, (self._end - time.monotonic()) / 60.0)

    def check(self) -> None:
        """Raise `Unfinished` if there is no time left."""
        if self.minutes_left() == 0.0:
            raise Unfinished("the time that was given is used up; the same command goes on")


class Unfinished(Exception):
    """The loop has to be gone on with by the same command."""


class OnlyLabels(Exception):
    """A round has labels, and no more is wanted."""


class Outcome(NamedTuple):
    """What a loop came to."""

    student: Path
    """The current student: the last that was accepted."""

    rounds: list[dict[str, Any]]
    """Content of each `round.json`."""

    finished: bool
    """Whether all rounds are done, or nothing new was found."""


def run_active(
    config: ActiveConfig,
    *,
    max_minutes: float | None = None,
    labels_only: bool = False,
    echo: Echo = log.info,
) -> Outcome:
    """Do all rounds, or go on with them.

    Parameters
    ----------
    config
        Everything that decides the result.
    max_minutes
        Stop after so long, between batches of runs or in the training.
    labels_only
        End when a round has labels, before the training; a later call without goes on.
    echo
        Is given lines of text.

    Raises
    ------
    ConfigError
        If the folder was begun with other settings, or a file does not do.
    LabelError, TeacherError
        If the teacher cannot be started, or a folder not be written.
    """
    folder = Path(config.output)
    with locked(folder, KIND):
        _same_settings(folder, config)
        loop = _Loop(config, folder, Deadline(max_minutes), echo)
        loop.labels_only = labels_only
        finished = True
        try:
            loop.run()
        except OnlyLabels as where:
            echo(str(where))
        except Unfinished as reason:
            echo(str(reason))
            finished = False
    return Outcome(loop.students[0], loop.rounds, finished)


def _same_settings(folder: Path, config: ActiveConfig) -> None:
    values = {k: v for k, v in asdict(config).items() if k not in _FREE}
    path = folder / SETTINGS
    if path.exists():
        before = json.loads(path.read_text("utf-8"))
        changed = [k for k in values if before.get(k) != json.loads(json.dumps(values[k]))]
        if changed:
            raise ConfigError(
                f"{folder}: was begun with other settings for {', '.join(changed)}; give them as "
                "they were, or choose another output folder"
            )
    write_json(path, values)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, as a whole or not at all."""
    with replacing(path) as file:
        file.write((json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


class _Loop:
    """The state of a loop: which students there are, and which rounds are done."""

    def __init__(self, config: ActiveConfig, folder: Path, deadline: Deadline, echo: Echo) -> None:
        self.config, self.folder = config, folder
        self.deadline, self.echo, self.labels_only = deadline, echo, False
        self.students = [find_student(s) for s in (config.student, *config.explore.committee)]
        self.rounds: list[dict[str, Any]] = []
        self.held_out = HeldOut.of(config.data)
        known = load_student(self.students[0]).numbers
        self.starts = read_starts(config.explore.starts, self.held_out, known)
        for reason, n in self.starts.skipped.items():
            echo(f"{n} starts left out: {reason}")

    @property
    def device(self) -> str | None:
        """For evaluators; None takes a GPU if there is one."""
        return None if self.config.device == "auto" else self.config.device

    def run(self) -> None:
        """All rounds."""
        for number in range(1, self.config.rounds + 1):
            place = self.folder / f"round-{number:03d}"
            place.mkdir(exist_ok=True)
            if not (place / ROUND).exists():
                self.echo(f"round {number} with {self.students[0]}")
                _Round(self, number, place).run()
            result = json.loads((place / ROUND).read_text("utf-8"))
            self.rounds.append(result)
            if result["accepted"]:
                self.students = [place / name for name in result["students"]]
            (self.folder / "rounds.md").write_text(format_rounds(self.rounds), encoding="utf-8")
            if not result["labelled"]:
                frames = result["explored"]["frames"]
                self.echo(
                    f"the teacher labelled none of {frames} structures"
                    if frames
                    else "nothing was found that the student does not know"
                )
                return

    def labels_before(self, number: int) -> list[Path]:
        """Dataset files that earlier rounds labelled."""
        files = [self.folder / f"round-{k:03d}/labels/dataset.h5" for k in range(1, number)]
        return [f for f in files if f.exists()]


class _Round:
    """One round in its folder."""

    def __init__(self, loop: _Loop, number: int, folder: Path) -> None:
        self.loop, self.number, self.folder = loop, number, folder
        self.config = loop.config

    def run(self) -> None:
        """All stages that are not done."""
        if not (self.folder / "candidates.h5").exists():
            # what the exploration costs is not to be lost to a wrong setting
            with self._teacher().start() as teacher:
                self._check_teacher(teacher.describe())
        self._explore()
        summary = self._curate()
        if summary["frames"] == 0:
            self._write(summary, None)
            return
        self._label()
        new = [*self.loop.labels_before(self.number)]
        mine = self.folder / "labels" / "dataset.h5"
        if not mine.exists():
            self._write(summary, None)
            return
        if self.loop.labels_only:
            raise OnlyLabels(f"{mine}: labels of round {self.number}; no training was wanted")
        self._mix([*new, mine])
        for k in range(len(self.loop.students)):
            self._train(k)
        self._novelty()
        self._write(summary, self._judge(mine))

    # explore

    def _explore(self) -> None:
        loop, explored = self.loop, self.folder / "explore"
        explored.mkdir(exist_ok=True)
        config = self.config.explore
        batches = batches_of(loop.starts.structures, self._chosen(), config.batch_atoms)
        n_steps = max(1, round(1e3 * config.picoseconds / config.timestep))
        students = Students(loop.students, loop.device)
        with tqdm(total=n_steps * len(batches), unit=" steps", disable=None) as bar:
            for k, batch in enumerate(batches):
                path = explored / f"batch-{k:04d}.npz"
                if path.exists():
                    bar.update(n_steps)
                    continue
                loop.deadline.check()
                rng = np.random.default_rng([self.config.seed, self.number, k])
                frames = explore(loop.starts.structures, batch, config, students, rng, bar.update)
                write_frames(path, frames)
                bar.set_postfix(frames=len(frames.time), failed=len(frames.failures))

    def _chosen(self) -> list[int]:
        """Starts of this round."""
        rng = np.random.default_rng([self.config.seed, self.number])
        return self.loop.starts.draw(self.config.explore.max_starts, rng)

    def _batches(self) -> list[Frames]:
        return [read_frames(p) for p in sorted((self.folder / "explore").glob("batch-*.npz"))]

    # curate

    def _curate(self) -> dict[str, Any]:
        path = self.folder / "curate.json"
        if path.exists():
            return dict(json.loads(path.read_text("utf-8")))
        loop, batches = self.loop, self._batches()
        known = curate.known_fingerprints([*self.config.data, *loop.labels_before(self.number)])
        choice = curate.choose(batches, loop.starts, self.config.curate, known)
        failures = [
            [loop.starts.groups[int(start)], str(reason)]
            for frames in batches
            for start, reason in frames.failures
        ]
        summary = {
            "threshold": threshold_of(self.config.explore, Students(loop.students, loop.device)),
            "runs": len(self._chosen()),
            "picoseconds": self.config.explore.picoseconds,
            "collected": sum(len(frames.time) for frames in batches),
            "before_failures": int(sum(frames.failing.sum() for frames in batches)),
            "failures": failures,
            "starts_left_out": loop.starts.skipped,
            "frames": 0 if choice is None else len(choice.groups),
            "dropped": {} if choice is None else choice.dropped,
        }
        if choice is not None:
            summary["largest_score"] = min(max(choice.scores), NEVER)  # JSON has no infinity
            curate.write_candidates(
                self.folder / "candidates.h5", choice, loop.held_out.rule,
                f"mlffd active {self.config.name}, round {self.number}",
            )  # fmt: skip
        write_json(path, summary)
        return summary

    # label

    def _teacher(self) -> TeacherChoice:
        teacher = self.config.teacher
        installed = installed_python(teacher.name)
        return TeacherChoice(
            name=teacher.name,
            options=dict(teacher.options),
            python=teacher.python or (str(installed) if installed else None),
            timeout=teacher.timeout,
            batch_atoms=teacher.batch_atoms,
        )

    def _check_teacher(self, described: str) -> None:
        known = self.loop.held_out.teacher
        if described != known:
            raise ConfigError(
                f"teacher: the data have labels of {known!r}, the new ones would be of "
                f"{described!r}; energies of two teachers have nothing to do with one another"
            )

    def _label(self) -> None:
        teacher = self.config.teacher
        self.loop.deadline.check()
        summary = label(
            open_source(self.folder / "candidates.h5"),
            self.folder / "labels",
            self._teacher(),
            limits=Limits(max_force=teacher.max_force, max_net_force=teacher.max_net_force),
            shard_size=teacher.shard_size,
            workers=Workers(count=teacher.workers),
        )
        if summary.dataset is None:
            return
        with Dataset(summary.dataset) as dataset:
            self._check_teacher(dataset.teacher)

    # train

    def _mix(self, new: Sequence[Path]) -> None:
        done = self.folder / "mixture.json"
        if done.exists():
            return
        rng = np.random.default_rng([self.config.seed, self.number, 7])
        mixture = curate.mix(
            self.folder / "train.h5", self.config.data, new, self.config.training, rng
        )
        write_json(done, mixture._asdict())

    def _train(self, member: int) -> None:
        student = self.folder / f"train-{member}" / STUDENT
        done = self.folder / f"trained-{member}.json"
        if done.exists():
            return
        trainer = Trainer(self._train_config(member))
        trainer.run()
        if not trainer.finished:
            raise Unfinished("stopped in the training; the same command goes on")
        target = self.folder / f"student-{member}.safetensors"
        shutil.copy(student, target.with_suffix(".tmp"))
        target.with_suffix(".tmp").replace(target)
        write_json(done, {"steps": trainer.progress.step, "seconds": trainer.progress.seconds})

    def _train_config(self, member: int) -> TrainConfig:
        settings = self.config.training
        current = self.loop.students[member]
        same = (
            "epochs", "batch_atoms", "batch_edges", "fit_minutes", "validate_every",
            "checkpoint_every", "tf32", "compile", "cuda_graph", "loss", "optimizer",
        )  # fmt: skip
        return TrainConfig(
            name=f"{self.config.name}-{self.number}",
            output=str(self.folder / f"train-{member}"),
            data=DataConfig(files=[str(self.folder / "train.h5")]),
            model=model_of(current),
            initial=str(current),
            seed=self.config.seed + 1000 * self.number + member,
            device=self.config.device,
            licence=read_header(current).licence,
            max_minutes=self.loop.deadline.minutes_left(),
            **{name: getattr(settings, name) for name in same},
        )

    def _novelty(self) -> None:
        """Statistics of the retrained student, which the next round begins with."""
        student = self.folder / "student-0.safetensors"
        if self.config.explore.committee or novelty_path(student).exists():
            return
        self.loop.deadline.check()
        fit_novelty(
            student,
            [self.folder / "train.h5"],
            novelty_path(student),
            max_structures=self.config.novelty_structures,
            device=pick_device(self.config.device),
            strict=False,
        )

    # judge

    def _judge(self, labels: Path) -> dict[str, Any]:
        files = self.config.accept.files or self.config.data
        tables = {}
        for name, student in (
            ("before", self.loop.students[0]),
            ("after", self.folder / "student-0.safetensors"),
        ):
            tables[name] = {
                "held_out": self._errors(student, files, self.config.accept.split),
                "new": self._errors(student, [labels], "all")["all"],
            }
        before, after = (tables[k]["held_out"]["all"] for k in ("before", "after"))
        worse = {
            term: after[term] / before[term] - 1.0
            for term in self.config.accept.terms
            if before[term] is not None and after[term] is not None
        }
        return {
            "accepted": bool(worse) and max(worse.values()) <= self.config.accept.tolerance,
            "change": worse,
            "errors": tables,
        }

    def _errors(self, student: Path, files: Sequence[str | Path], split: str) -> dict[str, Any]:
        device = pick_device(self.config.device)
        potential = load_student(student, device=device)
        source = StructureSource([Dataset(f) for f in files], split)
        batches = (make_batch(s, potential, device) for s in source.batches(2000))
        return rounded(evaluate(potential, batches, source.subsets, device))

    def _write(self, summary: dict[str, Any], judged: dict[str, Any] | None) -> None:
        n, manifest = len(self.loop.students), self.folder / "labels" / "manifest.json"
        failed: list[Any] = []
        if manifest.exists():
            shards = json.loads(manifest.read_text("utf-8"))["shards"].values()
            failed = [f for shard in shards for f in shard["failures"]]
        read = partial(_read_if_there, self.folder)
        result = {
            "round": self.number,
            "begun_with": [read_header(s).sha256 for s in self.loop.students],
            "students": [f"student-{k}.safetensors" for k in range(n)],
            "explored": summary,
            "labelled": 0 if judged is None else summary["frames"] - len(failed),
            "not_labelled": [reason for _, reason in failed],
            "mixture": read("mixture.json"),
            "trained": [read(f"trained-{k}.json") for k in range(n)],
            "accepted": False,
            **(judged or {}),
        }
        text = format_round(result)
        with replacing(self.folder / "round.md") as file:
            file.write(text.encode())
        write_json(self.folder / ROUND, result)
        self.loop.echo(text)


def _read_if_there(folder: Path, name: str) -> Any:
    path = folder / name
    return json.loads(path.read_text("utf-8")) if path.exists() else None


def model_of(student: Path) -> ModelConfig:
    """The settings of a student's architecture, as a training configuration has them."""
    header = read_header(student)
    shape = header.architecture
    tail = bool(shape.get("tail", False))
    return ModelConfig(
        elements=list(header.elements),
        n_channels=shape["n_channels"],
        n_interactions=shape["n_interactions"],
        n_basis=shape["n_basis"],
        cutoff=float(shape.get("message_cutoff", header.cutoff)),
        norm_softening=shape.get("norm_softening", 1e-2),
        filters=shape.get("filters", "sine"),
        pair_filters=shape.get("pair_filters", False),
        charges=shape.get("charges", False),
        tail_cutoff=header.cutoff if tail else None,
    )
