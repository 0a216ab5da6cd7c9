"""A classifier's file gives back the same net and its classes, and a damaged or hostile one is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from memfit.errors import DataError, MemfitError
from memfit.vision import classifier
from memfit.vision.classifier import HEADER_KEY, ClassifierConfig, build, load, save
from memfit.vision.models import resnet18

CONFIG = ClassifierConfig("resnet18", ("cat", "dög"), 24, 0.125)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    net = resnet18(2, width=0.125)
    net.bn1.running_mean.uniform_()
    save(net.to(memory_format=torch.channels_last).state_dict(), CONFIG, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_what_is_saved_is_loaded(path):
    net, config = load(path)
    assert config == CONFIG
    assert not net.training
    torch.manual_seed(0)
    expected = resnet18(2, width=0.125).state_dict()
    found = net.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected if "running_mean" not in name)
    assert net(torch.zeros(1, 3, 24, 24)).shape == (1, 2)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"size": 0}, "size"),
        ({"size": 10**6}, "size"),
        ({"size": True}, "size"),
        ({"width": 1e9}, "width"),
        ({"classes": ["a"]}, "classes"),
        ({"classes": ["a", "a"]}, "classes"),
        ({"classes": "ab"}, "classes"),
        ({"classes": [1, 2]}, "classes"),
        ({"model": ""}, "model"),
        ({"model": None}, "model"),
        ({"extra": 1}, "'extra' is unknown"),
        ({"classes": ["a", "b", "c"]}, r"fc\.weight"),
        ({"width": 16}, r"conv1\.weight"),
        ({"model": "mobilenet_v2"}, r"features\.0\.0\.weight"),
        ({"model": "other"}, "no model 'other'|name the function"),
        ({"model": "os:system"}, "name the function"),
    ],
)
def test_a_header_that_does_not_fit_is_refused_by_name(path, changes, complaint):
    header = json.dumps({**CONFIG.to_dict(), **changes})
    save_file(load_file(path), path, metadata={HEADER_KEY: header})
    with pytest.raises(DataError, match=complaint) as refused:
        load(path)
    assert str(refused.value).startswith(f"{path}: ")


@pytest.mark.parametrize("header", [None, "{", "[]", "{}", "3", "[" * 100_000])
def test_a_header_that_is_none_is_refused(path, header):
    save_file(load_file(path), path, metadata=None if header is None else {HEADER_KEY: header})
    with pytest.raises(DataError, match=r"model\.safetensors: "):
        load(path)


def test_tensors_that_do_not_fit_are_refused_by_name(path):
    whole = load_file(path)
    header = {HEADER_KEY: json.dumps(CONFIG.to_dict())}
    for changes, complaint in (
        ({"fc.bias": None}, r"fc\.bias"),
        ({"fc.bias": torch.zeros(3)}, r"fc\.bias"),
        ({"fc.bias": torch.zeros(2, dtype=torch.int64)}, r"fc\.bias"),
        ({"bn1.num_batches_tracked": torch.tensor(0.5)}, "num_batches_tracked"),
        ({"fc.bias": torch.tensor([0, torch.inf])}, "not finite"),
        ({"stray": torch.zeros(1)}, "stray"),
    ):
        tensors = {name: tensor for name, tensor in {**whole, **changes}.items() if tensor is not None}
        save_file(tensors, path, metadata=header)
        with pytest.raises(DataError, match=complaint):
            load(path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floats_of_another_size_become_the_nets_own(path, dtype):
    whole = load_file(path)
    floats = {name: tensor.to(dtype) for name, tensor in whole.items() if tensor.is_floating_point()}
    counts = {"bn1.num_batches_tracked": whole["bn1.num_batches_tracked"].to(torch.uint8)}
    save_file({**whole, **floats, **counts}, path, metadata={HEADER_KEY: json.dumps(CONFIG.to_dict())})
    net, _ = load(path)
    assert net(torch.zeros(1, 3, 24, 24)).shape == (1, 2)
    for name, tensor in net.state_dict().items():
        assert tensor.dtype == whole[name].dtype
        torch.testing.assert_close(tensor, floats.get(name, whole[name]).to(tensor.dtype))


def test_numbers_that_the_net_cannot_hold_are_refused_by_name(path):
    whole = load_file(path)
    header = {HEADER_KEY: json.dumps(CONFIG.to_dict())}
    for changes, complaint in (
        ({"fc.bias": torch.zeros(2).to(torch.float8_e4m3fn)}, r"fc\.bias should be float of 16 bits.*float8_e4m3fn"),
        ({"fc.bias": torch.zeros(2, dtype=torch.complex64)}, r"fc\.bias should be float.*complex64"),
        ({"fc.bias": torch.full((2,), 1e300, dtype=torch.float64)}, r"fc\.bias are not finite"),
        ({"bn1.num_batches_tracked": torch.tensor(True)}, "num_batches_tracked should be whole numbers.*bool"),
    ):
        save_file({**whole, **changes}, path, metadata=header)
        with pytest.raises(DataError, match=complaint):
            load(path)


NETWORK = """
import torch
from torch import nn

def net(classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(12, classes))

def nothing(classes):
    return 3

def sizeless(classes):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(classes))

def alone():
    return nn.Linear(12, 2)

def nowhere(classes):
    with torch.device("meta"):
        return net(classes)

def rounded(classes):
    made = net(classes)
    made.register_forward_hook(lambda _module, _inputs, scores: scores.round().long())
    return made
"""


@pytest.mark.filterwarnings("ignore:.*no-op")  # of what is loaded into a net without a place
def test_a_net_of_ones_own_is_made_by_the_function_that_is_named_and_no_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(NETWORK)
    net = build("mine.py:net", 2)
    config = ClassifierConfig("mine.py:net", ("a", "b"), 2)
    save(net.state_dict(), config, "model.safetensors")
    with pytest.raises(DataError, match=r"'mine\.py:net'.*--network"):
        load("model.safetensors")
    found, loaded = load("model.safetensors", "mine.py:net")
    assert loaded == config
    assert torch.equal(found[1].weight, net[1].weight)
    with pytest.raises(MemfitError, match="must return a torch"):
        load("model.safetensors", "mine.py:nothing")
    for network, complaint in (("nowhere", "fails with"), ("rounded", "torch.int64 scores")):
        with pytest.raises(MemfitError, match=rf"mine\.py:{network}: the model, given images .*{complaint}"):
            load("model.safetensors", f"mine.py:{network}")


def test_a_model_that_is_none_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(NETWORK)
    for name, complaint in (
        ("resnet50", "choose from resnet18, resnet34, mobilenet_v2"),
        ("mine.py:other", "no function 'other'"),
        ("absent.py:net", "no file"),
        ("mine.py:nothing", "not a int"),
        ("mine.py:sizeless", "parameters without a size"),
        ("mine.py:alone", r"mine\.py:alone is called with the number of classes, and takes \(\)"),
    ):
        with pytest.raises(MemfitError, match=complaint):
            build(name, 2)
    with pytest.raises(MemfitError, match="width"):
        build("mine.py:net", 2, width=0.5)


def test_nothing_is_allocated_for_a_file_that_lacks_what_its_header_claims(path, monkeypatch):
    made = []
    original = classifier.build

    def watched(*arguments):
        made.append(original(*arguments))
        return made[-1]

    monkeypatch.setattr(classifier, "build", watched)
    save_file(load_file(path), path, metadata={HEADER_KEY: json.dumps({**CONFIG.to_dict(), "width": 16})})
    with pytest.raises(DataError):
        load(path)
    assert all(parameter.is_meta for parameter in made[0].parameters())
