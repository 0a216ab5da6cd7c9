"""The low-rank GRU against nn.GRU with the same effective weights, in every configuration, and what it keeps."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import memfit
from memfit.gradients import lstm_recurrence


def with_random_factors(gru: nn.GRU, **settings: Any) -> tuple[nn.GRU, nn.GRU]:
    """A converted copy whose factors are not zero, and the plain GRU of the same effective weights."""
    low = memfit.convert_(copy.deepcopy(gru), memfit.LowRankGradient(**settings))
    with torch.no_grad():
        for matrix in low.low_rank.values():
            matrix.left.normal_(std=0.3)  # small enough for gradients over many steps not to explode
    gru.load_state_dict(memfit.state_dict(low))
    return low, gru


def flat(result: Any) -> list[Tensor]:
    output, h = result
    return [output.data if isinstance(output, PackedSequence) else output, h]


@settings(deadline=None, max_examples=60)
@given(
    layers=st.integers(1, 3),
    bidirectional=st.booleans(),
    bias=st.booleans(),
    batch_first=st.booleans(),
    form=st.sampled_from(["padded", "single", "packed", "packed and sorted"]),
    state=st.booleans(),
    settings_=st.fixed_dictionaries(
        {"sides": st.sampled_from(["both", "left"]), "rematerialize": st.booleans(), "rank": st.integers(1, 3)}
    ),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_outputs_and_all_gradients_are_those_of_nn_gru(
    layers: int,
    bidirectional: bool,
    bias: bool,
    batch_first: bool,
    form: str,
    state: bool,
    settings_: dict[str, Any],
    lengths: list[int],
    seed: int,
) -> None:
    torch.manual_seed(seed)
    gru = nn.GRU(4, 5, layers, bias=bias, batch_first=batch_first, bidirectional=bidirectional)
    low, plain = with_random_factors(gru.double(), **settings_, seed=seed)
    if form == "single":
        lengths = lengths[:1]
    batch, steps = len(lengths), max(lengths)
    shape = (steps, 4) if form == "single" else (batch, steps, 4) if batch_first else (steps, batch, 4)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    many = layers * (2 if bidirectional else 1)
    h0 = torch.randn(many, *(() if form == "single" else (batch,)), 5, dtype=torch.float64, requires_grad=True)
    hx = h0 if state else None

    def run(model: nn.GRU) -> list[Tensor]:
        if form.startswith("packed"):
            given_lengths = sorted(lengths, reverse=True) if form.endswith("sorted") else lengths
            packed = pack_padded_sequence(x, given_lengths, batch_first, enforce_sorted=form.endswith("sorted"))
            return flat(model(packed, hx))
        return flat(model(x, hx))

    expected, actual = run(plain), run(low)
    for first, second in zip(actual, expected, strict=True):
        torch.testing.assert_close(first, second)
    weights = [torch.randn_like(part) for part in expected]
    inputs = [x, h0] if state else [x]

    def gradients(model: nn.GRU, outputs: list[Tensor], keep: bool) -> tuple[list[Tensor], dict[str, Tensor]]:
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


@pytest.mark.parametrize("rematerialize", [False, True])
def test_gradcheck_of_a_whole_layer(rematerialize: bool) -> None:
    torch.manual_seed(0)
    low, _ = with_random_factors(nn.GRU(3, 4, bidirectional=True).double(), rank=2, rematerialize=rematerialize)
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    factors = [matrix.left for matrix in low.low_rank.values()] + [matrix.right for matrix in low.low_rank.values()]
    assert torch.autograd.gradcheck(lambda x, *_: flat(low(x)), (x, *factors, low.bias_ih_l0, low.bias_hh_l0))


@pytest.mark.parametrize("rematerialize", [False, True])
def test_blocked_products_agree_with_the_plain_ones(monkeypatch: pytest.MonkeyPatch, rematerialize: bool) -> None:
    """float32 matrices of this size are large in the LSTM's and GRU's eyes: all of it in oneDNN's blocked layout."""
    torch.manual_seed(0)
    monkeypatch.setattr(lstm_recurrence, "_BLOCK_FROM", 1)
    low, plain = with_random_factors(nn.GRU(12, 16, 2), rank=3, rematerialize=rematerialize)
    x = torch.randn(9, 5, 12, requires_grad=True)
    for first, second in zip(flat(low(x)), flat(plain(x)), strict=True):
        torch.testing.assert_close(first, second)
    gradients = [torch.autograd.grad(model(x)[0].square().sum(), [x, model.bias_hh_l0]) for model in (low, plain)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_dropout_between_layers_is_drawn_as_nn_gru_says() -> None:
    """Zeros in the share asked for between layers, none after the last, and none in eval mode."""
    torch.manual_seed(0)
    low, plain = with_random_factors(nn.GRU(8, 8, 2, dropout=0.5), rank=2)
    x = torch.randn(20, 4, 8)
    assert not torch.equal(low(x)[0], low(x)[0])
    assert low(x)[0].all()
    low.eval()
    plain.eval()
    torch.testing.assert_close(low(x)[0], plain(x)[0])


class Products(TorchDispatchMode):
    """Notes the result's shape and the summed length of every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[tuple[int, ...], int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "bmm", "baddbmm"):
            first = args[1] if func.overloadpacket.__name__.startswith(("add", "badd")) else args[0]
            self.seen.append((tuple(out.shape), first.shape[-1]))
        return out


@pytest.mark.parametrize("sides", ["both", "left"])
@pytest.mark.parametrize("rematerialize", [False, True])
def test_the_dense_gradient_is_never_formed(sides: str, rematerialize: bool) -> None:
    """No product over the rows of the batch has a weight's shape."""
    torch.manual_seed(0)
    gru = nn.GRU(12, 10, 2, bidirectional=True)
    shapes = {tuple(p.shape) for p in gru.parameters() if p.dim() == 2}
    shapes |= {shape[::-1] for shape in shapes}
    memfit.convert_(gru, memfit.LowRankGradient(rank=3, sides=sides, rematerialize=rematerialize))  # type: ignore[arg-type]
    with Products() as products:
        gru(torch.randn(7, 5, 12, requires_grad=True))[0].square().sum().backward()
    assert len(products.seen) > 20
    assert [seen for seen in products.seen if seen[0] in shapes and seen[1] != 3] == []


def kept(model: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps for backward, the layer's parameters excepted."""
    own = {p.data_ptr() for p in (*model.parameters(), *model.buffers())}
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.layout == torch.strided and tensor.data_ptr() not in own:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(x)
    return sum(storages.values())


def test_it_keeps_three_gates_and_what_the_side_needs_of_the_input() -> None:
    """Rows x 3 H for the gates, and the input or its projection; rematerialized, the input and the outputs."""
    gru, rows, hidden, rank = nn.GRU(16, 32), 40 * 8, 32, 4
    x = torch.randn(40, 8, 16)
    small = 4 * (3 * 8 * hidden + 2 * 3 * hidden)  # the states before each of 3 blocks of steps, and biases
    expected = {
        ("both", False): 3 * hidden + 16 + rank,
        ("left", False): 3 * hidden + rank,
        ("both", True): hidden + 16 + rank,
        ("left", True): hidden + 16 + rank,
    }
    for (sides, rematerialize), numbers in expected.items():
        technique = memfit.LowRankGradient(rank, sides, rematerialize=rematerialize)  # type: ignore[arg-type]
        low = memfit.convert_(copy.deepcopy(gru), technique)
        assert abs(kept(low, x) - 4 * rows * numbers) <= small, (sides, rematerialize)
        assert kept(low, x) < kept(gru, x)


@pytest.mark.parametrize("settings_", [{"sides": "both"}, {"sides": "left"}, {"refresh": 20}, {"rematerialize": True}])
def test_it_learns_to_remember(settings_: dict[str, Any]) -> None:
    """The sign of a sequence's first value, asked for three steps later."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"gru": nn.GRU(3, 16), "out": nn.Linear(16, 1)})
    memfit.convert_(model, memfit.LowRankGradient(3, **settings_), where="gru")
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    for _ in range(200):
        x = torch.randn(4, 64, 3)
        logits = model["out"](model["gru"](x)[1][0])
        loss = nn.functional.binary_cross_entropy_with_logits(logits[:, 0], (x[0, :, 0] > 0).float())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert loss.item() < 0.55  # chance is 0.69


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rematerialize", [False, True])
def test_forward_and_backward_inside_autocast_compute_in_the_weights_dtype(
    dtype: torch.dtype, rematerialize: bool
) -> None:
    low, plain = with_random_factors(nn.GRU(4, 5), rank=2, rematerialize=rematerialize)
    x = torch.randn(6, 2, 4).to(dtype).float()
    low(x)[0].square().sum().backward()
    matrix = low.low_rank["weight_hh_l0"]
    expected = matrix.left.grad.clone()
    low.zero_grad()
    with torch.autocast("cpu", dtype=dtype):
        output = low(x.to(dtype))[0]
        output.square().sum().backward()
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, plain(x)[0])
    torch.testing.assert_close(matrix.left.grad, expected)


def test_factors_of_a_bfloat16_weight_are_float32_and_get_gradients() -> None:
    torch.manual_seed(0)
    low, plain = with_random_factors(nn.GRU(6, 8, 2).bfloat16(), rank=2)
    x = torch.randn(7, 3, 6, dtype=torch.bfloat16)
    output, _ = low(x)
    torch.testing.assert_close(output, plain(x)[0], rtol=0.05, atol=0.05)
    output.float().square().sum().backward()
    for matrix in low.low_rank.values():
        assert matrix.left.dtype == matrix.left.grad.dtype == matrix.right.grad.dtype == torch.float32
    restored = memfit.restore_(low)
    assert type(restored) is nn.GRU
    assert restored.weight_hh_l1.dtype == torch.bfloat16


def test_state_copies_and_files_carry_the_training_and_restore_leaves_no_trace() -> None:
    torch.manual_seed(0)
    plain = nn.GRU(6, 8, 2, bidirectional=True)
    names = [name for name, _ in plain.named_parameters()]
    objects = [p for _, p in plain.named_parameters()]
    low = memfit.convert_(plain, memfit.LowRankGradient(rank=3, refresh=2))
    x = torch.randn(7, 3, 6)
    optimizer = torch.optim.Adam(low.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        low(x)[0].square().sum().backward()
        optimizer.step()
    assert low.matrix("weight_hh_l0").steps == 3
    expected = low(x)[0]

    fresh = memfit.convert_(nn.GRU(6, 8, 2, bidirectional=True), memfit.LowRankGradient(rank=3, refresh=2))
    fresh.load_state_dict(low.state_dict())
    file = io.BytesIO()
    torch.save(low, file)
    file.seek(0)
    saved = torch.load(file, weights_only=False)
    for other in (fresh, copy.deepcopy(low), saved):
        assert torch.equal(other(x)[0], expected)
        assert other.matrix("weight_hh_l0").steps == 3

    other = nn.GRU(6, 8, 2, bidirectional=True)
    other.load_state_dict(memfit.state_dict(low))
    torch.testing.assert_close(other(x)[0], expected)
    memfit.restore_(low)
    assert type(low) is nn.GRU
    assert [name for name, _ in low.named_parameters()] == names
    assert all(first is second for first, second in zip(low.parameters(), objects, strict=True))
    assert all(p.requires_grad and p.grad is None for name, p in low.named_parameters() if name.startswith("weight"))
    assert vars(low).keys() == vars(other).keys()
    torch.testing.assert_close(low(x)[0], expected)


@pytest.mark.parametrize(
    ("shape", "state", "words"),
    [
        ((6, 2, 5), None, "input_size. Expected 4, got 5"),
        ((6,), None, "2D or 3D"),
        ((0, 2, 4), None, "larger than 0"),
        ((6, 2, 4), (1, 3, 5), "Expected hidden size (1, 2, 5), got [1, 3, 5]"),
        ((6, 2, 4), (2, 5), "hidden"),
    ],
)
def test_wrong_shapes_are_refused_as_nn_gru_does(shape: Any, state: Any, words: str) -> None:
    low, plain = with_random_factors(nn.GRU(4, 5), rank=2)
    for model in (low, plain):
        with pytest.raises((RuntimeError, ValueError)) as refusal:
            model(torch.zeros(shape), None if state is None else torch.zeros(state))
        assert words in str(refusal.value) or model is plain
