import dataclasses
import json
import math
import re
from html.parser import HTMLParser

import pytest

from memfit.charts import line_chart
from memfit.errors import DataError
from memfit.ledger.report import format_bytes
from memfit.report_page import change_of_errors
from memfit.run.report import versions
from memfit.speech.page import render
from memfit.speech.report import Heard, PersonalizeReport

pytest.importorskip("jiwer")

PEAK = {"weights": 4 << 20, "gradients": 1 << 18, "optimizer": 1 << 19, "activations": 9 << 20, "workspace": 5 << 20}


@pytest.fixture
def report() -> PersonalizeReport:
    return PersonalizeReport(
        method="low-rank",
        config={
            "recordings": "voices/theo",
            "method": "low-rank",
            "speaker": "theo",
            "base": None,
            "rank": 16,
            "lr": 0.003,
            "steps": 4,
        },
        seed=7,
        steps=4,
        recordings="theo: 20 training utterances, 3 test utterances",
        wer_before=0.4,
        wer_after=0.1,
        wer_curve=((0, 0.4), (2, 0.25), (4, 0.1)),
        losses=(2.0, 1.5, math.nan, 1.0),
        seconds_per_step=0.05,
        peak_bytes={**PEAK, "total": sum(PEAK.values())},
        process_peak_bytes=31 << 20,
        heard=(
            Heard("a.wav", "one two three", "one three", "one two three"),
            Heard("b.wav", "four five", "oh four nine", ""),
            Heard("c.wav", "six", "", "six"),
        ),
        versions=versions(),
    )


class Page(HTMLParser):
    """Collects what the tests look at, and that every element that is opened is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.cells: list[str] = []
        self.links: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag == "td":
            self.cells.append("")
        if tag not in ("meta", "br", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "td" in self.open:
            self.cells[-1] += data


def test_the_json_has_the_fields_that_programs_rely_on(report):
    values = json.loads(report.to_json())
    assert {"method", "config", "seed", "steps", "wer_before", "wer_after", "seconds_per_step", "peak_bytes"} <= set(
        values
    )
    assert values["process_peak_bytes"] == 31 << 20
    assert list(values["peak_bytes"]) == ["weights", "gradients", "optimizer", "activations", "workspace", "total"]
    assert values["hypotheses"][1] == {"name": "b.wav", "reference": "four five", "before": "oh four nine", "after": ""}


def test_the_json_is_standard_even_when_a_loss_was_not_finite(report):
    values = json.loads(report.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert values["losses"] == [2.0, 1.5, None, 1.0]


def test_reading_the_json_gives_the_report_back(report):
    finite = dataclasses.replace(report, losses=(1.0, 0.5))
    assert PersonalizeReport.from_json(finite.to_json(), "report.json") == finite
    assert math.isnan(PersonalizeReport.from_json(report.to_json(), "report.json").losses[2])


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"hypotheses": 3}', '{"hypotheses": []}'])
def test_a_damaged_report_is_refused_by_name(text):
    with pytest.raises(DataError, match=r"out/report\.json"):
        PersonalizeReport.from_json(text, "out/report.json")


@pytest.mark.parametrize(
    "damage",
    [
        {"config": []},
        {"peak_bytes": {}},
        {"peak_bytes": []},
        {"peak_bytes": {**PEAK, "weights": None}},
        {"versions": 3},
        {"seconds_per_step": "1"},
        {"wer_after": None},
    ],
)
def test_a_report_with_values_of_another_kind_is_refused_by_name(report, damage):
    with pytest.raises(DataError, match=r"out/report\.json"):
        PersonalizeReport.from_json(json.dumps({**report.to_dict(), **damage}), "out/report.json")


def test_the_page_is_well_formed_and_needs_no_script_and_no_network(report):
    text = render(report)
    page = Page(text)
    assert not page.open
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert page.links == []
    assert not re.search(r"https?:|url\(|@import", text)


def test_the_page_says_the_figures(report):
    text = render(report)
    for expected in ("40.0 %", "10.0 %", "75 % fewer errors", "after 4 steps", "theo", "0.003", "low-rank"):
        assert expected in text
    for size in (*report.peak_bytes.values(), report.process_peak_bytes):
        assert format_bytes(size) in text


def test_the_page_marks_each_kind_of_error_in_words(report):
    page, text = Page(render(report)), render(report)
    assert page.cells[:3] == ["one two three", "one two three", "one two three"]  # the missed word is shown, and marked
    assert '<mark class="missed">two</mark>' in text
    assert '<mark class="wrong" title="for five">nine</mark>' in text
    assert '<mark class="extra">oh</mark>' in text
    assert page.cells[5] == "four five"
    assert text.count("<tr>") == 1 + len(report.heard)


def test_nothing_that_comes_from_outside_becomes_markup(report):
    hostile = '<script>alert("1")</script>&amp;'
    report = dataclasses.replace(
        report,
        config={hostile: hostile},
        recordings=hostile,
        heard=(Heard(hostile, hostile, f"{hostile} {hostile}", "two"), Heard("x", "two", hostile, "")),
        versions={hostile: hostile},
    )
    page = Page(render(report))
    assert "script" not in page.tags
    assert page.cells[0] == hostile


def test_the_page_of_a_run_of_one_step_on_perfect_speech_draws(report):
    best = dataclasses.replace(
        report, steps=1, losses=(0.0,), wer_before=0.0, wer_after=0.0, wer_curve=((0, 0.0), (1, 0.0))
    )
    assert "no change" in render(best)


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [(0.2, 0.1, "50 % fewer errors"), (0.1, 0.2, "100 % more errors"), (0.0, 0.1, "no errors before, some now")],
)
def test_a_change_is_told_in_words(before, after, words):
    assert change_of_errors(before, after) == words


def test_a_chart_leaves_out_what_is_not_finite_and_stays_within_its_frame():
    chart = line_chart([(1, 3.0), (2, math.inf), (3, math.nan), (4, 1.0)], title="a < b", x_label="step")
    assert "a &lt; b" in chart
    assert "nan" not in chart
    assert "inf" not in chart
    (path,) = re.findall(r'class="line" d="M([^"]+)"', chart)
    points = [tuple(map(float, point.split())) for point in path.split("L")]
    assert len(points) == 2
    assert all(0 <= x <= 380 and 0 <= y <= 220 for x, y in points)


@pytest.mark.parametrize("points", [[], [(0, 0.0)], [(5, 1e-9)], [(1, 1e6), (1000, 3.0)]])
def test_a_chart_of_anything_draws(points):
    assert line_chart(points, title="t", x_label="x", format_dot="{:g}".format).endswith("</svg>")
