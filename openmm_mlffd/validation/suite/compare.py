"""Several students side by side, from their validations."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from openmm_mlffd.validation.report import Report, Section, TableBlock
from openmm_mlffd.validation.suite.summary import headlines, read_validation


def compare(paths: Sequence[Path]) -> Report:
    """A report with a column for each validation.

    Parameters
    ----------
    paths
        Folders of reports, or their `validation.json`.

    Raises
    ------
    ValueError
        If one is no validation.
    """
    contents = [read_validation(path) for path in paths]
    names = _names(contents, paths)
    found = [
        {(h.section, h.name, h.unit): replace(h, unit="").text for h in headlines(content)}
        for content in contents
    ]
    keys = list(dict.fromkeys(key for table in found for key in table))
    sections = []
    for section in dict.fromkeys(key[0] for key in keys):
        rows = [
            [
                f"{key[1]} [{key[2]}]" if key[2] else key[1],
                *(table.get(key, "–") for table in found),
            ]
            for key in keys
            if key[0] == section
        ]
        table = TableBlock(caption=f"Section {section}", columns=["quantity", *names], rows=rows)
        sections.append(Section(title=section, tables=[table]))
    return Report(
        title="Students side by side",
        summary="From the validations of each; a dash is what was not measured.",
        sections=[
            Section(
                title="Students", tables=[_students(contents, names), _checks(contents, names)]
            ),
            *sections,
        ],
    )


def _names(contents: Sequence[dict[str, Any]], paths: Sequence[Path]) -> list[str]:
    """Name of each student, with its place where names are not enough."""
    names = [content["student"]["name"] for content in contents]
    return [
        name if names.count(name) == 1 else f"{name} ({path})"
        for name, path in zip(names, paths, strict=True)
    ]


def _students(contents: Sequence[dict[str, Any]], names: Sequence[str]) -> TableBlock:
    def failed(content: dict[str, Any]) -> str:
        n = sum(not check["passed"] for check in content["checks"])
        return f"{n} of {len(content['checks'])}"

    rows = [
        ["SHA-256", *(c["student"]["sha256"][:16] for c in contents)],
        ["level", *(c["level"] for c in contents)],
        ["finished", *("yes" if c["finished"] else "no" for c in contents)],
        ["checks failed", *map(failed, contents)],
        ["hardware", *(c["hardware"] for c in contents)],
    ]
    levels = {c["level"] for c in contents}
    caption = "Students" if len(levels) == 1 else "Students; levels differ, and so do the numbers"
    return TableBlock(caption=caption, columns=["", *names], rows=rows)


def _checks(contents: Sequence[dict[str, Any]], names: Sequence[str]) -> TableBlock:
    verdicts = [{c["name"]: c["passed"] for c in content["checks"]} for content in contents]
    keys = list(dict.fromkeys(key for table in verdicts for key in table))
    words = {True: "passed", False: "FAILED", None: "–"}
    rows = [[key, *(words[table.get(key)] for table in verdicts)] for key in keys]
    return TableBlock(caption="Checks", columns=["check", *names], rows=rows)


def format_text(report: Report) -> list[str]:
    """The tables of a report as lines of text."""
    lines = []
    for section in report.sections:
        for table in section.tables:
            rows = [list(table.columns), *map(list, table.rows)]
            widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
            lines.append("")
            lines.append(table.caption)
            lines.extend(
                "  ".join(
                    cell.ljust(width) for cell, width in zip(row, widths, strict=True)
                ).rstrip()
                for row in rows
            )
    return lines[1:]
