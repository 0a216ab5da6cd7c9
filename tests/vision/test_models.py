"""The zoo's nets are the published ones, with torchvision's keys."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from memfit.vision.models import ZOO, mobilenet_v2, resnet18, resnet34


def copied_in_order(source: nn.Module, target: nn.Module) -> None:
    """Fill a net with another's state; both register their layers in the order of the forward pass."""
    ours, theirs = target.state_dict(), source.state_dict()
    assert len(ours) == len(theirs)
    target.load_state_dict(dict(zip(ours, theirs.values(), strict=True)))


def unlike_at_birth(net: nn.Module) -> None:
    """Statistics and scales that would show a batch norm at the wrong place."""
    torch.manual_seed(1)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.running_var):
                    tensor.uniform_(0.5, 1.5)
                for tensor in (module.bias, module.running_mean):
                    tensor.uniform_(-0.3, 0.3)


@pytest.mark.parametrize(
    ("build", "parameters", "entries"),
    [(resnet18, 11_689_512, 122), (resnet34, 21_797_672, 218), (mobilenet_v2, 3_504_872, 314)],
)
def test_a_net_has_the_published_number_of_parameters(build, parameters, entries):
    with torch.device("meta"):
        net = build(1000)
    assert sum(parameter.numel() for parameter in net.parameters()) == parameters
    assert len(net.state_dict()) == entries


def test_the_keys_are_torchvisions():
    with torch.device("meta"):
        resnet, mobilenet = resnet18(1000).state_dict(), mobilenet_v2(1000).state_dict()
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]

    def block(name: str, downsample: bool = False) -> list[str]:
        both = [key for i in (1, 2) for key in (f"conv{i}.weight", *(f"bn{i}.{each}" for each in norm))]
        around = ["downsample.0.weight", *(f"downsample.1.{each}" for each in norm)] if downsample else []
        return [f"{name}.{key}" for key in (*both, *around)]

    blocks = [key for s in range(1, 5) for b in range(2) for key in block(f"layer{s}.{b}", s > 1 and b == 0)]
    expected = ["conv1.weight", *(f"bn1.{each}" for each in norm), *blocks, "fc.weight", "fc.bias"]
    assert sorted(resnet) == sorted(expected)
    shapes = {
        "conv1.weight": (64, 3, 7, 7),
        "layer2.0.downsample.0.weight": (128, 64, 1, 1),
        "layer4.1.conv2.weight": (512, 512, 3, 3),
        "fc.weight": (1000, 512),
    }
    assert {name: tuple(resnet[name].shape) for name in shapes} == shapes

    shapes = {
        "features.0.0.weight": (32, 3, 3, 3),
        "features.0.1.running_mean": (32,),
        "features.1.conv.0.0.weight": (32, 1, 3, 3),
        "features.1.conv.1.weight": (16, 32, 1, 1),
        "features.1.conv.2.weight": (16,),
        "features.2.conv.0.0.weight": (96, 16, 1, 1),
        "features.2.conv.1.0.weight": (96, 1, 3, 3),
        "features.2.conv.2.weight": (24, 96, 1, 1),
        "features.2.conv.3.num_batches_tracked": (),
        "features.17.conv.2.weight": (320, 960, 1, 1),
        "features.18.0.weight": (1280, 320, 1, 1),
        "classifier.1.weight": (1000, 1280),
        "classifier.1.bias": (1000,),
    }
    assert {name: tuple(mobilenet[name].shape) for name in shapes} == shapes


@pytest.mark.parametrize(("build", "depths"), [(resnet18, [2, 2, 2, 2]), (resnet34, [3, 4, 6, 3])])
def test_a_resnet_computes_what_that_of_transformers_does(build, depths):
    transformers = pytest.importorskip("transformers", reason='needs pip install "memfit[hf]"')
    torch.manual_seed(0)
    ours = build(10, width=0.25).eval()
    unlike_at_birth(ours)
    widths = [16, 32, 64, 128]
    theirs = transformers.ResNetForImageClassification(
        transformers.ResNetConfig(
            depths=depths, layer_type="basic", hidden_sizes=widths, embedding_size=16, num_labels=10
        )
    ).eval()
    names = {
        **{f"layer.{i}.convolution": f"conv{i + 1}" for i in range(2)},
        **{f"layer.{i}.normalization": f"bn{i + 1}" for i in range(2)},
        "shortcut.convolution": "downsample.0",
        "shortcut.normalization": "downsample.1",
    }

    def ours_by_their_name(name: str) -> Tensor:
        for their_prefix, our_prefix in (
            ("resnet.embedder.embedder.convolution", "conv1"),
            ("resnet.embedder.embedder.normalization", "bn1"),
            ("classifier.1", "fc"),
        ):
            if name.startswith(their_prefix):
                return state[our_prefix + name.removeprefix(their_prefix)]
        _, _, _, stage, _, block, rest = name.split(".", 6)
        part, _, last = rest.rpartition(".")
        return state[f"layer{int(stage) + 1}.{block}.{names[part]}.{last}"]

    state = ours.state_dict()
    theirs.load_state_dict({name: ours_by_their_name(name) for name in theirs.state_dict()})
    images = torch.randn(2, 3, 75, 64)
    torch.testing.assert_close(ours(images), theirs(images).logits, rtol=1e-4, atol=1e-5)


def test_a_mobilenet_computes_what_that_of_transformers_does():
    transformers = pytest.importorskip("transformers", reason='needs pip install "memfit[hf]"')
    torch.manual_seed(0)
    ours = mobilenet_v2(10, width=0.5).eval()
    unlike_at_birth(ours)
    theirs = transformers.MobileNetV2ForImageClassification(
        transformers.MobileNetV2Config(
            depth_multiplier=0.5, tf_padding=False, layer_norm_eps=1e-5, finegrained_output=True, num_labels=10
        )
    ).eval()
    copied_in_order(ours, theirs)
    images = torch.randn(2, 3, 64, 96)
    torch.testing.assert_close(ours(images), theirs(images).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ZOO)
def test_width_channels_and_classes_are_chosen_freely_and_the_last_stage_exists(name):
    entry = ZOO[name]
    net = entry.build(7, width=0.3, channels=1).eval()
    assert net(torch.randn(3, 1, 40, 33)).shape == (3, 7)
    assert all(tensor.shape[0] % 8 == 0 for key, tensor in net.state_dict().items() if key.endswith("running_mean"))
    last = [part for path in entry.last_stage for part in net.get_submodule(path).parameters()]
    assert 0 < len(last) < len(list(net.parameters()))


@pytest.mark.parametrize("arguments", [{"classes": 0}, {"classes": 2, "width": 0.0}, {"classes": 2, "channels": 0}])
@pytest.mark.parametrize("name", ZOO)
def test_an_argument_out_of_range_is_refused_by_name(name, arguments):
    with pytest.raises(ValueError, match=list(arguments)[-1]):
        ZOO[name].build(**arguments)
