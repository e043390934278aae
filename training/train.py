"""The training loop: seeded, logged, and resumed exactly where it stopped."""

import copy
import logging
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from openmm_mlffd.evaluator import resolve_device
from openmm_mlffd.modelfile import StudentHeader, load_student, make_potential, save_student
from openmm_mlffd.potential import Potential
from openmm_mlffd.training import references as fixed
from openmm_mlffd.training.batches import Batch, StructureSource, make_batch, prefetch
from openmm_mlffd.training.boards import Boards
from openmm_mlffd.training.checkpoint import Progress, read_checkpoint, write_checkpoint
from openmm_mlffd.training.config import ConfigError, TrainConfig
from openmm_mlffd.training.distributed import Processes
from openmm_mlffd.training.evaluate import evaluate
from openmm_mlffd.training.hdf5 import Dataset, Structures, take
from openmm_mlffd.training.header import all_seen, portable, rounded, student_header
from openmm_mlffd.training.hessian import load_hessians
from openmm_mlffd.training.loss import TERMS
from openmm_mlffd.training.resident import estimated_gb, share
from openmm_mlffd.training.resident_step import ResidentData
from openmm_mlffd.training.schedule import (
    Pace,
    average_weight,
    check_config,
    learning_rate,
    loss_factors,
)
from openmm_mlffd.training.step import TrainingStep
from openmm_mlffd.training.targets import TrainingBatch, count_totals, training_batch

log = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.pt"
STUDENT = "student.safetensors"
_MAX_BAD_STEPS = 20

Watch = Callable[["Progress", dict[str, dict[str, float]]], bool]


class TrainingError(RuntimeError):
    """Training cannot go on; the last checkpoint is intact."""


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of a name; "auto" is the GPU if there is one, each process's own.

    Raises
    ------
    ConfigError
        If the device does not exist here.
    """
    try:
        if name in ("auto", "cuda") and local_rank and torch.cuda.is_available():
            name = f"cuda:{local_rank}"
        return resolve_device(None if name == "auto" else name)
    except ValueError as error:
        raise ConfigError(f"device: {error}") from error


class Trainer:
    """One training run in one folder.

    Parameters
    ----------
    config
        Everything that decides the result. A run that was stopped goes on from its checkpoint
        if the folder has one of the same configuration.
    watch
        Told the progress and errors by subset after each validation; may stop the run.

    Raises
    ------
    ConfigError
        If the folder's checkpoint cannot be read or was made with other settings.
    """

    def __init__(self, config: TrainConfig, *, watch: Watch | None = None) -> None:
        check_config(config)
        self._watch = watch
        self.config = config
        self.processes = Processes.from_environment()
        self.device = pick_device(config.device, self.processes.local_rank)
        self.folder = Path(config.output)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.datasets = [Dataset(path) for path in config.data.files]
        self.source = self._source("train", config.data.max_structures)
        self.validation = self._source("val", None)
        self.header = student_header(config, self.datasets, self.source)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)
            self.potential = make_potential(self.header).to(self.device).train()
        self.average = copy.deepcopy(self.potential).eval().requires_grad_(False)
        several = self.processes.count > 1
        self.training_step = TrainingStep(
            self.potential, self.average, config, reduce=self.processes.sum if several else None
        )
        self.progress = Progress()
        self._initial: dict[str, Any] | None = None  # where the weights came from
        self._stop = False
        self._pace = Pace(config, 0.0)
        self._fitted_steps: int | None = None
        self._resident: ResidentData | None = None
        resumed = (self.folder / CHECKPOINT).exists()
        if resumed:
            self._load_checkpoint()
        elif config.initial is not None:
            self._start_from(config.initial)
        else:
            references = fixed.fit_references(self.source, self.potential, self.device)
            self._set(references=self.processes.of_first(references))
        if not resumed:
            self.training_step.limit_clashes()
        if config.model.crowding and not resumed:
            whole = self._source("train", None)
            limits = fixed.measure_coordination(whole, self.potential, self.device)
            self._set(coordination_limits=self.processes.of_first(limits))

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """What moves the weights."""
        return self.training_step.optimizer

    def run(self) -> Path:
        """Train to the end, or until told to stop (time limit, Ctrl-C, SIGTERM).

        Returns
        -------
        Path
            The student file: the averaged weights with the smallest validation force error.

        Raises
        ------
        TrainingError
            If too many steps have a loss or gradient that is not finite.
        """
        self._pace = Pace(self.config, self.progress.seconds)
        matmul = torch.backends.cuda.matmul
        tf32_before, matmul.allow_tf32 = matmul.allow_tf32, self.config.tf32
        handlers = self._catch_signals()
        show = self.processes.is_first
        # graphs and compiled kernels run on the current device
        current = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        try:
            with (
                current,
                self._boards() as board,
                tqdm(
                    total=self.n_steps,
                    initial=self.progress.step,
                    unit="step",
                    smoothing=0.02,
                    disable=not show,
                ) as bar,
            ):
                while not (self.finished or self._stop):
                    self._run_epoch(board, bar)
                if self.finished:
                    self._validate(board)
        finally:
            matmul.allow_tf32 = tf32_before
            for number, handler in handlers.items():
                signal.signal(number, handler)
        self.save_checkpoint()
        return self.folder / STUDENT

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or the time or steps that the run was fitted to."""
        fit, steps = self.config.fit_minutes, self.config.fit_steps
        if steps is not None:
            return self.progress.step >= steps
        late = fit is not None and self.progress.seconds >= 60 * fit
        return late or self.progress.epoch >= self.config.epochs

    @property
    def n_steps(self) -> int:
        """Steps of the whole run; packing depends a little on the order, schedules do not."""
        if self.config.fit_steps is not None:
            return self.config.fit_steps
        if self._fitted_steps is not None:
            return self._fitted_steps
        per_epoch = max(1, round(self.source.n_atoms.sum() / self.config.batch_atoms))
        return per_epoch * self.config.epochs

    def _run_epoch(self, board: Boards | None, bar: tqdm) -> None:
        p, config = self.progress, self.config
        for batch in self._work():
            lr = learning_rate(p.step, self.n_steps, config.optimizer)
            self._step(batch, lr)
            p.step += 1
            p.batch += 1
            bar.update()
            if p.step % 50 == 0:
                self._log(board, bar, lr)
            if p.step % config.validate_every == 0:
                self._validate(board)
            if p.step % config.checkpoint_every == 0:
                self.save_checkpoint()
            if self._pace.is_over():
                log.info("time limit reached at step %d", p.step)
                self._stop = True
            self._stop = self.processes.any(self._stop)
            if self.finished or self._stop:
                return
        p.epoch += 1
        p.batch = 0

    def steps(self) -> Iterator[int]:
        """Do step after step without end and without files; gives the atoms of each.

        For measurements: the learning rate is that of the first step.
        """
        while True:
            for batch in self._work():
                self._step(batch, learning_rate(0, self.n_steps, self.config.optimizer))
                if isinstance(batch, TrainingBatch):
                    yield len(batch.species)
                else:
                    assert self._resident is not None
                    yield self._resident.step.real_atoms(batch)
            self.progress.epoch = (self.progress.epoch + 1) % self.config.epochs

    @property
    def padding(self) -> float:
        """Share of the places for edges that are padding, in the present epoch."""
        return 0.0 if self._resident is None else self._resident.step.padding

    @property
    def shortfall(self) -> str:
        """What was asked for and could not be had; empty if nothing."""
        resident = "" if self._resident is None else self._resident.step.shortfall
        return self.training_step.shortfall + resident

    def _work(self) -> Iterator[int | TrainingBatch]:
        """Batches of the rest of this epoch: their numbers where the data are on the device."""
        p, config = self.progress, self.config
        if self._resident is None and self._fits_device():
            self._resident = ResidentData(
                self.source,
                self.potential,
                self.training_step,
                config,
                processes=self.processes,
                hessian=load_hessians(config.data, self.datasets, self.source),
            )
        if self._resident is not None:
            yield from range(p.batch, self._resident.load_epoch(p.epoch))
            return
        rng = np.random.default_rng([config.seed, p.epoch])
        structures = self.source.batches(config.batch_atoms, rng=rng, first=p.batch)
        who = self.processes
        if who.count > 1:
            structures = (_share_of(s, who.rank, who.count) for s in structures)
        yield from prefetch(
            structures,
            self.potential,
            self.device,
            convert=lambda batch: training_batch(batch, self.potential),
        )

    def _atoms_per_second(self) -> float:
        """Speed since the first steps, validation included."""
        n_steps = self._pace.speed(self.progress.step)
        if self._resident is None:
            return n_steps * self.config.batch_atoms
        return n_steps * self._resident.step.mean_atoms

    def _fits_device(self) -> bool:
        data = self.config.data
        if not self.source.in_memory or not data.resident_gb:
            size = math.inf
        else:
            size = estimated_gb(self.source, self.potential, self.device)
        fits = size <= data.resident_gb
        if not fits and self.config.loss.hessian:
            raise ConfigError(
                "loss.hessian: Hessian rows need data that are held on the device; raise "
                f"data.memory_gb ({data.memory_gb:g}) and data.resident_gb ({data.resident_gb:g})"
            )
        return fits

    def _step(self, batch: int | TrainingBatch, lr: float) -> None:
        p, config, step = self.progress, self.config, self.training_step
        step.set_controls(
            lr,
            average_weight(p.step, self.n_steps, config.optimizer),
            (p.epoch, p.batch),
            loss_factors(p.step, self.n_steps, config.loss),
        )
        if isinstance(batch, TrainingBatch):
            totals = count_totals(batch, config.loss.angle_threshold)
            self.processes.sum(totals)
            step.run(batch, totals)
        else:
            assert self._resident is not None
            self._resident.step.run(batch)

    def _count_bad_steps(self) -> None:
        # looking waits for the device, so only now and then
        step = self.training_step
        new = int(step.bad_steps)
        if not new:
            return
        step.bad_steps.zero_()
        self.progress.bad_steps += new
        epoch, batch = step.last_bad.int().tolist()
        where = f"batch {batch} of epoch {epoch}"
        log.warning("%d steps left out: loss or gradient not finite, last in %s", new, where)
        if self.progress.bad_steps > _MAX_BAD_STEPS:
            raise TrainingError(
                f"{self.progress.bad_steps} steps had a loss or gradient that is not finite, the "
                f"last in {where}; look for bad labels in {', '.join(self.config.data.files)}, or "
                "lower optimizer.learning_rate"
            )

    def _boards(self) -> AbstractContextManager[Boards | None]:
        if not self.processes.is_first:
            return nullcontext()
        return Boards(
            self.folder,
            self.progress.step,
            project=self.config.wandb_project,
            name=self.config.name,
            settings=portable(self.config),
        )

    def _log(self, board: Boards | None, bar: tqdm, lr: float) -> None:
        self._count_bad_steps()  # waits for the device, so that the clock is right
        fitted = self._pace.fitted_steps(self.progress.step) or 0
        times = self.processes.of_first([self._pace.seconds(), fitted])
        self.progress.seconds, self._fitted_steps = times[0], int(times[1]) or None
        if board is None:
            return
        terms = dict(zip(TERMS, self.training_step.losses.tolist(), strict=True))
        losses = {f"loss/{k}": v for k, v in terms.items() if getattr(self.config.loss, k)}
        losses["loss/total"] = sum(terms.values())
        board.add(losses | {"learning_rate": lr}, self.progress.step)
        bar.set_postfix({"loss": f"{losses['loss/total']:.4f}", "val": f"{self.progress.best:.1f}"})

    def _validate(self, board: Boards | None) -> None:
        """Errors of the average on the validation split; the first process does it for all."""
        if board is not None:
            self.average.energy_bound = 0.0
            subsets = self.validation.subsets
            table = evaluate(self.average, self._validation_batches(), subsets, self.device)
            r = table["all"]
            board.add(
                {
                    f"validation/{k}": v
                    for k, v in r.items()
                    if k not in ("structures", "atoms") and math.isfinite(v)
                },
                self.progress.step,
            )
            p = self.progress
            tqdm.write(
                f"step {p.step} after {p.seconds / 60:.1f} min, {self._atoms_per_second():.0f} "
                f"atoms/s: force MAE {r['force_mae']:.1f} RMSE {r['force_rmse']:.1f} meV/Å, "
                f"energy MAE {r['energy_mae']:.2f} meV/atom, angle {r['angle']:.2f}°"
            )
            value = sum(weight * r[name] for name, weight in self.config.metric.items())
            if value < self.progress.best:
                self.progress.best = value
                self._save_student({"split": "val", "by_subset": rounded(table)})
            if self._watch is not None and self._watch(p, table):
                self._stop = True
        self.progress.best = self.processes.of_first(self.progress.best)

    def _validation_batches(self) -> Iterator[Batch]:
        for structures in self.validation.batches(self.config.batch_atoms):
            yield make_batch(structures, self.average, self.device)

    def _save_student(self, metrics: dict[str, Any]) -> None:
        bound = fixed.measure_energy_bound(self.average, self._validation_batches())
        self.average.energy_bound = bound
        new: dict[str, Any] = {
            "energy_bound": bound,
            "metrics": metrics,
            "training": {"steps": self.progress.step, "config": portable(self.config)},
        }
        if self._initial is not None:
            new["training"]["initial"] = self._initial
            new["dataset"] = all_seen(self.header.dataset, self._initial["dataset"])
        header = StudentHeader(**(asdict(self.header) | new))
        save_student(self.folder / STUDENT, self.average, header)

    def save_checkpoint(self) -> None:
        """Write everything that the rest of the run depends on; the old one stays until done."""
        self._count_bad_steps()
        if not self.processes.is_first:
            return
        step = self.training_step
        state = {
            "config": asdict(self.config),
            "references": self.potential.references,
            "coordination_limits": self.potential.coordination_limits,
            "potential": self.potential.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": step.optimizer.state_dict(),
            "progress": asdict(self.progress),
            "initial": self._initial,
            "clashes": step.clashes_kept,
            "muon": None if step.muon is None else step.muon.state(),
        }
        write_checkpoint(self.folder / CHECKPOINT, state)

    def _load_checkpoint(self) -> None:
        path = self.folder / CHECKPOINT
        state = read_checkpoint(path, self.config, self.device)
        self.potential.load_state_dict(state["potential"])
        self.average.load_state_dict(state["average"])
        self.training_step.load_optimizer(state["optimizer"])
        if self.training_step.muon is not None:
            self.training_step.muon.load(state["muon"])
        self.progress = Progress(**state["progress"])
        names = ("references", "coordination_limits")
        self._set(**{name: state[name] for name in names if name in state})
        self._initial = state.get("initial")
        self.training_step.limit_clashes(state.get("clashes"))
        log.info("resumed from %s at step %d", path, self.progress.step)

    def _start_from(self, path: str) -> None:
        initial = load_student(path, device=self.device)
        for name in ("architecture", "elements", "cutoff", "energy_scale"):
            mine, theirs = getattr(self.header, name), getattr(initial.header, name)
            if name == "architecture":  # weights may learn to live with another softening
                mine, theirs = ({**a, "norm_softening": None} for a in (mine, theirs))
            if mine != theirs:
                raise ConfigError(
                    f"initial: {path} has {name} {theirs}, this run {mine}; they must be the same"
                )
        self.potential.load_state_dict(initial.state_dict())
        self.average.load_state_dict(initial.state_dict())
        self._set(references=initial.header.references)
        if self.config.model.crowding:
            self._set(coordination_limits=initial.header.coordination_limits)
        names = ("name", "sha256", "architecture", "dataset", "training")
        self._initial = {name: getattr(initial.header, name) for name in names}

    def _set(self, **values: list[float] | None) -> None:
        """Numbers of each element, of the student, its average and its file."""
        for name, numbers in values.items():
            for potential in (self.potential, self.average):
                setattr(potential, name, numbers)
        self.header = StudentHeader(**(asdict(self.header) | values))

    def _source(self, split: str, max_structures: int | None) -> StructureSource:
        data = self.config.data
        return StructureSource(
            self.datasets,
            split,
            memory_gb=data.memory_gb,
            max_structures=max_structures,
            block_size=data.block_size,
            seed=self.config.seed,
        )

    def _catch_signals(self) -> dict[int, Any]:
        def stop(number: int, frame: FrameType | None) -> None:
            if self._stop:
                raise KeyboardInterrupt
            log.warning("stopping after this step, with a checkpoint; once more to stop at once")
            self._stop = True

        try:
            return {n: signal.signal(n, stop) for n in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread: signals are not ours
            return {}


def _share_of(structures: Structures, rank: int, count: int) -> Structures:
    n_atoms = np.diff(structures.offsets)
    return take(structures, share(np.arange(len(n_atoms)), n_atoms, count)[rank])


def train(config: TrainConfig) -> tuple[Potential, Path]:
    """Train a student; see `Trainer`. Returns the averaged potential and the student file."""
    trainer = Trainer(config)
    path = trainer.run()
    return trainer.average, path
