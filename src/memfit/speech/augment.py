"""Variations of a recording that leave its words alone, so that a few voices stand for many.

All of them draw from a ``torch.Generator``: the same state, the same variation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK = 64  # samples


@dataclass(frozen=True)
class Augmentation:
    """How strongly to vary.

    Attributes:
        speed: largest relative change of speed and pitch together, 0.1 for 0.9 to 1.1 times (Ko et al., "Audio
            Augmentation for Speech Recognition", 2015).
        warp: largest relative stretch of the frequency axis, as another vocal tract would make it (Jaitly and Hinton,
            "Vocal Tract Length Perturbation", 2013).
        noise: lowest and highest signal-to-noise ratio in decibels of the white noise that is added; above 60 nobody
            hears it.
        time_masks: number of stretches of time that are blanked, each up to ``time_mask_frames`` long (Park et al.,
            "SpecAugment", 2019).
        time_mask_frames: longest blanked stretch, in feature frames of 10 ms.
        band_masks: number of ranges of mel bands that are blanked, each up to ``band_mask_width`` wide.
        band_mask_width: widest blanked range, in mel bands.
    """

    speed: float = 0.1
    warp: float = 0.1
    noise: tuple[float, float] = (10.0, 70.0)
    time_masks: int = 2
    time_mask_frames: int = 6
    band_masks: int = 2
    band_mask_width: int = 5

    def paced(self, waveforms: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
        """Vary the speed of each waveform, float32 of shape ``(samples,)``, by its own draw."""
        draws = torch.rand(len(waveforms), generator=generator).tolist()
        return [
            resample(wave, 1.0 + self.speed * (2.0 * draw - 1.0)) for wave, draw in zip(waveforms, draws, strict=True)
        ]

    def noisy(self, waveforms: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
        """Add white noise to each waveform, float32 of shape ``(samples,)``, at a ratio of its own."""
        lowest, highest = self.noise
        ratios = lowest + (highest - lowest) * torch.rand(len(waveforms), generator=generator)
        levels = (10.0 ** (-ratios / 20.0)).tolist()
        return [
            wave + torch.randn(wave.shape, generator=generator) * (level * wave.square().mean().sqrt())
            for wave, level in zip(waveforms, levels, strict=True)
        ]

    def warps(self, count: int, generator: torch.Generator) -> Tensor:
        """Frequency-warping factors of shape ``(count,)`` for :class:`memfit.speech.features.LogMel`."""
        return 1.0 + self.warp * (2.0 * torch.rand(count, generator=generator) - 1.0)

    def masked(self, features: Tensor, lengths: Tensor, generator: torch.Generator) -> Tensor:
        """Features with random stretches and ranges set to zero, which is their mean.

        Args:
            features: ``(batch, frames, bands)``.
            lengths: ``(batch,)`` in frames.
            generator: what decides.
        """
        batch, _, bands = features.shape
        keep = torch.ones_like(features, dtype=torch.bool)
        for number, widest, size, axis in (
            (self.time_masks, self.time_mask_frames, lengths, 1),
            (self.band_masks, self.band_mask_width, torch.full_like(lengths, bands), 2),
        ):
            width = (torch.rand(number, batch, generator=generator) * (widest + 1)).long()
            start = (torch.rand(number, batch, generator=generator) * (size - width).clamp(min=0)).long()
            position = torch.arange(features.shape[axis])
            blank = ((position >= start[..., None]) & (position < (start + width)[..., None])).any(dim=0)
            keep &= ~(blank[:, :, None] if axis == 1 else blank[:, None, :])
        return features * keep


def resample(wave: Tensor, speed: float) -> Tensor:
    """Play a waveform faster (``speed`` above 1) or slower: pitch and duration change together.

    The spectrum is cut or extended and transformed back, which is exact for a band-limited signal.

    Args:
        wave: float32 of shape ``(samples,)``.
        speed: a positive factor, met to within 64 samples; up to 64 samples of silence are added.
    """
    # Lengths with a factor of 64 have fast Fourier transforms; a prime length can take ten times as long.
    blocks = -(-len(wave) // _BLOCK)
    target = _BLOCK * max(1, round(blocks / speed))
    spectrum = torch.fft.rfft(wave, n=_BLOCK * blocks)
    return torch.fft.irfft(spectrum[: target // 2 + 1], n=target) * (target / (_BLOCK * blocks))
