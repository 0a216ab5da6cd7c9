"""Weights of files arrive whole or not at all, but for a head of other classes."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from memfit.errors import DataError
from memfit.vision import classifier
from memfit.vision.classifier import ClassifierConfig
from memfit.vision.models import mobilenet_v2, resnet18
from memfit.vision.weights import head_name, load_weights

HEAD = ("fc.weight", "fc.bias")


def net(classes: int = 4, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return resnet18(classes, width=0.125)


def written(state: dict[str, Tensor], path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


def same(first: dict[str, Tensor], second: dict[str, Tensor], but: tuple[str, ...] = ()) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first if name not in but)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.pt"])
def test_weights_of_the_same_classes_arrive_whole(tmp_path, name):
    other = net(seed=1).state_dict()
    model = net()
    assert load_weights(model, written(other, tmp_path / name)) == ()
    assert same(model.state_dict(), other)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_the_layout_and_the_parameters_themselves_stay(tmp_path, layout):
    model = net().to(memory_format=layout)
    before = list(model.parameters())
    load_weights(model, written(net(seed=1).state_dict(), tmp_path / "w.pth"))
    assert all(one is other for one, other in zip(model.parameters(), before, strict=True))
    assert model.conv1.weight.is_contiguous(memory_format=layout)


def test_half_precision_becomes_the_models_own(tmp_path):
    other = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in net(seed=1).state_dict().items()
    }
    model = net()
    load_weights(model, written(other, tmp_path / "w.safetensors"))
    assert model.conv1.weight.dtype == torch.float32
    torch.testing.assert_close(model.conv1.weight.data, other["conv1.weight"].float())


@pytest.mark.parametrize("classes", [1000, 2])
def test_a_head_for_another_number_of_classes_is_left_fresh_and_named(tmp_path, classes):
    model, other = net(), net(classes, seed=1).state_dict()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert load_weights(model, written(other, tmp_path / "w.pth")) == HEAD
    assert same({name: model.state_dict()[name] for name in HEAD}, before)
    assert same(model.state_dict(), other, but=HEAD)


def test_a_backbone_without_a_head_is_taken(tmp_path):
    model = mobilenet_v2(3, width=0.25)
    other = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("classifier")}
    assert load_weights(model, written(other, tmp_path / "w.pth")) == ("classifier.1.weight", "classifier.1.bias")


def test_files_from_before_there_were_counts_of_batches_are_taken(tmp_path):
    other = {name: tensor for name, tensor in net(seed=1).state_dict().items() if "num_batches" not in name}
    model = net()
    assert load_weights(model, written(other, tmp_path / "w.pth")) == ()
    assert same(other, model.state_dict())


def test_a_head_for_classes_of_other_names_is_left_fresh(tmp_path):
    path = tmp_path / "model.safetensors"
    classifier.save(net(seed=1).state_dict(), ClassifierConfig("resnet18", ("a", "b", "c", "d"), 32, 0.125), path)
    assert load_weights(net(), path, ("a", "b", "c", "d")) == ()
    assert load_weights(net(), path) == ()
    assert load_weights(net(), path, ("a", "b", "d", "c")) == HEAD
    assert load_weights(net(), path, ("1", "2", "3", "4")) == HEAD


def without(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda s: without("conv1.weight", s), r"lacks 'conv1\.weight'"),
        (lambda s: {**s, "stray": torch.zeros(1)}, "has besides 'stray'"),
        (lambda s: {**s, "conv1.weight": torch.zeros(8, 1, 7, 7)}, r"in other shapes 'conv1\.weight'"),
        (lambda s: {**s, "fc.weight": torch.zeros(4, 7)}, r"in other shapes 'fc\.weight'"),
        (lambda s: {f"module.{name}": tensor for name, tensor in s.items()}, "lacks .* and 96 more; it has besides"),
        (lambda s: {**s, "bn1.weight": torch.full((8,), torch.nan)}, r"'bn1\.weight' are not finite"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_other_weights_are_one_sentence_that_names_the_keys_and_change_nothing(tmp_path, change, complaint, suffix):
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = written(change(net(seed=1).state_dict()), tmp_path / f"w{suffix}")
    with pytest.raises(DataError, match=complaint) as refused:
        load_weights(model, path)
    assert str(refused.value).startswith(f"{path}: ")
    assert len(str(refused.value)) < 1000
    assert same(model.state_dict(), before)


@pytest.mark.parametrize(
    ("dtype", "suffix"),
    [
        (torch.complex64, ".pth"),
        (torch.bool, ".pth"),
        (torch.bool, ".safetensors"),
        (torch.int64, ".safetensors"),
        (torch.float8_e4m3fn, ".pth"),
        (torch.float8_e4m3fn, ".safetensors"),
    ],
)
def test_other_kinds_of_numbers_are_refused_by_name(tmp_path, dtype, suffix):
    state = net(seed=1).state_dict()
    path = written({**state, "conv1.weight": state["conv1.weight"].to(dtype)}, tmp_path / f"w{suffix}")
    with pytest.raises(DataError, match=r"in other kinds of numbers 'conv1\.weight'"):
        load_weights(net(), path)


def test_a_number_that_is_too_large_for_the_net_is_refused(tmp_path):
    path = written({**net().state_dict(), "bn1.bias": torch.full((8,), 1e300, dtype=torch.float64)}, tmp_path / "w.pth")
    with pytest.raises(DataError, match=r"'bn1\.bias' are not finite"):
        load_weights(net(), path)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda w: w.to_sparse(), "layout torch.sparse_coo"),
        (lambda w: w.to("meta"), "on meta"),
        (lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), "dtype torch.qint8"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*deprecated:UserWarning")
def test_tensors_that_are_not_plain_are_refused_by_name(tmp_path, change, complaint):
    state = net(seed=1).state_dict()
    path = written({**state, "fc.weight": change(state["fc.weight"])}, tmp_path / "w.pth")
    with pytest.raises(DataError, match=rf"'fc\.weight' is a Tensor.*{complaint}"):
        load_weights(net(), path)


@pytest.mark.parametrize("stray", [1, None, b"fc.weight", (1, 2)], ids=repr)
def test_keys_that_are_no_names_are_no_state_dict(tmp_path, stray):
    path = written({**net().state_dict(), stray: torch.zeros(2)}, tmp_path / "w.pth")
    with pytest.raises(DataError, match="holds no state dict"):
        load_weights(net(), path)


class Malicious:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_bad_files_are_one_sentence_and_run_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = written(net().state_dict(), tmp_path / "whole.pth").read_bytes()
    torch.save(net(), tmp_path / "module.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    torch.save({"model": net().state_dict(), "epoch": 3}, tmp_path / "nested.pth")
    torch.save({}, tmp_path / "nothing.pth")
    contents = {"empty.pth": b"", "text.pth": b"text", "half.pth": whole[: len(whole) // 2], "zip.pth": b"PK\3\4" * 9}
    contents |= {"pickle.pth": pickle.dumps(Malicious()), "half.safetensors": b"\0" * 20, "model.onnx": b"onnx"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder.pth").mkdir()
    bad = [
        "module.pth",
        "list.pth",
        "nested.pth",
        "nothing.pth",
        *contents,
        "folder.pth",
        "missing.pth",
        "text.pth/x.pt",
    ]
    for name in bad:
        with pytest.raises(DataError) as refused:
            load_weights(net(), tmp_path / name)
        assert str(refused.value).startswith(f"{tmp_path / name}: "), name
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "executed").exists()


def test_the_head_is_the_last_layer_with_a_matrix():
    assert head_name(net()) == "fc"
    assert head_name(mobilenet_v2(3, width=0.25)) == "classifier.1"
    assert head_name(nn.Linear(3, 2)) == ""
    assert head_name(nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.Flatten())) == "0"
