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
        environment.filters["value"] = lambda check: value_text(check.value, check.high, check.unit)
        environment.filters["range"] = lambda check: range_text(check.low, check.high, check.unit)
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


def value_text(value: float | None, high: float, unit: str = "") -> str:
    """The value of a check: what must not be at all is counted.

    >>> value_text(8.0, 0.0), value_text(0.07818, 0.05, "eV")
    ('8', '0.0782 eV')
    """
    if value is None or value != value:
        return "no number"
    return f"{value:.0f}" if high == 0 else f"{number(value)} {unit}".strip()


def range_text(low: float, high: float, unit: str = "") -> str:
    """What a check asks for.

    >>> range_text(3.0, 5.0), range_text(0.0, 0.05, "eV")
    ('3 to 5', 'at most 0.05 eV')
    """
    text = f"{low:.4g} to {high:.4g}" if low > 0 else f"at most {high:.4g}"
    return f"{text} {unit}".strip()


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
