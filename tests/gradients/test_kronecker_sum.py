"""The streaming sum of outer products: against the exact sum, truncated SVD, the closed form and a slow reference."""

from __future__ import annotations

import copy
import importlib.util
import math
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import memfit
from memfit.gradients.kronecker_sum import KroneckerSum
from memfit.gradients.mixing import least_variance

_spec = importlib.util.spec_from_file_location("one_term", Path(__file__).with_name("one_term_at_a_time.py"))
assert _spec is not None
assert _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
OneTermAtATime = _module.OneTermAtATime

DRAWS = 1000  # of distributions that are compared


def terms(rows: int, columns: int, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Terms whose sum has singular values that fall off."""
    generator = torch.Generator().manual_seed(seed)
    scale = 0.8 ** torch.arange(count)
    return torch.randn(rows, count, generator=generator) * scale, torch.randn(columns, count, generator=generator)


def moments(draw: Callable[[int], Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Mean and variance over draws, elementwise, in float64."""
    mean = square = torch.zeros(1, dtype=torch.float64)
    for number in range(count):
        value = draw(number).double()
        mean, square = mean + value / count, square + value**2 / count
    return mean, (square - mean**2).clamp(min=0) * count / (count - 1)


# (rows, columns, terms per addition, block, bits): one by one; through the matrix; through QR; in several blocks.
STREAMS = {
    "one by one": (7, 9, [1] * 4, 1, None),
    "short side": (3, 12, [6], 32, None),
    "one block": (10, 9, [6], 32, None),
    "blocks of three": (12, 11, [3, 5], 3, None),
    "16 bits": (6, 9, [4], 32, 16),
}


def check_mean(stream: str, draws: int) -> None:
    rows, columns, additions, block, bits = STREAMS[stream]
    left, right = terms(rows, columns, sum(additions))
    total = KroneckerSum(rows, columns, rank=2, block=block, bits=bits)

    def draw(_: int) -> Tensor:
        total.reset()
        for some, others in zip(left.split(additions, 1), right.split(additions, 1), strict=True):
            assert total.add(some, others)
        return total.matrix()

    mean, variance = moments(draw, draws)
    exact = left.double() @ right.double().t()
    error = (variance / draws).sqrt()
    assert float(error.min()) > 0
    # Rounding to 16 bits is to nearest: its error does not average out, and is this small.
    rounding = 2e-4 if bits else 1e-5
    assert bool(((mean - exact).abs() <= 4 * error + rounding * float(exact.abs().max())).all())


@pytest.mark.parametrize("stream", STREAMS)
def test_the_mean_of_draws_is_the_exact_sum(stream: str) -> None:
    check_mean(stream, 1000)


@pytest.mark.slow
@pytest.mark.parametrize("stream", STREAMS)
def test_the_mean_of_10_000_draws_is_the_exact_sum(stream: str) -> None:
    check_mean(stream, 10_000)


@pytest.mark.parametrize(
    ("rows", "columns", "count", "rank"), [(8, 6, 5, 4), (9, 14, 7, 2), (3, 20, 9, 2), (5, 5, 5, 1), (50, 60, 10, 4)]
)
def test_the_variance_of_one_addition_is_the_least_that_is_possible(
    rows: int, columns: int, count: int, rank: int
) -> None:
    left, right = terms(rows, columns, count)
    exact = left.double() @ right.double().t()
    least = least_variance(torch.linalg.svdvals(exact)[: min(rows, columns, count)].tolist(), rank)
    errors = []
    for number in range(2000):
        total = KroneckerSum(rows, columns, rank, seed=number)
        total.add(left, right)
        errors.append(float((total.matrix().double() - exact).square().sum()))
    # The squared error does not even depend on the signs: what is mixed has one length.
    assert max(errors) - min(errors) < 1e-4 * float(exact.square().sum())
    assert math.isclose(sum(errors) / len(errors), least, rel_tol=1e-3)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.integers(1, 5), st.integers(0, 10**6))
@settings(deadline=None)
def test_biased_is_the_truncated_svd(rows: int, columns: int, count: int, rank: int, seed: int) -> None:
    left, right = terms(rows, columns, count, seed)
    total = KroneckerSum(rows, columns, rank, unbiased=False, dtype=torch.float64)
    total.add(left, right)
    u, values, v = torch.linalg.svd(left.double() @ right.double().t(), full_matrices=False)
    expected = (u[:, :rank] * values[:rank]) @ v[:rank]
    assert torch.allclose(total.matrix(), expected, atol=1e-6 * float(values[0]))


def test_biased_block_by_block_is_the_truncated_svd_of_each_sum() -> None:
    left, right = terms(12, 10, 9)
    total = KroneckerSum(12, 10, 3, unbiased=False, block=2)
    expected = torch.zeros(12, 10)
    for some, others in zip(left.split(2, 1), right.split(2, 1), strict=True):
        total.add(some, others)
        u, values, v = torch.linalg.svd(expected + some @ others.t(), full_matrices=False)
        expected = (u[:, :3] * values[:3]) @ v[:3]
        assert torch.allclose(total.matrix(), expected, atol=1e-4)


@given(st.integers(1, 7), st.integers(1, 7), st.lists(st.integers(0, 5), max_size=4), st.booleans())
@settings(deadline=None)
def test_the_sum_is_exact_from_full_rank_on(rows: int, columns: int, additions: list[int], unbiased: bool) -> None:
    left, right = terms(rows, columns, sum(additions))
    for rank in {min(rows, columns), min(rows, columns) + 2}:
        total = KroneckerSum(rows, columns, rank, unbiased=unbiased, block=2)
        for some, others in zip(left.split(additions, 1), right.split(additions, 1), strict=True):
            assert total.add(some, others)
        assert torch.allclose(total.matrix(), left @ right.t(), atol=1e-4)


def test_up_to_rank_terms_are_exact_and_zeros_change_nothing() -> None:
    left, right = terms(20, 30, 3)
    total = KroneckerSum(20, 30, rank=4, block=8)
    for d, a in zip(left.t(), right.t(), strict=True):
        total.add(d.unsqueeze(1), a.unsqueeze(1))
        total.add(torch.zeros(20, 2), torch.randn(30, 2))
    assert torch.allclose(total.matrix(), left @ right.t(), atol=1e-5)
    assert torch.equal(KroneckerSum(4, 5, 2).matrix(), torch.zeros(4, 5))


@pytest.mark.parametrize("shape", [(20, 30), (3, 30)])
def test_a_sum_of_zeros_is_zero(shape: tuple[int, int]) -> None:
    total = KroneckerSum(*shape, rank=2, block=4)
    assert total.add(torch.zeros(shape[0], 6), torch.zeros(shape[1], 6))
    assert torch.equal(total.matrix(), torch.zeros(shape))


def same_second_moments(ours: Callable[[int], Tensor], theirs: Callable[[int], Tensor], shape: tuple[int, int]) -> bool:
    """Whether draws have the same mean squares in 40 random directions, within 4 standard errors."""
    probes = torch.randn(40, *shape, generator=torch.Generator().manual_seed(1))
    (mean, variance), (other, other_variance) = (
        moments(lambda number: (probes * draw(number)).sum((1, 2)).square(), DRAWS)  # noqa: B023
        for draw in (ours, theirs)
    )
    errors = ((variance + other_variance) / DRAWS).sqrt()
    return bool(((mean - other).abs() <= 4 * errors + 1e-4 * mean).all())


def test_one_by_one_it_has_the_distribution_of_the_slow_reference() -> None:
    """As far as its second moments in 40 random directions tell."""
    left, right = terms(6, 7, 5)
    generator = torch.Generator().manual_seed(2)

    def ours(number: int) -> Tensor:
        total = KroneckerSum(6, 7, rank=3, seed=number, block=1)
        for d, a in zip(left.t(), right.t(), strict=True):
            total.add(d.unsqueeze(1), a.unsqueeze(1))
        return total.matrix()

    def theirs(number: int) -> Tensor:
        total = OneTermAtATime(6, 7, 3, True, generator)
        total.add(left, right)
        return total.matrix()

    assert same_second_moments(ours, theirs, (6, 7))


def test_a_block_of_one_term_too_many_has_the_distribution_of_one_by_one() -> None:
    """Until then both are exact, and so it is the same reduction, with signs of its own."""
    left, right = terms(8, 9, 4)
    generator = torch.Generator().manual_seed(2)

    def ours(number: int) -> Tensor:
        total = KroneckerSum(8, 9, rank=3, seed=number)
        total.add(left, right)
        return total.matrix()

    def theirs(number: int) -> Tensor:
        total = OneTermAtATime(8, 9, 3, True, generator)
        total.add(left, right)
        return total.matrix()

    assert same_second_moments(ours, theirs, (8, 9))


def test_blocks_have_less_variance_than_one_by_one() -> None:
    left, right = terms(12, 10, 12)

    def draw(block: int) -> Callable[[int], Tensor]:
        def make(number: int) -> Tensor:
            total = KroneckerSum(12, 10, rank=2, block=block, seed=number)
            for some, others in zip(left.split(block, 1), right.split(block, 1), strict=True):
                total.add(some, others)
            return total.matrix()

        return make

    variances = [float(moments(draw(block), 300)[1].sum()) for block in (1, 4, 12)]
    assert variances[0] > 1.05 * variances[1] > 1.05 * variances[2]


@pytest.mark.parametrize("shape", [(40, 50), (40, 3)])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("unbiased", [True, False])
def test_a_block_with_a_number_that_is_not_finite_is_left_out(
    shape: tuple[int, int], number: float, unbiased: bool
) -> None:
    total = KroneckerSum(*shape, rank=2, unbiased=unbiased, block=4)
    good = terms(*shape, 6)
    total.add(*good)
    before = total.matrix()
    for side in (0, 1):
        bad = [each.clone() for each in good]
        bad[side][1, 0] = number
        bad[side] = bad[side][:, :4]
        bad[1 - side] = bad[1 - side][:, :4]
        assert not total.add(*bad)
        assert torch.equal(total.matrix(), before)
    assert total.add(*good)


@pytest.mark.parametrize("bits", [None, 16])
def test_a_loaded_sum_goes_on_with_the_same_bits(bits: int | None) -> None:
    first = KroneckerSum(30, 40, rank=3, bits=bits, block=4, seed=7)
    first.add(*terms(30, 40, 9, seed=1))
    second = KroneckerSum(30, 40, rank=3, bits=bits, block=4, seed=7)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for each in (first, second):
        each.add(*terms(30, 40, 9, seed=2))
    assert torch.equal(first.matrix(), second.matrix())
    assert first.state_dict().keys() == second.state_dict().keys()


def test_16_bits_are_16_bits_with_a_range_of_their_own() -> None:
    plain, short = KroneckerSum(30, 40, rank=8), KroneckerSum(30, 40, rank=8, bits=16)
    for scale in (1e-6, 1e6):  # of the gradients
        left, right = terms(30, 40, 6)
        for total in (plain, short):
            total.reset()
            total.add(left * scale, right)
        exact = left @ right.t() * scale
        assert float((short.matrix() - exact).abs().max()) < 3e-4 * float(exact.abs().max())
    assert sum(buffer.nbytes for buffer in short.buffers()) == 2 * 8 * (30 + 40) + 8
    assert sum(buffer.nbytes for buffer in plain.buffers()) == 4 * 8 * (30 + 40)


def test_autocast_rounds_nothing() -> None:
    expected, total = KroneckerSum(40, 50, rank=2), KroneckerSum(40, 50, rank=2)
    left, right = terms(40, 50, 40)
    expected.add(left, right)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total.add(left, right)
    assert torch.equal(total.left, expected.left)


def test_terms_of_half_precision_are_added_in_float32() -> None:
    total = KroneckerSum(40, 50, rank=2)
    left, right = (each.bfloat16() for each in terms(40, 50, 2))
    total.add(left, right)
    assert torch.allclose(total.matrix(), left.float() @ right.float().t(), atol=1e-5)


def test_rows_and_factors_are_those_of_the_matrix() -> None:
    total = KroneckerSum(30, 40, rank=2)
    total.add(*terms(30, 40, 5))
    left, right = total.factors()
    assert (left.shape, right.shape) == ((30, 2), (40, 2))
    assert torch.allclose(left @ right.t(), total.matrix())
    assert torch.allclose(total.matrix(3, 9), total.matrix()[3:9])
    total.reset()
    assert torch.equal(total.matrix(), torch.zeros(30, 40))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rank": 0}, "rank=0 is not possible"),
        ({"rows": 0}, "rows=0"),
        ({"block": 0}, "block=0"),
        ({"bits": 8}, "bits=8"),
        ({"dtype": torch.float16}, "float16"),
    ],
)
def test_arguments_out_of_range_are_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        KroneckerSum(**{"rows": 3, "columns": 4, "rank": 2, **change})  # type: ignore[arg-type]


def test_terms_that_do_not_fit_are_refused() -> None:
    total = KroneckerSum(3, 4, rank=2)
    with pytest.raises(ValueError, match=r"do not fit a matrix of \(3, 4\)"):
        total.add(torch.zeros(4, 1), torch.zeros(3, 1))
    with pytest.raises(ValueError, match="do not pair"):
        total.add(torch.zeros(3, 1), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="are not matrices"):
        total.add(torch.zeros(3), torch.zeros(4))
    with pytest.raises(ValueError, match=r"do not fit a matrix of \(3, 4\)"):
        total.add_rows(torch.zeros(1, 4), torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"a matrix of \(1, 4\) does not fit one of \(3, 4\)"):
        total.add_matrix(torch.ones(1, 4))


def test_biased_is_the_truncated_svd_whatever_the_size_of_its_numbers() -> None:
    left, right = terms(8, 9, 6)
    for size in (1e-10, 1e10):
        total = KroneckerSum(8, 9, 4, unbiased=False)
        total.add(left * size, right * torch.tensor([1, 1, 1, 1e-9, 1e-9, 1e-9]))
        u, values, v = torch.linalg.svd(
            size * left.double() @ (right * torch.tensor([1, 1, 1, 1e-9, 1e-9, 1e-9])).double().t()
        )
        best = (u[:, :3] * values[:3]) @ v[:3]
        assert float((total.matrix() - best).norm() / best.norm()) < 1e-5


@pytest.mark.parametrize("side", [10, 64, 300])
@pytest.mark.parametrize("count", [1, 80])
def test_memory_is_rank_times_rows_and_columns_and_the_workspace_that_is_documented(side: int, count: int) -> None:
    rank, block = 4, 32
    total = KroneckerSum(side, side, rank, bits=16, block=block)
    left, right = torch.randn(count, side), torch.randn(count, side)
    total.add_rows(left, right)
    kept = sum(buffer.nbytes for buffer in total.buffers())
    assert kept == rank * 2 * side * 2 + 8
    tracemalloc.start()  # NumPy tells it of its arrays, which the ledger does not see
    try:
        total.add_rows(left, right)
        in_numpy = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    with memfit.ledger(total) as book:
        total.add_rows(left, right)
    columns = rank + min(count, block)
    workspace = book.peak.total - kept - left.nbytes - right.nbytes + in_numpy
    assert workspace <= 4 * (4 * columns * 2 * side + 10 * columns**2) + 6_000  # of Python's own objects
