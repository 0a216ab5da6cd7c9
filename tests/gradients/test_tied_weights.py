"""Weights that several layers share: converted together they stay one, through training, saving and restoring."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memfit


class LanguageModel(nn.Module):
    """(B, T) tokens -> (B, T, words) logits, its output tied to its table."""

    def __init__(self, words: int = 23, width: int = 12, padding_idx: int | None = None, **table: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width, padding_idx=padding_idx, **table)
        self.body = nn.Linear(width, width)
        self.out = nn.Linear(width, words, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.tanh(self.body(self.embed(tokens))))


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 23, (4, 9), generator=torch.Generator().manual_seed(1))


def converted(model: nn.Module, where: Any = "*", **settings: Any) -> nn.Module:
    return memfit.convert_(model, memfit.LowRankGradient(**{"rank": 4, **settings}), where=where)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(1, dims=1).flatten())


def train(model: nn.Module, tokens: Tensor, steps: int, optimizer: torch.optim.Optimizer | None = None) -> float:
    optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=2e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, tokens)
        loss.backward()
        optimizer.step()
    return loss.item()


@pytest.mark.parametrize("padding", [None, 3])
def test_both_owners_give_to_one_pair_of_factors(tokens: Tensor, padding: int | None) -> None:
    """dU = G V^T and dV = U^T G, with G the tied dense weight's gradient: the sum of both uses."""
    torch.manual_seed(0)
    dense = LanguageModel(padding_idx=padding).double()
    model = converted(copy.deepcopy(dense))
    matrix = model.embed.matrix("weight")
    assert model.out.matrix("weight") is matrix
    matrix.left.data.normal_()
    dense.load_state_dict(memfit.state_dict(model))
    torch.testing.assert_close(model(tokens), dense(tokens))
    loss_of(model, tokens).backward()
    loss_of(dense, tokens).backward()
    torch.testing.assert_close(matrix.left.grad, dense.embed.weight.grad @ matrix.right.detach().t())
    torch.testing.assert_close(matrix.right.grad, matrix.left.detach().t() @ dense.embed.weight.grad)
    torch.testing.assert_close(model.body.bias.grad, dense.body.bias.grad)


@pytest.mark.parametrize("basis", ["random", "power"])
def test_the_factors_are_listed_once_and_the_weight_stays_one(tokens: Tensor, basis: str) -> None:
    model = LanguageModel()
    weight = model.embed.weight
    original = copy.deepcopy(model)
    converted(model, basis=basis, refresh=4)
    assert len(list(model.parameters())) == 3 + 3 + 1  # of the table, of the body, and the body's bias
    before = train(model, tokens, 1)
    assert train(model, tokens, 40) < 0.8 * before
    assert model.embed.matrix("weight").steps == 41  # once a step, though two layers use it
    torch.testing.assert_close(model.embed.weight, model.out.weight)
    trained = model(tokens)
    plain = memfit.state_dict(model)
    assert list(plain) == list(original.state_dict())
    assert plain["out.weight"] is plain["embed.weight"]
    original.load_state_dict(plain)
    torch.testing.assert_close(original(tokens), trained, atol=1e-5, rtol=1e-5)
    memfit.restore_(model)
    assert model.embed.weight is model.out.weight is weight
    assert weight.requires_grad
    torch.testing.assert_close(model(tokens), trained, atol=1e-5, rtol=1e-5)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in original.named_parameters()]
    train(model, tokens, 2)
    assert model.embed.weight is model.out.weight


def test_the_tie_outlives_copies_files_and_casts(tokens: Tensor) -> None:
    model = converted(LanguageModel(), sides="left")
    train(model, tokens, 2)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False), copy.deepcopy(model).double()):
        assert other.embed.matrix("weight") is other.out.matrix("weight")
        torch.testing.assert_close(other(tokens).float(), model(tokens))
        memfit.restore_(other)
        assert other.embed.weight is other.out.weight


def test_the_full_state_dict_resumes_training_exactly(tokens: Tensor) -> None:
    model = LanguageModel()
    other = copy.deepcopy(model)
    for net in (model, other):
        converted(net, refresh=3)
    optimizer, resumed = (torch.optim.Adam(net.parameters(), lr=1e-2) for net in (model, other))
    train(model, tokens, 4, optimizer)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, tokens, 4, optimizer)
    train(other, tokens, 4, resumed)
    for (name, first), second in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(first, second), name


def test_weights_tied_inside_one_layer_stay_tied() -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(6, 6, num_layers=2).double()
    lstm.weight_hh_l1 = lstm.weight_hh_l0
    weight, x = lstm.weight_hh_l0, torch.randn(5, 2, 6).double()
    expected = lstm(x)[0]
    converted(lstm)
    torch.testing.assert_close(lstm(x)[0], expected)
    assert lstm.matrix("weight_hh_l0") is lstm.matrix("weight_hh_l1")
    optimizer = torch.optim.Adam(lstm.parameters(), lr=1e-2)
    lstm(x)[0].square().sum().backward()
    optimizer.step()
    trained = lstm(x)[0]
    memfit.restore_(lstm)
    assert lstm.weight_hh_l0 is lstm.weight_hh_l1 is weight
    torch.testing.assert_close(lstm(x)[0], trained)


@pytest.mark.parametrize("where", ["out", ["out", "body"], "embed", lambda _, module: isinstance(module, nn.Linear)])
def test_a_choice_of_one_owner_alone_is_refused_and_names_the_other(where: Any) -> None:
    model = LanguageModel()
    one, other = ("embed", "out") if where == "embed" else ("out", "embed")
    with pytest.raises(memfit.ConversionError, match=rf"'{one}' shares its weight with '{other}\.weight'.*choose all"):
        converted(model, where)
    assert type(model.out) is nn.Linear
    assert type(model.body) is nn.Linear
    assert model.out.weight is model.embed.weight


@pytest.mark.parametrize(
    ("model", "where"),
    [
        (lambda: LanguageModel(), "[bo]*"),
        (lambda: LanguageModel(max_norm=2.0), "*"),  # a table that does not convert
        (lambda: LanguageModel(), ["body", "*out"]),
    ],
)
def test_a_wildcard_leaves_a_tied_weight_dense_unless_it_takes_all_owners(
    model: Callable[[], nn.Module], where: Any, tokens: Tensor
) -> None:
    net = model()
    converted(net, where)
    assert type(net.out) is nn.Linear
    assert type(net.embed) is nn.Embedding
    assert hasattr(net.body, "low_rank")
    train(net, tokens, 3)
    assert net.out.weight is net.embed.weight


def test_a_wildcard_that_finds_nothing_else_says_why() -> None:
    with pytest.raises(memfit.ConversionError, match=r"where='o\*' matched no layer .*'out' shares its weight with"):
        converted(LanguageModel(), "o*")


def test_a_mixed_choice_of_all_owners_is_one() -> None:
    model = converted(LanguageModel(), ["embed", "o*"])
    assert model.embed.matrix("weight") is model.out.matrix("weight")


def test_layers_that_store_a_weight_the_other_way_round_cannot_share_factors() -> None:
    model = nn.ModuleDict({"up": nn.ConvTranspose1d(6, 5, 3), "down": nn.Conv1d(5, 6, 3), "other": nn.Linear(7, 7)})
    model["up"].weight = model["down"].weight
    converted(model)
    assert type(model["up"]) is nn.ConvTranspose1d
    assert type(model["down"]) is nn.Conv1d
    memfit.restore_(model)
    with pytest.raises(memfit.ConversionError, match=r"'up' shares its weight with 'down\.weight', which store it the"):
        converted(model, ["up", "down"])


def test_a_layer_left_out_for_one_tie_takes_its_other_ties_with_it() -> None:
    """The second LSTM shares one matrix with a layer that is not chosen, another with the first LSTM."""
    model = nn.ModuleDict(
        {"one": nn.LSTM(6, 6), "two": nn.LSTM(6, 6), "free": nn.Linear(6, 6), "out": nn.Linear(6, 24)}
    )
    model["two"].weight_hh_l0 = model["one"].weight_hh_l0
    model["out"].weight = model["two"].weight_ih_l0
    converted(model, ["one*", "two*", "fr*"])
    assert [name for name, module in model.items() if hasattr(module, "low_rank")] == ["free"]


def small_gpt2(transformers: Any) -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=40, n_positions=16, n_embd=24, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def small_llama(transformers: Any) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=24,
        intermediate_size=36,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("make", [small_gpt2, small_llama])
@pytest.mark.parametrize("sides", ["both", "left"])
def test_a_language_model_of_transformers_is_converted_wholly(make: Any, sides: str) -> None:
    transformers = pytest.importorskip("transformers", reason='needs pip install "memfit[hf]"')
    torch.manual_seed(0)
    model = make(transformers).eval()  # without dropout
    original = copy.deepcopy(model)
    tokens = torch.randint(0, 40, (4, 12))
    before = original(tokens, labels=tokens)
    converted(model, sides=sides, refresh=8)
    assert [
        name for name, p in model.named_parameters() if p.requires_grad and min(p.shape[:2]) > 4 and p.dim() > 1
    ] == []
    torch.testing.assert_close(model(tokens).logits, before.logits)
    table = model.get_input_embeddings()
    assert table.matrix("weight") is model.lm_head.matrix("weight")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2, weight_decay=0.0)
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.8 * before.loss.item()
    trained = model(tokens).logits
    plain = memfit.state_dict(model)
    assert list(plain) == list(original.state_dict())
    original.load_state_dict(plain)
    torch.testing.assert_close(original(tokens).logits, trained, atol=1e-4, rtol=1e-4)
    memfit.restore_(model)
    torch.testing.assert_close(model(tokens).logits, trained, atol=1e-4, rtol=1e-4)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert repr(model) == repr(original)


def test_the_linear_layer_of_transformers_has_the_gradients_of_the_dense_one() -> None:
    utils = pytest.importorskip("transformers.pytorch_utils", reason='needs pip install "memfit[hf]"')
    torch.manual_seed(0)
    dense = utils.Conv1D(7, 5).double()  # from 5 to 7
    layer = converted(copy.deepcopy(dense), rank=3)
    matrix = layer.matrix("weight")
    matrix.left.data.normal_()
    dense.load_state_dict(memfit.state_dict(layer))
    x = torch.randn(4, 2, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(x), dense(x))
    d = torch.randn(4, 2, 7, dtype=torch.float64)
    layer(x).backward(d)
    dense(x).backward(d)
    gradient = dense.weight.grad.t()
    torch.testing.assert_close(matrix.left.grad, gradient @ matrix.right.detach().t())
    torch.testing.assert_close(matrix.right.grad, matrix.left.detach().t() @ gradient)
    torch.testing.assert_close(layer.bias.grad, dense.bias.grad)
    assert isinstance(layer, utils.Conv1D)
    assert "nf=7, nx=5, LowRankGradient(rank=3" in repr(layer)
    with pytest.raises(memfit.ConversionError, match="7 x 5, so the rank may be at most 5"):
        converted(utils.Conv1D(7, 5), rank=6)


def test_memfit_does_not_import_transformers() -> None:
    program = "import sys, torch, memfit; memfit.convert_(torch.nn.Linear(4, 4), memfit.LowRankGradient(rank=2)); "
    subprocess.run([sys.executable, "-c", program + "assert 'transformers' not in sys.modules"], check=True)
