"""Low-rank gradients of Embedding: against the dense table with rows W + U V, sparse and with padding."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import memfit


def converted(model: nn.Module, **settings: Any) -> nn.Module:
    return memfit.convert_(model, memfit.LowRankGradient(**settings))


@settings(deadline=None, max_examples=40)
@given(
    shape=st.lists(st.integers(0, 4), max_size=3),
    rows=st.integers(1, 9),
    columns=st.integers(1, 7),
    sides=st.sampled_from(["both", "left"]),
    sparse=st.booleans(),
    data=st.data(),
)
def test_a_lookup_is_the_dense_one_with_the_effective_weight(
    shape: list[int], rows: int, columns: int, sides: str, sparse: bool, data: Any
) -> None:
    """Also with U not zero in the padding's row, as it gets when the table is tied to another layer."""
    torch.manual_seed(0)
    padding = data.draw(st.none() | st.integers(-rows, rows - 1))
    dense = nn.Embedding(rows, columns, padding_idx=padding).double()
    layer = copy.deepcopy(dense)
    layer.sparse = sparse
    converted(layer, rank=data.draw(st.integers(1, min(rows, columns))), sides=sides)
    tokens = torch.randint(0, rows, shape)
    assert torch.equal(layer(tokens), dense(tokens))
    matrix = layer.matrix("weight")
    matrix.left.data.normal_()
    dense.weight.data.copy_(layer.weight)
    y, expected = layer(tokens), dense(tokens)
    torch.testing.assert_close(y, expected)
    d = torch.randn_like(expected)
    expected.backward(d)
    y.backward(d)
    gradient = dense.weight.grad
    assert matrix.left.grad.is_sparse == sparse
    torch.testing.assert_close(matrix.left.grad.to_dense(), gradient @ matrix.right.detach().t())
    if sides == "both":
        torch.testing.assert_close(matrix.right.grad, matrix.left.detach().t() @ gradient)


def test_the_factors_pass_gradcheck() -> None:
    layer = converted(nn.Embedding(5, 4, padding_idx=1).double(), rank=2)
    matrix = layer.matrix("weight")
    tokens = torch.tensor([[0, 3, 3], [4, 0, 2]])

    def function(left: Tensor, right: Tensor) -> Tensor:
        factors = {"low_rank.weight.left": left, "low_rank.weight.right": right}
        return torch.func.functional_call(layer, factors, (tokens,))

    left = torch.randn_like(matrix.left, requires_grad=True)
    assert torch.autograd.gradcheck(function, (left, matrix.right.detach().clone().requires_grad_()))


class Made(TorchDispatchMode):
    """Notes the size of every tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [tensor for tensor in tree_leaves(out) if isinstance(tensor, Tensor)]
        self.sizes += [(tensor._values() if tensor.is_sparse else tensor).numel() for tensor in tensors]
        return out


@pytest.mark.parametrize("sides", ["both", "left"])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("padding", [None, 3])
def test_nothing_of_the_tables_size_is_made(sides: str, sparse: bool, padding: int | None) -> None:
    layer = converted(nn.Embedding(1000, 32, padding_idx=padding, sparse=sparse), rank=4, sides=sides)
    with Made() as made:
        layer(torch.randint(0, 1000, (5, 6))).square().sum().backward()
    assert len(made.sizes) > 5
    assert max(made.sizes) <= (5 * 6 * 32 if sparse else 1000 * 4)


def test_the_left_side_keeps_tokens_alone() -> None:
    def kept(sides: str) -> set[tuple[int, ...]]:
        layer, shapes = converted(nn.Embedding(50, 16), rank=3, sides=sides), set()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.add(tuple(t.shape)) or t, lambda t: t):
            layer(torch.randint(0, 50, (7, 5)))
        return shapes

    assert kept("both") == {(35,), (35, 3), (3, 16)}
    assert kept("left") == {(35,), (3, 16)}


@pytest.mark.parametrize(
    ("argument", "words"), [({"max_norm": 1.0}, "has max_norm"), ({"scale_grad_by_freq": True}, "scale_grad_by_freq")]
)
def test_tables_that_a_factor_cannot_train_stay_dense_and_are_refused_by_name(
    argument: dict[str, Any], words: str
) -> None:
    model = nn.ModuleDict({"table": nn.Embedding(9, 8, **argument), "out": nn.Linear(8, 9)})
    converted(model, rank=2)
    assert type(model["table"]) is nn.Embedding
    memfit.restore_(model)
    with pytest.raises(memfit.ConversionError, match=f"layer 'table' {words}|layer 'table' has {words}"):
        memfit.convert_(model, memfit.LowRankGradient(rank=2), where=["table", "out"])


def test_a_rank_above_the_tables_is_refused() -> None:
    with pytest.raises(memfit.ConversionError, match="9 x 8, so the rank may be at most 8, not 9"):
        converted(nn.Embedding(9, 8), rank=9)


def bag(**settings: Any) -> tuple[nn.Module, Tensor, Tensor]:
    """A model that reads words and gives each a target vector of rank 2, and words with their targets."""
    torch.manual_seed(0)
    tokens = torch.randint(0, 30, (8, 6))
    targets = (torch.randn(30, 2) @ torch.randn(2, 12))[tokens]
    return nn.Sequential(nn.Embedding(30, 12, **settings)), tokens, targets


def fit(model: nn.Module, tokens: Tensor, targets: Tensor, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(tokens).float(), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_sparse_gradients_suit_sparse_optimizers() -> None:
    model, tokens, targets = bag(sparse=True)
    converted(model, rank=6, sides="left", refresh=10)
    losses = fit(model, tokens, targets, torch.optim.SparseAdam(list(model.parameters())[1:], lr=0.05), 60)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(("basis", "momentum"), [("random", 0.0), ("random", 0.9), ("power", 0.0), ("power", 0.9)])
def test_sparse_and_dense_gradients_train_alike(basis: str, momentum: float) -> None:
    """Under SGD a row that was not looked up stays either way."""
    weights = []
    for sparse in (False, True):
        model, tokens, targets = bag(sparse=sparse)
        converted(model, rank=6, basis=basis, refresh=2)
        fit(model, tokens, targets, torch.optim.SGD(model.parameters(), lr=0.3, momentum=momentum), 5)
        weights.append(memfit.restore_(model)[0].weight)
    torch.testing.assert_close(weights[0], weights[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("basis", "refresh"), [("random", None), ("random", 9), ("power", 9)])
def test_a_table_learns_saves_and_comes_back(dtype: torch.dtype, basis: str, refresh: int | None) -> None:
    model, tokens, targets = bag(padding_idx=0)
    original = copy.deepcopy(model.to(dtype))
    weight = model[0].weight
    converted(model, rank=6, basis=basis, refresh=refresh)
    assert model[0].matrix("weight").left.dtype == torch.float32
    losses = fit(model, tokens, targets, torch.optim.Adam(model.parameters(), lr=0.1), 60)
    assert losses[-1] < 0.5 * losses[0]
    trained = model(tokens)
    assert trained.dtype == dtype
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for copied in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(copied(tokens), trained)
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.02}
    assert not model[0].weight[0].any()  # the padding's row
    plain = copy.deepcopy(original)
    plain.load_state_dict(memfit.state_dict(model))
    torch.testing.assert_close(plain(tokens), trained, **close)
    memfit.restore_(model)
    torch.testing.assert_close(model(tokens), trained, **close)
    assert model[0].weight is weight
    assert repr(model) == repr(original)
    assert set(vars(model[0])) == set(vars(original[0]))


def test_the_full_state_dict_resumes_training_exactly() -> None:
    model, tokens, targets = bag()
    other = copy.deepcopy(model)
    for net in (model, other):
        converted(net, rank=4, refresh=3)
    optimizer, resumed = (torch.optim.Adam(net.parameters(), lr=0.1) for net in (model, other))
    fit(model, tokens, targets, optimizer, 4)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert fit(model, tokens, targets, optimizer, 4) == fit(other, tokens, targets, resumed, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_a_lookup_as_it_is(dtype: torch.dtype) -> None:
    model, tokens, targets = bag(padding_idx=0)
    converted(model, rank=6)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            out = model(tokens)
        assert out.dtype == torch.float32  # as of nn.Embedding
        loss = nn.functional.mse_loss(out, targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
