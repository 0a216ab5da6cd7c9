"""Singular values made fewer: the unbiased mixture against what defines it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from memfit.gradients.mixing import (
    biased_mixing,
    kept,
    least_variance,
    orthonormal_columns,
    random_signs,
    unbiased_mixing,
)

# Of the smallest numbers there are, the squares would be zero.
values = st.lists(st.just(0.0) | st.floats(1e-9, 1), min_size=1, max_size=9).map(
    lambda each: sorted(each, reverse=True)
)


def rows_of(squares: list[float]) -> Tensor:
    lengths, which, directions = orthonormal_columns(squares)
    return torch.tensor(lengths, dtype=torch.float64)[:, None] * torch.tensor(directions, dtype=torch.float64)[which]


def all_signs(count: int) -> list[list[int]]:
    return [[1 - 2 * (number >> place & 1) for place in range(count)] for number in range(2**count)]


@given(values, st.integers(1, 8))
def test_the_mean_over_all_signs_is_the_diagonal_itself(values: list[float], rank: int) -> None:
    products = [torch.from_numpy(unbiased_mixing(values, rank, signs)) for signs in all_signs(len(values))]
    mean = torch.stack([each @ each.t() for each in products]).mean(0)
    expected = torch.tensor(values, dtype=torch.float64).diag()
    assert products[0].shape == (len(values), rank)
    assert torch.allclose(mean, expected, atol=1e-5 * max(values))


@given(values, st.integers(1, 8))
def test_the_variance_over_all_signs_is_the_closed_form(values: list[float], rank: int) -> None:
    exact = torch.tensor(values, dtype=torch.float64).diag()
    products = [torch.from_numpy(unbiased_mixing(values, rank, signs)) for signs in all_signs(len(values))]
    variance = torch.stack([(each @ each.t() - exact).square().sum() for each in products]).mean()
    assert math.isclose(float(variance), least_variance(values, rank), abs_tol=1e-4 * max(values) ** 2)


@given(values, st.integers(1, 8))
def test_the_number_kept_is_the_one_of_least_variance_among_those_that_are_possible(
    values: list[float], rank: int
) -> None:
    if len(values) <= rank:
        return
    possible = []
    for first in range(rank):
        tail = values[first:]
        if (rank - first) * tail[0] <= sum(tail) * (1 + 1e-12):
            possible.append(sum(tail) ** 2 / (rank - first) - sum(value**2 for value in tail))
    assert math.isclose(least_variance(values, rank), min(possible), abs_tol=1e-9)
    assert 0 <= kept(values, rank) < rank


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 10**6))
def test_rows_of_any_possible_norms_make_orthonormal_columns(count: int, columns: int, seed: int) -> None:
    columns = min(count, columns)
    generator = torch.Generator().manual_seed(seed)
    some = torch.linalg.qr(torch.randn(count, columns, dtype=torch.float64, generator=generator))[0]
    squares = some.square().sum(1)
    for order in (squares, squares.sort(descending=True).values, squares.sort().values):
        found = rows_of(order.tolist())
        assert torch.allclose(found.t() @ found, torch.eye(columns, dtype=torch.float64), atol=1e-6)
        assert torch.allclose(found.square().sum(1), order, atol=1e-6)


@pytest.mark.parametrize("squares", [[1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.5, 0.5, 0.0, 1.0], [0.75] * 4])
def test_whole_and_empty_rows_are_possible(squares: list[float]) -> None:
    found = rows_of(squares)
    assert torch.allclose(found.t() @ found, torch.eye(round(sum(squares)), dtype=torch.float64))
    assert torch.allclose(found.square().sum(1), torch.tensor(squares, dtype=torch.float64))


def test_as_many_values_as_columns_are_kept_as_they_are() -> None:
    for mixed in (unbiased_mixing([3.0, 1.0], 3, [-1, 1]), biased_mixing([3.0, 1.0], 3)):
        found = torch.from_numpy(mixed)
        assert torch.allclose(found @ found.t(), torch.tensor([3.0, 1.0], dtype=torch.float64).diag())


def test_the_biased_mixture_keeps_the_largest() -> None:
    found = torch.from_numpy(biased_mixing([4.0, 3.0, 2.0], 2))
    assert torch.allclose(found @ found.t(), torch.tensor([4.0, 3.0, 0.0], dtype=torch.float64).diag())


def test_rounding_errors_are_not_mixed_in() -> None:
    found = torch.from_numpy(unbiased_mixing([1.0, 0.5, 1e-8], 2, [1, 1, 1]))
    assert torch.equal(found[2], torch.zeros(2, dtype=torch.float64))


def test_signs_are_the_same_again_and_differ_between_draws_and_seeds() -> None:
    assert random_signs(1, 2, 70) == random_signs(1, 2, 70)
    assert random_signs(1, 2, 70) != random_signs(1, 3, 70)
    assert random_signs(1, 2, 70) != random_signs(2, 2, 70)
    assert random_signs(1, 2, 70)[:60] == random_signs(1, 2, 60)


@pytest.mark.parametrize("lag", [1, 7])
def test_signs_are_fair_and_independent(lag: int) -> None:
    signs = torch.tensor([random_signs(5, draw, 40) for draw in range(4000)], dtype=torch.float64)
    for product in (signs, signs * signs.roll(lag, 0), signs * signs.roll(lag, 1)):
        assert abs(float(product.mean())) < 4 / math.sqrt(signs.numel())
        assert float(product.mean(0).abs().max()) < 5 / math.sqrt(len(signs))
