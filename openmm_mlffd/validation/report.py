"""A validation report: one HTML file that needs nothing else."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from openmm_mlffd.validation.conservation import Check, Conservation

try:
    import jinja2
except ImportError as error:
    raise ImportError(
        "Jinja2 is needed to write reports: pip install openmm-mlffd[analysis]"
    ) from error


@dataclass(frozen=True, kw_only=True)
class FigureBlock:
    """A figure of a report."""

    svg: str
    """The figure."""

    caption: str
    """What it shows and what to see in it."""

    alt: str
    """What it shows, for those who cannot see it."""

    @property
    def source(self) -> str:
        """The figure as the address of an image."""
        return "data:image/svg+xml;base64," + base64.b64encode(self.svg.encode()).decode()


@dataclass(frozen=True, kw_only=True)
class TableBlock:
    """A table of a report. The first column names the rows."""

    caption: str
    """What it shows."""

    columns: Sequence[str]
    """Heads of the columns, with units; none for a table of names and values."""

    rows: Sequence[Sequence[str]]
    """Cells as text."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A section of a report."""

    title: str
    """Its title."""

    paragraphs: Sequence[str] = ()
    """Text before tables and figures."""

    tables: Sequence[TableBlock] = ()
    """Tables, in order."""

    figures: Sequence[FigureBlock] = ()
    """Figures, in order."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that a report says."""

    title: str
    """Its title."""

    summary: str
    """What was done, in a few sentences."""

    checks: Sequence[Check] = ()
    """What had to be passed; they come first."""

    sections: list[Section] = field(default_factory=list)
    """The rest, in order."""

    @property
    def passed(self) -> bool:
        """Whether all checks are passed."""
        return all(check.passed for check in self.checks)

    def write(self, path: str | Path) -> Path:
        """Write the report as one HTML file without anything external.

        Returns
        -------
        Path
            The file.
        """
        environment = jinja2.Environment(
            autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        environment.filters["number"] = number
        source = files("openmm_mlffd.validation").joinpath("report.html").read_text("utf-8")
        path = Path(path)
        path.write_text(environment.from_string(source).render(report=self), encoding="utf-8")
        return path


def number(value: float, digits: int = 3) -> str:
    """A number with so many significant digits, as a reader would write it.

    >>> number(0.012345), number(1234.5), number(-12.0)
    ('0.0123', '1234', '−12.0')
    """
    if value != value:
        return "not a number"
    text = f"{value:#.{digits}g}"
    if "e" in text:
        if abs(value) >= 1:
            text = f"{value:.0f}"
        else:
            mantissa, exponent = text.split("e")
            text = f"{mantissa}·10{exponent_text(int(exponent))}"
    return text.rstrip(".").replace("-", "−")


def exponent_text(exponent: int) -> str:
    """A power in superscript digits: exponent_text(-5) is '⁻⁵'."""
    return str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def conservation_table(runs: Sequence[Conservation], ratios: Sequence[float]) -> TableBlock:
    """Energy conservation of runs with several time steps.

    Parameters
    ----------
    runs
        The smallest time step first.
    ratios
        Ratio of the fluctuations of each run and the next.
    """
    rows = []
    for run, ratio in zip(runs, ["", *map(number, ratios)], strict=True):
        rows.append(
            [
                f"{run.timestep:g} fs",
                f"{run.duration:g}",
                f"{number(run.slope)} ± {number(run.slope_error, 2)}",
                f"{number(run.slope_kt)} ± {number(run.slope_kt_error, 2)}",
                number(run.drift_over_kinetic_std),
                number(run.rms),
                ratio,
                number(run.mean_temperature),
            ]
        )
    return TableBlock(
        caption="Energy conservation. The slope is that of the shadow energy where it is known. "
        "The ratio is that of the rms fluctuations in the first 0.2 ps to those of the row above; "
        "it is 4 if forces are exact.",
        columns=[
            "time step",
            "length [ps]",
            "slope [meV/atom/ns]",
            "slope [kT/ns/dof]",
            "drift / std(Ekin)",
            "rms(E) [meV/atom]",
            "ratio",
            "mean T [K]",
        ],
        rows=rows,
    )
