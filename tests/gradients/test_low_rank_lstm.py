"""The low-rank LSTM against nn.LSTM with the same effective weights, in every configuration, and what it keeps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import memfit
from memfit.gradients import lstm_recurrence
from memfit.gradients.lstm_recurrence import RowProduct


def with_random_factors(lstm: nn.LSTM, **settings: Any) -> tuple[nn.LSTM, nn.LSTM]:
    """A converted copy whose factors are not zero, and the plain LSTM of the same effective weights."""
    low = memfit.convert_(copy.deepcopy(lstm), memfit.LowRankGradient(**settings))
    with torch.no_grad():
        for matrix in low.low_rank.values():
            matrix.left.normal_(std=0.3)  # small enough for gradients over many steps not to explode
    lstm.load_state_dict(memfit.state_dict(low))
    return low, lstm


def flat(result: Any) -> list[Tensor]:
    output, (h, c) = result
    return [output.data if isinstance(output, PackedSequence) else output, h, c]


@settings(deadline=None, max_examples=60)
@given(
    layers=st.integers(1, 3),
    bidirectional=st.booleans(),
    proj=st.sampled_from([0, 0, 3]),
    bias=st.booleans(),
    batch_first=st.booleans(),
    form=st.sampled_from(["padded", "single", "packed", "packed and sorted"]),
    state=st.booleans(),
    settings_=st.fixed_dictionaries(
        {"sides": st.sampled_from(["both", "left"]), "rematerialize": st.booleans(), "rank": st.integers(1, 3)}
    ),
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_outputs_and_all_gradients_are_those_of_nn_lstm(
    layers: int,
    bidirectional: bool,
    proj: int,
    bias: bool,
    batch_first: bool,
    form: str,
    state: bool,
    settings_: dict[str, Any],
    lengths: list[int],
    seed: int,
) -> None:
    torch.manual_seed(seed)
    lstm = nn.LSTM(4, 5, layers, bias=bias, batch_first=batch_first, bidirectional=bidirectional, proj_size=proj)
    low, plain = with_random_factors(lstm.double(), **settings_, seed=seed)
    if form == "single":
        lengths = lengths[:1]
    batch, steps = len(lengths), max(lengths)
    shape = (steps, 4) if form == "single" else (batch, steps, 4) if batch_first else (steps, batch, 4)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    many = layers * (2 if bidirectional else 1)
    middle = () if form == "single" else (batch,)
    h0 = torch.randn(many, *middle, proj or 5, dtype=torch.float64, requires_grad=True)
    c0 = torch.randn(many, *middle, 5, dtype=torch.float64, requires_grad=True)
    hx = (h0, c0) if state else None

    def run(model: nn.LSTM) -> list[Tensor]:
        if form.startswith("packed"):
            given_lengths = sorted(lengths, reverse=True) if form.endswith("sorted") else lengths
            packed = pack_padded_sequence(x, given_lengths, batch_first, enforce_sorted=form.endswith("sorted"))
            return flat(model(packed, hx))
        return flat(model(x, hx))

    expected, actual = run(plain), run(low)
    for first, second in zip(actual, expected, strict=True):
        torch.testing.assert_close(first, second)
    weights = [torch.randn_like(part) for part in expected]
    inputs = [x, *(hx or ())]

    def gradients(model: nn.LSTM, outputs: list[Tensor], keep: bool) -> tuple[list[Tensor], dict[str, Tensor]]:
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        total = sum((out * weight).sum() for out, weight in zip(outputs, weights, strict=True))
        found = torch.autograd.grad(total, [*inputs, *named.values()], retain_graph=keep)
        return list(found[: len(inputs)]), dict(zip(named, found[len(inputs) :], strict=True))

    plain_inputs, dense = gradients(plain, expected, keep=False)
    for keep in (True, False):  # a retained graph must find its saved tensors unharmed
        low_inputs, low_gradients = gradients(low, actual, keep)
        for first, second in zip(low_inputs, plain_inputs, strict=True):
            torch.testing.assert_close(first, second)
        for name, gradient in low_gradients.items():
            if name.startswith("low_rank."):
                _, weight, factor = name.split(".")
                matrix = low.low_rank[weight]
                if factor == "left":
                    expected_gradient = dense[weight] @ matrix.right.t()
                else:
                    expected_gradient = matrix.left.t() @ dense[weight]
                torch.testing.assert_close(gradient, expected_gradient)
            else:
                torch.testing.assert_close(gradient, dense[name])


def test_gradcheck_of_a_whole_layer() -> None:
    torch.manual_seed(0)
    low, _ = with_random_factors(nn.LSTM(3, 4, proj_size=2, bidirectional=True).double(), rank=2)
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    factors = [matrix.left for matrix in low.low_rank.values()] + [matrix.right for matrix in low.low_rank.values()]
    assert torch.autograd.gradcheck(lambda x, *_: flat(low(x)), (x, *factors, low.bias_ih_l0))


def test_blocked_products_agree_with_the_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(lstm_recurrence, "_BLOCK_FROM", 1)
    monkeypatch.setattr(lstm_recurrence, "_PIECE_BYTES", 512)
    for shape, pieces in (((47, 21), 1), ((21, 47), 7), ((3, 470), 3), ((2, 16), 1)):
        base = torch.randn(shape) if shape == (47, 21) else torch.randn(shape[::-1]).t()
        left, right = torch.randn(base.shape[0], 3), torch.randn(3, base.shape[1])
        product = RowProduct(base, left, right, 6)
        assert len(product.blocked) == pieces
        for rows in (1, 5, 6, 9):
            x, other = torch.randn(rows, base.shape[1]), torch.randn(rows, base.shape[0])
            expected = x @ (base + left @ right).t()
            torch.testing.assert_close(product(x), expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(product.plus(other, x), other + expected, rtol=1e-4, atol=1e-4)
    low, plain = with_random_factors(nn.LSTM(12, 16, 2, proj_size=6), rank=3)
    x = torch.randn(37, 5, 12, requires_grad=True)
    for first, second in zip(flat(low(x)), flat(plain(x)), strict=True):
        torch.testing.assert_close(first, second)
    gradients = [torch.autograd.grad(flat(layer(x))[0].square().sum(), x)[0] for layer in (low, plain)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_dropout_between_layers_is_drawn_as_nn_lstm_says() -> None:
    """Zeros in the share asked for between layers, none after the last, and none in eval mode."""
    torch.manual_seed(0)
    low, plain = with_random_factors(nn.LSTM(8, 8, 2, dropout=0.5), rank=2)
    x = torch.randn(20, 4, 8)
    assert not torch.equal(low(x)[0], low(x)[0])
    assert low(x)[0].all()
    low.eval()
    plain.eval()
    torch.testing.assert_close(low(x)[0], plain(x)[0])


@pytest.mark.parametrize("sides", ["both", "left"])
@pytest.mark.parametrize("rematerialize", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_it_keeps_no_more_for_backward_than_nn_lstm(sides: str, rematerialize: bool, bidirectional: bool) -> None:
    torch.manual_seed(0)
    plain = nn.LSTM(16, 32, 3, bidirectional=bidirectional)
    technique = memfit.LowRankGradient(rank=4, sides=sides, rematerialize=rematerialize)  # type: ignore[arg-type]
    low = memfit.convert_(copy.deepcopy(plain), technique)
    x = torch.randn(40, 8, 16)

    def kept(model: nn.Module) -> int:
        own = {p.data_ptr() for p in (*model.parameters(), *model.buffers())}
        storages: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            if tensor.layout == torch.strided and tensor.data_ptr() not in own:
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(x)
        return sum(storages.values())

    assert kept(low) <= kept(plain)
    if rematerialize:
        saving = memfit.convert_(copy.deepcopy(plain), memfit.LowRankGradient(rank=4, sides=sides))  # type: ignore[arg-type]
        assert kept(low) < 0.7 * kept(saving)


@pytest.mark.parametrize("settings_", [{"sides": "both"}, {"sides": "left"}, {"refresh": 20}, {"rematerialize": True}])
def test_it_learns_to_remember(settings_: dict[str, Any]) -> None:
    """The sign of a sequence's first value, asked for three steps later."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"lstm": nn.LSTM(3, 16), "out": nn.Linear(16, 1)})
    memfit.convert_(model, memfit.LowRankGradient(3, **settings_), where="lstm")
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    for _ in range(200):
        x = torch.randn(4, 64, 3)
        logits = model["out"](model["lstm"](x)[1][0][0])
        loss = nn.functional.binary_cross_entropy_with_logits(logits[:, 0], (x[0, :, 0] > 0).float())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert loss.item() < 0.55  # chance is 0.69


def test_autocast_computes_in_the_weights_dtype() -> None:
    low, plain = with_random_factors(nn.LSTM(4, 5), rank=2)
    x = torch.randn(6, 2, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = low(x.bfloat16())[0]
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, plain(x.bfloat16().float())[0])


@pytest.mark.parametrize("rematerialize", [False, True])
def test_backward_inside_autocast_computes_in_the_weights_dtype(rematerialize: bool) -> None:
    low, _ = with_random_factors(nn.LSTM(4, 5), rank=2, rematerialize=rematerialize)
    x = torch.randn(6, 2, 4)
    low(x)[0].square().sum().backward()
    matrix = low.low_rank["weight_hh_l0"]
    expected = matrix.left.grad.clone()
    low.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low(x)[0].square().sum().backward()
    torch.testing.assert_close(matrix.left.grad, expected)


@pytest.mark.parametrize(
    ("shape", "state", "words"),
    [
        ((6, 2, 5), None, "input_size. Expected 4, got 5"),
        ((6,), None, "2D or 3D"),
        ((0, 2, 4), None, "larger than 0"),
        ((6, 2, 4), ((1, 3, 5), (1, 2, 5)), "Expected hidden"),
    ],
)
def test_wrong_shapes_are_refused_as_nn_lstm_does(shape: Any, state: Any, words: str) -> None:
    low, _ = with_random_factors(nn.LSTM(4, 5), rank=2)
    hx = None if state is None else tuple(torch.zeros(part) for part in state)
    with pytest.raises((RuntimeError, ValueError), match=words.replace("(", r"\(")):
        low(torch.zeros(shape), hx)
