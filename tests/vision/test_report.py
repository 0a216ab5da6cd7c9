"""The report reads back as it was written, and its page stands alone and shows nothing of a name as code."""

from __future__ import annotations

import dataclasses
import json
import math
from html.parser import HTMLParser

import pytest

from memfit.errors import DataError
from memfit.run.report import versions
from memfit.vision.page import change_in_words, render
from memfit.vision.report import ClassAccuracy, FinetuneReport, Mistake

PEAK = {"weights": 4 << 20, "gradients": 1 << 18, "optimizer": 1 << 19, "activations": 9 << 20, "workspace": 5 << 20}


@pytest.fixture
def report() -> FinetuneReport:
    return FinetuneReport(
        model="resnet18",
        config={"data": "photos", "train": ["layer4", "fc"], "convert": [], "lr": 0.01, "data_sha256": "0" * 64},
        seed=7,
        steps=4,
        data="images from photos: 20 training images and 4 held-out test images of 2 classes",
        accuracy_before=0.5,
        accuracy_after=0.75,
        accuracy_curve=((0, 0.5), (2, 0.25), (4, 0.75)),
        losses=(2.0, 1.5, math.nan, 1.0),
        seconds_per_step=0.05,
        peak_bytes={**PEAK, "total": sum(PEAK.values())},
        process_peak_bytes=31 << 20,
        per_class=(ClassAccuracy("cat", 3, 2, 3), ClassAccuracy("<dog>", 1, 0, 0)),
        mistakes=(Mistake("<dog>/a&b.jpg", "<dog>", "cat", "cat"),),
        versions=versions(),
    )


class Page(HTMLParser):
    """That every element that is opened is closed, and what would load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        assert not {name for name, _ in attributes} & {"src", "href", "onload"}
        if tag not in ("meta", "path", "circle"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data.strip())


def test_a_report_reads_back_as_it_was_written(report):
    again = FinetuneReport.from_json(report.to_json(), "report.json")
    assert math.isnan(again.losses[2])
    finite = tuple(0.0 if math.isnan(loss) else loss for loss in report.losses)
    assert dataclasses.replace(again, losses=finite) == dataclasses.replace(report, losses=finite)
    new = dataclasses.replace(report, accuracy_before=None, losses=finite)
    assert FinetuneReport.from_json(new.to_json(), "report.json") == new


@pytest.mark.parametrize(
    "damage",
    [
        {"per_class": 3},
        {"per_class": [{"name": "cat"}]},
        {"mistakes": None},
        {"accuracy_after": None},
        {"accuracy_before": "good"},
        {"peak_bytes": {}},
        {"losses": ["a"]},
        {"config": 1},
        {"stray": 1},
    ],
)
def test_a_report_with_values_of_another_kind_is_refused_by_name(report, damage):
    text = json.dumps({**report.to_dict(), **damage})
    with pytest.raises(DataError, match=r"out/report\.json: not a report of memfit finetune"):
        FinetuneReport.from_json(text, "out/report.json")


def test_the_page_stands_alone_and_shows_the_outcome(report):
    page = Page(render(report))
    assert page.open == []
    assert not page.tags & {"script", "link", "img", "iframe"}
    for words in (
        "50.0 %",
        "75.0 %",
        "50 % fewer errors",
        "on 4 held-out images, which were never trained on",
        "<dog>/a&b.jpg",
        "66.7 %",
        "100.0 %",
        "layer4, fc",
        "000000000000",
        "1 held-out image, all here.",
    ):
        assert words in page.words, words


def test_the_page_of_new_classes_has_no_figures_from_before(report):
    new = dataclasses.replace(
        report,
        accuracy_before=None,
        accuracy_curve=report.accuracy_curve[1:],
        per_class=tuple(dataclasses.replace(each, before=None) for each in report.per_class),
        mistakes=(dataclasses.replace(report.mistakes[0], before=None),),
    )
    assert change_in_words(new) == "2 classes that the weights did not know"
    page = Page(render(new))
    assert page.open == []
    assert "66.7 %" not in page.words


def test_the_page_says_where_the_curve_is_of_some_images_only(report):
    many = (dataclasses.replace(report.per_class[0], images=501), *report.per_class[1:])
    assert "on 500 of them" in render(dataclasses.replace(report, per_class=many))
    assert "of them" not in render(report)


def test_a_page_without_mistakes_has_no_table_of_them(report):
    assert "Taken for another class" not in render(dataclasses.replace(report, mistakes=()))
