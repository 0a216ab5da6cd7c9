import math

import pytest
import torch

from memfit.errors import MemfitError
from memfit.nvm import TECHNOLOGIES, CellArray, Technology, report
from memfit.weights.cell_report import write_histogram
from memfit.weights.technology import technology

MADE_UP = Technology("made up", endurance=1000, source="this test", read_picojoules=1.0, write_picojoules=10.0)


def test_writes_energy_and_lifetime_of_two_arrays_by_hand():
    first, second = CellArray(torch.zeros(2, 3), bits=8), CellArray(torch.zeros(4), bits=4)
    for _ in range(3):
        first.write_(first.values + torch.eye(3)[:2] * first.step)  # two of six cells
    second.write_(torch.full((4,), 0.5))
    first.count_read_(5)
    second.count_read_(7)
    found = report([first, second], MADE_UP)
    assert (found.cells, found.writes, found.worst_cell) == (10, 10, 3)
    assert found.histogram == ((0, 4), (1, 4), (2, 2))
    assert found.bits_written == 6 * 8 + 4 * 4
    assert found.bits_read == 5 * 6 * 8 + 7 * 4 * 4
    assert found.write_joules == pytest.approx(64 * 10e-12)
    assert found.read_joules == pytest.approx(352e-12)
    # 3 writes in 60 samples: the 1,000th comes after 20,000, at 2 a second after 10,000 seconds.
    assert found.lifetime_seconds(60, 2.0) == pytest.approx(10_000)


def test_cells_that_are_not_written_last_for_ever():
    assert report([CellArray(torch.zeros(3))], MADE_UP).lifetime_seconds(10, 1.0) == math.inf


def test_bins_of_the_histogram_double_and_hold_every_cell():
    counts = torch.tensor([0, 1, 2, 3, 4, 7, 8, 100_000, 2**31 - 1], dtype=torch.int32)
    found = dict(write_histogram(counts))
    assert [found[least] for least in (0, 1, 2, 4, 8)] == [1, 1, 2, 2, 1]
    assert found[65536] == 1
    assert found[2**30] == 1
    assert sum(found.values()) == 9


def test_energy_that_a_source_does_not_give_is_not_made_up():
    unknown = Technology("unknown", endurance=10, source="this test")
    found = report([CellArray(torch.zeros(3))], unknown)
    assert found.read_joules is None
    assert found.write_joules is None


def test_every_preset_has_a_source_and_a_name_that_finds_it():
    assert len(TECHNOLOGIES) >= 3
    for name, preset in TECHNOLOGIES.items():
        assert technology(name) is preset
        assert len(preset.source) > 20
    with pytest.raises(MemfitError, match="choose from rram"):
        technology("punch cards")


def test_impossible_figures_are_refused():
    with pytest.raises(ValueError, match="endurance"):
        Technology("worn", endurance=0, source="this test")
    with pytest.raises(ValueError, match="endurance='1e6' of text is not possible"):
        Technology("text", endurance="1e6", source="this test")  # type: ignore[arg-type]
    found = report([CellArray(torch.zeros(3))], MADE_UP)
    with pytest.raises(ValueError, match="positive"):
        found.lifetime_seconds(0, 1.0)
    with pytest.raises(ValueError, match="no cells"):
        report([], MADE_UP)
