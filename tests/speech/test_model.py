"""The recognizer: that padding has no effect, that its file comes back whole, and that a wrong file is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from memfit.errors import DataError
from memfit.speech.model import Recognizer, RecognizerConfig, load, load_base, save

SMALL = RecognizerConfig(features=6, layers=2, hidden=5)


def _recognizer(config: RecognizerConfig = SMALL) -> Recognizer:
    torch.manual_seed(0)
    return Recognizer(config)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 23), min_size=1, max_size=4),
    extra=st.integers(0, 5),
    stack=st.integers(1, 3),
    bidirectional=st.booleans(),
)
def test_neither_padding_nor_the_rest_of_the_batch_has_an_effect(
    lengths: list[int], extra: int, stack: int, bidirectional: bool
) -> None:
    config = RecognizerConfig(features=6, layers=2, hidden=5, stack=stack, bidirectional=bidirectional)
    model = _recognizer(config)
    features = torch.randn(len(lengths), max(lengths) + extra, 6)  # what lies beyond the lengths is garbage
    log_probs, out_lengths = model(features, torch.tensor(lengths))
    assert log_probs.shape == (-(-features.shape[1] // stack), len(lengths), len(config.alphabet))
    for row, (length, frames) in enumerate(zip(lengths, out_lengths.tolist(), strict=True)):
        alone, (expected,) = model(features[row : row + 1, :length], torch.tensor([length]))
        assert frames == expected == -(-length // stack)
        torch.testing.assert_close(log_probs[:frames, row], alone[:, 0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(log_probs.exp().sum(dim=-1), torch.ones(log_probs.shape[:2]))


def test_gradients_are_those_of_the_utterances_one_by_one() -> None:
    model = _recognizer()
    features, lengths = torch.randn(3, 20, 6), torch.tensor([20, 7, 12])

    def loss(rows: slice) -> torch.Tensor:
        log_probs, frames = model(features[rows], lengths[rows])
        return sum(log_probs[:n, i, 1].sum() for i, n in enumerate(frames.tolist()))  # type: ignore[return-value]

    together = torch.autograd.grad(loss(slice(0, 3)), list(model.parameters()))
    singly = [torch.autograd.grad(loss(slice(i, i + 1)), list(model.parameters())) for i in range(3)]
    for whole, *parts in zip(together, *singly, strict=True):
        torch.testing.assert_close(whole, sum(parts), atol=1e-4, rtol=1e-4)


def test_layers_are_plain_ones_of_torch_and_scale_by_configuration() -> None:
    with torch.device("meta"):
        large = Recognizer(RecognizerConfig(layers=3, hidden=1024, bidirectional=False))
    assert {type(module) for module in large.modules()} == {Recognizer, nn.LSTM, nn.Linear}
    assert sum(parameter.numel() for parameter in large.parameters()) > 20_000_000


def test_a_file_gives_back_the_same_recognizer(tmp_path: Path) -> None:
    model, path = _recognizer(), tmp_path / "model.safetensors"
    save(model, SMALL, path)
    loaded = load(path)
    assert loaded.config == SMALL
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]
    save(loaded.state_dict(), loaded.config, path)
    features, lengths = torch.randn(2, 9, 6), torch.tensor([9, 4])
    assert torch.equal(load(path)(features, lengths)[0], model(features, lengths)[0])


def _safetensors(tensors: dict[str, torch.Tensor], config: object) -> bytes:
    header = config if isinstance(config, str) else json.dumps(config)
    return safetensors.torch.save(tensors, metadata={"memfit.speech.recognizer": header})


def _file(case: str) -> bytes:
    model = _recognizer()
    tensors, config = dict(model.state_dict()), SMALL.to_dict()
    whole = _safetensors(tensors, config)
    name = "output.weight"
    return {
        "empty": b"",
        "text": b"this is no model file at all, only some text",
        "truncated": whole[: len(whole) // 2],
        "header only": whole[:6],
        "huge header": (2**62).to_bytes(8, "little") + whole[8:],
        "foreign": safetensors.torch.save(tensors),
        "config is not JSON": _safetensors(tensors, "{"),
        "config is a list": _safetensors(tensors, [1]),
        "unknown setting": _safetensors(tensors, {**config, "magic": 1}),
        "absurd size": _safetensors(tensors, {**config, "hidden": 10**12}),
        "wrong type": _safetensors(tensors, {**config, "layers": "two"}),
        "alphabet twice": _safetensors(tensors, {**config, "alphabet": ["<blank>", "a", "a"]}),
        "alphabet is a number": _safetensors(tensors, {**config, "alphabet": 3}),
        "other shape": _safetensors(tensors, {**config, "hidden": 7}),
        "missing tensor": _safetensors({k: v for k, v in tensors.items() if k != name}, config),
        "extra tensor": _safetensors({**tensors, "stray": torch.zeros(1)}, config),
        "whole numbers": _safetensors({**tensors, name: torch.zeros(tensors[name].shape, dtype=torch.int64)}, config),
        "not finite": _safetensors({**tensors, name: torch.full_like(tensors[name], torch.nan)}, config),
    }[case]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("empty", "not a safetensors file"),
        ("text", "not a safetensors file"),
        ("truncated", "not a safetensors file"),
        ("header only", "not a safetensors file"),
        ("huge header", "not a safetensors file"),
        ("foreign", "not a memfit recognizer"),
        ("config is not JSON", "configuration in the header is wrong"),
        ("config is a list", "configuration in the header is wrong"),
        ("unknown setting", "unknown setting 'magic'"),
        ("absurd size", "hidden must be"),
        ("wrong type", "layers must be"),
        ("alphabet twice", "alphabet must be"),
        ("alphabet is a number", "alphabet must be"),
        ("other shape", "lstm.weight_ih_l0"),
        ("missing tensor", "output.weight"),
        ("extra tensor", "stray"),
        ("whole numbers", "output.weight"),
        ("not finite", "not finite"),
    ],
)
def test_a_file_that_is_no_recognizer_is_refused_by_name(case: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "base.safetensors"
    path.write_bytes(_file(case))
    with pytest.raises(DataError, match=message) as caught:
        load(path)
    assert str(caught.value).startswith(str(path))


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such model file"):
        load(tmp_path / "nothing.safetensors")
    with pytest.raises(DataError, match="folder"):
        load(tmp_path)


def test_a_file_that_cannot_be_written_leaves_the_earlier_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be written"):
        save(_recognizer(), SMALL, tmp_path / "nowhere" / "model.safetensors")
    path = tmp_path / "model.safetensors"
    path.mkdir()
    with pytest.raises(DataError, match="cannot be written"):
        save(_recognizer(), SMALL, path)
    assert os.listdir(tmp_path) == ["model.safetensors"]


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "3"])
def test_a_configuration_that_makes_no_recognizer_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="hidden must be a whole number"):
        RecognizerConfig(hidden=value)  # type: ignore[arg-type]


def test_the_shipped_recognizer_is_small_and_knows_the_alphabet() -> None:
    model = load_base()
    assert 800_000 <= sum(parameter.numel() for parameter in model.parameters()) <= 950_000
    assert sum(parameter.numel() for parameter in model.parameters()) * 4 < 4_000_000
    assert model.config.alphabet[1:] == (" ", "'", *"abcdefghijklmnopqrstuvwxyz")
