import base64
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from openmm_mlffd.validation import figures
from openmm_mlffd.validation.analysis import Dihedrals, RadialDistribution
from openmm_mlffd.validation.conservation import Check, conservation
from openmm_mlffd.validation.report import (
    FigureBlock,
    Report,
    Section,
    TableBlock,
    conservation_table,
    number,
)


class Page(HTMLParser):
    """All tags with their attributes, and all text outside of the style sheet."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.text, self._style = [], [], False
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._style = tag == "style"

    def handle_data(self, data):
        if not self._style:
            self.text.append(data)

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def traces(make_trace):
    time = np.linspace(0, 1, 401)
    return [make_trace(time, dt**2 * 1e-3 * np.sin(200 * time), timestep=dt) for dt in (0.5, 1.0)]


@pytest.fixture
def report(traces):
    runs = [conservation(trace) for trace in traces]
    figure = FigureBlock(svg=figures.draw_energies(traces), caption="Energies.", alt="Two panels.")
    return Report(
        title="Student <b>default</b> & more",
        summary="What was done.",
        checks=[Check(name="ratio of rms", value=4.0321, unit="", low=3, high=5)],
        sections=[
            Section(
                title="Peptide",
                paragraphs=["A paragraph."],
                tables=[conservation_table(runs, [4.0321])],
                figures=[figure],
            )
        ],
    )


def test_the_page_holds_the_numbers(report, tmp_path):
    text = " ".join(Page(report.write(tmp_path / "r.html").read_text("utf-8")).text)
    for expected in (
        "4.03",
        "3 to 5",
        "passed",
        "0.5 fs",
        "meV/atom/ns",
        "Energies.",
        "A paragraph.",
    ):
        assert expected in text
    assert "All 1 checks passed." in text


def test_a_failed_check_is_said_in_words(report, tmp_path):
    checks = [*report.checks, Check(name="drift", value=0.2, unit="", high=0.01)]
    failed = replace(report, checks=checks)
    text = " ".join(Page(failed.write(tmp_path / "r.html").read_text("utf-8")).text)
    assert not failed.passed
    assert "1 of 2 checks failed." in text
    assert "at most 0.01" in text


def test_the_page_needs_nothing_else(report, tmp_path):
    source = report.write(tmp_path / "r.html").read_text("utf-8")
    page = Page(source)
    assert not page.of("script")
    assert not page.of("link")
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset", "data"):
            assert attributes.get(name, "data:").startswith("data:")
    assert not re.search(r"url\(|@import|https?://", source)


def test_the_page_can_be_read_by_machine_and_ear(report, tmp_path):
    page = Page(report.write(tmp_path / "r.html").read_text("utf-8"))
    assert page.of("html") == [{"lang": "en"}]
    assert len(page.of("h1")) == len(page.of("main")) == len(page.of("title")) == 1
    assert [image["alt"] for image in page.of("img")] == ["Two panels."]
    assert len(page.of("caption")) == len(page.of("table")) == 2
    assert all("scope" in attributes for attributes in page.of("th"))


def test_text_is_not_taken_for_markup(report, tmp_path):
    page = Page(report.write(tmp_path / "r.html").read_text("utf-8"))
    assert not page.of("b")
    assert "Student <b>default</b> & more" in " ".join(page.text)


def test_tables_of_any_kind_are_shown(tmp_path):
    table = TableBlock(caption="Speed", columns=["system", "ms/step"], rows=[["water", "12.5"]])
    report = Report(title="t", summary="s", sections=[Section(title="Speed", tables=[table])])
    page = Page(report.write(tmp_path / "r.html").read_text("utf-8"))
    assert {"scope": "row"} in page.of("th")
    assert "12.5" in " ".join(page.text)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.012345, "0.0123"),
        (-12.0, "−12.0"),
        (1234.5, "1234"),
        (4.0, "4.00"),
        (1.5e-7, "1.50·10⁻⁷"),
        (0.0, "0.00"),
        (float("nan"), "not a number"),
    ],
)
def test_numbers_are_written_as_readers_would(value, text):
    assert number(value) == text


def drawings():
    angles = np.linspace(-170, 170, 30)[:, None]
    r = np.linspace(0.05, 6, 60)
    return {
        "series": lambda: figures.draw_series(
            r, {"temperature": 300 + np.sin(r)}, "temperature [K]", target=300.0
        ),
        "ramachandran": lambda: figures.draw_ramachandran(Dihedrals(phi=angles, psi=-angles)),
        "radial": lambda: figures.draw_radial(
            {"O–O": RadialDistribution(r=r, g=1 - np.exp(-r))}, marks={"experiment": 2.8}
        ),
    }


@pytest.mark.parametrize("name", drawings())
def test_figures_are_svg_and_the_same_each_time(name):
    first, second = (drawings()[name]() for _ in range(2))
    assert first == second
    assert ET.fromstring(first).tag.endswith("svg")


def test_figures_are_embedded_whole(report):
    figure = report.sections[0].figures[0]
    head, content = figure.source.split(",", 1)
    assert head == "data:image/svg+xml;base64"
    assert base64.b64decode(content).decode() == figure.svg


def test_drawing_leaves_the_settings_of_matplotlib_alone(traces):
    import matplotlib

    before = dict(matplotlib.rcParams)
    figures.draw_energies(traces)
    assert dict(matplotlib.rcParams) == before
