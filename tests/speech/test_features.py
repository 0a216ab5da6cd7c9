"""Log-mel features against a slow, obvious reference, and that neither padding nor gain reaches the recognizer."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memfit.speech.features import LogMel, mel_filterbank


def _reference(wave: torch.Tensor, sample_rate: int, bands: int) -> torch.Tensor:
    """The definition, one frame, one frequency and one filter at a time, in float64."""
    window, hop = round(0.025 * sample_rate), round(0.01 * sample_rate)
    wave = wave.double()
    wave = torch.cat([wave, torch.zeros(max(0, window - len(wave)))])
    emphasized = [wave[0].item()] + [(wave[t] - 0.97 * wave[t - 1]).item() for t in range(1, len(wave))]
    fft = 1
    while fft < window:
        fft *= 2
    highest = 2595 * math.log10(1 + sample_rate / 2 / 700)
    edges = [700 * (10 ** (highest * i / (bands + 1) / 2595) - 1) for i in range(bands + 2)]
    taper = [0.5 - 0.5 * math.cos(2 * math.pi * t / (window - 1)) for t in range(window)]
    rows = []
    for start in range(0, len(wave) - window + 1, hop):
        frame = torch.tensor(
            [emphasized[start + t] * taper[t] for t in range(window)] + [0.0] * (fft - window)
        ).double()
        power = torch.fft.fft(frame).abs().square()
        row = []
        for band in range(bands):
            low, centre, high = edges[band : band + 3]
            energy = 0.0
            for k in range(fft // 2 + 1):
                f = k * sample_rate / fft
                energy += max(0.0, min((f - low) / (centre - low), (high - f) / (high - centre))) * power[k].item()
            row.append(math.log(max(energy, 1e-10)))
        rows.append(row)
    logs = torch.tensor(rows).double()
    logs = logs.clamp(min=logs.max().item() - 7 * math.log(10))
    centred = logs - logs.mean(dim=0)
    return centred / centred.square().mean(dim=0).sqrt().clamp(min=1e-2)


@pytest.mark.parametrize("samples", [3000, 1234, 201, 200, 50, 1])
@pytest.mark.parametrize("sample_rate", [8000, 16000])
def test_features_follow_their_definition(samples: int, sample_rate: int) -> None:
    wave = 0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(samples))
    features, lengths = LogMel(sample_rate, 20)([wave])
    expected = _reference(wave, sample_rate, 20)
    assert features.dtype == torch.float32
    assert lengths.tolist() == [expected.shape[0]] == [LogMel(sample_rate, 20).frames(samples)]
    torch.testing.assert_close(features[0].double(), expected, atol=2e-3, rtol=1e-3)


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=5), seed=st.integers(0, 2**31))
def test_an_utterances_features_do_not_depend_on_its_batch(sizes: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    waves = [torch.randn(size, generator=generator) for size in sizes]
    log_mel = LogMel(8000, 40)
    features, lengths = log_mel(waves)
    for row, wave, length in zip(features, waves, lengths.tolist(), strict=True):
        alone, (frames,) = log_mel([wave])
        assert frames == length
        torch.testing.assert_close(row[:length], alone[0], atol=1e-3, rtol=1e-3)
        assert not row[length:].any()


def test_digital_silence_gives_zeros_and_nothing_infinite() -> None:
    features, _ = LogMel(8000, 40)([torch.zeros(4000)])
    assert features.abs().max() == 0


def test_gain_does_not_change_the_features() -> None:
    wave = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    features, _ = LogMel(8000, 40)([wave, 0.01 * wave])
    torch.testing.assert_close(features[0], features[1], atol=1e-3, rtol=1e-3)


def test_every_filter_hears_something_and_every_inner_frequency_is_heard() -> None:
    filters = mel_filterbank(40, 129, 8000)
    assert bool((filters.sum(dim=0) > 0).all())
    assert bool((filters[2:-2].sum(dim=1) > 0).all())
    assert float(filters.max()) <= 1


def test_a_warp_of_one_changes_nothing_and_a_larger_one_moves_the_filters_up() -> None:
    plain = mel_filterbank(40, 129, 8000)
    warped = mel_filterbank(40, 129, 8000, torch.tensor([1.0, 1.15, 0.85]))
    torch.testing.assert_close(warped[0], plain)
    frequencies = torch.linspace(0, 4000, 129)[:, None]

    def centre(filters: torch.Tensor) -> torch.Tensor:
        return ((filters * frequencies).sum(dim=0) / filters.sum(dim=0))[10:]

    assert bool((centre(warped[1]) > centre(plain)).all())
    assert bool((centre(warped[2]) < centre(plain)).all())
    assert bool((warped >= 0).all())
    assert bool((warped.sum(dim=1) > 0).all())
