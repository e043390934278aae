"""`mlffd tune`: a search for hyper-parameters, shared by processes and resumed from its file."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from openmm_mlffd.modelfile import load_student
from openmm_mlffd.storage import replacing
from openmm_mlffd.training.checkpoint import Progress
from openmm_mlffd.training.config import (
    ConfigError,
    TrainConfig,
    check_keys,
    load_as,
    load_config,
    read_settings,
)
from openmm_mlffd.training.shards import FolderError, Kind, locked
from openmm_mlffd.training.train import STUDENT, Trainer

try:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import TrialState
except ImportError as error:
    raise ImportError(
        f"Optuna is needed ({error}): pip install 'openmm-mlffd[training]'"
    ) from error

KIND = Kind("mlffd-trial", "trial.json", "trained", "training")
STUDY = "study"
JOURNAL = "study.journal"
TRIAL = "trial.json"
LOOKS = 20
"""Runs are compared at so many points of their budget."""

Echo = Callable[[str], object]


@dataclass(frozen=True, kw_only=True)
class Range:
    """Values that a setting may take: `choices`, or numbers from `low` to `high`."""

    choices: list[Any] | None = None
    low: float | None = None
    high: float | None = None
    log: bool = False
    """Draw from the logarithm."""

    step: float | None = None
    """Only low, low + step, …"""

    integer: bool = False
    """Only whole numbers."""


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """What is searched, and for how long."""

    trials: int = 30
    """Runs that are finished or pruned, of all processes together."""

    minutes: float | None = None
    """Budget of a run; the learning rate's schedule is fitted to it. This …"""

    steps: int | None = None
    """… or that."""

    metric: dict[str, float] = field(default_factory=lambda: {"force_mae": 1.0})
    """Validation errors to their weights; their sum is made small."""

    startup: int = 5
    """Runs before any is pruned."""

    warmup: float = 0.2
    """Share of its budget before which a run is not pruned."""

    seed: int = 0
    """Of the search."""

    space: dict[str, Any]
    """Setting, such as optimizer.learning_rate, to a `Range`."""


def load_search(path: str | Path) -> tuple[SearchConfig, dict[str, Range]]:
    """Read the file of a search.

    Raises
    ------
    ConfigError
        If it cannot be read, or a setting is unknown, of the wrong type or without meaning.
    """
    config = load_as(SearchConfig, path)
    if (config.minutes is None) == (config.steps is None):
        raise ConfigError(f"{path}: a run needs a budget, either `minutes` or `steps`")
    ranges = {}
    for name, values in config.space.items():
        check_keys(values, Range, str(path), f"space.{name}.")
        found = ranges[name] = Range(**values)
        numbers = found.low is not None and found.high is not None and found.low < found.high
        if (not found.choices) == (not numbers):
            raise ConfigError(
                f"{path}: space.{name} needs either `choices` or `low` below `high`, got {values}"
            )
        if found.log and (found.step is not None or not numbers or found.low <= 0):  # type: ignore[operator]
            raise ConfigError(f"{path}: space.{name}: log needs a positive low, and no step")
    if not ranges:
        raise ConfigError(f"{path}: space names no setting")
    return config, ranges


class Search:
    """One search in one folder; several processes may work at it.

    Parameters
    ----------
    base
        YAML file of the training.
    space
        YAML file of the search.
    folder
        Where journal, trials and tables are written.
    overrides
        Settings of the training as ``key=value``.
    echo
        Is given lines of text.

    Raises
    ------
    ConfigError
        If a file cannot be used, or a setting of the space does not exist.
    """

    def __init__(
        self,
        base: str | Path,
        space: str | Path,
        folder: str | Path,
        *,
        overrides: list[str] | None = None,
        echo: Echo = lambda _: None,
    ) -> None:
        self.base, self.overrides = base, list(overrides or [])
        self.config, self.ranges = load_search(space)
        self.folder, self.echo = Path(folder), echo
        self.folder.mkdir(parents=True, exist_ok=True)
        first = {name: _first(r) for name, r in self.ranges.items()}
        self.settings(first, self.folder / "check")  # unknown settings are refused here
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        backend = JournalFileBackend(str(self.folder / JOURNAL))
        self.study = optuna.create_study(
            study_name=STUDY,
            storage=JournalStorage(backend),
            pruner=optuna.pruners.MedianPruner(
                n_startup_trials=self.config.startup,
                n_warmup_steps=math.ceil(self.config.warmup * LOOKS),
            ),
            load_if_exists=True,
        )  # fmt: skip

    def _sampler(self, number: int) -> "optuna.samplers.BaseSampler":
        """Draws the values of a trial, the same ones in whichever process."""
        return optuna.samplers.TPESampler(
            seed=1000 * self.config.seed + number,
            constant_liar=True,
            n_startup_trials=self.config.startup,
        )

    def settings(self, values: Mapping[str, Any], output: Path) -> TrainConfig:
        """The training of a point of the space."""
        budget = {"fit_minutes": self.config.minutes, "fit_steps": self.config.steps}
        return load_config(
            self.base,
            [
                *self.overrides,
                *(f"{name}={json.dumps(value)}" for name, value in values.items()),
                *(f"{name}={value}" for name, value in budget.items() if value is not None),
                f"output={output}",
            ],
        )

    def run(self) -> bool:
        """Work until all trials are done; whether they are (else a signal ended it)."""
        # nobody may look for trials without a process while one of them is begun
        with locked(self.folder, KIND, wait=True):
            self._take_up()
        while self.done() < self.config.trials:
            with ExitStack() as stack:
                with locked(self.folder, KIND, wait=True):
                    trial = self.study.ask()
                    self.study.sampler = self._sampler(trial.number)
                    values = {name: _suggest(trial, name, r) for name, r in self.ranges.items()}
                    name = trial.user_attrs.get("folder", f"trial-{trial.number:04d}")
                    folder = self.folder / name
                    trial.set_user_attr("folder", name)
                    stack.enter_context(locked(folder, KIND))
                if not self._train(trial, values, folder):
                    self.write_tables()
                    return False
            self.write_tables()
        return True

    def done(self) -> int:
        """Trials that are finished or pruned."""
        states = (TrialState.COMPLETE, TrialState.PRUNED)
        return len(self.study.get_trials(deepcopy=False, states=states))

    def _take_up(self) -> None:
        """Trials whose process is gone are begun again, from their checkpoints."""
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            name = trial.user_attrs.get("folder", f"trial-{trial.number:04d}")
            with _free(self.folder / name) as is_free:
                if is_free and set(trial.params) == set(self.ranges):
                    self.study.tell(trial.number, state=TrialState.FAIL)
                    self.study.enqueue_trial(trial.params, user_attrs={"folder": name})
                elif is_free:
                    self.study.tell(trial.number, state=TrialState.FAIL)

    def _train(self, trial: "optuna.Trial", values: Mapping[str, Any], folder: Path) -> bool:
        """Train one trial; whether it came to an end."""
        watch = _Watch(self.config, trial)
        self.echo(f"{folder.name}: " + ", ".join(f"{k}={v}" for k, v in values.items()))
        trainer = Trainer(self.settings(values, folder), watch=watch)
        trainer.run()
        if not (trainer.finished or watch.pruned):
            return False
        student = folder / STUDENT
        result = {
            "number": trial.number,
            "state": "pruned" if watch.pruned else "finished",
            "value": watch.best,
            "values": dict(values),
            "errors": watch.errors,
            "steps": trainer.progress.step,
            "seconds": trainer.progress.seconds,
            "weights": sum(p.numel() for p in load_student(student).parameters())
            if student.exists()
            else None,
        }
        _write_json(folder / TRIAL, result)
        if watch.pruned:
            self.study.tell(trial, state=TrialState.PRUNED)
        elif math.isfinite(watch.best):
            self.study.tell(trial, watch.best)
        else:
            self.study.tell(trial, state=TrialState.FAIL)
        self.echo(f"{folder.name}: {result['state']} with {watch.best:.4g}")
        return True

    def results(self) -> list[dict[str, Any]]:
        """Content of each `trial.json`, the best first; pruned ones last."""
        found = [json.loads(p.read_text("utf-8")) for p in self.folder.glob(f"trial-*/{TRIAL}")]
        return sorted(found, key=lambda r: (r["state"] != "finished", r["value"]))

    def write_tables(self) -> None:
        """Write `trials.json`, `trials.md`, and the best configuration as `best.yaml`."""
        found = self.results()
        if not found:
            return
        _write_json(self.folder / "trials.json", found)
        _write(self.folder / "trials.md", format_trials(found, list(self.ranges)))
        if found[0]["state"] != "finished":
            return
        values = found[0]["values"]
        overrides = [*self.overrides, *(f"{k}={json.dumps(v)}" for k, v in values.items())]
        text = yaml.safe_dump(
            read_settings(self.base, overrides), allow_unicode=True, sort_keys=False
        )
        _write(
            self.folder / "best.yaml",
            f"# The best of {len(found)} trials: {found[0]['value']:.4g} after "
            f"{found[0]['steps']} steps.\n{text}",
        )


class _Watch:
    """Tells a trial how its training goes, and the training when to stop."""

    def __init__(self, config: SearchConfig, trial: "optuna.Trial") -> None:
        self._config, self._trial = config, trial
        self._reported = -1
        self.best, self.pruned = math.inf, False
        self.errors: dict[str, float] = {}

    def __call__(self, progress: Progress, table: dict[str, dict[str, float]]) -> bool:
        found = table["all"]
        value = sum(weight * found[name] for name, weight in self._config.metric.items())
        if math.isfinite(value) and value < self.best:
            self.best, self.errors = value, {k: v for k, v in found.items() if math.isfinite(v)}
        if self._config.minutes is not None:
            share = progress.seconds / (60 * self._config.minutes)
        else:
            share = progress.step / (self._config.steps or 1)
        look = min(LOOKS, int(share * LOOKS))
        for k in range(self._reported + 1, look + 1):  # all have the same points
            self._trial.report(self.best if math.isfinite(self.best) else 1e9, k)
        self._reported = max(self._reported, look)
        self.pruned = look < LOOKS and look >= 1 and self._trial.should_prune()
        return self.pruned


def _first(values: Range) -> Any:
    if values.choices:
        return values.choices[0]
    return int(values.low or 0) if values.integer else values.low


def _suggest(trial: "optuna.Trial", name: str, values: Range) -> Any:
    if values.choices:
        return trial.suggest_categorical(name, values.choices)
    low, high = values.low, values.high
    assert low is not None  # load_search saw to it
    assert high is not None
    if values.integer:
        return trial.suggest_int(name, int(low), int(high), step=int(values.step or 1),
                                 log=values.log)  # fmt: skip
    return trial.suggest_float(name, low, high, step=values.step, log=values.log)


@contextmanager
def _free(folder: Path) -> Iterator[bool]:
    """Whether no process works in a folder; if so, none does while the block runs."""
    try:
        with locked(folder, KIND):
            yield True
    except FolderError:
        yield False


def format_trials(results: list[dict[str, Any]], names: list[str]) -> str:
    """Trials as a Markdown table."""
    heads = ["trial", "value", *names, "weights", "steps", "force MAE", "energy MAE", ""]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for r in results:
        errors = r["errors"]
        cells = [
            str(r["number"]),
            f"{r['value']:.4g}",
            *(f"{r['values'][n]:.4g}" if isinstance(r["values"][n], float) else str(r["values"][n])
              for n in names),
            str(r["weights"] or "–"),
            str(r["steps"]),
            f"{errors['force_mae']:.2f}" if "force_mae" in errors else "–",
            f"{errors['energy_mae']:.3f}" if "energy_mae" in errors else "–",
            r["state"],
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _write_json(path: Path, content: Any) -> None:
    _write(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _write(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode())


def run_tune(base: Path, space: Path, output: Path, *, overrides: list[str], echo: Echo) -> bool:
    """`mlffd tune`: see `mlffd tune --help`. Returns whether all trials are done."""
    search = Search(base, space, output, overrides=overrides, echo=echo)
    finished = search.run()
    results = search.results()
    if results:
        echo(format_trials(results[:10], list(search.ranges)))
        echo(f"{output / 'best.yaml'}; all {len(results)} trials: {output / 'trials.md'}")
    return finished
