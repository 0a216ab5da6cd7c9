"""StreamingLowRank: when weights are written, by how much, and that nothing else changes."""

from __future__ import annotations

import copy
import io
import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import memfit
from memfit.convert import ConvertedLayer
from memfit.gradients.kronecker_sum import KroneckerSum
from memfit.gradients.max_norm import max_norm
from memfit.gradients.streaming_layer import StreamingConv2d, StreamingLinear
from memfit.gradients.streaming_matrix import StreamingMatrix
from memfit.weights.cell_array import CellArray
from memfit.weights.quantize import quantize

EXACT: dict[str, Any] = {
    "max_norm": False,
    "min_write_density": 0.0,
    "weight_bits": None,
    "bias_bits": None,
    "factor_bits": None,
}


class Net(nn.Module):
    """Images (B, 1, 9, 9) to three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2), nn.ReLU())
        self.head = nn.Linear(128, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).flatten(1))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def samples(count: int, seed: int = 1, batch: int = 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.rand(batch, 1, 9, 9, generator=generator), torch.randint(5, (batch,), generator=generator))
        for _ in range(count)
    ]


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, stream: list[tuple[Tensor, Tensor]]) -> None:
    for x, y in stream:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


class InBlocks(KroneckerSum):
    """As of a matrix with two long sides."""

    takes_matrix = False


def matrices(model: nn.Module) -> list[StreamingMatrix]:
    return [module for module in model.modules() if isinstance(module, StreamingMatrix)]


def test_with_a_full_rank_it_is_gradient_descent_on_means_over_periods(net: Net) -> None:
    """Biases move at every sample, so they are left out here."""
    for layer in (net.body[0], net.body[2], net.head):
        layer.bias = None
    reference = copy.deepcopy(net)
    model = memfit.convert_(net, memfit.StreamingLowRank(rank=5, period=4, **EXACT))
    model.body[2].matrices["weight"].terms = KroneckerSum(8, 54, 8)
    model.body[0].matrices["weight"].terms = KroneckerSum(6, 9, 6)
    stream = samples(12)
    learn(model, torch.optim.SGD(model.parameters(), lr=0.5), stream)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.5)
    for start in range(0, 12, 4):
        x, y = (torch.cat(each) for each in zip(*stream[start : start + 4], strict=True))
        optimizer.zero_grad()
        F.cross_entropy(reference(x), y).backward()
        optimizer.step()
    for name, expected in reference.state_dict().items():
        torch.testing.assert_close(memfit.state_dict(model)[name], expected, atol=1e-5, rtol=1e-4)


@given(
    st.integers(1, 3),
    st.sampled_from([(3, 1, 0, 1), (3, 2, 1, 1), ((2, 3), (1, 2), (1, 0), 1), (2, 1, 1, 2), (1, 1, 0, 1)]),
    st.sampled_from(["zeros", "reflect", "circular"]),
    st.integers(1, 40),
    st.booleans(),
    st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_terms_of_a_convolution_add_up_to_its_gradient(
    batch: int, geometry: tuple[Any, ...], mode: str, block: int, whole: bool, last: bool
) -> None:
    """In blocks of pixels or at once; channels last too."""
    kernel, stride, padding, dilation = geometry
    layer = nn.Conv2d(2, 5, kernel, stride, padding, dilation, padding_mode=mode, dtype=torch.float64)
    reference = copy.deepcopy(layer)
    memfit.convert_(layer, memfit.StreamingLowRank(rank=2, period=10**9, block=block, **EXACT))
    matrix = matrices(layer)[0]
    # Of full rank, so that the sum is exact.
    shape = matrix.terms.shape
    matrix.terms = (KroneckerSum if whole else InBlocks)(*shape, min(shape), block=block, dtype=torch.float64)
    x = torch.randn(batch, 2, 7, 6, dtype=torch.float64)
    x = (x.contiguous(memory_format=torch.channels_last) if last else x).requires_grad_()
    other = x.detach().clone().requires_grad_()
    d = torch.randn_like(reference(other))
    reference(other).backward(d)
    y = layer(x)
    torch.testing.assert_close(y, reference(other))
    y.backward(d)
    torch.testing.assert_close(matrix.terms.matrix().view(layer.weight.shape), reference.weight.grad, atol=1e-6, rtol=0)
    torch.testing.assert_close(x.grad, other.grad)
    torch.testing.assert_close(layer.bias.grad, reference.bias.grad)
    assert layer.weight.grad is None


@pytest.mark.parametrize("shape", [(7,), (4, 7), (2, 3, 7)])
def test_terms_of_a_linear_layer_add_up_to_its_gradient(shape: tuple[int, ...]) -> None:
    layer = nn.Linear(7, 5, dtype=torch.float64)
    reference = copy.deepcopy(layer)
    memfit.convert_(layer, memfit.StreamingLowRank(rank=5, period=10**9, **EXACT))
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    y, expected = layer(x), reference(other)
    torch.testing.assert_close(y, expected)
    for result in (y, expected):
        result.square().sum().backward()
    torch.testing.assert_close(matrices(layer)[0].terms.matrix(), reference.weight.grad, atol=1e-6, rtol=0)
    torch.testing.assert_close(x.grad, other.grad)
    torch.testing.assert_close(layer.bias.grad, reference.bias.grad)


def test_gradients_of_inputs_and_biases_are_right(net: Net) -> None:
    net.double()
    memfit.convert_(net, memfit.StreamingLowRank(rank=2, **EXACT))
    x = torch.randn(2, 1, 9, 9, dtype=torch.float64, requires_grad=True)
    biases = [net.body[0].bias, net.head.bias]
    assert torch.autograd.gradcheck(lambda x, *_: net(x), (x, *biases))


def test_an_input_of_another_dtype_is_refused_as_by_torch(net: Net) -> None:
    memfit.convert_(net, memfit.StreamingLowRank(rank=2))
    with pytest.raises(RuntimeError, match="should be the same"):
        net(torch.rand(1, 1, 9, 9, dtype=torch.float64))


def test_a_second_derivative_is_refused(net: Net) -> None:
    memfit.convert_(net, memfit.StreamingLowRank(rank=2))
    x = torch.rand(1, 1, 9, 9, requires_grad=True)
    with pytest.raises(RuntimeError, match="has no second derivatives"):
        torch.autograd.grad(net(x).square().sum(), x, create_graph=True)


def test_weights_are_written_once_in_a_period_and_biases_at_every_sample(net: Net) -> None:
    memfit.convert_(net, memfit.StreamingLowRank(rank=2, period=3, max_norm=True, min_write_density=0.0))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    before = copy.deepcopy(memfit.state_dict(net))
    for number, sample in enumerate(samples(7), start=1):
        learn(net, optimizer, [sample])
        after = copy.deepcopy(memfit.state_dict(net))
        for name, value in after.items():
            changed = not torch.equal(value, before[name])
            assert changed == (name.endswith("bias") or number % 3 == 0), (name, number)
        before = after


def test_the_mean_moves_the_weight_by_the_learning_rate_of_its_group(net: Net) -> None:
    memfit.convert_(net.head, memfit.StreamingLowRank(rank=5, period=2, **EXACT))
    weight = net.head.weight
    others = [p for p in net.parameters() if p is not weight]
    groups: list[dict[str, Any]] = [{"params": others, "lr": 0.0}, {"params": [weight], "lr": 0.25}]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9, weight_decay=0.1)
    before = weight.detach().clone()
    gradients = []
    for x, y in samples(2):
        (gradient,) = torch.autograd.grad(
            F.cross_entropy(F.linear(net.body(x).flatten(1), weight, net.head.bias), y), weight
        )
        gradients.append(gradient)
        learn(net, optimizer, [(x, y)])
    mean = (gradients[0] + gradients[1]) / 2
    torch.testing.assert_close(weight.detach(), before - 0.25 * mean, atol=1e-5, rtol=1e-4)
    assert optimizer.state[weight] == {}


def test_schedulers_and_maximize_are_followed() -> None:
    moved = []
    for maximize, factor in ((False, 1.0), (True, 1.0), (False, 0.5)):
        torch.manual_seed(0)
        layer = memfit.convert_(nn.Linear(6, 5), memfit.StreamingLowRank(rank=5, period=1, **EXACT))
        before = layer.weight.detach().clone()
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, maximize=maximize)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch, factor=factor: factor)
        layer(torch.ones(2, 6)).square().sum().backward()
        optimizer.step()
        schedule.step()
        moved.append(layer.weight.detach() - before)
    torch.testing.assert_close(moved[1], -moved[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(moved[2], moved[0] / 2, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
        lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9, nesterov=True),
        lambda parameters: torch.optim.RMSprop(parameters, lr=0.01),
        lambda parameters: torch.optim.Adam(parameters, lr=0.01, foreach=True),
    ],
)
def test_any_optimizer_makes_the_steps_and_keeps_nothing_for_the_weights(net: Net, make: Any) -> None:
    memfit.convert_(net, memfit.StreamingLowRank(rank=2, period=2, min_write_density=0.0))
    optimizer = make(net.parameters())
    before = copy.deepcopy(memfit.state_dict(net))
    learn(net, optimizer, samples(4))
    assert not any(torch.equal(value, before[name]) for name, value in memfit.state_dict(net).items())
    assert all(matrix.effective() not in optimizer.state for matrix in matrices(net))


def test_a_closure_is_one_sample(net: Net) -> None:
    memfit.convert_(net, memfit.StreamingLowRank(rank=2, period=2, min_write_density=0.0))
    other = copy.deepcopy(net)
    learn(net, torch.optim.SGD(net.parameters(), lr=0.1), samples(4))
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    for x, y in samples(4):

        def closure(x: Tensor = x, y: Tensor = y) -> float:
            optimizer.zero_grad()
            loss = F.cross_entropy(other(x), y)
            loss.backward()
            return loss.item()

        optimizer.step(closure)
    same(net, other)


def same(first: nn.Module, second: nn.Module) -> None:
    for (name, one), other in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_several_backward_passes_add_up_in_one_step(net: Net) -> None:
    memfit.convert_(net, memfit.StreamingLowRank(rank=5, period=1, **EXACT), where="head")
    whole = copy.deepcopy(net)
    x, y = samples(1, batch=6)[0]
    for model, parts in ((net, 3), (whole, 1)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for some, labels in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (F.cross_entropy(model(some), labels) / parts).backward()
        optimizer.step()
    torch.testing.assert_close(net.head.weight, whole.head.weight, atol=1e-5, rtol=1e-4)


def test_too_few_changes_put_a_write_off_and_the_root_makes_up_for_it() -> None:
    """One cell of 30 wants to move by six tenths of a level in a period; two periods on, it does by the root of two."""
    layer = nn.Linear(6, 5, bias=False)
    nn.init.zeros_(layer.weight)
    technique = memfit.StreamingLowRank(
        rank=1, period=1, max_norm=False, min_write_density=0.01, weight_range=1.0, factor_bits=None
    )
    memfit.convert_(layer, technique)
    x, d = torch.zeros(1, 6), torch.zeros(1, 5)
    x[0, 2], d[0, 3] = 1.0, 1.0
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.4 / 128)
    cells = layer.matrices["weight"].cells
    moved = []
    for _ in range(2):
        layer(x).backward(d)
        optimizer.step()
        moved.append(float(cells.values.detach()[3, 2] * 128))
    # The mean stays the same; its step is the root of two of 0.4 levels, which rounds to one.
    assert moved == [0.0, -1.0]
    assert int(cells.writes.sum()) == 1
    assert layer.matrices["weight"].samples == 0

    crowded = copy.deepcopy(technique)
    object.__setattr__(crowded, "min_write_density", 0.1)  # three cells of 30
    memfit.restore_(layer)
    nn.init.zeros_(layer.weight)
    memfit.convert_(layer, crowded)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    for _ in range(3):
        layer(x).backward(d)
        optimizer.step()
    assert int(layer.matrices["weight"].cells.writes.sum()) == 0
    assert layer.matrices["weight"].samples == 3


def test_with_max_norm_a_step_that_was_put_off_is_no_larger(recwarn: pytest.WarningsRecorder) -> None:
    """It moves no weight by half a level, and says so once."""
    layer = nn.Linear(6, 5, bias=False)
    memfit.convert_(layer, memfit.StreamingLowRank(rank=2, period=1, weight_range=4.0))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.015)  # a level is 8 / 256
    for _ in range(20):
        layer(torch.randn(1, 6)).square().sum().backward()
        optimizer.step()
    matrix = layer.matrices["weight"]
    assert matrix.samples == matrix.attempts == 20
    assert int(matrix.cells.writes.sum()) == 0
    (warning,) = recwarn
    assert "nothing was written: lr=0.015 is less than half the distance of two levels" in str(warning.message)


def test_only_cells_whose_level_changes_are_written(net: Net) -> None:
    memfit.convert_(net, memfit.StreamingLowRank(rank=2, period=2, max_norm=True, min_write_density=0.0))
    cells = [module for module in net.modules() if isinstance(module, CellArray)]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
    for number in range(4):
        before = [(array.values.detach().clone(), array.writes.clone()) for array in cells]
        learn(net, optimizer, samples(2, seed=number))
        for array, (values, writes) in zip(cells, before, strict=True):
            assert torch.equal(array.writes - writes, (array.values != values).int())
            assert 0 < int((array.writes - writes).sum()) < array.writes.numel()


def test_rows_are_written_block_by_block_where_the_weight_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """And it is the same as all at once."""
    torch.manual_seed(0)
    layer = memfit.convert_(nn.Linear(50, 40), memfit.StreamingLowRank(rank=2, period=2, block=1))
    other = copy.deepcopy(layer)
    matrix = layer.matrices["weight"]
    assert len(matrix._blocks()) > 5
    monkeypatch.setattr(other.matrices["weight"], "_blocks", lambda: [(0, 40)])
    for each in (layer, other):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.05)
        for seed in range(4):
            optimizer.zero_grad()
            each(torch.randn(1, 50, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
            optimizer.step()
    same(layer, other)
    assert int(matrix.cells.writes.sum()) > 0


def test_max_norm_moves_the_largest_by_the_learning_rate() -> None:
    for scale in (1.0, 1e-3):  # of the loss
        layer = memfit.convert_(
            nn.Linear(6, 5, bias=False), memfit.StreamingLowRank(rank=5, period=2, **{**EXACT, "max_norm": True})
        )
        before = layer.weight.detach().clone()
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.125)
        for _ in range(2):
            (layer(torch.rand(3, 6)).square().sum() * scale).backward()
            optimizer.step()
        assert math.isclose(float((layer.weight.detach() - before).abs().max()), 0.125, rel_tol=1e-4)


def test_max_norm_divides_by_the_bias_corrected_average_where_that_is_larger() -> None:
    average, seen = 0.0, []
    for number, largest in enumerate([2.0, 4.0, 1.0, 0.0], start=1):
        divisor, average = max_norm(largest, average, number)
        seen.append(largest)
        weights = [0.001 * 0.999 ** (number - 1 - index) for index in range(number)]
        mean = sum(weight * value for weight, value in zip(weights, seen, strict=True)) / sum(weights)
        assert math.isclose(divisor, max(largest, mean), rel_tol=1e-9)
    assert max_norm(0.0, 0.0, 1)[0] == 1e-4


@pytest.mark.parametrize(
    "settings",
    [{}, {"factor_bits": None}, EXACT, {"activation_bits": 8, "gradient_bits": 8}, {"min_agreement": 0.05}],
)
def test_a_loaded_state_resumes_with_the_same_bits(net: Net, settings: dict[str, Any]) -> None:
    technique = memfit.StreamingLowRank(rank=2, period=3, **settings)
    other = copy.deepcopy(net)
    for model in (net, other):
        memfit.convert_(model, technique)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    learn(net, optimizer, samples(8))
    saved = io.BytesIO()
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=True)
    other.load_state_dict(loaded["model"])
    resumed = torch.optim.Adam(other.parameters(), lr=0.01)
    resumed.load_state_dict(loaded["optimizer"])
    learn(net, optimizer, samples(8, seed=2))
    learn(other, resumed, samples(8, seed=2))
    same(net, other)


def test_fit_resumes_exactly(net: Net, tmp_path: Any) -> None:
    models = [copy.deepcopy(net), net]
    results = []
    for model, runs in zip(models, ([8], [5, 8]), strict=True):
        memfit.convert_(model, memfit.StreamingLowRank(rank=2, period=3))
        for steps in runs:
            results.append(
                memfit.fit(
                    model,
                    lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
                    samples(8),
                    torch.optim.SGD(model.parameters(), lr=0.1),
                    steps=steps,
                    checkpoint=tmp_path / f"{len(runs)}.safetensors",
                    resume=True,
                )
            )
            if steps == 5:  # a fresh process would have a fresh model
                model = memfit.convert_(
                    copy.deepcopy(memfit.restore_(model)), memfit.StreamingLowRank(rank=2, period=3)
                )
    assert results[-1].resumed_from == 5
    same(models[0], model)


@pytest.mark.parametrize("settings", [{}, EXACT, {"min_agreement": 0.05}])
def test_copies_and_pickles_learn_on_like_the_original(net: Net, settings: dict[str, Any]) -> None:
    memfit.convert_(net, memfit.StreamingLowRank(rank=2, period=2, **settings))
    learn(net, torch.optim.SGD(net.parameters(), lr=0.1), samples(3))
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    others = [copy.deepcopy(net), torch.load(buffer, weights_only=False)]
    for model in (net, *others):
        learn(model, torch.optim.SGD(model.parameters(), lr=0.1), samples(3, seed=5))
    for other in others:
        same(net, other)


def test_restore_leaves_no_trace(net: Net) -> None:
    original = copy.deepcopy(net)
    weights = dict(net.named_parameters())
    memfit.convert_(net, memfit.StreamingLowRank(rank=2, period=2))
    learn(net, torch.optim.SGD(net.parameters(), lr=0.1), samples(5))
    expected = net(samples(1)[0][0])
    trained = memfit.state_dict(net)
    assert memfit.restore_(net) is net
    assert torch.equal(net(samples(1)[0][0]), expected)
    assert repr(net) == repr(original)
    assert list(dict(net.named_parameters())) == list(weights)
    for name, parameter in net.named_parameters():
        assert parameter is weights[name]
        assert parameter.requires_grad
        assert torch.equal(parameter, trained[name])
    for module, plain in zip(net.modules(), original.modules(), strict=True):
        assert type(module) is type(plain)
        assert set(vars(module)) == set(vars(plain))
    before = copy.deepcopy(net.state_dict())
    learn(net, torch.optim.SGD(net.parameters(), lr=0.1), samples(1))  # densely
    assert not any(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_restoring_at_once_gives_the_same_bits_where_nothing_is_quantized(net: Net) -> None:
    before = copy.deepcopy(net.state_dict())
    memfit.restore_(memfit.convert_(net, memfit.StreamingLowRank(rank=2, weight_bits=None, bias_bits=None)))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_state_dict_has_the_original_keys_and_loads_there(net: Net) -> None:
    original = copy.deepcopy(net)
    memfit.convert_(net, memfit.StreamingLowRank(rank=2, period=2))
    learn(net, torch.optim.SGD(net.parameters(), lr=0.1), samples(4))
    plain = memfit.state_dict(net)
    assert list(plain) == list(original.state_dict())
    assert not any(tensor.requires_grad for tensor in plain.values())
    original.load_state_dict(plain)
    assert torch.equal(original(samples(1)[0][0]), net(samples(1)[0][0]))


def test_the_conversion_rounds_to_what_cells_and_biases_hold(net: Net) -> None:
    expected = copy.deepcopy(net.state_dict())
    memfit.convert_(net, memfit.StreamingLowRank(rank=2, weight_bits=6, weight_range=0.5, bias_bits=10))
    for name, value in memfit.state_dict(net).items():
        bits, reach = (10, 8.0) if name.endswith("bias") else (6, 0.5)
        assert torch.equal(value, quantize(expected[name], bits, -reach, reach)), name


def test_biases_stay_on_their_levels(net: Net) -> None:
    memfit.convert_(net, memfit.StreamingLowRank(rank=2, bias_bits=12))
    learn(net, torch.optim.SGD(net.parameters(), lr=0.1), samples(3))
    for layer in (net.body[0], net.body[2], net.head):
        assert torch.equal(layer.bias, quantize(layer.bias.detach(), 12, -8.0, 8.0))
        assert bool(layer.bias.any())


def test_activations_and_gradients_are_quantized_in_the_loop() -> None:
    layer = nn.Linear(6, 5, bias=False)
    technique = memfit.StreamingLowRank(rank=5, period=10**9, activation_bits=4, gradient_bits=3, **EXACT)
    memfit.convert_(layer, technique)
    x = torch.rand(3, 6) * 3 - 0.5
    x.requires_grad_()
    d = torch.rand(3, 5) * 3 - 1.5
    y = layer(x)
    y.backward(d)
    coarse, d_coarse = quantize(x.detach(), 4, 0.0, 2.0), quantize(d, 3, -1.0, 1.0)
    torch.testing.assert_close(y, F.linear(coarse, layer.weight))
    torch.testing.assert_close(layer.matrices["weight"].terms.matrix(), d_coarse.t() @ coarse, atol=1e-5, rtol=0)
    inside = (x >= 0) & (x <= 2)
    torch.testing.assert_close(x.grad, d_coarse @ layer.weight.detach() * inside)


def test_eval_and_no_grad_change_nothing(net: Net) -> None:
    memfit.convert_(net, memfit.StreamingLowRank(rank=2, period=1))
    before = copy.deepcopy(net.state_dict())
    with torch.no_grad():
        net(samples(1)[0][0])
    net.eval()(samples(1)[0][0])
    for (name, value), other in zip(net.state_dict().items(), before.values(), strict=True):
        assert torch.equal(value, other), name


def test_a_frozen_weight_adds_nothing(net: Net) -> None:
    memfit.convert_(net, memfit.StreamingLowRank(rank=2, period=10**9))
    net.head.weight.requires_grad_(False)
    net(samples(1)[0][0]).sum().backward()
    assert not bool(net.head.matrices["weight"].terms.matrix().any())
    assert bool(net.body[0].matrices["weight"].terms.matrix().any())


def test_a_gradient_that_is_not_finite_is_left_out_and_said(net: Net) -> None:
    memfit.convert_(net, memfit.StreamingLowRank(rank=2, period=10**9))
    net(samples(1)[0][0]).sum().backward()
    before = copy.deepcopy(net.state_dict())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        (net(samples(1)[0][0]) * math.inf).sum().backward()
    assert [str(each.message).split()[3] for each in said] == ["head.weight", "body.2.weight", "body.0.weight"]
    for name, value in net.state_dict().items():
        if name.endswith(("left", "right")):
            assert torch.equal(value, before[name]), name


def test_autocast_adds_terms_of_half_precision_in_float32(net: Net) -> None:
    memfit.convert_(net, memfit.StreamingLowRank(rank=2, period=2))
    plain = copy.deepcopy(net)
    stream = samples(2)
    learn(plain, torch.optim.SGD(plain.parameters(), lr=0.01), stream[:1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert net(stream[0][0]).dtype == torch.bfloat16
        learn(net, torch.optim.SGD(net.parameters(), lr=0.01), stream[:1])
    for one, other in zip(matrices(net), matrices(plain), strict=True):
        assert one.terms.left.dtype == other.terms.left.dtype
        scale = float(other.terms.matrix().abs().max())
        assert 0 < float((one.terms.matrix() - other.terms.matrix()).norm()) < 0.2 * float(other.terms.matrix().norm())
        assert scale > 0


def test_tied_weights_stay_tied_and_add_to_one_sum() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    reference = copy.deepcopy(model)
    memfit.convert_(model, memfit.StreamingLowRank(rank=6, period=1, **EXACT))
    assert model[0].matrices["weight"] is model[1].matrices["weight"]
    for each in (model, reference):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        each(torch.ones(2, 6)).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(model[1].weight, reference[1].weight, atol=1e-5, rtol=1e-4)
    memfit.restore_(model)
    assert model[0].weight is model[1].weight


def test_the_ledger_has_the_sum_on_the_gradients_line() -> None:
    model = nn.Sequential(nn.Linear(300, 200, bias=False))
    technique = memfit.StreamingLowRank(rank=4, period=10, factor_bits=None, weight_bits=None)
    memfit.convert_(model, technique)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with memfit.ledger(model, optimizer) as book:
        for _ in range(2):
            model(torch.rand(1, 300)).sum().backward()
            optimizer.step()
    assert book.peak.gradients == 4 * 4 * (300 + 200)
    assert book.peak.optimizer == 0
    assert book.peak.weights == 4 * 300 * 200


def test_a_wildcard_leaves_dense_what_does_not_suit_and_a_name_is_refused() -> None:
    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(4, 6, 3),
            "grouped": nn.Conv2d(4, 4, 3, groups=2),
            "thin": nn.Linear(6, 2),
            "untracked": nn.BatchNorm2d(4, track_running_stats=False),
            "embedding": nn.Embedding(5, 6),
        }
    )
    memfit.convert_(model, memfit.StreamingLowRank(rank=3))
    assert {name for name, layer in model.items() if isinstance(layer, ConvertedLayer)} == {"conv"}
    assert isinstance(model["conv"], StreamingConv2d)
    for name, said in (
        ("grouped", "has 2 groups"),
        ("thin", "2 x 6, so the rank may be at most 2, not 3"),
        ("untracked", "keeps no running statistics"),
        ("embedding", "is a Embedding, which StreamingLowRank does not convert"),
    ):
        with pytest.raises(memfit.ConversionError, match=said):
            memfit.convert_(model, memfit.StreamingLowRank(rank=3), where=name)


def test_weights_that_cells_cannot_hold_are_refused() -> None:
    layer = nn.Linear(6, 5)
    with pytest.raises(memfit.ConversionError, match=r"bfloat16, and cells hold float32 or float64: give weight_bits"):
        memfit.convert_(layer.bfloat16(), memfit.StreamingLowRank(rank=2))
    memfit.convert_(layer, memfit.StreamingLowRank(rank=2, period=1, **EXACT))
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    before = layer.weight.detach().clone()
    layer(torch.ones(1, 6, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    assert layer.weight.dtype == torch.bfloat16
    assert not torch.equal(layer.weight, before)
    broken = nn.Linear(6, 5)
    with torch.no_grad():
        broken.weight[0, 0] = math.nan
    with pytest.raises(memfit.ConversionError, match="not finite"):
        memfit.convert_(broken, memfit.StreamingLowRank(rank=2))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rank": 0}, "rank=0"),
        ({"rank": True}, "rank=True"),
        ({"period": 0}, "period=0"),
        ({"block": 0}, "block=0"),
        ({"seed": -1}, "seed=-1"),
        ({"weight_bits": 17}, "weight_bits=17 is not possible: give a whole number from 1 to 16, or None"),
        ({"bias_bits": 0}, "bias_bits=0"),
        ({"activation_bits": 2.5}, r"activation_bits=2\.5"),
        ({"gradient_bits": 0}, "gradient_bits=0"),
        ({"factor_bits": 8}, "factor_bits=8"),
        ({"min_write_density": 1.5}, r"min_write_density=1\.5"),
        ({"min_write_density": math.nan}, "min_write_density=nan"),
        ({"weight_range": 0.3}, r"weight_range=0\.3 is not possible: give a power of two"),
        ({"weight_range": 0.0}, r"weight_range=0\.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(memfit.ConversionError, match=said):
        memfit.StreamingLowRank(**settings)


def test_it_learns_a_shift_of_its_stream_with_few_writes() -> None:
    """Two classes of noisy patterns, whose meaning changes; a write moves a cell once in a hundred samples at most."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4))
    memfit.convert_(model, memfit.StreamingLowRank(rank=2, period=20))
    weights = [matrix.effective() for matrix in matrices(model)]
    biases = [layer.bias for layer in model if isinstance(layer, StreamingLinear)]
    optimizer = torch.optim.SGD([{"params": weights, "lr": 0.1}, {"params": biases, "lr": 0.02}], lr=1.0)
    patterns = torch.randn(4, 20)
    generator = torch.Generator().manual_seed(1)
    right: list[bool] = []
    for number in range(2000):
        label = torch.randint(4, (1,), generator=generator)
        x = patterns[(label + number // 1000) % 4] + 0.5 * torch.randn(1, 20, generator=generator)
        optimizer.zero_grad()
        logits = model(x)
        right.append(bool(logits.argmax() == label))
        F.cross_entropy(logits, label).backward()
        optimizer.step()
    assert sum(right[700:1000]) > 270
    assert sum(right[1000:1100]) < 60
    assert sum(right[1700:2000]) > 270
    writes = [module.writes for module in model.modules() if isinstance(module, CellArray)]
    assert max(int(each.max()) for each in writes) <= 2000 // 20


def test_nothing_warns_in_an_ordinary_loop(net: Net) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        memfit.convert_(net, memfit.StreamingLowRank(rank=2, period=2))
        learn(net, torch.optim.SGD(net.parameters(), lr=0.1), samples(4))


def test_a_gradient_that_goes_past_the_layer_is_refused(net: Net) -> None:
    memfit.convert_(net, memfit.StreamingLowRank(rank=2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    (x, y), before = samples(1)[0], net.head.weight.detach().clone()
    (F.cross_entropy(net(x), y) + net.head.weight.square().sum()).backward()
    with pytest.raises(memfit.TrainingError, match=r"weight of head\S* has a gradient that did not come through"):
        optimizer.step()
    assert torch.equal(net.head.weight, before)


def test_an_old_gradient_does_not_outlive_the_conversion(net: Net) -> None:
    x, y = samples(1)[0]
    F.cross_entropy(net(x), y).backward()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.1)
    memfit.convert_(net, memfit.StreamingLowRank(rank=2))
    before = net.head.weight.detach().clone()
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    assert torch.equal(net.head.weight, before)


def test_a_batch_norm_needs_a_period() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with pytest.raises(memfit.ConversionError, match="give a longer period"):
        memfit.convert_(model, memfit.StreamingLowRank(rank=2, period=1))
    assert type(model[0]) is nn.Linear


def test_statistics_survive_an_empty_batch_and_a_sample_that_is_not_finite() -> None:
    norm = memfit.convert_(nn.BatchNorm2d(3), memfit.StreamingLowRank(period=10), where="")
    norm(torch.randn(1, 3, 4, 4))
    before = {name: each.clone() for name, each in norm.state_dict().items()}
    norm(torch.empty(0, 3, 4, 4))
    with pytest.warns(RuntimeWarning, match="not finite"):
        norm(torch.full((1, 3, 4, 4), float("nan")))
    for name, each in norm.state_dict().items():
        assert torch.equal(each, before[name])
    assert bool(norm(torch.randn(1, 3, 4, 4)).isfinite().all())


@pytest.mark.parametrize(
    "setting", [{"min_write_density": "much"}, {"min_write_density": None}, {"weight_range": "1"}, {"max_norm": "no"}]
)
def test_settings_of_another_type_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(memfit.ConversionError, match="is not possible"):
        memfit.StreamingLowRank(**setting)
