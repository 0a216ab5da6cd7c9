"""Taps of a kernel that lie between patches: each reads the two patches around it, in shares that add up to one.

A map that is constant on patches, read at a distance of a patches from their centres and averaged over a patch, gives
the patches floor(a) and floor(a) + 1 away in the shares 1 - (a - floor(a)) and a - floor(a). With a stride, which reads
some of the pixels, that is an approximation.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor

import torch
from torch import Tensor

Shares = tuple[tuple[float, ...], ...]
"""For each tap of an axis its share of each patch, from as many patches before as there are after."""


def shares_between(distances: Sequence[float]) -> Shares:
    """The shares of taps that lie so many patches from the patch that they belong to.

    Args:
        distances: of each tap, in patches, negative before it.

    Returns:
        For each tap 2 r + 1 shares: of the patches r before to r after, the fewest that hold all taps.
    """
    reach = max(ceil(abs(distance)) for distance in distances)
    found = []
    for distance in distances:
        before = floor(distance)
        row = [0.0] * (2 * reach + 1)
        row[reach + before] += 1 - (distance - before)
        if distance > before:
            row[reach + before + 1] += distance - before
        found.append(tuple(row))
    return tuple(found)


def to_patches(weight: Tensor, shares: tuple[Shares | None, Shares | None]) -> Tensor:
    """The kernel (O, I, taps of H, taps of W) as one of patches: what each neighbouring patch counts in all."""
    for axis, each in enumerate(shares, start=2):
        if each is not None:
            weight = _turned(weight, axis, weight.new_tensor(each))
    return weight


def to_taps(gradient: Tensor, shares: tuple[Shares | None, Shares | None]) -> Tensor:
    """The gradient of the kernel from that of the kernel of patches: the transpose of :func:`to_patches`."""
    for axis, each in enumerate(shares, start=2):
        if each is not None:
            gradient = _turned(gradient, axis, gradient.new_tensor(each).t())
    return gradient


def _turned(kernel: Tensor, axis: int, matrix: Tensor) -> Tensor:
    """Product of the kernel's axis (n) with a matrix (n x m)."""
    return torch.tensordot(kernel, matrix, ([axis], [0])).movedim(-1, axis)
