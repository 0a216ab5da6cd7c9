"""Log-mel features of speech in plain torch.

    x = log(M |rfft(w * (s[t] - 0.97 s[t - 1]))|^2), clamped to 70 dB below its maximum, then per band (x - mean) / std

with w a Hann window and M a bank of triangular filters, equally spaced on the mel scale of O'Shaughnessy (1987),
mel(f) = 2595 log10(1 + f / 700). Mean and standard deviation are those of the utterance, so that neither the gain nor
the microphone's colour reaches the recognizer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

WINDOW_SECONDS = 0.025
HOP_SECONDS = 0.010
_PRE_EMPHASIS = 0.97
_DYNAMIC_RANGE = 7.0 * math.log(10.0)  # 70 dB of power, in the natural logarithm
_SMALLEST_POWER = 1e-10  # below a 16-bit recording's last bit; keeps the logarithm of digital silence finite
_SMALLEST_STD = 1e-2  # a band that never moves (silence) becomes zeros instead of noise


def mel_filterbank(bands: int, bins: int, sample_rate: int, warp: Tensor | None = None) -> Tensor:
    """Triangular filters on the mel scale, each with a peak of 1.

    Args:
        bands: number of filters.
        bins: number of FFT bins from 0 Hz to half of ``sample_rate``, both included.
        sample_rate: samples per second.
        warp: factors of shape ``(batch,)`` by which the frequency axis is stretched, as a longer or shorter vocal tract
            would do. 1 leaves it as it is. Above 4/5 of the band the stretch eases off linearly, so that the highest
            frequency stays in place (Jaitly and Hinton, "Vocal Tract Length Perturbation", 2013).

    Returns:
        float32 of shape ``(bins, bands)``, or ``(batch, bins, bands)`` with ``warp``.
    """
    nyquist = sample_rate / 2
    highest_mel = 2595.0 * math.log10(1.0 + nyquist / 700.0)
    edges = 700.0 * (10.0 ** (torch.linspace(0.0, highest_mel, bands + 2) / 2595.0) - 1.0)
    if warp is not None:
        factor = warp[:, None]
        knee = 0.8 * nyquist / factor.clamp(min=1.0)
        above = nyquist - (nyquist - knee * factor) / (nyquist - knee) * (nyquist - edges)
        edges = torch.where(edges <= knee, edges * factor, above)
    frequencies = torch.linspace(0.0, nyquist, bins)[:, None]
    lower, centre, upper = (edges[..., None, i : i + bands] for i in range(3))
    return torch.minimum((frequencies - lower) / (centre - lower), (upper - frequencies) / (upper - centre)).clamp(
        min=0
    )


class LogMel:
    """Turns waveforms into log-mel features, many at once.

    Args:
        sample_rate: samples per second of every waveform.
        bands: number of mel bands.
    """

    def __init__(self, sample_rate: int, bands: int) -> None:
        self.sample_rate = sample_rate
        self.bands = bands
        self.window = round(WINDOW_SECONDS * sample_rate)
        self.hop = round(HOP_SECONDS * sample_rate)
        self._fft = 1 << (self.window - 1).bit_length()
        self._taper = torch.hann_window(self.window, periodic=False)
        self._filters = mel_filterbank(bands, self._fft // 2 + 1, sample_rate)

    def frames(self, samples: int) -> int:
        """Number of feature frames of a waveform of ``samples`` samples: one per hop, at least one."""
        return 1 + max(0, samples - self.window) // self.hop

    def __call__(self, waveforms: Sequence[Tensor], warp: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Compute features.

        Args:
            waveforms: one float32 tensor of shape ``(samples,)`` per utterance; lengths may differ. One that is shorter
                than a window is taken as followed by silence.
            warp: frequency-warping factors of shape ``(batch,)``; see :func:`mel_filterbank`.

        Returns:
            ``features`` float32 of shape ``(batch, frames, bands)``, zero beyond each utterance's end, and ``lengths``
            int64 of shape ``(batch,)`` in frames. An utterance's features do not depend on the others of the batch.
        """
        lengths = torch.tensor([self.frames(len(wave)) for wave in waveforms])
        padded = pad_sequence(list(waveforms), batch_first=True)
        samples = self.window + self.hop * (int(lengths.max()) - 1)
        padded = torch.nn.functional.pad(padded, (0, max(0, samples - padded.shape[1])))[:, :samples]
        emphasized = torch.cat([padded[:, :1], padded[:, 1:] - _PRE_EMPHASIS * padded[:, :-1]], dim=1)
        windows = emphasized.unfold(1, self.window, self.hop) * self._taper
        power = torch.fft.rfft(windows, n=self._fft).abs().square()
        if warp is None:
            filters = self._filters
        else:
            filters = mel_filterbank(self.bands, self._fft // 2 + 1, self.sample_rate, warp)
        features = (power @ filters).clamp(min=_SMALLEST_POWER).log()

        inside = (torch.arange(features.shape[1]) < lengths[:, None])[:, :, None]
        peak = features.masked_fill(~inside, -math.inf).amax(dim=(1, 2), keepdim=True)
        features = torch.maximum(features, peak - _DYNAMIC_RANGE)
        count = lengths[:, None, None]
        mean = (features * inside).sum(dim=1, keepdim=True) / count
        centred = (features - mean) * inside
        std = (centred.square().sum(dim=1, keepdim=True) / count).sqrt()
        return centred / std.clamp(min=_SMALLEST_STD), lengths
