"""The training loop: seeded, logged, and resumed exactly where it stopped."""

import copy
import logging
import math
import os
import pickle
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from openmm_mlffd.evaluator import resolve_device
from openmm_mlffd.modelfile import StudentHeader, load_student, make_potential, save_student
from openmm_mlffd.potential import Potential
from openmm_mlffd.training.batches import Batch, StructureSource, make_batch, prefetch
from openmm_mlffd.training.config import ConfigError, OptimizerConfig, TrainConfig
from openmm_mlffd.training.evaluate import evaluate
from openmm_mlffd.training.hdf5 import Dataset
from openmm_mlffd.training.loss import loss_terms
from openmm_mlffd.training.references import fit_references, measure_energy_bound

log = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.pt"
STUDENT = "student.safetensors"
_MAX_BAD_STEPS = 20


class TrainingError(RuntimeError):
    """Training cannot go on; the last checkpoint is intact."""


class _SkippingAdamW(torch.optim.AdamW):
    """AdamW whose fused step is left out, on the device, where `found_inf` is not zero."""

    found_inf: Tensor


@dataclass
class Progress:
    """Where a run is."""

    step: int = 0
    """Optimizer steps done."""

    epoch: int = 0
    """Passes over the data finished."""

    batch: int = 0
    """Batches of the current pass done."""

    bad_steps: int = 0
    """Steps left out because the loss or the gradient was not finite."""

    best: float = math.inf
    """Smallest force MAE on the validation set so far [meV/Å]."""


def pick_device(name: str) -> torch.device:
    """The device of a name; "auto" is the GPU if there is one.

    Raises
    ------
    ConfigError
        If the device does not exist here.
    """
    try:
        return resolve_device(None if name == "auto" else name)
    except ValueError as error:
        raise ConfigError(f"device: {error}") from error


def learning_rate(step: int, n_steps: int, config: OptimizerConfig) -> float:
    """Linear warm-up, then cosine from the highest to the final learning rate."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    x = min(1.0, (step - config.warmup_steps) / max(1, n_steps - config.warmup_steps))
    low = config.final_learning_rate
    return low + (config.learning_rate - low) * 0.5 * (1 + math.cos(math.pi * x))


class Trainer:
    """One training run in one folder.

    Parameters
    ----------
    config
        Everything that decides the result. A run that was stopped goes on from its checkpoint
        if the folder has one of the same configuration.

    Raises
    ------
    ConfigError
        If the folder's checkpoint cannot be read or was made with other settings.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.device = pick_device(config.device)
        self.folder = Path(config.output)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.datasets = [Dataset(path) for path in config.data.files]
        self.source = self._source("train", config.data.max_structures)
        self.validation = self._source("val", None)
        self.header = self._header()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)
            self.potential = make_potential(self.header).to(self.device).train()
        self.average = copy.deepcopy(self.potential).eval().requires_grad_(False)
        self.optimizer = _SkippingAdamW(
            self.potential.parameters(),
            lr=config.optimizer.learning_rate,
            weight_decay=config.optimizer.weight_decay,
            fused=True,
        )
        self.progress = Progress()
        self._initial: dict[str, Any] | None = None  # where the weights came from
        self._stop = False
        self._losses: dict[str, Tensor] = {}
        self._bad_steps = torch.zeros((), device=self.device)
        self._last_bad = torch.zeros(2, device=self.device)  # epoch and batch
        if (self.folder / CHECKPOINT).exists():
            self._load_checkpoint()
        elif config.initial is not None:
            self._start_from(config.initial)
        else:
            self._set_references(fit_references(self.source, self.potential, self.device))

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
        started = time.monotonic()
        limit = math.inf if self.config.max_minutes is None else 60 * self.config.max_minutes
        n_batches = self._batches_per_epoch()
        n_steps = n_batches * self.config.epochs
        matmul = torch.backends.cuda.matmul
        tf32_before, matmul.allow_tf32 = matmul.allow_tf32, self.config.tf32
        handlers = self._catch_signals()
        try:
            with (
                SummaryWriter(
                    str(self.folder / "tensorboard"), purge_step=self.progress.step
                ) as board,
                tqdm(total=n_steps, initial=self.progress.step, unit="step", smoothing=0.02) as bar,
            ):
                while self.progress.epoch < self.config.epochs and not self._stop:
                    self._run_epoch(n_steps, started + limit, board, bar)
                if not self._stop:
                    self._validate(board)
        finally:
            matmul.allow_tf32 = tf32_before
            for number, handler in handlers.items():
                signal.signal(number, handler)
        self.save_checkpoint()
        return self.folder / STUDENT

    @property
    def finished(self) -> bool:
        """Whether all epochs are done."""
        return self.progress.epoch >= self.config.epochs

    def _run_epoch(self, n_steps: int, deadline: float, board: SummaryWriter, bar: tqdm) -> None:
        p, config = self.progress, self.config
        rng = np.random.default_rng([config.seed, p.epoch])
        structures = self.source.batches(config.batch_atoms, rng=rng, first=p.batch)
        for batch in prefetch(structures, self.potential, self.device):
            lr = learning_rate(p.step, n_steps, config.optimizer)
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
            if time.monotonic() > deadline:
                log.info("time limit reached at step %d", p.step)
                self._stop = True
            if self._stop:
                return
        p.epoch += 1
        p.batch = 0

    def _step(self, batch: Batch, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        terms = loss_terms(self.potential(batch.graph), batch, self.config.loss)
        loss = torch.stack([t.double() for t in terms.values()]).sum()
        loss.backward()
        clip = self.config.optimizer.clip
        norm = torch.nn.utils.clip_grad_norm_(self.potential.parameters(), clip)
        self._losses = {k: v.detach() for k, v in terms.items()} | {"total": loss.detach()}
        self.optimizer.found_inf = (~(torch.isfinite(norm) & torch.isfinite(loss))).float()
        self.optimizer.step()
        self._update_average()
        self._bad_steps += self.optimizer.found_inf
        for place, number in enumerate((self.progress.epoch, self.progress.batch)):
            self._last_bad[place] = torch.where(
                self.optimizer.found_inf > 0, float(number), self._last_bad[place]
            )

    def _count_bad_steps(self) -> None:
        # looking waits for the device, so only now and then
        new = int(self._bad_steps)
        if not new:
            return
        self._bad_steps.zero_()
        self.progress.bad_steps += new
        epoch, batch = self._last_bad.int().tolist()
        where = f"batch {batch} of epoch {epoch}"
        log.warning("%d steps left out: loss or gradient not finite, last in %s", new, where)
        if self.progress.bad_steps > _MAX_BAD_STEPS:
            raise TrainingError(
                f"{self.progress.bad_steps} steps had a loss or gradient that is not finite, the "
                f"last in {where}; look for bad labels in {', '.join(self.config.data.files)}, or "
                "lower optimizer.learning_rate"
            )

    @torch.no_grad()
    def _update_average(self) -> None:
        # a short memory at first, so that the average forgets the random start
        decay = min(
            self.config.optimizer.ema_decay, (1 + self.progress.step) / (10 + self.progress.step)
        )
        torch._foreach_lerp_(
            list(self.average.parameters()), list(self.potential.parameters()), 1 - decay
        )

    def _log(self, board: SummaryWriter, bar: tqdm, lr: float) -> None:
        self._count_bad_steps()
        step = self.progress.step
        losses = {k: float(v) for k, v in self._losses.items()}
        for name, value in losses.items():
            board.add_scalar(f"loss/{name}", value, step)
        board.add_scalar("learning_rate", lr, step)
        bar.set_postfix({"loss": f"{losses['total']:.4f}", "val": f"{self.progress.best:.1f}"})

    def _validate(self, board: SummaryWriter) -> None:
        self.average.energy_bound = 0.0
        subsets = self.validation.subsets
        table = evaluate(self.average, self._validation_batches(), subsets, self.device)
        for key, value in table["all"].items():
            if key not in ("structures", "atoms") and math.isfinite(value):
                board.add_scalar(f"validation/{key}", value, self.progress.step)
        r = table["all"]
        tqdm.write(
            f"step {self.progress.step}: force MAE {r['force_mae']:.1f} RMSE {r['force_rmse']:.1f} "
            f"meV/Å, energy MAE {r['energy_mae']:.2f} meV/atom, angle {r['angle']:.2f}°"
        )
        if r["force_mae"] < self.progress.best:
            self.progress.best = r["force_mae"]
            self._save_student({"split": "val", "by_subset": _rounded(table)})

    def _validation_batches(self) -> Iterator[Batch]:
        for structures in self.validation.batches(self.config.batch_atoms):
            yield make_batch(structures, self.average, self.device)

    def _save_student(self, metrics: dict[str, Any]) -> None:
        bound = measure_energy_bound(self.average, self._validation_batches())
        self.average.energy_bound = bound
        new = {
            "energy_bound": bound,
            "metrics": metrics,
            "training": {"steps": self.progress.step, "config": _portable(self.config)},
        }
        if self._initial is not None:
            new["training"]["initial"] = self._initial
            new["dataset"] = _all_seen(self.header.dataset, self._initial["dataset"])
        header = StudentHeader(**(asdict(self.header) | new))
        save_student(self.folder / STUDENT, self.average, header)

    def save_checkpoint(self) -> None:
        """Write everything that the rest of the run depends on; the old one stays until done."""
        self._count_bad_steps()
        state = {
            "config": asdict(self.config),
            "references": self.potential.references,
            "potential": self.potential.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": asdict(self.progress),
            "initial": self._initial,
        }
        temporary = self.folder / (CHECKPOINT + ".tmp")
        try:
            with temporary.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.folder / CHECKPOINT)
        finally:
            temporary.unlink(missing_ok=True)

    def _load_checkpoint(self) -> None:
        path = self.folder / CHECKPOINT
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
        except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
            cause = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ConfigError(
                f"{path}: not a checkpoint that can be read ({cause}); remove it to start anew"
            ) from error
        before, now = state["config"], asdict(self.config)
        free = {"output", "device", "max_minutes", "validate_every", "checkpoint_every", "data"}
        changed = [k for k in now if k not in free and before.get(k) != now[k]]
        if changed:
            raise ConfigError(
                f"{path} was made with other settings for {', '.join(changed)}; "
                "give them as they were, or choose another output folder"
            )
        self.potential.load_state_dict(state["potential"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])
        self._set_references(state["references"])
        self._initial = state.get("initial")
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
        self._set_references(initial.header.references)
        names = ("name", "sha256", "architecture", "dataset", "training")
        self._initial = {name: getattr(initial.header, name) for name in names}

    def _set_references(self, references: list[float]) -> None:
        self.potential.references = list(references)
        self.average.references = list(references)
        self.header = StudentHeader(**(asdict(self.header) | {"references": list(references)}))

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

    def _header(self) -> StudentHeader:
        model = self.config.model
        names = ("n_channels", "n_interactions", "n_basis", "norm_softening")
        sizes = {k: getattr(model, k) for k in names}
        return StudentHeader(
            name=self.config.name,
            architecture={"kind": "painn", **sizes},
            elements=list(model.elements),
            references=[0.0] * len(model.elements),
            cutoff=model.cutoff,
            teacher="; ".join(sorted({d.teacher for d in self.datasets})),
            dataset={
                "files": [d.path.name for d in self.datasets],
                "train_structures": len(self.source),
                "train_atoms": int(self.source.n_atoms.sum()),
                "split": [
                    {k: v for k, v in d.attributes.items() if k.startswith("split")}
                    for d in self.datasets
                ],
            },
            licence=self.config.licence,
        )

    def _batches_per_epoch(self) -> int:
        # packing depends a little on the order; the schedule only needs the size
        return max(1, round(self.source.n_atoms.sum() / self.config.batch_atoms))

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


def _rounded(table: dict[str, dict[str, float]]) -> dict[str, dict[str, float | None]]:
    return {
        name: {k: round(v, 3) if math.isfinite(v) else None for k, v in row.items()}
        for name, row in table.items()
    }


def _all_seen(dataset: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    """The training set of both runs together, where one is a part of the other."""
    same = all(dataset[name] == earlier.get(name) for name in ("files", "split"))
    return earlier if same and earlier["train_atoms"] > dataset["train_atoms"] else dataset


def _portable(config: TrainConfig) -> dict[str, Any]:
    """The configuration without folders of the machine."""
    values = asdict(config)
    values["data"]["files"] = [Path(f).name for f in config.data.files]
    if config.initial is not None:
        values["initial"] = Path(config.initial).name
    del values["output"]
    return values


def train(config: TrainConfig) -> tuple[Potential, Path]:
    """Train a student; see `Trainer`. Returns the averaged potential and the student file."""
    trainer = Trainer(config)
    path = trainer.run()
    return trainer.average, path
