"""A filtered backward that keeps the taps of a kernel apart: each tap reads the patches that its pixels lie in.

Let x and the output's gradient g be constant on patches, as a filter takes them to be: X on patches r of x, G on
patches q of the output. Along one axis let N[j, q, r] be the number of pixels of q for which tap j reads a pixel of r.
Then the gradients of the convolution, exactly, are

    grad w[o, i, j, k] = sum over q, r of  G[o, q] N_rows[j] N_columns[k] X[i, r]
    grad X[i, r]       = sum over o, j, k, q of  G[o, q] w[o, i, j, k] N_rows[j] N_columns[k] / pixels of r

where q and r run over rows and columns, and grad X is the mean over the patch of the gradient of x.

Where N depends on r - q alone, as when patches of one size cover maps of one size that are padded with zeros, these are
the gradients of a small convolution of X, whose kernel is A_rows^T w A_columns with A[j, r - q] = N[j, q, r].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

Counts = tuple[tuple[tuple[int, ...], ...], ...]
Shares = tuple[tuple[int, ...], ...]


class Reads(NamedTuple):
    """What the taps read. Plain numbers, as these are kept, and compilers are to see through them.

    Attributes:
        rows: N of the rows, (taps, patches of the output, patches of x).
        columns: of the columns.
        shares: A of both, (taps, 2 r + 1) for a reach of r patches, or None where N depends on more than r - q.
    """

    rows: Counts
    columns: Counts
    shares: tuple[Shares, Shares] | None


def of_axes(rows: Counts, columns: Counts) -> Reads:
    """Of both axes."""
    of_rows, of_columns = _shares(rows), _shares(columns)
    return Reads(rows, columns, None if of_rows is None or of_columns is None else (of_rows, of_columns))


def _shares(counts: Counts) -> Shares | None:
    outputs, inputs = len(counts[0]), len(counts[0][0])
    if outputs != inputs:
        return None
    reach = 0
    found: list[dict[int, int]] = []
    for tap in counts:
        row: dict[int, int] = {}
        for q in range(outputs):
            for r in range(inputs):
                if row.setdefault(r - q, tap[q][r]) != tap[q][r]:
                    return None
                if tap[q][r]:
                    reach = max(reach, abs(r - q))
        found.append(row)
    return tuple(tuple(row.get(away, 0) for away in range(-reach, reach + 1)) for row in found)


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


def reads(size: int, outputs: int, positions: list[list[int | None]], widths: tuple[int, int]) -> Counts:
    """N of one axis.

    Args:
        size: of x, in pixels.
        outputs: pixels of the output.
        positions: for each tap and each pixel of the output the pixel of x that it reads, or None for padding.
        widths: of patches of the output, and of x; the first patches begin at the first pixels.

    Returns:
        (taps, patches of the output, patches of x).
    """
    found = []
    for read in positions:
        table = [[0] * -(-size // widths[1]) for _ in range(-(-outputs // widths[0]))]
        for pixel, position in enumerate(read):
            if position is not None:
                table[pixel // widths[0]][position // widths[1]] += 1
        found.append(tuple(tuple(row) for row in table))
    return tuple(found)


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
    if by.shares is not None:
        shape = (means.shape[1], pooled.shape[1] // groups, *(len(each[0]) for each in by.shares))
        gradient = _backward(means, pooled, means.new_empty(1).expand(shape), groups, (False, True, False))[1]
        taps = [len(each) for each in by.shares]
        return (gradient.flatten(2) @ _both(by.shares, means).t()).unflatten(2, taps)
    g, x = means.permute(0, 2, 3, 1), pooled.permute(0, 2, 3, 1)
    rows = g.reshape(-1, groups, g.shape[3] // groups)
    across = _across(by.columns, means)
    batch, height, _, channels = x.shape
    depthwise = groups == channels == means.shape[1]  # then the products are elementwise
    read = (across @ x).view(batch, height, -1)
    parts = []
    for down in _down(by.rows, means):
        terms = (down @ read).view(len(rows), -1, groups, channels // groups)  # q; tap of the columns; channel
        if depthwise:
            parts.append((rows.unsqueeze(1) * terms).sum(0).permute(1, 2, 0).unsqueeze(1))
        else:
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
    if by.shares is not None:
        sizes = [len(each[0]) for each in by.shares]
        kernel = (weight.flatten(2) @ _both(by.shares, means)).unflatten(2, sizes)
        like = means.new_empty(1).expand(len(means), weight.shape[1] * groups, *means.shape[2:])
        return _backward(means, like, kernel, groups, (True, False, False))[0]
    g = means.permute(0, 2, 3, 1)
    batch, height, width, outputs = g.shape
    rows = g.reshape(-1, groups, outputs // groups)
    across = _across(by.columns, means).t()
    taps = weight.unflatten(0, (groups, -1)).permute(3, 0, 1, 4, 2)  # tap of the rows first, channels of x last
    total: Tensor | None = None
    for down, kernel in zip(_down(by.rows, means), taps, strict=True):
        if kernel.shape[0] == outputs and kernel.shape[3] == 1:  # depthwise: elementwise
            terms = rows.unsqueeze(1) * kernel.squeeze(1).transpose(0, 1)
        else:
            terms = torch.einsum("mgo,goki->mkgi", rows, kernel)
        terms = terms.reshape(batch * height, width * kernel.shape[2], -1)
        read = down.t() @ (across @ terms).view(batch, height, -1)
        total = read if total is None else total.add_(read)
    assert total is not None
    return total.view(batch, len(by.rows[0][0]), len(by.columns[0][0]), -1).permute(0, 3, 1, 2)


def _both(shares: tuple[Shares, Shares], like: Tensor) -> Tensor:
    """Taps of both axes x patches of both."""
    rows, columns = (torch.tensor(each, dtype=like.dtype, device=like.device) for each in shares)
    return torch.kron(rows, columns)


def _backward(g: Tensor, x: Tensor, kernel: Tensor, groups: int, wanted: tuple[bool, bool, bool]) -> list[Tensor]:
    """Gradients of a convolution of maps of patches, whose taps lie around each patch."""
    padding = [size // 2 for size in kernel.shape[2:]]
    found: list[Tensor] = torch.ops.aten.convolution_backward.default(
        g, x, kernel, None, (1, 1), padding, (1, 1), False, (0, 0), groups, wanted
    )
    return found


def _down(counts: Counts, like: Tensor) -> Iterator[Tensor]:
    """For each tap of the rows, patches of the output x patches of x."""
    yield from torch.tensor(counts, dtype=like.dtype, device=like.device)


def _across(counts: Counts, like: Tensor) -> Tensor:
    """Patches of the output, and in each the taps, x patches of x."""
    return torch.tensor(counts, dtype=like.dtype, device=like.device).transpose(0, 1).flatten(0, 1)
