"""Maps cut into patches: the mean over each patch, and its way back, which spreads one number over a patch.

Channels-last maps are pooled and spread at about the speed of a copy. With the channels first, torch pools patches
narrower than 4 slower than it transposes, and never repeats along a row well; those two go other ways.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_POOLS_AS_FAST_FROM = 4  # of that width on, pooling with the channels first is as fast as transposing and pooling
_SCALES_EXACT_TO = 40  # upsampling to the nearest rounds the reciprocal of its scale: proved exact to this width


class Cut(NamedTuple):
    """One spatial axis, cut into patches. All numbers are of pixels.

    Attributes:
        size: of the axis.
        width: of a patch.
        patches: how many there are.
        origin: where the first patch begins; it, and the last, may reach out of the map.
        every: only each ``every``-th pixel belongs to the map at all, and ``width`` and ``origin`` count those.
    """

    size: int
    width: int
    patches: int
    origin: int = 0
    every: int = 1

    @property
    def pixels(self) -> int:
        """How many pixels belong to the map."""
        return -(-self.size // self.every)

    @property
    def end(self) -> int:
        """The pixel after the last patch."""
        return self.origin + self.patches * self.width

    @property
    def is_inside(self) -> bool:
        """Whether each patch has a real pixel and the first begins with one."""
        return self.origin >= 0 and self.end - self.width < self.pixels

    def counts(self) -> list[int]:
        """How many real pixels each patch has."""
        starts = range(self.origin, self.end, self.width)
        return [max(0, min(start + self.width, self.pixels) - max(start, 0)) for start in starts]


Cuts = tuple[Cut, Cut]


def pool(x: Tensor, cuts: Cuts) -> Tensor:
    """The mean of each patch over its real pixels; 0 for a patch that has none.

    Args:
        x: (B, C, H, W).
        cuts: of H and of W.

    Returns:
        (B, C, patches of H, patches of W).
    """
    rows, columns = cuts
    if rows.every > 1 or columns.every > 1:
        x = x[:, :, :: rows.every, :: columns.every]
    if min(rows.width, columns.width) < _POOLS_AS_FAST_FROM and (rows.width, columns.width) != (1, 1):
        x = x.contiguous(memory_format=torch.channels_last)
    width = (rows.width, columns.width)
    if rows.is_inside and columns.is_inside:
        if rows.origin or columns.origin or rows.end < rows.pixels or columns.end < columns.pixels:
            x = x[:, :, rows.origin : rows.end, columns.origin : columns.end]
        return x if width == (1, 1) else F.avg_pool2d(x, width, width, ceil_mode=True, count_include_pad=False)
    sides = [side for cut in (columns, rows) for side in (-cut.origin, cut.end - cut.pixels)]
    sums = F.avg_pool2d(F.pad(x, sides), width, width, divisor_override=1)
    return sums / counts(cuts, sums).clamp(min=1)


def spread(coarse: Tensor, cuts: Cuts, channels_last: bool) -> Tensor:
    """A map that has the number of a patch at each of its pixels, and 0 outside of all patches.

    Args:
        coarse: (B, C, patches of H, patches of W).
        cuts: of H and of W.
        channels_last: the memory format of the result.

    Returns:
        (B, C, H, W).
    """
    if any(cut.every > 1 for cut in cuts):
        return _spread_thinly(coarse, cuts, channels_last)
    within = [min(cut.size - cut.origin, cut.patches * cut.width) for cut in cuts]
    map_ = _repeat(coarse, cuts, (within[0], within[1]), channels_last)
    sides = [side for cut in reversed(cuts) for side in (cut.origin, cut.size - min(cut.end, cut.size))]
    return F.pad(map_, sides) if any(sides) else map_


def _repeat(coarse: Tensor, cuts: Cuts, size: tuple[int, int], channels_last: bool) -> Tensor:
    """Each number ``width`` times along both axes, cut off at ``size``."""
    (height, width), (rows, columns) = size, cuts
    if channels_last and max(rows.width, columns.width) <= _SCALES_EXACT_TO:
        coarse = coarse.contiguous(memory_format=torch.channels_last)
        if rows.width == columns.width == 1:
            return coarse[:, :, :height, :width]
        return torch.ops.aten.upsample_nearest2d(coarse, size, float(rows.width), float(columns.width))
    # Along a row by a product with ones and zeros, which BLAS does faster than torch copies single numbers.
    ones = torch.eye(columns.patches, dtype=coarse.dtype, device=coarse.device)
    wide = coarse.contiguous() @ ones.repeat_interleave(columns.width, dim=1)[:, :width]
    batch, channels = coarse.shape[:2]
    tall = wide.unsqueeze(3).expand(-1, -1, -1, rows.width, -1).reshape(batch, channels, -1, width)[:, :, :height]
    return tall.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _spread_thinly(coarse: Tensor, cuts: Cuts, channels_last: bool) -> Tensor:
    """Onto each ``every``-th pixel, with zeros between."""
    rows, columns = cuts
    layout = torch.channels_last if channels_last else torch.contiguous_format
    shape = (*coarse.shape[:2], rows.size, columns.size)
    out = torch.empty(shape, dtype=coarse.dtype, device=coarse.device, memory_format=layout).zero_()
    thin = (rows._replace(size=rows.pixels, every=1), columns._replace(size=columns.pixels, every=1))
    out[:, :, :: rows.every, :: columns.every] = spread(coarse, thin, channels_last)
    return out


def counts(cuts: Cuts, like: Tensor) -> Tensor:
    """The number of real pixels of each patch: (patches of H, patches of W), of the dtype of ``like``."""
    rows, columns = (torch.tensor(cut.counts(), dtype=like.dtype, device=like.device) for cut in cuts)
    return rows.unsqueeze(1) * columns
