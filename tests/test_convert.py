"""convert_, restore_ and state_dict: what is chosen, what is refused, and that nothing is left behind."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import memfit
from memfit.convert import ConvertedLayer
from memfit.gradients.low_rank_layer import LowRankLinear


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 12)
        self.encoder = nn.LSTM(12, 9, num_layers=2, bidirectional=True)
        self.norm = nn.LayerNorm(18)
        self.head = nn.Sequential(nn.Linear(18, 14), nn.Tanh(), nn.Linear(14, 11, bias=False))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.encoder(self.embed(tokens))[0]))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 11, (7, 3), generator=torch.Generator().manual_seed(1))


def train(model: nn.Module, tokens: torch.Tensor, steps: int = 3) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()


def test_a_converted_model_computes_exactly_what_it_did(net: Net, tokens: torch.Tensor) -> None:
    expected = net(tokens)
    memfit.convert_(net, memfit.LowRankGradient(rank=4))
    torch.testing.assert_close(net(tokens), expected)


def test_convert_keeps_the_layer_object_and_its_type_and_hooks(net: Net, tokens: torch.Tensor) -> None:
    layer, calls = net.head[0], []
    layer.register_forward_hook(lambda *_: calls.append(1))
    memfit.convert_(net, memfit.LowRankGradient(rank=2), where="head.*")
    assert net.head[0] is layer
    assert isinstance(layer, nn.Linear)
    net(tokens)
    assert calls == [1]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("*", {"embed", "encoder", "head.0", "head.2"}),
        ("head.*", {"head.0", "head.2"}),
        ("head.0", {"head.0"}),
        (["encoder", "head.2"], {"encoder", "head.2"}),
        (lambda name, module: isinstance(module, nn.Linear) and module.bias is None, {"head.2"}),
        (lambda name, module: name.startswith("head"), {"head.0", "head.2"}),
    ],
)
def test_where_chooses(net: Net, where: object, expected: set[str]) -> None:
    memfit.convert_(net, memfit.LowRankGradient(rank=2), where=where)  # type: ignore[arg-type]
    assert {name for name, module in net.named_modules() if hasattr(module, "low_rank")} == expected


def test_the_model_itself_may_be_the_layer() -> None:
    layer = nn.Linear(6, 5)
    assert memfit.convert_(layer, memfit.LowRankGradient(rank=2)) is layer
    assert isinstance(layer, LowRankLinear)


class ScaledLinear(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def test_a_subclass_of_a_layer_is_not_the_layer(net: Net) -> None:
    """It may read its weight in a way that the technique does not know."""
    net.head[2] = ScaledLinear(14, 11)
    memfit.convert_(net, memfit.LowRankGradient(rank=2), where="head.*")
    assert type(net.head[2]) is ScaledLinear
    with pytest.raises(memfit.ConversionError, match=r"'head\.2' is a ScaledLinear, which LowRankGradient does not"):
        memfit.convert_(net, memfit.LowRankGradient(rank=2), where="head.2")


def test_layers_better_left_dense_are_left_by_wildcards_and_refused_when_meant() -> None:
    model = nn.ModuleDict({"depthwise": nn.Conv1d(6, 6, 3, groups=6), "pointwise": nn.Conv1d(6, 6, 1)})
    technique = memfit.LowRankGradient(rank=2)
    for where in ("depthwise", ["depthwise", "point*"], lambda name, module: isinstance(module, nn.Conv1d)):
        with pytest.raises(memfit.ConversionError, match="'depthwise' has 6 groups"):
            memfit.convert_(model, technique, where=where)
    assert type(model["pointwise"]) is nn.Conv1d
    with pytest.raises(
        memfit.ConversionError, match=r"where='d\*' matched no layer .*; layer 'depthwise' has 6 groups"
    ):
        memfit.convert_(model, technique, where="d*")
    memfit.convert_(model, technique)
    assert [name for name, module in model.items() if hasattr(module, "low_rank")] == ["pointwise"]


@pytest.mark.parametrize(
    ("where", "rank", "words"),
    [
        ("decoder.*", 2, ["'decoder.*' matched no layer", "'encoder'", "'head.0'"]),
        ("norm", 2, ["layer 'norm' is a LayerNorm", "Linear, ", "LSTM", "Conv1D of transformers"]),
        (lambda name, module: name == "norm", 2, ["matched no layer"]),
        ("head.*", 15, ["layer 'head.2'", "11 x 14", "at most 11, not 15"]),
        ("encoder", 10, ["layer 'encoder'", "36 x 9", "at most 9, not 10"]),
    ],
)
def test_a_wrong_choice_is_refused_by_name_and_changes_nothing(
    net: Net, where: object, rank: int, words: list[str]
) -> None:
    before = {name: type(module) for name, module in net.named_modules()}
    with pytest.raises(memfit.ConversionError) as refusal:
        memfit.convert_(net, memfit.LowRankGradient(rank=rank), where=where)  # type: ignore[arg-type]
    assert all(word in str(refusal.value) for word in words), refusal.value
    assert {name: type(module) for name, module in net.named_modules()} == before


def test_converting_twice_is_refused_and_other_layers_may_follow(net: Net) -> None:
    memfit.convert_(net, memfit.LowRankGradient(rank=2), where="head.0")
    with pytest.raises(memfit.ConversionError, match=r"'head\.0' is converted already"):
        memfit.convert_(net, memfit.LowRankGradient(rank=3), where="head.0")
    memfit.convert_(net, memfit.LowRankGradient(rank=3), where="head.2")
    assert net.head[0].technique.rank == 2
    assert net.head[2].technique.rank == 3


def test_frozen_layers_are_left_out_by_globs_and_refused_by_name(net: Net) -> None:
    net.head[0].requires_grad_(False)
    memfit.convert_(net, memfit.LowRankGradient(rank=2), where="head.*")
    assert type(net.head[0]) is nn.Linear
    with pytest.raises(memfit.ConversionError, match=r"'head\.0' is frozen"):
        memfit.convert_(net, memfit.LowRankGradient(rank=2), where="head.0")


def test_a_weight_that_is_computed_is_refused(net: Net) -> None:
    torch.nn.utils.parametrizations.weight_norm(net.head[0])
    with pytest.raises(memfit.ConversionError, match=r"'head\.0'"):
        memfit.convert_(net, memfit.LowRankGradient(rank=2), where="head.0")
    old = nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(5, 5)))
    with pytest.raises(memfit.ConversionError, match="keeps its weight elsewhere"):
        memfit.convert_(old, memfit.LowRankGradient(rank=2), where="0")


def test_state_dict_is_plain_inside_a_wrapper_that_renames_keys(net: Net, tokens: torch.Tensor) -> None:
    expected = list(net.state_dict())
    memfit.convert_(net, memfit.LowRankGradient(rank=4))
    net.head = checkpoint_wrapper(net.head)
    assert list(memfit.state_dict(net)) == expected


def test_state_dict_and_restore_do_not_round_under_autocast(net: Net) -> None:
    expected = net.head[0].weight.detach().clone()
    memfit.convert_(net, memfit.LowRankGradient(rank=4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(memfit.state_dict(net)["head.0.weight"], expected)
        assert torch.equal(memfit.restore_(net).head[0].weight, expected)


def test_unfreezing_everything_brings_no_dense_gradient_back(net: Net, tokens: torch.Tensor) -> None:
    memfit.convert_(net, memfit.LowRankGradient(rank=4))
    net.requires_grad_(False)
    net.requires_grad_(True)
    net(tokens).sum().backward()
    assert [name for name, p in net.named_parameters() if name.endswith(".base") and p.grad is not None] == []


def test_conversion_works_under_a_default_device_and_dtype() -> None:
    layer = nn.Linear(6, 5)
    with torch.device("meta"):
        memfit.convert_(layer, memfit.LowRankGradient(rank=2))
    assert not layer.matrix("weight").right.is_meta
    torch.set_default_dtype(torch.float64)
    try:
        other = memfit.convert_(nn.Linear(6, 5, dtype=torch.float32), memfit.LowRankGradient(rank=2))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(layer.matrix("weight").right, other.matrix("weight").right)


def test_a_converted_layer_refuses_to_be_initialized(net: Net) -> None:
    memfit.convert_(net, memfit.LowRankGradient(rank=2))
    for layer in (net.head[0], net.encoder):
        with pytest.raises(memfit.ConversionError, match="restore_"):
            layer.reset_parameters()


def test_a_layer_under_two_names_stays_one_layer() -> None:
    shared = nn.Linear(6, 6)
    model = memfit.convert_(nn.Sequential(shared, nn.Tanh(), shared), memfit.LowRankGradient(rank=2))
    assert model[0] is model[2]
    plain = memfit.state_dict(model)
    assert set(plain) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert plain["0.weight"] is plain["2.weight"]
    memfit.restore_(model)
    assert type(model[2]) is nn.Linear


def test_state_dict_loads_into_the_original_model(net: Net, tokens: torch.Tensor) -> None:
    original = copy.deepcopy(net)
    memfit.convert_(net, memfit.LowRankGradient(rank=4))
    train(net, tokens)
    plain = memfit.state_dict(net)
    assert list(plain) == list(original.state_dict())
    assert not any(tensor.requires_grad for tensor in plain.values())
    original.load_state_dict(plain)
    torch.testing.assert_close(original(tokens), net(tokens))


def test_restore_leaves_no_trace(net: Net, tokens: torch.Tensor) -> None:
    original = copy.deepcopy(net)
    weights = dict(net.named_parameters())
    memfit.convert_(net, memfit.LowRankGradient(rank=4, refresh=2))
    train(net, tokens)
    trained = net(tokens)
    assert memfit.restore_(net) is net
    torch.testing.assert_close(net(tokens), trained)
    assert repr(net) == repr(original)
    assert [name for name, _ in net.named_parameters()] == [name for name, _ in original.named_parameters()]
    for name, parameter in net.named_parameters():
        assert parameter is weights[name]
        assert parameter.requires_grad
    for module, plain in zip(net.modules(), original.modules(), strict=True):
        assert type(module) is type(plain)
        assert set(vars(module)) == set(vars(plain))
    train(net, tokens)  # and it trains on, densely


def test_restoring_at_once_gives_the_same_bits(net: Net) -> None:
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    memfit.restore_(memfit.convert_(net, memfit.LowRankGradient(rank=4)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_the_weights_own_name_gives_the_effective_weight(net: Net, tokens: torch.Tensor) -> None:
    memfit.convert_(net, memfit.LowRankGradient(rank=4))
    train(net, tokens)
    plain = memfit.state_dict(net)
    torch.testing.assert_close(net.head[0].weight.detach(), plain["head.0.weight"])
    torch.testing.assert_close(net.encoder.weight_hh_l1_reverse.detach(), plain["encoder.weight_hh_l1_reverse"])
    with pytest.raises(memfit.ConversionError, match="restore_"):
        net.head[0].weight = nn.Parameter(torch.zeros(14, 18))


def test_converted_models_can_be_copied_pickled_moved_and_cast(net: Net, tokens: torch.Tensor) -> None:
    memfit.convert_(net, memfit.LowRankGradient(rank=4))
    train(net, tokens)
    expected = net(tokens)
    torch.testing.assert_close(copy.deepcopy(net)(tokens), expected)
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    torch.testing.assert_close(loaded(tokens), expected)
    memfit.restore_(loaded)
    torch.testing.assert_close(loaded(tokens), expected)
    torch.testing.assert_close(net.double()(tokens), expected.double(), atol=1e-5, rtol=1e-5)


def test_the_full_state_dict_resumes_training_exactly(net: Net, tokens: torch.Tensor) -> None:
    technique = memfit.LowRankGradient(rank=4, refresh=2)
    other = copy.deepcopy(net)
    memfit.convert_(net, technique)
    memfit.convert_(other, technique)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            model(tokens).square().mean().backward()
            optimizer.step()

    steps(net, optimizer, 3)
    other.load_state_dict(copy.deepcopy(net.state_dict()))
    resumed = torch.optim.Adam(other.parameters(), lr=1e-2)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(net, optimizer, 4)
    steps(other, resumed, 4)
    for (name, first), second in zip(net.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(first, second), name


def test_a_model_on_the_meta_device_converts_without_memory() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(1 << 14, 1 << 14))
    memfit.convert_(model, memfit.LowRankGradient(rank=8))
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("where", [None, 5, [1, 2]])
def test_a_where_that_is_none_is_refused(where: object) -> None:
    with pytest.raises(memfit.ConversionError, match="give a name or glob"):
        memfit.convert_(nn.Sequential(nn.Linear(4, 4)), memfit.LowRankGradient(rank=2), where)  # type: ignore[arg-type]


def test_a_slip_in_one_of_several_names_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(memfit.ConversionError, match=r"matches 'encoder\.q'"):
        memfit.convert_(model, memfit.LowRankGradient(rank=2), ["0", "encoder.q"])
    assert type(model[0]) is nn.Linear


def test_a_recurrent_layer_whose_weights_are_computed_is_left_out() -> None:
    lstm = torch.nn.utils.weight_norm(nn.LSTM(4, 4), "weight_hh_l0")
    model = nn.ModuleList([lstm, nn.Linear(4, 4)])
    memfit.convert_(model, memfit.LowRankGradient(rank=1))
    assert type(model[0]) is nn.LSTM
    with pytest.raises(memfit.ConversionError, match="weight norm"):
        memfit.convert_(model, memfit.LowRankGradient(rank=1), "0")


def test_a_wildcard_leaves_layers_dense_that_are_too_thin_for_the_rank() -> None:
    model = nn.Sequential(nn.Linear(12, 12), nn.LSTM(12, 3), nn.Linear(12, 4))
    memfit.convert_(model, memfit.LowRankGradient(rank=5))
    assert [isinstance(layer, ConvertedLayer) for layer in model] == [True, False, False]
    with pytest.raises(memfit.ConversionError, match="4 x 12, so the rank may be at most 4, not 5: lower it"):
        memfit.convert_(nn.Sequential(nn.Linear(12, 4)), memfit.LowRankGradient(rank=5), where="0")
    with pytest.raises(memfit.ConversionError, match=r"matched no layer .* at most 4"):
        memfit.convert_(nn.Linear(12, 4), memfit.LowRankGradient(rank=5))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((nn.Linear(4, 4), "low-rank"), "needs a technique such as .* not 'low-rank'"),
        ((nn.Linear(4, 4), memfit.LowRankGradient), "not the class LowRankGradient"),
        ((5, memfit.LowRankGradient(rank=2)), "needs a torch.nn.Module first, not int"),
    ],
)
def test_arguments_of_another_kind_are_refused(arguments: tuple[Any, Any], said: str) -> None:
    with pytest.raises(memfit.ConversionError, match=said):
        memfit.convert_(*arguments)


def test_a_technique_is_written_as_it_was_given() -> None:
    assert str(memfit.LowRankGradient(rank=4)) == "LowRankGradient(rank=4)"
    assert str(memfit.LowRankGradient(rank=4, sides="left")) == "LowRankGradient(rank=4, sides='left')"


def test_an_optimizer_from_before_the_conversion_is_warned_of_once() -> None:
    model = nn.Linear(6, 6)
    early = torch.optim.SGD(model.parameters(), lr=0.1)
    memfit.convert_(model, memfit.LowRankGradient(rank=2))
    model(torch.ones(1, 6)).sum().backward()
    with pytest.warns(UserWarning, match=r"this SGD was made before memfit\.convert_"):
        early.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        early.step()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        torch.optim.SGD([model.bias], lr=0.1).step()
