"""Batches come in an order that torch's global generator decides, and predictions leave the model as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from memfit.run.modes import evaluating
from memfit.vision.batches import DEVIATION, MEAN, Batches, cross_entropy, normalized, predict
from memfit.vision.data import Images


def numbered(count: int, size: int = 4) -> Images:
    """Images that can be told apart, also mirrored: the number in the left half."""
    pixels = torch.zeros(count, size, size, 3, dtype=torch.uint8)
    pixels[:, :, : size // 2] = torch.arange(1, count + 1)[:, None, None, None]
    return Images([str(index) for index in range(count)], torch.arange(count), lambda index: pixels[index], pixels)


def test_images_are_normalised_as_torchvisions_weights_want():
    pixels = torch.randint(0, 256, (2, 5, 6, 3), dtype=torch.uint8)
    found = normalized(pixels)
    assert found.is_contiguous(memory_format=torch.channels_last)
    for colour in range(3):
        expected = (pixels[..., colour] / 255.0 - MEAN[colour]) / DEVIATION[colour]
        torch.testing.assert_close(found[:, colour], expected, rtol=1e-5, atol=1e-6)


def test_every_image_comes_once_in_a_pass_with_its_label():
    torch.manual_seed(0)
    batches = Batches(numbered(7), 3)
    assert len(batches) == 3
    passes = [[batch.labels for batch in batches] for _ in range(2)]
    assert [len(labels) for labels in passes[0]] == [3, 3, 1]
    for labels in passes:
        assert sorted(torch.cat(labels).tolist()) == list(range(7))
    assert torch.cat(passes[0]).tolist() != torch.cat(passes[1]).tolist()
    expected = normalized(numbered(7).pixels(range(7)))
    for batch in batches:
        assert torch.equal(batch.images, expected[batch.labels])


def test_the_generators_state_at_the_beginning_decides_a_pass():
    batches = Batches(numbered(9), 4, flip=True)
    torch.manual_seed(5)
    expected = list(batches)
    torch.manual_seed(5)
    for batch, other in zip(batches, expected, strict=True):
        torch.rand(3)  # a dropout in between
        assert torch.equal(batch.images, other.images)


def test_about_half_of_the_images_are_mirrored_and_nothing_else_happens_to_them():
    torch.manual_seed(0)
    plain = normalized(numbered(200).pixels(range(200)))
    (batch,) = Batches(numbered(200), 200, flip=True)
    mirrored = sum(
        torch.equal(image, plain[label].flip(-1)) for image, label in zip(*vars(batch).values(), strict=True)
    )
    same = sum(torch.equal(image, plain[label]) for image, label in zip(*vars(batch).values(), strict=True))
    assert mirrored + same == 200
    assert 70 < mirrored < 130


def test_a_last_batch_of_too_few_images_is_left_out():
    assert [len(batch.labels) for batch in Batches(numbered(7), 3, fewest=2)] == [3, 3]
    assert [len(batch.labels) for batch in Batches(numbered(8), 3, fewest=2)] == [3, 3, 2]
    for count, size, fewest in ((1, 4, 2), (4, 1, 2), (4, 0, 1)):
        with pytest.raises(ValueError, match="no batch"):
            Batches(numbered(count), size, fewest=fewest)


def test_the_loss_is_the_mean_negative_log_probability():
    images = numbered(3)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    (batch,) = Batches(images, 3)
    probabilities = net(batch.images).softmax(1)
    expected = -torch.stack([probabilities[i, label].log() for i, label in enumerate(batch.labels)]).mean()
    torch.testing.assert_close(cross_entropy(net, batch), expected)


def test_predictions_are_of_eval_mode_and_leave_each_part_in_its_own():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.9), nn.Flatten(), nn.Linear(32, 5))
    net.train()
    net[1].eval()
    statistics = net[1].running_mean.clone()
    images = numbered(11)
    found = predict(net, images, batch_size=4)
    assert [module.training for module in net] == [True, False, True, True, True]
    assert torch.equal(net[1].running_mean, statistics)
    with evaluating(net):
        expected = net(normalized(images.pixels(range(11)))).argmax(1)
    assert torch.equal(found, expected)
    assert torch.equal(predict(net, images, [7, 2], batch_size=4), expected[[7, 2]])
