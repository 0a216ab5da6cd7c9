"""A filtered backward that keeps the taps of a kernel apart: each tap reads the patches that its pixels lie in.

Let x and the output's gradient g be constant on patches, as a filter takes them to be: X on patches r of x, G on
patches q of the output. Along one axis let N[j, q, r] be the number of pixels of q for which tap j reads a pixel of r.
Then the gradients of the convolution, exactly, are

    grad w[o, i, j, k] = sum over q, r of  G[o, q] N_rows[j] N_columns[k] X[i, r]
    grad X[i, r]       = sum over o, j, k, q of  G[o, q] w[o, i, j, k] N_rows[j] N_columns[k] / pixels of r

where q and r run over rows and columns, and grad X is the mean over the patch of the gradient of x.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

Reads = tuple[np.ndarray, np.ndarray]
"""N of rows and of columns, (taps, patches of the output, patches of x) each."""


def position(pixel: int, size: int, mode: str) -> int | None:
    """The pixel of a map that a padded one has at ``pixel``, counted from the map's first; None for a zero."""
    if 0 <= pixel < size:
        return pixel
    if mode == "circular":
        return pixel % size
    if mode == "replicate":
        return min(max(pixel, 0), size - 1)
    if mode == "reflect":
        return -pixel if pixel < 0 else 2 * (size - 1) - pixel
    return None


def reads(size: int, outputs: int, positions: list[list[int | None]], widths: tuple[int, int]) -> np.ndarray:
    """N of one axis.

    Args:
        size: of x, in pixels.
        outputs: pixels of the output.
        positions: for each tap and each pixel of the output the pixel of x that it reads, or None for padding.
        widths: of patches of the output, and of x; the first patches begin at the first pixels.

    Returns:
        (taps, patches of the output, patches of x), float64.
    """
    found = np.zeros((len(positions), -(-outputs // widths[0]), -(-size // widths[1])))
    for tap, read in enumerate(positions):
        for pixel, position in enumerate(read):
            if position is not None:
                found[tap, pixel // widths[0], position // widths[1]] += 1
    return found


def weight_gradient(means: Tensor, pooled: Tensor, by: Reads, groups: int) -> Tensor:
    """The weight's gradient.

    Args:
        means: G (B, C_out, Q, Q').
        pooled: X (B, C_in, R, R'), of its dtype.
        by: N.
        groups: of the channels.

    Returns:
        (C_out, C_in / groups, taps of rows, taps of columns).
    """
    g, x = means.permute(0, 2, 3, 1), pooled.permute(0, 2, 3, 1)
    rows = g.reshape(-1, groups, g.shape[3] // groups)
    across = _across(by[1], means)
    batch, height, _, channels = x.shape
    read = (across @ x).view(batch, height, -1)
    parts = []
    for down in _down(by[0], means):
        terms = (down @ read).view(len(rows), -1, groups, channels // groups)  # q; tap of the columns; channel
        parts.append(torch.einsum("mgo,mkgi->goik", rows, terms))
    return torch.stack(parts, 3).flatten(0, 1)


def input_gradient(means: Tensor, weight: Tensor, by: Reads, groups: int) -> Tensor:
    """The sum over each patch of x of the gradient of x.

    Args:
        means: G (B, C_out, Q, Q').
        weight: (C_out, C_in / groups, taps of rows, taps of columns), of its dtype.
        by: N.
        groups: of the channels.

    Returns:
        (B, C_in, R, R').
    """
    g = means.permute(0, 2, 3, 1)
    batch, height, width, outputs = g.shape
    rows = g.reshape(-1, groups, outputs // groups)
    across = _across(by[1], means).t()
    taps = weight.unflatten(0, (groups, -1)).permute(3, 0, 1, 4, 2)  # tap of the rows first, channels of x last
    total: Tensor | None = None
    for down, kernel in zip(_down(by[0], means), taps, strict=True):
        terms = torch.einsum("mgo,goki->mkgi", rows, kernel).reshape(batch * height, width * kernel.shape[2], -1)
        read = down.t() @ (across @ terms).view(batch, height, -1)
        total = read if total is None else total.add_(read)
    assert total is not None
    return total.view(batch, by[0].shape[2], by[1].shape[2], -1).permute(0, 3, 1, 2)


def _down(counts: np.ndarray, like: Tensor) -> Iterator[Tensor]:
    """For each tap of the rows, patches of the output x patches of x."""
    yield from torch.from_numpy(counts).to(like)


def _across(counts: np.ndarray, like: Tensor) -> Tensor:
    """Patches of the output, and in each the taps, x patches of x."""
    return torch.from_numpy(counts).to(like).transpose(0, 1).flatten(0, 1)
