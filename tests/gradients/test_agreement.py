"""A sum that is written only where its samples agree: what is measured, and when it holds a write back."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import memfit
from memfit.gradients.convolution import Geometry
from memfit.gradients.kronecker_sum import KroneckerSum
from memfit.gradients.streaming_matrix import StreamingMatrix
from memfit.gradients.streaming_product import Convolution, Wanted

EXACT: dict[str, Any] = {"weight_bits": None, "bias_bits": None, "factor_bits": None, "min_write_density": 0.0}


class InBlocks(KroneckerSum):
    """As of a matrix with two long sides."""

    takes_matrix = False


def matrix_of(layer: nn.Module) -> StreamingMatrix:
    matrix = layer.matrices["weight"]
    assert isinstance(matrix, StreamingMatrix)
    return matrix


@given(
    st.sampled_from(["linear", "convolution", "convolution in blocks", "strided"]),
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(1, 4),
)
@settings(deadline=None, max_examples=60)
def test_it_is_the_inner_product_of_each_gradient_with_the_sum_before(
    kind: str, batch: int, block: int, count: int
) -> None:
    """However many blocks of terms a gradient has. Sums are of full rank, and so exact."""
    if kind == "linear":
        layer: nn.Module = nn.Linear(7, 5, dtype=torch.float64)
        shape: tuple[int, ...] = (batch, 7)
    else:
        options = {"stride": 2, "padding": 1, "padding_mode": "reflect"} if kind == "strided" else {}
        layer = nn.Conv2d(2, 5, 3, dtype=torch.float64, **options)
        shape = (batch, 2, 7, 6)
    reference = copy.deepcopy(layer)
    memfit.convert_(layer, memfit.StreamingLowRank(rank=2, period=10**9, min_agreement=0.0, block=block, **EXACT))
    matrix = matrix_of(layer)
    rows, columns = matrix.terms.shape
    make = KroneckerSum if kind == "convolution" else InBlocks
    matrix.terms = make(rows, columns, min(rows, columns), block=block, dtype=torch.float64)
    total, expected, squares = torch.zeros_like(reference.weight), 0.0, 0.0
    for _ in range(count):
        x = torch.randn(shape, dtype=torch.float64)
        reference.weight.grad = None
        for each in (layer, reference):
            each(x).sin().sum().backward()
        gradient = reference.weight.grad
        expected += float((total * gradient).sum())
        squares += float(gradient.square().sum())
        total += gradient
    assert math.isclose(matrix.agreement, expected, rel_tol=1e-6, abs_tol=1e-6 * squares)
    assert math.isclose(matrix.terms.squared_norm(), squares + 2 * matrix.agreement, rel_tol=1e-6)


@pytest.mark.parametrize("bits", [None, 16])
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (64, 784), (300, 500)])
def test_inner_products_are_those_of_the_matrices(shape: tuple[int, int], bits: Any) -> None:
    """Of small sums by NumPy and of large ones."""
    generator = torch.Generator().manual_seed(0)
    total = KroneckerSum(*shape, rank=3, bits=bits)
    for _ in range(4):
        total.add_rows(torch.randn(2, shape[0], generator=generator), torch.randn(2, shape[1], generator=generator))
    left, right = torch.randn(6, shape[0], generator=generator), torch.randn(6, shape[1], generator=generator)
    matrix, more = total.matrix().double(), left.double().t() @ right.double()
    scale = float(matrix.norm() * more.norm())
    assert math.isclose(total.inner_rows(left, right), float((matrix * more).sum()), abs_tol=1e-6 * scale)
    assert math.isclose(total.inner_matrix(more.float()), float((matrix * more).sum()), abs_tol=1e-6 * scale)
    assert math.isclose(total.squared_norm(), float(matrix.square().sum()), rel_tol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert math.isclose(total.inner_rows(left, right), float((matrix * more).sum()), abs_tol=1e-6 * scale)


@pytest.mark.parametrize("unbiased", [True, False])
def test_gradients_that_have_nothing_in_common_agree_by_nothing_on_average(unbiased: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    agreements = []
    for seed in range(1000):
        total, agreement = KroneckerSum(8, 6, rank=2, unbiased=unbiased, seed=seed), 0.0
        for _ in range(6):
            left, right = torch.randn(1, 8, generator=generator), torch.randn(1, 6, generator=generator)
            agreement += total.inner_rows(left, right)
            total.add_rows(left, right)
        agreements.append(agreement)
    drawn = torch.tensor(agreements)
    assert abs(float(drawn.mean())) < 4 * float(drawn.std()) / math.sqrt(len(drawn))


def linear(**options: Any) -> tuple[nn.Linear, torch.optim.Optimizer]:
    layer = nn.Linear(6, 5, bias=False)
    memfit.convert_(layer, memfit.StreamingLowRank(rank=2, period=2, weight_range=4.0, **options))
    return layer, torch.optim.SGD(layer.parameters(), lr=0.1)


def step(layer: nn.Linear, optimizer: torch.optim.Optimizer, x: Tensor, d: Tensor) -> int:
    """One sample; how many writes there were till then."""
    layer(x).backward(d)
    optimizer.step()
    return int(matrix_of(layer).cells.writes.sum())


def test_samples_that_agree_are_written_and_others_wait_for_more() -> None:
    torch.manual_seed(0)
    x, d = torch.randn(1, 6), torch.randn(1, 5)
    layer, optimizer = linear(min_agreement=0.4)
    assert [step(layer, optimizer, x, d) > 0 for _ in range(2)] == [False, True]  # a share of one half
    matrix = matrix_of(layer)
    assert (matrix.samples, matrix.agreement) == (0, 0.0)

    layer, optimizer = linear(min_agreement=0.6)
    assert [step(layer, optimizer, x, d) > 0 for _ in range(4)] == [False, False, False, True]  # three quarters

    layer, optimizer = linear(min_agreement=0.0)
    for sign in (1.0, -0.5, 1.0, -0.5, 1.0, -0.5):
        assert step(layer, optimizer, x, sign * d) == 0
    assert matrix_of(layer).samples == 6
    assert matrix_of(layer).attempts == 0  # the average of largest elements is of sums that are candidates

    layer, optimizer = linear()
    assert [step(layer, optimizer, x, sign * d) > 0 for sign in (1.0, -0.5)] == [False, True]


def test_a_sample_that_is_not_finite_does_not_spoil_it() -> None:
    torch.manual_seed(0)
    x, d = torch.randn(1, 6), torch.randn(1, 5)
    layer, optimizer = linear(min_agreement=0.1)
    step(layer, optimizer, x, d)
    with pytest.warns(RuntimeWarning, match="not finite"):
        assert step(layer, optimizer, x, torch.full((1, 5), math.nan)) == 0
    assert matrix_of(layer).agreement == 0.0
    step(layer, optimizer, x, d)
    assert step(layer, optimizer, x, d) > 0


def test_without_a_gradient_nothing_is_written() -> None:
    layer, optimizer = linear(min_agreement=0.0)
    for _ in range(4):
        assert step(layer, optimizer, torch.zeros(1, 6), torch.zeros(1, 5)) == 0


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("share", [None, 0.0])
def test_a_sum_that_waited_does_not_go_deaf(share: float | None, unbiased: bool) -> None:
    """A few contrary samples fill the only rank; then come smaller ones elsewhere, all alike."""
    layer = nn.Linear(6, 5, bias=False)
    nn.init.zeros_(layer.weight)
    technique = memfit.StreamingLowRank(
        rank=1, period=2, unbiased=unbiased, min_agreement=share, min_write_density=0.01, weight_range=1.0
    )
    memfit.convert_(layer, technique)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    here, there = torch.eye(6)[:1], torch.eye(6)[1:2]
    for sign in (10.0, -9.0):
        step(layer, optimizer, here, sign * torch.eye(5)[:1])
    for _ in range(300):
        step(layer, optimizer, there, torch.eye(5)[1:2])
    assert int(matrix_of(layer).cells.writes[1, 1]) > 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1.0, 1e3])
def test_inner_products_of_a_convolution_are_in_the_sums_dtype(dtype: torch.dtype, size: float) -> None:
    torch.manual_seed(0)
    total, weight = InBlocks(8, 36, rank=3), torch.zeros(8, 4, 3, 3)
    x, d = torch.rand(2, 4, 9, 9).to(dtype), (size * torch.rand(2, 8, 7, 7)).to(dtype)
    total.add_rows(torch.rand(9, 8), torch.rand(9, 36))
    left, right = (each.double() for each in total.factors())
    dweight = torch.nn.grad.conv2d_weight(x.double(), weight.shape, d.double()).flatten(1)
    convolution = Convolution(Geometry((1, 1), (0, 0), (1, 1)))
    found = convolution.gradients(total, d, x, weight.to(dtype), Wanted(False, True, False, agreement=True))
    assert math.isclose(found.agreement, float((left @ right.t() * dweight).sum()), rel_tol=1e-5)


def test_terms_that_do_not_fit_are_refused() -> None:
    total = KroneckerSum(6, 1, 1)
    with pytest.raises(ValueError, match="do not pair"):
        total.inner_rows(torch.ones(3, 6), torch.ones(1, 1))
    with pytest.raises(ValueError, match="does not fit"):
        total.inner_matrix(torch.ones(6, 3))


@pytest.mark.parametrize("share", [math.nan, 1, 1.5, -2, "0.1", True])
def test_a_share_out_of_range_is_refused(share: Any) -> None:
    with pytest.raises(memfit.ConversionError, match=r"min_agreement=.* is not possible: give a number from -1 to"):
        memfit.StreamingLowRank(min_agreement=share)
