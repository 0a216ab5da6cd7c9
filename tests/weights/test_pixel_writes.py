import pytest
import torch
import torch.nn.functional as F
from torch import nn

from memfit.weights.pixel_writes import PixelWrites


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(2, 3, 3, padding=1),
        nn.Conv2d(2, 3, (3, 2), stride=2, dilation=2),
        nn.Conv2d(2, 4, 3, padding="same", padding_mode="reflect"),
    ],
)
def test_each_pixel_whose_term_is_not_zero_counts(layer: nn.Conv2d):
    torch.manual_seed(0)
    counter = PixelWrites(layer)
    expected = torch.zeros_like(layer.weight)
    for _ in range(3):
        x = torch.rand(1, 2, 7, 8) * (torch.rand(1, 2, 7, 8) < 0.6)
        y = layer(x)
        d = torch.randn_like(y) * (torch.rand_like(y) < 0.4)
        y.backward(d)
        padding = (0,) * 4 if isinstance(layer.padding, tuple) else (1,) * 4
        padded = F.pad(x, padding, mode="reflect") if any(padding) else x
        zeros = (0, 0) if isinstance(layer.padding, str) else layer.padding
        patches = F.unfold(padded, layer.kernel_size, layer.dilation, zeros, layer.stride)[0]
        for pixel in range(patches.shape[1]):
            term = torch.outer(d.flatten(2)[0, :, pixel], patches[:, pixel])
            expected += (term != 0).view_as(expected)
    assert torch.equal(counter.writes.float(), expected)


def test_predictions_alone_are_no_writes():
    layer = nn.Conv2d(1, 1, 3)
    counter = PixelWrites(layer)
    with torch.no_grad():
        layer(torch.rand(1, 1, 5, 5))
    assert not counter.writes.any()
    assert "pixel_writes.writes" in layer.state_dict()
