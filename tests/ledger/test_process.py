"""The operating system's figure: `process_peak` sees what a region touches, and only that."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from memfit.errors import MemfitError
from memfit.ledger import process, process_peak

MB = 10**6


def touch(megabytes: int) -> torch.Tensor:
    return torch.ones(megabytes * MB // 4)


def test_a_touched_allocation_shows_even_though_it_is_freed_again() -> None:
    with process_peak() as measured:
        touch(200)
    assert measured.growth == pytest.approx(200 * MB, rel=0.05)
    assert measured.peak == measured.start + measured.growth


def test_the_peak_of_an_earlier_region_is_forgotten() -> None:
    touch(300)
    with process_peak() as measured:
        touch(100)
    assert measured.growth == pytest.approx(100 * MB, rel=0.1)


def test_nested_regions_keep_the_outer_peak() -> None:
    with process_peak() as outer:
        touch(200)
        with process_peak() as inner:
            touch(50)
        assert outer.growth >= 190 * MB
    assert inner.growth == pytest.approx(50 * MB, rel=0.1)
    assert outer.growth == pytest.approx(200 * MB, rel=0.05)


def test_the_figure_can_be_read_while_the_region_is_open() -> None:
    with process_peak() as measured:
        before = measured.growth
        kept = touch(100)
        assert measured.growth - before == pytest.approx(100 * MB, rel=0.1)
        del kept


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's high-water mark is reset on Linux only")
def test_sampling_stands_in_where_the_kernel_does_not_forget_its_peak(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(process, "_CLEAR_REFS", tmp_path / "missing" / "clear_refs")
    touch(600)  # above what follows, so that the lifetime's peak says nothing about the region
    with process_peak() as measured:
        tensor = touch(200)
        tensor.mul_(2)
    assert measured.method == "sampled"
    assert measured.growth == pytest.approx(200 * MB, rel=0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's high-water mark is reset on Linux only")
def test_a_region_above_the_lifetime_peak_is_exact_without_a_reset(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(process, "_CLEAR_REFS", tmp_path / "missing" / "clear_refs")
    lifetime = process._lifetime_peak()
    with process_peak() as measured:
        beyond = max(0, lifetime - process.resident()) // MB + 200
        touch(beyond)
    assert measured.method == "lifetime"
    assert measured.growth == pytest.approx(beyond * MB, rel=0.05)


def test_a_region_is_used_once() -> None:
    measured = process_peak()
    with measured, pytest.raises(MemfitError, match="used already"):
        measured.__enter__()


def test_an_exception_closes_the_region() -> None:
    with pytest.raises(ValueError, match="inside"), process_peak() as measured:
        raise ValueError("inside")
    assert measured.growth >= 0
    assert not process._open


def test_a_system_without_a_figure_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "plan9")
    with pytest.raises(MemfitError, match="cannot read the process's resident memory on plan9"):
        process_peak().__enter__()
    assert not process._open


def test_memfit_imports_where_there_is_no_resource_module() -> None:
    code = "import torch, sys; sys.modules['resource'] = None; import memfit"  # as on Windows
    subprocess.run([sys.executable, "-c", code], check=True)
