"""The C++ operators against what they stand for, and how they stand aside."""

from __future__ import annotations

import copy
import random
import shutil
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memfit
from memfit import ConversionError, GradientFilter, MissingExtraError, StreamingLowRank, native
from memfit.gradients.kronecker_sum import KroneckerSum
from memfit.gradients.mixing import least_variance

needs_compiler = pytest.mark.skipif(
    shutil.which("ninja") is None or shutil.which("c++") is None, reason="needs ninja and a C++ compiler"
)


def gradients(layer: nn.Module, technique: GradientFilter, x: torch.Tensor, seed: int) -> list[torch.Tensor]:
    model = memfit.convert_(copy.deepcopy(layer), technique, where="")
    leaf = x.detach().clone().requires_grad_(True)
    y = model(leaf)
    g = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(seed))
    layout = torch.contiguous_format if y.is_contiguous() else torch.channels_last
    y.backward(g.contiguous(memory_format=layout))
    return [leaf.grad, *(parameter.grad for parameter in model.parameters())]  # type: ignore[list-item]


@pytest.mark.slow  # it is compiled
@needs_compiler
def test_filtered_gradients_are_those_of_torchs_operators() -> None:
    drawn = random.Random(0)
    for seed in range(300):
        kernel, stride, dilation, padding = (
            (drawn.randint(least, most), drawn.randint(least, most)) for least, most in ((1, 4), (1, 3), (1, 3), (0, 4))
        )
        inputs = drawn.choice([4, 12, 44])  # fewer than a block of channels, one and a rest, and blocks of two sizes
        outputs, groups = drawn.choice([inputs, 2 * inputs]), drawn.choice([1, 2, 4, inputs])
        bias = drawn.random() < 0.5
        layer = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias).double()
        size = [d * (k - 1) + 1 + drawn.randint(0, 9) for d, k in zip(dilation, kernel, strict=True)]
        patch = drawn.randint(1, 6)
        x = torch.randn(drawn.randint(0, 3), inputs, *size, dtype=torch.float64)
        for layout in (torch.contiguous_format, torch.channels_last):
            layer, x = layer.to(memory_format=layout), x.contiguous(memory_format=layout)
            expected = gradients(layer, GradientFilter(patch), x, seed)
            found = gradients(layer, GradientFilter(patch, native=True), x, seed)
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other)


@pytest.mark.slow
@needs_compiler
def test_what_the_filter_does_not_take_goes_the_usual_way() -> None:
    model = memfit.convert_(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)), GradientFilter(2, native=True))
    x = torch.randn(2, 3, 9, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(x).float().sum().backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    peak = memfit.estimate(model, x, lambda model, x: model(x).sum(), optimizer).peak  # of tensors without data
    assert peak.activations > 0


def some_terms(drawn: random.Random, count: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Terms as rows, of all sizes, some of them zero, some along others."""
    left, right = torch.randn(count, rows), torch.randn(count, columns)
    for row in range(count):
        left[row] *= drawn.choice([0.0, 1.0, 1.0, 10.0 ** drawn.randint(-3, 3)])
        right[row] *= drawn.choice([0.0, 1.0, 1.0, 10.0 ** drawn.randint(-3, 3)])
        if row and drawn.random() < 0.2:
            right[row] = right[row - 1]
    return left, right


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("bits", [None, 16])
def test_biased_sums_are_those_of_numpy_and_torch(bits: Any) -> None:
    drawn = random.Random(1)
    for _ in range(200):
        rows, columns, rank = drawn.randint(1, 40), drawn.randint(1, 40), drawn.randint(1, 6)
        block = drawn.choice([1, 4, 32])
        found, expected = (
            KroneckerSum(rows, columns, rank, unbiased=False, bits=bits, block=block, native=native)
            for native in (True, False)
        )
        exact = torch.zeros(rows, columns, dtype=torch.float64)
        for _ in range(3):
            left, right = some_terms(drawn, drawn.randint(0, 12), rows, columns)
            assert found.add_rows(left, right) == expected.add_rows(left, right)
            exact += left.double().t() @ right.double()
        size = max(float(exact.norm()), float(expected.matrix().norm()), 1e-30)
        error, other = (float((each.matrix().double() - exact).norm()) / size for each in (found, expected))
        # Where two values are nearly the same either may be dropped: what is lost is the same.
        assert abs(error - other) < (1e-3 if bits else 1e-5)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    ("rows", "columns", "count", "rank"), [(9, 14, 7, 2), (3, 20, 9, 2), (5, 5, 5, 1), (30, 40, 7, 2)]
)
def test_unbiased_sums_have_the_exact_mean_and_the_least_error(rows: int, columns: int, count: int, rank: int) -> None:
    torch.manual_seed(0)
    left, right = torch.randn(count, rows) * 0.8 ** torch.arange(count)[:, None], torch.randn(count, columns)
    exact = left.double().t() @ right.double()
    least = least_variance(torch.linalg.svdvals(exact)[: min(rows, columns, count)].tolist(), rank)
    total = KroneckerSum(rows, columns, rank, native=True)
    mean = square = torch.zeros(rows, columns, dtype=torch.float64)
    draws = 4000
    for _ in range(draws):
        total.reset()
        assert total.add_rows(left, right)
        drawn = total.matrix().double()
        assert float((drawn - exact).square().sum()) == pytest.approx(least, rel=1e-4)
        mean, square = mean + drawn / draws, square + drawn**2 / draws
    error = ((square - mean**2) / draws).sqrt()
    assert bool(((mean - exact).abs() <= 4.5 * error + 1e-5).all())


@pytest.mark.slow
@needs_compiler
def test_a_native_sum_leaves_out_what_is_not_finite_and_tells_autograd_of_the_rest() -> None:
    for shape in ((30, 20), (30, 3)):
        total = KroneckerSum(*shape, rank=2, bits=16, native=True)
        left, right = torch.randn(2, shape[0]), torch.randn(2, shape[1])
        assert total.add_rows(left, right)
        before, version = total.matrix(), total.left._version
        for number in (torch.nan, torch.inf):
            assert not total.add_rows(left.index_fill(0, torch.tensor(1), number), right)
        assert torch.equal(total.matrix(), before)
        assert total.add_rows(left, right)
        assert total.left._version > version
        copied = copy.deepcopy(total)
        copied.load_state_dict(total.state_dict())
        for each in (total, copied):
            each.add_rows(right[:, :1] * left, right)
        assert torch.equal(total.matrix(), copied.matrix())


@pytest.mark.slow
@needs_compiler
def test_a_net_learns_by_native_sums_as_by_the_others() -> None:
    losses = {}
    for by in (True, False):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 10))
        memfit.convert_(net, StreamingLowRank(rank=4, period=5, native=by))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
        images, labels = torch.rand(10, 1, 8, 8), torch.arange(10)
        for step in range(600):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images[step % 10][None]), labels[step % 10][None]).backward()
            optimizer.step()
        losses[by] = nn.functional.cross_entropy(net(images), labels).item()
    assert losses[True] < 1.0
    assert losses[False] < 1.0


@pytest.mark.slow
@needs_compiler
def test_terms_with_a_side_of_zeros_and_tiny_terms_take_nothing_from_a_native_sum() -> None:
    total = KroneckerSum(30, 40, 4, native=True)
    left, right = torch.randn(1, 30) * 1e-5, torch.randn(1, 40) * 1e-5
    for some, others in ((left, right), (torch.zeros(1, 30), 1e12 * right), (1e12 * left, torch.zeros(1, 40))):
        assert total.add_rows(some, others)
        torch.testing.assert_close(total.matrix(), left.t() @ right)
    biased = KroneckerSum(30, 40, 4, unbiased=False, native=True)
    biased.add_rows(torch.eye(1, 30), torch.eye(1, 40))
    for _ in range(2000):
        biased.add_rows(torch.eye(2, 30)[1:], 9e-7 * torch.eye(2, 40)[1:])
    assert biased.matrix()[1, 1].item() == pytest.approx(1.8e-3, rel=1e-3)


@pytest.mark.slow
@needs_compiler
def test_what_a_native_sum_does_not_take_goes_the_usual_way() -> None:
    left, right = torch.randn(2, 30), torch.randn(2, 40)
    exact = left.t() @ right
    wide = KroneckerSum(30, 40, 4, native=True, dtype=torch.float64)
    converted = KroneckerSum(30, 40, 4, bits=16, native=True).double()
    turned = KroneckerSum(30, 40, 4, native=True)
    state = {name: each.t().contiguous().t() if each.dim() == 2 else each for name, each in turned.state_dict().items()}
    turned.load_state_dict(state, assign=True)
    negated = KroneckerSum(30, 40, 4, native=True)
    for total, some in ((wide, left), (converted, left), (turned, left), (negated, torch._neg_view(-left))):
        assert total.add_rows(some, right)
        torch.testing.assert_close(total.matrix().float(), exact, atol=1e-3, rtol=1e-3)
    overflow = KroneckerSum(30, 40, 4, native=True)
    assert not overflow.add_rows(1e30 * torch.ones(1, 30), 1e30 * torch.ones(1, 40))
    with torch.inference_mode():
        constant = KroneckerSum(30, 40, 4, native=True)
    assert constant.add_rows(left, right)


def test_a_sum_from_a_file_goes_on_without_a_compiler(monkeypatch: Any) -> None:
    total = KroneckerSum(30, 40, 4)
    total.native = True
    native.operator.cache_clear()
    monkeypatch.setattr(shutil, "which", lambda name: "ninja" if name == "ninja" else None)
    with pytest.warns(RuntimeWarning, match="goes on without its C"):
        copied = copy.deepcopy(total)
    assert copied.add_rows(torch.randn(1, 30), torch.randn(1, 40))


def test_without_a_compiler_the_conversion_is_refused_and_nothing_changed(monkeypatch: Any) -> None:
    native.operator.cache_clear()
    monkeypatch.setattr(shutil, "which", lambda name: "ninja" if name == "ninja" else None)
    for technique in (GradientFilter(2, native=True), StreamingLowRank(2, native=True)):
        model = nn.Sequential(nn.Conv2d(3, 4, 3))
        with pytest.raises(ConversionError, match=r"there is no compiler .*: install one, or leave native out"):
            memfit.convert_(model, technique)
        assert type(model[0]) is nn.Conv2d


def test_without_ninja_the_extra_is_named(monkeypatch: Any) -> None:
    native.operator.cache_clear()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setitem(sys.modules, "ninja", None)
    with pytest.raises(MissingExtraError, match=r"memfit\[native\]"):
        memfit.convert_(nn.Sequential(nn.Conv2d(3, 4, 3)), GradientFilter(2, native=True))


def test_native_is_true_or_false() -> None:
    with pytest.raises(ConversionError, match="native='yes' is not possible: give True or False"):
        GradientFilter(2, native="yes")  # type: ignore[arg-type]
    with pytest.raises(ConversionError, match="native=1 is not possible: give True or False"):
        StreamingLowRank(native=1)  # type: ignore[arg-type]
