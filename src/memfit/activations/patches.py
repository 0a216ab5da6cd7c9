"""Maps cut into patches: the mean over each patch, and its way back, which spreads one number over a patch.

Channels-last maps are pooled and spread at about the speed of a copy. With the channels first, torch pools patches
narrower than 4 slower than it transposes, and never repeats along a row well; those two go other ways. So do the few
channels of an image, which are last in memory, and which it pools one by one: there whole maps are added.

What depends on sizes alone is worked out once, as small maps are quicker than Python.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_POOLS_AS_FAST_FROM = 4  # of that width on, pooling with the channels first is as fast as transposing and pooling
_FEW_CHANNELS = 4  # up to so many, channels that are last are fewer than a register holds
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

    @property
    def in_patches(self) -> slice:
        """Where the pixels of all patches are on the axis, if none reaches out before it."""
        return slice(self.origin * self.every, min(self.end * self.every, self.size), self.every)


Cuts = tuple[Cut, Cut]


class _Pooling(NamedTuple):
    """How to pool a map.

    Attributes:
        part: of the map, which is then cut from its first pixel on; None for all of it.
        width: of the patches, (H, W).
        is_inside: whether each patch has a real pixel, and none reaches out before the first.
        is_whole: whether, of ``part``, no patch is cut off either.
        sides: what is to be added to ``part`` around it, in the order of ``F.pad``, where not all is inside.
    """

    part: tuple[slice, ...] | None
    width: tuple[int, int]
    is_inside: bool
    is_whole: bool
    sides: list[int]


@lru_cache(maxsize=512)
def _pooling(cuts: Cuts) -> _Pooling:
    is_inside = all(cut.is_inside for cut in cuts)
    wanted = [cut.in_patches if is_inside else slice(0, cut.size, cut.every) for cut in cuts]
    is_all = all(each == slice(0, cut.size, 1) for each, cut in zip(wanted, cuts, strict=True))
    return _Pooling(
        None if is_all else (slice(None), slice(None), *wanted),
        (cuts[0].width, cuts[1].width),
        is_inside,
        is_inside and all(cut.end <= cut.pixels for cut in cuts),
        [side for cut in reversed(cuts) for side in (-cut.origin, cut.end - cut.pixels)],
    )


def pool(x: Tensor, cuts: Cuts) -> Tensor:
    """The mean of each patch over its real pixels; 0 for a patch that has none.

    Args:
        x: (B, C, H, W).
        cuts: of H and of W.

    Returns:
        (B, C, patches of H, patches of W); x itself where each of its pixels is a patch, and never a view of it.
    """
    way = _pooling(cuts)
    part, width = x if way.part is None else x[way.part], way.width
    if way.is_inside and width == (1, 1):
        return x if way.part is None else part.clone()  # of a view the whole map would be kept
    if way.is_whole and _has_few_channels_last(x):
        return _add_up(_add_up(part, 2, width[0]), 3, width[1]).mul_(1 / (width[0] * width[1]))
    if min(width) < _POOLS_AS_FAST_FROM:
        part = part.contiguous(memory_format=torch.channels_last)
    if way.is_inside:
        return F.avg_pool2d(part, width, width, ceil_mode=True, count_include_pad=False)
    sums = F.avg_pool2d(F.pad(part, way.sides), width, width, divisor_override=1)
    return sums / counts(cuts, sums).clamp(min=1)


def _has_few_channels_last(x: Tensor) -> bool:
    # In half precision the sums of a patch would be rounded, which torch's pooling does not do.
    return 1 < x.shape[1] <= _FEW_CHANNELS and x.stride(1) == 1 and x.is_cpu and x.element_size() >= 4


def _add_up(x: Tensor, axis: int, width: int) -> Tensor:
    """The sum of each ``width`` neighbours along an axis; a new tensor, if they are two or more."""
    first, *others = (x[(slice(None),) * axis + (slice(start, None, width),)] for start in range(width))
    if not others:
        return first
    total = first + others[0]
    for other in others[1:]:
        total += other
    return total


class _Spreading(NamedTuple):
    """How to spread over a map.

    Attributes:
        size: (H, W) of what patches cover.
        sides: zeros around it, in the order of ``F.pad``; None where there are none.
        whole: (H, W) of all patches.
        full: what to upsample to, and then to cut off.
    """

    size: tuple[int, int]
    sides: list[int] | None
    whole: tuple[int, int]
    full: tuple[int, int]


@lru_cache(maxsize=512)
def _spreading(cuts: Cuts) -> _Spreading:
    rows, columns = cuts
    height, width = (min(cut.size - cut.origin, cut.patches * cut.width) for cut in cuts)
    whole = (rows.patches * rows.width, columns.patches * columns.width)
    sides = [side for cut in reversed(cuts) for side in (cut.origin, cut.size - min(cut.end, cut.size))]
    # Where the result is as large, or twice as large, torch takes it that this is the scale.
    guessed = [
        each in (cut.patches, 2 * cut.patches) and each != full
        for each, full, cut in zip((height, width), whole, cuts, strict=True)
    ]
    return _Spreading((height, width), sides if any(sides) else None, whole, whole if any(guessed) else (height, width))


def spread(coarse: Tensor, cuts: Cuts, channels_last: bool) -> Tensor:
    """A map that has the number of a patch at each of its pixels, and 0 outside of all patches.

    Args:
        coarse: (B, C, patches of H, patches of W).
        cuts: of H and of W.
        channels_last: the memory format of the result.

    Returns:
        (B, C, H, W).
    """
    if cuts[0].every > 1 or cuts[1].every > 1:
        return _spread_thinly(coarse, cuts, channels_last)
    way = _spreading(cuts)
    map_ = _repeat(coarse, cuts, way, channels_last)
    return map_ if way.sides is None else F.pad(map_, way.sides)


def _repeat(coarse: Tensor, cuts: Cuts, way: _Spreading, channels_last: bool) -> Tensor:
    """Each number ``width`` times along both axes, cut off at the size that is wanted."""
    (height, width), (rows, columns) = way.size, cuts
    layout = torch.channels_last if channels_last else torch.contiguous_format
    if rows.patches == columns.patches == 1:
        return coarse.expand(-1, -1, height, width).contiguous(memory_format=layout)
    if channels_last and max(rows.width, columns.width) <= _SCALES_EXACT_TO:
        coarse = coarse.contiguous(memory_format=layout)
        upsampled = torch.ops.aten.upsample_nearest2d.default(coarse, way.full, float(rows.width), float(columns.width))
        if way.full == way.size:
            return upsampled
        return upsampled[:, :, :height, :width].contiguous(memory_format=layout)
    # Along a row by a product with ones and zeros, which BLAS does faster than torch copies single numbers.
    ones = torch.eye(columns.patches, dtype=coarse.dtype, device=coarse.device)
    wide = coarse.contiguous() @ ones.repeat_interleave(columns.width, dim=1)[:, :width]
    batch, channels = coarse.shape[:2]
    tall = wide.unsqueeze(3).expand(-1, -1, -1, rows.width, -1).reshape(batch, channels, way.whole[0], width)
    return tall[:, :, :height].contiguous(memory_format=layout)


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
    """The number of real pixels of each patch: (patches of H, patches of W), of the dtype and device of ``like``."""
    rows, columns = (torch.tensor(_counts(cut), dtype=like.dtype, device=like.device) for cut in cuts)
    return rows.unsqueeze(1) * columns


@lru_cache(maxsize=512)
def _counts(cut: Cut) -> list[int]:
    """How many real pixels each patch has."""
    starts = range(cut.origin, cut.end, cut.width)
    return [max(0, min(start + cut.width, cut.pixels) - max(start, 0)) for start in starts]
