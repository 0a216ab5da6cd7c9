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

from typing import NamedTuple

import torch
from torch import Tensor

Counts = dict[tuple[int, int, int], int]
"""What of N is not zero, by tap, patch of the output and patch of x."""
Shares = tuple[tuple[int, ...], ...]
_DENSE = 4096  # numbers of a table up to which a product with all of them is quicker than one with those not zero


class Axis(NamedTuple):
    """What the taps of one axis read.

    Attributes:
        taps: how many there are.
        outputs: patches of the output.
        inputs: patches of x.
        counts: N.
    """

    taps: int
    outputs: int
    inputs: int
    counts: Counts


class Reads(NamedTuple):
    """What the taps read. Plain numbers, as these are kept, and compilers are to see through them.

    Attributes:
        axes: of rows and columns, or None where ``shares`` say it.
        shares: A of rows and columns, (taps, 2 r + 1) for a reach of r patches, where N depends on r - q alone and the
            reach is short.
    """

    axes: tuple[Axis, Axis] | None
    shares: tuple[Shares, Shares] | None


def of_axes(rows: Axis, columns: Axis) -> Reads:
    """Of both axes."""
    of_rows, of_columns = _shares(rows), _shares(columns)
    return Reads((rows, columns), None) if of_rows is None or of_columns is None else Reads(None, (of_rows, of_columns))


def _shares(axis: Axis) -> Shares | None:
    reach = max([0, *[abs(r - q) for _, q, r in axis.counts]])
    # Taps that a dilation holds far apart would make a large kernel of mostly zeros.
    if axis.outputs != axis.inputs or 2 * reach + 1 > axis.taps + 2:
        return None
    found = [[0] * (2 * reach + 1) for _ in range(axis.taps)]
    for (tap, q, r), count in axis.counts.items():
        found[tap][r - q + reach] = max(found[tap][r - q + reach], count)
    for tap, row in enumerate(found):
        for place, count in enumerate(row):
            away = place - reach
            patches = range(max(0, -away), min(axis.outputs, axis.outputs - away))
            if any(axis.counts.get((tap, q, q + away), 0) != count for q in patches):
                return None
    return tuple(tuple(row) for row in found)


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


def reads(size: int, outputs: int, positions: list[list[int | None]], widths: tuple[int, int]) -> Axis:
    """What the taps of one axis read.

    Args:
        size: of x, in pixels.
        outputs: pixels of the output.
        positions: for each tap and each pixel of the output the pixel of x that it reads, or None for padding.
        widths: of patches of the output, and of x; the first patches begin at the first pixels.
    """
    counts: Counts = {}
    for tap, read in enumerate(positions):
        for pixel, place in enumerate(read):
            if place is not None:
                key = (tap, pixel // widths[0], place // widths[1])
                counts[key] = counts.get(key, 0) + 1
    return Axis(len(positions), -(-outputs // widths[0]), -(-size // widths[1]), counts)


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
    assert by.axes is not None
    rows, columns = by.axes
    g, x = means.permute(0, 2, 3, 1), pooled.permute(0, 2, 3, 1)
    batch, height, _, channels = x.shape
    depthwise = groups == channels == means.shape[1]  # then the products are elementwise
    g = g.reshape(batch * rows.outputs * columns.outputs, groups, means.shape[1] // groups)
    read = _times(_table(columns, means), x).reshape(batch, height, -1 if batch else 0)
    parts = []
    for tap in range(rows.taps):
        terms = _times(_table(rows, means, tap), read)  # q; tap of the columns; channel
        terms = terms.reshape(len(g), columns.taps, groups, channels // groups)
        if depthwise:
            parts.append((g.unsqueeze(1) * terms).sum(0).permute(1, 2, 0).unsqueeze(1))
        else:
            parts.append(torch.einsum("mgo,mkgi->goik", g, terms))
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
    assert by.axes is not None
    rows, columns = by.axes
    batch, outputs, channels = means.shape[0], means.shape[1], weight.shape[1] * groups
    g = means.permute(0, 2, 3, 1).reshape(-1, groups, outputs // groups) if means.numel() else means.new_empty(0)
    across = _table(columns, means).t()
    taps = weight.unflatten(0, (groups, -1)).permute(3, 0, 1, 4, 2)  # tap of the rows first, channels of x last
    total = means.new_zeros(batch, rows.inputs, columns.inputs * channels)
    for tap, kernel in enumerate(taps if batch else ()):
        if outputs == groups == channels:  # depthwise: elementwise
            terms = g.view(-1, 1, groups) * kernel[:, 0, :, 0].t()
        else:
            terms = torch.einsum("mgo,goki->mkgi", g, kernel)
        terms = terms.reshape(batch * rows.outputs, columns.outputs * columns.taps, channels)
        total += _times(_table(rows, means, tap).t(), _times(across, terms).reshape(batch, rows.outputs, -1))
    return total.view(batch, rows.inputs, columns.inputs, channels).permute(0, 3, 1, 2)


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


def _table(axis: Axis, like: Tensor, tap: int | None = None) -> Tensor:
    """N as a matrix, patches of the output x patches of x: of one tap, or of all, each patch's one after the other."""
    taps = axis.taps if tap is None else 1
    of = [(q * taps + (t if tap is None else 0), r, n) for (t, q, r), n in axis.counts.items() if tap in (None, t)]
    places = torch.tensor([each[:2] for each in of], dtype=torch.int64, device=like.device).view(-1, 2).t()
    values = torch.tensor([each[2] for each in of], dtype=like.dtype, device=like.device)
    shape = (axis.outputs * taps, axis.inputs)
    if shape[0] * shape[1] > _DENSE and like.dtype in (torch.float32, torch.float64):
        return torch.sparse_coo_tensor(places, values, shape, check_invariants=False)
    return like.new_zeros(shape).index_put_((places[0], places[1]), values)


def _times(table: Tensor, x: Tensor) -> Tensor:
    """Product of a matrix (n, m) with each of x (..., m, c)."""
    if not table.is_sparse:
        return table @ x
    rows = x.movedim(-2, 0)
    product = torch.sparse.mm(table, rows.reshape(len(rows), -1))
    return product.view(-1, *rows.shape[1:]).movedim(0, -2)
