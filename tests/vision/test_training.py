"""What is frozen stays, in weights and in statistics, and what cannot be trained is said before training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from memfit.errors import MemfitError
from memfit.vision.models import ZOO
from memfit.vision.training import check_scores, fewest_images, train_only


@pytest.mark.parametrize("name", ZOO)
def test_only_what_is_named_trains_and_frozen_batch_norms_keep_their_statistics(name):
    torch.manual_seed(0)
    net = ZOO[name].build(3, width=0.125)
    last = ZOO[name].last_stage
    train_only(net, last)
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(torch.randn(4, 3, 64, 64)).square().sum().backward()
    optimizer.step()
    for key, tensor in net.state_dict().items():
        trained = any(key.startswith(f"{prefix}.") for prefix in last)
        assert torch.equal(tensor, before[key]) != trained, key


def test_globs_and_names_add_up_and_a_star_is_everything():
    net = ZOO["resnet18"].build(3, width=0.125)
    train_only(net, ["*"])
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert all(module.training for module in net.modules())
    train_only(net, ["layer1.*.bn2", "fc"])
    trained = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    norms = {f"layer1.{block}.bn2.{name}" for block in (0, 1) for name in ("weight", "bias")}
    assert trained == {"fc.weight", "fc.bias", *norms}
    assert net.layer1[0].bn2.training
    assert not net.layer1[0].bn1.training


def test_a_batch_norm_without_weights_of_its_own_keeps_its_statistics_only_if_it_is_not_named():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False), nn.Flatten(), nn.Linear(4, 2))
    train_only(net, ["*"])
    assert net[1].training
    train_only(net, ["3"])
    assert not net[1].training


def test_what_matches_nothing_or_has_nothing_to_train_is_refused_by_name():
    net = ZOO["resnet18"].build(3, width=0.125)
    with pytest.raises(MemfitError, match=r"'layer9\.\*': its modules are 'conv1'"):
        train_only(net, ["fc", "layer9.*"])
    with pytest.raises(MemfitError, match="'relu' has no parameters"):
        train_only(net, ["relu"])


class Shapeless(nn.Module):
    def __init__(self, found: object) -> None:
        super().__init__()
        self.found = found

    def forward(self, x: torch.Tensor) -> object:
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


@pytest.mark.parametrize(
    ("found", "complaint"),
    [
        (torch.zeros(1, 4), r"gives \(1, 4\), and should give scores of shape \(1, 3\)"),
        (torch.zeros(3), r"gives \(3,\)"),
        ((torch.zeros(1, 3), None), "gives a tuple"),
        (
            RuntimeError("mat1 and mat2\nand more\n\nCPU: registered at"),
            r"fails with RuntimeError: mat1 and mat2 and more \(at .*test_training\.py:",
        ),
        (ValueError(), "fails with ValueError: no message"),
    ],
)
def test_a_net_that_does_not_suit_the_images_is_refused_before_training(found, complaint):
    with pytest.raises(MemfitError, match=complaint) as refused:
        check_scores(Shapeless(found), "mine.py:net", 3, 32)
    assert "mine.py:net: the model, given images of shape (1, 3, 32, 32)," in str(refused.value)


def test_a_batch_norm_that_sees_one_value_for_each_image_needs_two():
    net = ZOO["resnet18"].build(3, width=0.125)
    assert [fewest_images(net, size) for size in (32, 33)] == [2, 1]
    train_only(net, ["fc"])
    assert fewest_images(net, 32) == 1
    assert all(not module.training for module in net.modules() if isinstance(module, nn.BatchNorm2d))
