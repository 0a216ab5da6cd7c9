"""How singular values are made fewer: the best few of them, or an unbiased mixture of the least variance.

A matrix U diag(s) V^T of rank p is replaced by (U M) (V M)^T of rank r, with M (p x r). Both sides have the same M, so
that the two factors are of the same size. Biased, M keeps the r largest: M M^T = diag(s_1 .. s_r, 0 ..). Unbiased, let
m be the first index (from 1) with

    (r - m + 1) s_m <= s_m + .. + s_p =: t,          k = r - m + 1.

The m - 1 values before it are kept. The p - m + 1 others are mixed in k columns, Z = sqrt(t / k) D X, with X of
orthonormal columns whose rows have the squared norms s_i k / t, and D of independent random signs. The diagonal of
Z Z^T is then the values themselves, whatever the signs, and all else has mean zero: E[M M^T] = diag(s). The expected
squared error, t^2 / k - (s_m^2 + .. + s_p^2), is the least that an unbiased approximation of rank r has.

With one value too many (p = r + 1), X X^T is the identity minus one rank, and so the same for every such X.

Source: Benzing, Gauy, Mujika, Martinsson, Steger, "Optimal Kronecker-Sum Approximation of Real Time Recurrent
Learning", ICML 2019, for p = r + 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.floating[Any]]

# Singular values below this share of the largest are rounding errors of float32, and of products of float64. Mixed in,
# each would bring noise of the square root of its share.
NEGLIGIBLE = 1e-6
_WORD = 2**64 - 1


def kept(values: Sequence[float], rank: int) -> int:
    """How many of the singular values, largest first, stay as they are in the unbiased mixture: m - 1."""
    total = sum(values)
    for index, value in enumerate(values[: rank - 1]):
        if (rank - index) * value <= total:
            return index
        total -= value
    return rank - 1


def least_variance(values: Sequence[float], rank: int) -> float:
    """The expected squared (Frobenius) error of the best unbiased approximation of a rank.

    Args:
        values: singular values, largest first.
        rank: from 1.
    """
    if len(values) <= rank:
        return 0.0
    first = kept(values, rank)
    return sum(values[first:]) ** 2 / (rank - first) - sum(value**2 for value in values[first:])


def biased_mixing(values: Sequence[float], rank: int) -> Matrix:
    """M (p x rank) that keeps the largest of p singular values."""
    mixed = np.zeros((len(values), rank))
    for index, value in enumerate(values[:rank]):
        mixed[index, index] = math.sqrt(value)
    return mixed


def unbiased_mixing(values: Sequence[float], rank: int, signs: Sequence[int]) -> Matrix:
    """M (p x rank) with E[M M^T] = diag(values) over the signs, of the least variance.

    Args:
        values: p singular values, largest first.
        rank: r, from 1.
        signs: p numbers, 1 or -1, drawn independently.
    """
    least = NEGLIGIBLE * values[0]
    count = sum(value > least for value in values)
    if count <= rank:
        return biased_mixing([*values[:count], *[0.0] * (len(values) - count)], rank)
    first = kept(values[:count], rank)
    tail = values[first:count]
    columns, total = rank - first, sum(tail)
    lengths, which, directions = orthonormal_columns([value * columns / total for value in tail])
    length = math.sqrt(total / columns)
    sizes = [length * sign * each for sign, each in zip(signs[first:], lengths, strict=False)]
    mixed = biased_mixing([*values[:first], *[0.0] * (len(values) - first)], rank)
    mixed[first:count, first:] = np.array(directions)[which] * np.array(sizes)[:, None]
    return mixed


def orthonormal_columns(squares: Sequence[float]) -> tuple[list[float], list[int], list[list[float]]]:
    """Rows of these squared norms that make a matrix with orthonormal columns.

    A chain of rotations: each takes what is left of the rows before it and either a row of zeros or the next unit
    vector, which is orthogonal to it, and turns them until one of the two has the norm that is wanted. What is left
    keeps its direction until a unit vector comes in, so that there are few directions, and many rows along each.

    Args:
        squares: each from 0 to 1, the sum is the number of columns.

    Returns:
        Row i is ``lengths[i]`` times ``directions[which[i]]``.
    """
    columns = round(sum(squares))
    directions = [[1.0] + [0.0] * (columns - 1)]
    lengths: list[float] = []
    which: list[int] = []
    rest, length, square, used = 0, 1.0, 1.0, 1  # what is left: its direction, and length; its squared norm
    for wanted in squares:
        if square < min(wanted, 1.0) and used < columns:
            share = min((wanted - square) / (1 - square), 1.0)
            sine, cosine = math.sqrt(share), math.sqrt(1 - share)
            row = [cosine * length * x for x in directions[rest]]
            left = [-sine * length * x for x in directions[rest]]
            row[used], left[used] = sine, cosine
            directions += [row, left]
            lengths.append(1.0)
            rest = len(directions) - 1
            which.append(rest - 1)
            length, square, used = 1.0, max(square + 1 - wanted, 0.0), used + 1
        else:
            share = min(wanted / square, 1.0) if square > 0 else 0.0
            lengths.append(math.sqrt(share) * length)
            which.append(rest)
            length *= math.sqrt(1 - share)
            square = max(square - wanted, 0.0)
    return lengths, which, directions


def random_signs(seed: int, draw: int, count: int) -> list[int]:
    """``count`` independent signs, 1 or -1: the same for the same seed and draw, on any device, without a state."""
    start = start_of_signs(seed, draw)
    signs: list[int] = []
    for number in range(0, count, 64):
        bits = scrambled(start + number)
        signs += [1 - 2 * (bits >> place & 1) for place in range(min(count - number, 64))]
    return signs


def start_of_signs(seed: int, draw: int) -> int:
    """The number, of 64 bits, that a draw's signs come from."""
    return scrambled(seed) + draw << 32 & _WORD


def scrambled(number: int) -> int:
    """64 bits that look random, of any number: a step of SplitMix64.

    Source: Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014.
    """
    bits = number + 0x9E3779B97F4A7C15 & _WORD
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB & _WORD
    return bits ^ bits >> 31
