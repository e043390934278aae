"""What the sections are given, and what they give back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from openmm_mlffd.validation.conservation import Check
from openmm_mlffd.validation.report import Section
from openmm_mlffd.validation.suite.dynamics import Progress, silent
from openmm_mlffd.validation.suite.models import Model
from openmm_mlffd.validation.suite.plan import Plan
from openmm_mlffd.validation.suite.store import Store


@dataclass(frozen=True, kw_only=True)
class Job:
    """One validation."""

    model: Model
    """What is validated."""

    plan: Plan
    """How much is measured."""

    store: Store
    """Where finished pieces are."""

    output: Path
    """Folder of the report."""

    teacher: Model | None = None
    """What it is compared with."""

    data: Path | None = None
    """Data set with labels."""

    split: str = "test"
    """Part of the data set."""

    training: Path | None = None
    """Data set whose split ``train`` was trained on; None for `data` itself."""

    speed: Path | None = None
    """JSON of a speed measurement."""

    minutes: float | None = None
    """Wall time after which a single run is ended as it is; None for what the plan says."""

    progress: Progress = silent
    """Told how far long runs are."""

    def limit(self, planned: float | None = None) -> float:
        """Wall time of a run [min], given what the plan has for it."""
        if self.minutes is not None:
            return self.minutes
        return self.plan.run_minutes if planned is None else planned


@dataclass(frozen=True, kw_only=True)
class SectionResult:
    """What a section found."""

    numbers: Mapping[str, Any] = field(default_factory=dict)
    """Everything, as it goes to JSON."""

    checks: Sequence[Check] = ()
    """What had to be passed."""

    sections: Sequence[Section] = ()
    """For the report."""

    @property
    def passed(self) -> bool:
        """Whether all checks are passed."""
        return all(check.passed for check in self.checks)


def named(checks: Sequence[Check], prefix: str) -> list[Check]:
    """The checks, with what they are about before their names."""
    return [replace(check, name=f"{prefix}: {check.name}") for check in checks]
