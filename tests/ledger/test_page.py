"""The page of a profile: one file, right in its figures, and pleasant in a real browser at any width."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from memfit.ledger import LINES, Instant, LiveTensor, Peak
from memfit.ledger.advice import Advice
from memfit.ledger.page import render, thin_out
from memfit.ledger.profile import Profile
from memfit.ledger.target import ProfileConfig

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
MIB = 1 << 20


def profile(scale: int = 1, target: str = "net.py:task") -> Profile:
    peak = Peak(10 * MIB, 10 * MIB, 20 * MIB, 3 * MIB * scale, MIB)
    samples = [(0.001 * k, 10 * MIB, MIB * min(k, 10), 10 * MIB, MIB * (k % 7), MIB * (k % 3)) for k in range(40)]
    samples.append((0.0405, *(getattr(peak, line) for line in LINES)))
    samples.append((0.05, 10 * MIB, 0, 20 * MIB, 0, 0))
    return Profile(
        config=ProfileConfig(target),
        peak=peak,
        instant=Instant(0.0405, "backward", "encoder.layers.1", "aten.mm"),
        modules={
            "encoder.layers.1.linear": Peak(weights=30 * MIB),
            "encoder.layers.0": Peak(activations=8 * MIB),
            "encoder.layers.0.norm": Peak(weights=2 * MIB),
            "": Peak(activations=4 * MIB),
        },
        tensors=[LiveTensor(8 * MIB, "workspace", (2048, 1024), "float32", "a", "forward", "aten.mm", "net.py:7 in f")],
        timeline=samples,
        growth=50 * MIB,
        advice=[Advice("--convert 'LowRankGradient(rank=8)@*'", peak, Peak(10 * MIB, MIB, MIB, 3 * MIB, MIB))],
    )


class Reader(HTMLParser):
    """Collects what a page links to, its text, and whether its elements close."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "br", "rect", "path"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("rect", "path"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    return reader


def test_it_is_one_file_with_all_figures() -> None:
    page = render({"as it is": profile(2), "converted": profile()})
    reader = read(page)
    assert reader.open == []
    assert reader.links == []
    assert "url(" not in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    for words in ("44.0 MiB", "50.0 MiB", "encoder", "layers", "(itself)", "2048 x 1024 float32", "net.py:7 in f"):
        assert words in reader.text
    assert "Side by side" in reader.text
    assert "Side by side" not in render({"as it is": profile()})


def test_the_tree_adds_up() -> None:
    sizes = re.findall(r'class="name">([^<]*)</span>.*?class="size">([^<]*)<', render({"as it is": profile()}))
    assert dict(sizes) == {
        "encoder": "40.0 MiB",
        "layers": "40.0 MiB",
        "1": "30.0 MiB",
        "linear": "30.0 MiB",
        "0": "10.0 MiB",
        "norm": "2.0 MiB",
        "(itself)": "8.0 MiB",
        "(outside of modules)": "4.0 MiB",
    }


def test_what_comes_from_outside_is_escaped() -> None:
    hostile = "<script>alert(1)</script>:task"
    assert "<script>alert" not in render({hostile: profile(target=hostile), "b": profile(target=hostile)})


def test_a_long_timeline_is_thinned_out_and_keeps_its_peak() -> None:
    timeline = [(0.001 * k, 5.0, 1.0 * (k % 10), 0.0, 0.0, 0.0) for k in range(9000)]
    timeline[4321] = (4.321, 5.0, 100.0, 0.0, 0.0, 0.0)
    samples, peak = thin_out(timeline)
    assert len(samples) <= 2 * 600 + 1
    assert samples[peak][1:] == timeline[4321][1:]
    assert abs(samples[peak][0] - timeline[4321][0]) <= timeline[-1][0] / 600
    assert samples[peak + 1][0] - samples[peak][0] >= 0.99 * timeline[-1][0] / 600, "wide enough to be seen"
    assert samples == sorted(samples, key=lambda sample: sample[0])
    assert samples[-1] == timeline[-1]
    embedded = re.search(r'id="samples">(.*?)</script>', render({"as it is": profile()}))
    assert embedded is not None
    data = json.loads(embedded[1])
    assert sum(data["samples"][data["peak"]][1:]) == 44 * MIB


@pytest.mark.skipif(BROWSER is None, reason="no Chromium (Debian's package: chromium)")
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_a_browser_shows_it_without_errors_and_without_scrolling_sideways(
    width: int, dark: bool, tmp_path: Path
) -> None:
    page = render({"as it is": profile(2), "converted": profile()})
    # The page reports on itself: errors, the widest element, and what the readout says under the pointer.
    probe = """<script>
window.onerror = (message) => document.body.dataset.error = message;
addEventListener('load', () => {
  document.body.dataset.wide = document.documentElement.scrollWidth;
  const box = chart.getBoundingClientRect();
  chart.dispatchEvent(new PointerEvent('pointermove', {clientX: box.left + 0.21 * box.width}));
  document.body.dataset.readout = document.getElementById('at-total').textContent;
});
</script></body>"""
    path = tmp_path / "page.html"
    path.write_text(page.replace("</body>", probe), encoding="utf-8")
    frame = tmp_path / "frame.html"  # a headless window has a least width; a frame has none
    frame.write_text(f'<iframe src="page.html" width="{width}" height="900"></iframe>', encoding="utf-8")
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    if dark:
        command.append("--blink-settings=preferredColorScheme=0")
    shown = subprocess.run(
        [*command, f"--window-size={max(500, width)},1000", "--virtual-time-budget=3000", "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    assert "data-error" not in shown
    found = re.search(r'data-wide="(\d+)" data-readout="([^"]*)"', shown)
    assert found is not None
    assert int(found[1]) <= max(500, width)
    assert found[2] == "34.0 MiB"  # of the sample at 10 ms, 0.21 of the way
