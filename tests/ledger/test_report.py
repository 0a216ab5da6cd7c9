"""The ledger's figures as text, table, picture and plain values."""

from __future__ import annotations

import json
import math
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

from memfit.ledger import LINES, Ledger, Peak, ledger
from memfit.ledger.report import format_bytes, svg, table, to_dict

PEAK = Peak(weights=3 << 20, gradients=1 << 20, optimizer=2 << 20, activations=512 << 10, workspace=0)


@pytest.fixture(scope="module")
def book() -> Ledger:
    model = nn.Sequential(nn.Linear(300, 300), nn.ReLU())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ledger(model, optimizer) as book:
        model(torch.randn(4, 300)).sum().backward()
        optimizer.step()
    return book


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1048575, "1.0 MiB"),
        (12_897_484, "12.3 MiB"),
        (5 << 30, "5.0 GiB"),
        (5 << 40, "5120.0 GiB"),
        (-2048, "-2.0 KiB"),
    ],
)
def test_bytes_for_people(n: int, text: str) -> None:
    assert format_bytes(n) == text


@given(st.integers(0, 1 << 45))
def test_bytes_for_people_are_within_rounding(n: int) -> None:
    number, unit = format_bytes(n).split()
    factor = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}[unit]
    assert math.isclose(float(number) * factor, n, abs_tol=0.0501 * factor)


def test_print_shows_the_five_lines_their_sum_and_the_instant(book: Ledger) -> None:
    lines = str(book).splitlines()
    assert [line.split()[0] for line in lines[:5]] == list(LINES)
    assert lines[6].split() == ["total", *format_bytes(book.peak.total).split(), "100.0%"]
    assert lines[7].startswith(f"peak in {book.instant.phase}, in 0 (aten.")


def test_an_empty_account_can_be_printed() -> None:
    with ledger(nn.ReLU()) as book:
        pass
    assert "0 B" in str(book)
    assert "at the start of the region" in str(book)


def test_the_table_shows_a_book_or_a_peak(book: Ledger) -> None:
    def shown(measured: Ledger | Peak, modules: int = 0) -> str:
        console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(table(measured, title="Memory", modules=modules))
        return console.export_text()

    assert "3.0 MiB" in shown(PEAK)
    text = shown(book, modules=2)
    assert "Memory" in text
    assert format_bytes(book.peak.total) in text
    assert "peak in" in text


def test_plain_values_go_through_json(book: Ledger) -> None:
    values = json.loads(json.dumps(to_dict(book)))
    assert values["peak"] == book.peak.to_dict()
    assert values["instant"]["phase"] == book.instant.phase
    assert sum(lines["total"] for lines in values["modules"].values()) == book.peak.total
    assert to_dict(PEAK) == {
        "weights": 3145728,
        "gradients": 1048576,
        "optimizer": 2097152,
        "activations": 524288,
        "workspace": 0,
        "total": 6815744,
    }


def test_the_picture_is_one_scale_without_scripts_or_outside_parts() -> None:
    half = Peak(**{line: value // 2 for line, value in PEAK.to_dict().items() if line in LINES})
    picture = svg({"adam <b>": PEAK, "low-rank": half})
    root = ElementTree.fromstring(picture)
    space = "{http://www.w3.org/2000/svg}"
    bars = [rect for group in root.iter(f"{space}g") for rect in group.iter(f"{space}rect")]
    # Four lines each, as the empty one is left out; the second bar is half as long.
    assert len(bars) == 8
    lengths = [float(bar.attrib["width"]) for bar in bars]
    assert sum(lengths[:4]) == pytest.approx(2 * sum(lengths[4:]), rel=0.01)
    assert lengths[0] == pytest.approx(3 * lengths[1], rel=0.01)
    texts = [text.text for text in root.iter(f"{space}text")]
    assert [text for text in texts if text in LINES] == list(LINES)
    assert "adam <b>" in texts
    assert "6.5 MiB" in texts
    assert "<script" not in picture
    assert "http" not in picture.replace("http://www.w3.org/2000/svg", "")
    assert "currentColor" in picture
    assert "var(--memfit-weights," in picture


def test_a_narrow_picture_has_its_legend_in_rows() -> None:
    narrow = ElementTree.fromstring(svg({"low-rank": PEAK}, width=340))
    assert narrow.attrib["viewBox"].startswith("0 0 340 ")
    assert max(float(part.attrib["x"]) for part in narrow.iter() if "x" in part.attrib) < 340


def test_an_empty_picture_is_still_one() -> None:
    ElementTree.fromstring(svg({}))
    ElementTree.fromstring(svg({"nothing": Peak()}))
