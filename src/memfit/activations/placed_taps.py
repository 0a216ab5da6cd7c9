"""A filtered backward in which each tap of a kernel reads what is where it lies.

Let the output's gradient g be constant on patches q, G, as a filter takes it to be, and for the weight's gradient x on
patches r, X. Let the kernel be w = sum over m of c_m b_m, with b_m (j, k) a product of two functions over the taps of
rows and of columns, orthonormal. With T of :mod:`memfit.activations.tap_reads` for both axes, t of single pixels of x,
the gradients of the convolution are, and exactly so if the b_m are as many as the taps,

    grad x[i, pixel]  =  sum over m and q of  t_m[pixel, q]  sum over o of  c_m[o, i] G[o, q]
    grad w            =  sum over m of  b_m  sum over q and r of  G[o, q] T_m[r, q] X[i, r]

Of planes over the taps there are three b_m: the constant and the slopes along rows and columns. So a 3 x 3 kernel takes
three products and not nine.

Where all taps count, and T depends on r - q alone, as when patches of one size cover maps of one size that are padded
with zeros, the weight's is that of a small convolution of X.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from memfit.activations.patches import spread
from memfit.activations.tap_reads import Axis, gathering, shares, spreading

Axes = tuple[Axis, Axis]
Rows = tuple[tuple[float, ...], ...]


def weight_gradient(means: Tensor, pooled: Tensor, weight: Tensor, axes: Axes, groups: int) -> Tensor:
    """The weight's gradient.

    Args:
        means: G (B, C_out, Q, Q').
        pooled: X (B, C_in, R, R'), of its dtype.
        weight: (C_out, C_in / groups, taps of rows, taps of columns), of which shape and layout are used.
        axes: what the taps of rows and columns read.
        groups: of the channels.

    Returns:
        Shaped as ``weight``.
    """
    rows, columns = axes
    if _is_for_torch(axes, weight, groups):
        x = spread(pooled, (rows.cut_of_input, columns.cut_of_input), channels_last=True)
        return _nearest(_by_torch(means, x, weight, axes, groups, (False, True, False))[1], axes)
    of_rows, of_columns = shares(rows), shares(columns)
    if of_rows is not None and of_columns is not None:
        return _of_convolution(means, pooled, weight, (of_rows, of_columns), groups)
    outputs, inputs = weight.shape[:2]
    # The maps of fewer channels are gathered, for each function over the kernel.
    if means.shape[1] <= pooled.shape[1]:
        pairs = ((g, _rows(pooled)) for g in _gather(means, axes, to_input=True))
    else:
        pairs = ((_rows(means), x) for x in _gather(pooled, axes, to_input=False))
    products = []
    for g, x in pairs:
        if groups == 1:
            products.append(g.t() @ x)
        elif outputs == groups and inputs == 1:
            products.append((g * x).sum(0).unsqueeze(1))
        else:
            of_groups = (each.unflatten(1, (groups, -1)) for each in (g, x))
            products.append(torch.einsum("mgo,mgi->goi", *of_groups).flatten(0, 1))
    found = torch.stack(products, 1)  # the outputs' functions x channels
    taps = found if rows.keeps_taps and columns.keeps_taps else _functions(axes, means).t() @ found
    return taps.view(outputs, *weight.shape[2:], inputs).permute(0, 3, 1, 2)


def input_gradient(means: Tensor, weight: Tensor, axes: Axes, groups: int) -> Tensor:
    """The gradient of x.

    Args:
        means: G (B, C_out, Q, Q').
        weight: (C_out, C_in / groups, taps of rows, taps of columns), of its dtype.
        axes: what the taps of rows and columns read; the patches of x do not matter.
        groups: of the channels.

    Returns:
        (B, C_in, H, W), the channels last in memory.
    """
    if _is_for_torch(axes, weight, groups):
        like = means.new_empty(1).expand(len(means), weight.shape[1] * groups, axes[0].size, axes[1].size)
        return _by_torch(means, like, _nearest(weight, axes), axes, groups, (True, False, False))[0]
    rows, columns = (axis._replace(width=1) for axis in axes)
    (outputs, inputs), batch, height, width = weight.shape[:2], len(means), rows.of_output, columns.of_output
    kernel = weight.permute(0, 2, 3, 1).reshape(outputs, -1, inputs)
    if not (rows.keeps_taps and columns.keeps_taps):
        kernel = _functions(axes, means) @ kernel  # c, the outputs' functions x channels
    g = _rows(means)
    counts = _columns_of_rows(axes)
    # Patches of rows and their functions; pixels of columns and channels.
    of_rows = means.new_empty(batch, height, len(counts), columns.size * inputs * groups)
    for number, (count, part) in enumerate(zip(counts, kernel.split(counts, 1), strict=True)):
        if groups == 1:
            terms = g @ part.flatten(1)
        elif outputs == groups and inputs == 1:
            terms = g.unsqueeze(1) * part.squeeze(2).t()
        else:
            of_groups = (g.unflatten(1, (groups, -1)), part.unflatten(0, (groups, -1)))
            terms = torch.einsum("mgo,gofi->mfgi", *of_groups)
        terms = terms.reshape(batch, height, width * count, inputs * groups)
        of_rows[:, :, number] = _times(spreading(columns, range(count), means), terms).flatten(2)
    dx = _times(spreading(rows, range(len(counts)), means), of_rows.flatten(1, 2))
    return dx.view(batch, rows.size, columns.size, inputs * groups).permute(0, 3, 1, 2)


def _is_for_torch(axes: Axes, weight: Tensor, groups: int) -> bool:
    """Whether torch's own backward, of maps constant on patches, is quicker: it is where no channels are summed."""
    return groups == len(weight) and weight.shape[1] == 1 and all(axis.suits_torch for axis in axes)


def _by_torch(
    means: Tensor, x: Tensor, weight: Tensor, axes: Axes, groups: int, wanted: tuple[bool, bool, bool]
) -> list[Tensor]:
    """The convolution's own gradients, of an output's gradient that is constant on patches."""
    rows, columns = axes
    g = spread(means, (rows.cut_of_output, columns.cut_of_output), channels_last=True)
    strides, paddings, dilations = zip(*(axis.window[1:4] for axis in axes), strict=True)
    found: list[Tensor] = torch.ops.aten.convolution_backward.default(
        g, x, weight, None, strides, paddings, dilations, False, (0, 0), groups, wanted
    )
    return found


def _nearest(weight: Tensor, axes: Axes) -> Tensor:
    """The kernel that is nearest among those of the basis."""
    if all(axis.keeps_taps for axis in axes):
        return weight
    functions = _functions(axes, weight)
    nearest = (weight.flatten(2) @ (functions.t() @ functions)).view(weight.shape)
    return torch.empty_like(weight).copy_(nearest)  # torch looks at the layout


def _columns_of_rows(axes: Axes) -> list[int]:
    """For each function of rows, with how many of the first of columns it makes one over the kernel, of one slope."""
    rows, columns = (axis.degrees for axis in axes)
    return [sum(high + wide <= 1 for wide in columns) for high in rows]


def _functions(axes: Axes, like: Tensor) -> Tensor:
    """The functions over the kernel, (functions, taps of both axes)."""
    rows, columns = axes
    counts = _columns_of_rows(axes)
    pairs = [(high, wide) for high, count in zip(rows.basis, counts, strict=True) for wide in columns.basis[:count]]
    of = [[down * across for down in high for across in wide] for high, wide in pairs]
    return torch.tensor(of, dtype=like.dtype, device=like.device)


def _gather(maps: Tensor, axes: Axes, to_input: bool) -> Iterator[Tensor]:
    """For each function over the kernel T_m G, or the transposed T_m with X, (B R R', C_out) or (B Q Q', C_in)."""

    def table(axis: Axis, functions: Sequence[int]) -> Tensor:
        return gathering(axis, functions, maps) if to_input else spreading(axis, functions, maps).t()

    rows, columns = axes
    high, wide = (axis.of_input if to_input else axis.of_output for axis in axes)
    maps = maps.permute(0, 2, 3, 1)
    batch, height, _, channels = maps.shape
    functions = len(columns.basis)
    across = _times(table(columns, range(functions)), maps).view(batch, height, wide, functions, channels)
    for number, count in enumerate(_columns_of_rows(axes)):
        part = across[:, :, :, :count].reshape(batch, height, wide * count * channels)
        yield from _times(table(rows, (number,)), part).view(batch * high * wide, count, channels).unbind(1)


def _rows(maps: Tensor) -> Tensor:
    """(B, C, Q, R) as (B Q R, C), of any B."""
    batch, channels, height, width = maps.shape
    return maps.permute(0, 2, 3, 1).reshape(batch * height * width, channels)


def _times(table: Tensor, x: Tensor) -> Tensor:
    """Product of a matrix (n, m) with each of x (B, ..., m, c)."""
    if not table.is_sparse:
        return table @ x
    out = x.new_empty(*x.shape[:-2], len(table), x.shape[-1])
    for image, into in zip(x, out, strict=True):  # less is laid out in another order at once
        rows = image.movedim(-2, 0)
        product = torch.sparse.mm(table, rows.reshape(len(rows), -1))
        into.copy_(product.view(len(table), *rows.shape[1:]).movedim(0, -2))
    return out


def _of_convolution(g: Tensor, x: Tensor, weight: Tensor, by: tuple[Rows, Rows], groups: int) -> Tensor:
    """The weight's gradient by that of a convolution of maps of patches, which reads neighbours of each."""
    sizes = [len(each[0]) for each in by]
    both = torch.kron(*(torch.tensor(each, dtype=g.dtype, device=g.device) for each in by))
    like = g.new_empty(1).expand(*weight.shape[:2], *sizes)
    way = ((1, 1), [size // 2 for size in sizes], (1, 1), False, (0, 0), groups, (False, True, False))
    gradient = torch.ops.aten.convolution_backward.default(g, x, like, None, *way)[1]
    return (gradient.flatten(2) @ both.t()).view(weight.shape)
