"""The picture of a profile: a PNG that shows what was found, and a clear word where it cannot be drawn."""

from __future__ import annotations

import io
import sys

import pytest

from memfit.errors import MemfitError
from memfit.ledger import LINES, Instant, Peak
from memfit.ledger.picture import draw_png
from memfit.ledger.profile import Profile
from memfit.ledger.report import COLOURS
from memfit.ledger.target import ProfileConfig

MIB = 1 << 20


def profile(scale: int) -> Profile:
    peak = Peak(10 * MIB, 10 * MIB, 20 * MIB, 3 * MIB * scale, 4 * MIB)
    samples = [(0.01, 10 * MIB, 0, 20 * MIB, 3 * MIB, 0), (0.04, *(getattr(peak, line) for line in LINES))]
    return Profile(
        config=ProfileConfig("net.py:task"),
        peak=peak,
        instant=Instant(0.04, "backward", "encoder", "aten.mm"),
        modules={"encoder": peak},
        tensors=[],
        timeline=[(0.0, 10 * MIB, 0, 20 * MIB, 0, 0), *samples, (0.05, 10 * MIB, 0, 20 * MIB, 0, 0)],
        growth=50 * MIB,
    )


def test_the_picture_shows_every_line_of_every_profile() -> None:
    image = pytest.importorskip("matplotlib.image")
    one, two = (
        image.imread(io.BytesIO(draw_png(profiles)))
        for profiles in ({"as it is": profile(4)}, {"as it is": profile(4), "again": profile(4)})
    )
    assert two.shape[0] > one.shape[0], "a bar more"
    for line in LINES:
        colour = [int(COLOURS[line][0][at : at + 2], 16) / 255 for at in (1, 3, 5)]
        shown = [(abs(picture[:, :, :3] - colour).max(axis=2) < 0.01).sum() for picture in (one, two)]
        assert 500 < shown[0] < shown[1], line


def test_without_matplotlib_one_sentence_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MemfitError, match=r'pip install "memfit\[png\]"'):
        draw_png({"as it is": profile(1)})
