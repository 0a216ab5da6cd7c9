"""The low-rank attention against nn.MultiheadAttention with the same effective weights, and whole transformers."""

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

import memfit

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{words}")  # of torch's own, about what these tests do on purpose
    for words in ("Support for mismatched", "enable_nested_tensor is True", "The PyTorch API of nested tensors")
]
KINDS = ("none", "bool", "float")


def with_random_factors(plain: nn.Module, **settings: Any) -> tuple[nn.Module, nn.Module]:
    """A converted copy whose factors are not zero, and the plain module of the same effective weights."""
    low = memfit.convert_(copy.deepcopy(plain), memfit.LowRankGradient(**settings))
    with torch.no_grad():
        for name, parameter in low.named_parameters():
            if name.endswith(".left"):
                parameter.normal_(std=0.3)
    plain.load_state_dict(memfit.state_dict(low))
    return low, plain


def attention(width: int, heads: int, **settings: Any) -> nn.MultiheadAttention:
    """With biases that are not zero, as they are in a new layer."""
    plain = nn.MultiheadAttention(width, heads, **settings)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.normal_()
    return plain


def mask_of(kind: str, shape: tuple[int, ...]) -> Tensor | None:
    """A random mask that leaves every query its first key."""
    if kind == "none":
        return None
    hidden = torch.rand(shape) < 0.4
    hidden[..., 0] = False
    if kind == "bool":
        return hidden
    return torch.randn(shape, dtype=torch.float64).masked_fill(hidden, float("-inf"))


def check_gradients(low: nn.Module, plain: nn.Module, inputs: list[Tensor], run: Any) -> None:
    """Outputs and all gradients of ``run(model)``: those of factors are products of the dense ones."""
    expected, actual = run(plain), run(low)
    for first, second in zip(actual, expected, strict=True):
        torch.testing.assert_close(first, second)
    weights = [torch.randn_like(part) for part in expected]

    def gradients(model: nn.Module, outputs: list[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        total = sum((out * weight).sum() for out, weight in zip(outputs, weights, strict=True))
        found = torch.autograd.grad(total, [*inputs, *named.values()])
        return list(found[: len(inputs)]), dict(zip(named, found[len(inputs) :], strict=True))

    (dense_inputs, dense), (low_inputs, found) = gradients(plain, expected), gradients(low, actual)
    torch.testing.assert_close(low_inputs, dense_inputs)
    for name, gradient in found.items():
        *path, owner, weight, factor = ("", "", *name.split("."))
        if owner != "low_rank":
            torch.testing.assert_close(gradient, dense[name])
            continue
        matrix = low.get_submodule(name.rpartition(".")[0])
        full = dense[".".join([*filter(None, path), weight])]
        product = full @ matrix.right.t() if factor == "left" else matrix.left.t() @ full
        torch.testing.assert_close(gradient, product)


@settings(deadline=None, max_examples=60)
@given(
    heads=st.integers(1, 3),
    form=st.sampled_from(["self", "self", "cross", "query is key", "three inputs", "other widths"]),
    flags=st.fixed_dictionaries(
        {name: st.booleans() for name in ("bias", "add_bias_kv", "add_zero_attn", "batch_first")}
    ),
    batched=st.booleans(),
    padding=st.sampled_from(KINDS),
    mask=st.sampled_from(KINDS),
    mask_dims=st.sampled_from([2, 3]),
    need_weights=st.booleans(),
    average=st.booleans(),
    sides=st.sampled_from(["both", "left"]),
    lengths=st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3)),
    seed=st.integers(0, 99),
)
def test_outputs_weights_and_gradients_are_those_of_nn_multiheadattention(
    heads: int,
    form: str,
    flags: dict[str, bool],
    batched: bool,
    padding: str,
    mask: str,
    mask_dims: int,
    need_weights: bool,
    average: bool,
    sides: str,
    lengths: tuple[int, int, int],
    seed: int,
) -> None:
    torch.manual_seed(seed)
    width = 4 * heads
    other = {"kdim": 3, "vdim": 5} if form == "other widths" else {}
    low, plain = with_random_factors(attention(width, heads, **flags, **other).double(), rank=2, sides=sides)
    targets, keys, batch = lengths
    if form in ("self", "query is key"):
        keys = targets

    def make(length: int, size: int) -> Tensor:
        shape = (batch, length, size) if flags["batch_first"] else (length, batch, size)
        return torch.randn(shape if batched else (length, size), dtype=torch.float64, requires_grad=True)

    query = make(targets, width)
    key = query if form in ("self", "query is key") else make(keys, other.get("kdim", width))
    value = query if form == "self" else key if form == "cross" else make(keys, other.get("vdim", width))
    arguments: dict[str, Any] = {
        "key_padding_mask": mask_of(padding, (batch, keys) if batched else (keys,)),
        "attn_mask": mask_of(mask, ((batch if batched else 1) * heads,) * (mask_dims - 2) + (targets, keys)),
        "need_weights": need_weights,
        "average_attn_weights": average,
    }

    def run(model: nn.Module) -> list[Tensor]:
        output, weights = model(query, key, value, **arguments)
        assert (weights is not None) == need_weights
        return [output] if weights is None else [output, weights]

    inputs = list({id(x): x for x in (query, key, value)}.values())
    check_gradients(low, plain, inputs, run)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("extra", [{}, {"add_bias_kv": True}])
def test_a_causal_hint_stands_for_its_mask(need_weights: bool, padded: bool, extra: dict[str, bool]) -> None:
    torch.manual_seed(0)
    low, plain = with_random_factors(attention(8, 2, **extra).double(), rank=2)
    x = torch.randn(5, 3, 8, dtype=torch.float64, requires_grad=True)
    mask = nn.Transformer.generate_square_subsequent_mask(5).double()
    padding = torch.arange(5) >= torch.tensor([[5], [3], [4]]) if padded else None

    def run(model: nn.Module) -> list[Tensor]:
        found = model(x, x, x, padding, need_weights, mask, is_causal=True)
        return [part for part in found if part is not None]

    check_gradients(low, plain, [x], run)
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        low(x, x, x, is_causal=True)


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_draws_as_in_the_plain_layer(need_weights: bool) -> None:
    torch.manual_seed(0)
    low, plain = with_random_factors(attention(8, 2, dropout=0.4), rank=2)
    x = torch.randn(5, 3, 8)
    torch.manual_seed(1)
    expected = plain(x, x, x, need_weights=need_weights)[0]
    torch.manual_seed(1)
    torch.testing.assert_close(low(x, x, x, need_weights=need_weights)[0], expected)
    assert not torch.allclose(low(x, x, x, need_weights=need_weights)[0], expected)
    low.eval()
    assert torch.equal(low(x, x, x)[0], low(x, x, x)[0])


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("widths", [{}, {"kdim": 3, "vdim": 5}])
def test_gradcheck_of_a_whole_layer(need_weights: bool, widths: dict[str, int]) -> None:
    torch.manual_seed(0)
    low, _ = with_random_factors(attention(4, 2, **widths).double(), rank=2)
    query = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(2, 2, widths.get(k, 4), dtype=torch.float64) for k in ("kdim", "vdim"))
    parameters = [p for p in low.parameters() if p.requires_grad]
    assert torch.autograd.gradcheck(
        lambda query, *_: low(query, key, value, need_weights=need_weights)[0], (query, *parameters)
    )


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
@pytest.mark.parametrize("widths", [{}, {"kdim": 10, "vdim": 14}])
def test_the_dense_gradient_is_never_formed(sides: str, widths: dict[str, int]) -> None:
    """No product over the rows of the batch has a weight's shape, nor that of a third of one."""
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(12, 2, **widths)
    shapes = {tuple(p.shape) for p in plain.parameters() if p.dim() == 2} | {(12, 12), (24, 12)}
    shapes |= {shape[::-1] for shape in shapes}
    low = memfit.convert_(plain, memfit.LowRankGradient(rank=3, sides=sides))  # type: ignore[arg-type]
    with Products() as products:
        query, key, value = (torch.randn(7, 5, widths.get(k, 12), requires_grad=True) for k in ("q", "kdim", "vdim"))
        low(query, key, value)[0].square().sum().backward()
        if not widths:
            low(query, query, query)[0].square().sum().backward()
    assert len(products.seen) > 20
    assert [seen for seen in products.seen if seen[0] in shapes and seen[1] != 3] == []


def kept(model: nn.Module, x: Tensor) -> int:
    """Numbers that autograd keeps for backward, the layer's parameters excepted."""
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.itemsize
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(x, x, x, need_weights=False)
    return sum(storages.values())


def test_the_left_side_keeps_projections_in_place_of_the_input() -> None:
    """Queries, keys, values, the attention's output and its scale stay: 4 E + heads numbers a row."""
    plain, rows, rank = nn.MultiheadAttention(16, 2, batch_first=True), 4 * 50, 3
    x = torch.randn(4, 50, 16)

    def converted(sides: str) -> nn.Module:
        return memfit.convert_(copy.deepcopy(plain), memfit.LowRankGradient(rank, sides))  # type: ignore[arg-type]

    assert kept(converted("left"), x) == rows * (4 * 16 + 2 + 2 * rank)
    assert kept(converted("both"), x) == rows * (5 * 16 + 2 + 2 * rank)
    assert kept(plain, x) >= rows * (5 * 16 + 2)


def encoder(layers: int = 2, **settings: Any) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, **settings)
    return nn.TransformerEncoder(layer, layers)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_an_encoder_gives_the_right_numbers_in_train_and_eval_mode(
    norm_first: bool, training: bool, grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In eval mode without gradients nn.TransformerEncoderLayer hands the weights to one fused operator."""
    torch.manual_seed(0)
    low, plain = with_random_factors(encoder(norm_first=norm_first), rank=2)
    assert len([name for name, m in low.named_modules() if hasattr(m, "technique")]) == 2 * 4
    low.train(training)
    plain.train(training)
    calls = []
    fused = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *args: (calls.append(1), fused(*args))[1])
    x = torch.randn(3, 5, 8)
    padding = torch.arange(5) >= torch.tensor([[5], [3], [4]])
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(low(x), plain(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            low(x, src_key_padding_mask=padding)[~padding],
            plain(x, src_key_padding_mask=padding)[~padding],
            rtol=1e-4,
            atol=1e-5,
        )
    assert bool(calls) == (not training and not grad)


def test_attention_takes_nested_tensors_where_the_plain_layer_does() -> None:
    torch.manual_seed(0)
    low, plain = with_random_factors(attention(8, 2, batch_first=True).eval(), rank=2)
    x = torch.nested.nested_tensor([torch.randn(5, 8), torch.randn(3, 8)])
    with torch.no_grad():
        torch.testing.assert_close(
            low(x, x, x, need_weights=False)[0].to_padded_tensor(0.0),
            plain(x, x, x, need_weights=False)[0].to_padded_tensor(0.0),
        )


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_a_whole_transformer_is_converted_and_trains_as_the_dense_one(batch_first: bool, training: bool) -> None:
    torch.manual_seed(0)
    dense = nn.Transformer(8, 2, 1, 1, 12, dropout=0.0, batch_first=batch_first).double()
    low, plain = with_random_factors(dense, rank=2)
    low.train(training)
    plain.train(training)
    names = {name for name, module in low.named_modules() if hasattr(module, "technique")}
    sublayers = {"self_attn", "self_attn.out_proj", "linear1", "linear2"}
    expected = {f"encoder.layers.0.{name}" for name in sublayers} | {f"decoder.layers.0.{name}" for name in sublayers}
    assert names == expected | {"decoder.layers.0.multihead_attn", "decoder.layers.0.multihead_attn.out_proj"}
    source, target = (torch.randn(4, 3, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = nn.Transformer.generate_square_subsequent_mask(3 if batch_first else 4).double()

    def run(model: nn.Module) -> list[Tensor]:
        return [model(source, target, tgt_mask=mask, tgt_is_causal=True)]

    check_gradients(low, plain, [source, target], run)
    with torch.no_grad():
        torch.testing.assert_close(run(low), run(plain))


@pytest.mark.parametrize(
    "settings_", [{}, {"sides": "left"}, {"refresh": 15}, {"basis": "power", "refresh": 15}], ids=str
)
def test_an_encoder_learns_from_another(settings_: dict[str, Any]) -> None:
    torch.manual_seed(0)
    x, teacher, student = torch.randn(16, 6, 8), encoder(1), encoder(1)
    goal = teacher(x).detach()
    memfit.convert_(student, memfit.LowRankGradient(4, **settings_))
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = nn.functional.mse_loss(student(x), goal)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("need_weights", [False, True])
def test_autocast_computes_as_in_the_plain_layer(dtype: torch.dtype, need_weights: bool) -> None:
    torch.manual_seed(0)
    low, plain = with_random_factors(nn.MultiheadAttention(16, 2), rank=2)
    x = torch.randn(6, 3, 16)
    mask = nn.Transformer.generate_square_subsequent_mask(6)
    with torch.autocast("cpu", dtype=dtype):
        output, weights = low(x, x, x, need_weights=need_weights, attn_mask=mask)
        expected, plain_weights = plain(x, x, x, need_weights=need_weights, attn_mask=mask)
        assert output.dtype == expected.dtype == dtype
        torch.testing.assert_close(output, expected, rtol=0.05, atol=0.05)
        if need_weights:
            assert weights.dtype == plain_weights.dtype
        output.float().square().sum().backward()
    left = low.matrix("in_proj_weight").left
    assert left.dtype == left.grad.dtype == torch.float32


def test_factors_of_a_bfloat16_weight_are_float32_and_get_gradients() -> None:
    torch.manual_seed(0)
    low, plain = with_random_factors(nn.MultiheadAttention(16, 2).bfloat16(), rank=2)
    x = torch.randn(6, 3, 16, dtype=torch.bfloat16)
    output, _ = low(x, x, x)
    torch.testing.assert_close(output, plain(x, x, x)[0], rtol=0.05, atol=0.05)
    output.float().square().sum().backward()
    for matrix in (low.matrix("in_proj_weight"), low.out_proj.matrix("weight")):
        assert matrix.left.grad.dtype == matrix.right.grad.dtype == torch.float32
    assert memfit.restore_(low).in_proj_weight.dtype == torch.bfloat16


@pytest.mark.parametrize("settings_", [{}, {"kdim": 3, "vdim": 5, "add_bias_kv": True}], ids=str)
def test_state_copies_and_files_carry_the_training_and_restore_leaves_no_trace(settings_: dict[str, Any]) -> None:
    torch.manual_seed(0)

    def make() -> nn.MultiheadAttention:
        return nn.MultiheadAttention(8, 2, **settings_)

    technique = memfit.LowRankGradient(rank=2, refresh=2)
    low = make()
    keys, objects = list(low.state_dict()), dict(low.named_parameters())
    memfit.convert_(low, technique)
    inputs = [torch.randn(5, 3, settings_.get(name, 8)) for name in ("q", "kdim", "vdim")]
    optimizer = torch.optim.Adam(low.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        low(*inputs)[0].square().sum().backward()
        optimizer.step()
    assert low.out_proj.matrix("weight").steps == 3
    expected = low(*inputs)[0]

    fresh = memfit.convert_(make(), technique)
    fresh.load_state_dict(low.state_dict())
    file = io.BytesIO()
    torch.save(low, file)
    file.seek(0)
    for other in (fresh, copy.deepcopy(low), torch.load(file, weights_only=False)):
        assert torch.equal(other(*inputs)[0], expected)
        assert other.out_proj.matrix("weight").steps == 3

    assert list(memfit.state_dict(low)) == keys
    plain = make()
    plain.load_state_dict(memfit.state_dict(low))
    torch.testing.assert_close(plain(*inputs)[0], expected)
    assert memfit.restore_(low) is low
    assert type(low) is nn.MultiheadAttention
    assert type(low.out_proj) is type(plain.out_proj)
    for name, parameter in low.named_parameters():
        assert parameter is objects[name]
        assert parameter.requires_grad
    assert list(low.state_dict()) == keys
    assert vars(low).keys() == vars(plain).keys()
    assert vars(low.out_proj).keys() == vars(plain.out_proj).keys()
    torch.testing.assert_close(low(*inputs)[0], expected)


def test_an_attention_and_its_out_proj_are_converted_together_or_not_at_all() -> None:
    technique = memfit.LowRankGradient(rank=2)
    model = memfit.convert_(encoder(1), technique, where="layers.0.self_attn")
    names = {name for name, module in model.named_modules() if hasattr(module, "technique")}
    assert names == {"layers.0.self_attn", "layers.0.self_attn.out_proj"}
    for where in ("layers.0.self_attn.out_proj", lambda _, module: isinstance(module, nn.Linear)):
        with pytest.raises(memfit.ConversionError, match=r"out_proj' is a part of layer 'layers\.0\.self_attn'"):
            memfit.convert_(encoder(1), technique, where=where)

    frozen = encoder(1)
    frozen.layers[0].self_attn.out_proj.weight.requires_grad_(False)
    memfit.convert_(frozen, technique)
    assert type(frozen.layers[0].self_attn) is nn.MultiheadAttention
    with pytest.raises(memfit.ConversionError, match="a part 'out_proj' that is frozen"):
        memfit.convert_(nn.ModuleDict({"a": frozen.layers[0].self_attn}), technique, where="a")
    other = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2)})
    other["a"].out_proj = nn.Linear(8, 8)
    with pytest.raises(memfit.ConversionError, match="'a' has an out_proj of another type, Linear"):
        memfit.convert_(other, technique, where="a")
    with pytest.raises(memfit.ConversionError, match=r"in_proj_weight of 24 x 8, .* at most 8, not 9"):
        memfit.convert_(nn.MultiheadAttention(8, 2), memfit.LowRankGradient(rank=9))


def test_a_tied_out_proj_decides_for_the_whole_attention() -> None:
    technique = memfit.LowRankGradient(rank=2)

    def tied() -> nn.ModuleDict:
        model = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2), "out": nn.Linear(8, 8)})
        model["out"].weight = model["a"].out_proj.weight
        return model

    with pytest.raises(memfit.ConversionError, match=r"'a\.out_proj' shares its weight with 'out\.weight'"):
        memfit.convert_(tied(), technique, where="a")
    with pytest.raises(memfit.ConversionError, match=r"'a\.out_proj' shares its weight with 'out\.weight'"):
        memfit.convert_(tied(), technique, where="a*")
    both = memfit.convert_(tied(), technique)
    assert both["a"].out_proj.matrix("weight") is both["out"].matrix("weight")
    restored = memfit.restore_(both)
    assert restored["a"].out_proj.weight is restored["out"].weight


@pytest.mark.parametrize(
    "arguments",
    [
        {"query": (5, 3, 7)},
        {"key": (4, 3, 8)},
        {"attn_mask": (4, 5)},
        {"attn_mask": (6, 4, 5)},
        {"key_padding_mask": (3, 4)},
        {"key_padding_mask": (5,)},
        {"query": (5, 8)},
    ],
    ids=str,
)
def test_what_the_plain_layer_refuses_is_refused(arguments: dict[str, tuple[int, ...]]) -> None:
    low, plain = with_random_factors(nn.MultiheadAttention(8, 2), rank=2)
    shapes = {"query": (5, 3, 8), "key": (5, 3, 8), "value": (5, 3, 8), **arguments}
    for model in (low, plain):
        with pytest.raises((AssertionError, RuntimeError)):
            model(**{name: torch.zeros(shape) for name, shape in shapes.items()})


def test_a_converted_attention_cannot_be_initialized_anew() -> None:
    low = memfit.convert_(nn.MultiheadAttention(8, 2), memfit.LowRankGradient(rank=2))
    with pytest.raises(memfit.ConversionError, match="restore_"):
        low._reset_parameters()
    assert "LowRankGradient(rank=2" in repr(low)
