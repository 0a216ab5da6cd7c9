"""What may happen to images between the laboratory and the field. Pure functions; all randomness is the generator's.

Images are (batch, 1, height, width), float32, 0 (background) to 1 (ink); so are the results.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

_POINTS = 4  # of the elastic field's grid, each way


def elastic(images: Tensor, generator: Generator, strength: float = 0.8) -> Tensor:
    """Each image bent by a smooth random field of its own, as handwriting varies.

    The field is Gaussian noise on a grid of 4 x 4 points, with cubic interpolation between them.

    Args:
        strength: root mean square of the displacement, in 28ths of the image's size: pixels, for MNIST.

    Source: after Simard, Steinkraus and Platt, "Best Practices for Convolutional Neural Networks Applied to Visual
    Document Analysis", ICDAR 2003, who smooth noise by a Gaussian.
    """
    count, _, height, width = images.shape
    coarse = torch.randn(count, 2, _POINTS, _POINTS, generator=generator)
    field = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)
    # In units of the grid, on which the image reaches from -1 to 1.
    size = field.square().mean((1, 2, 3), keepdim=True).sqrt()
    field = field / size * (2 * strength / 28)
    upright = torch.eye(2, 3).expand(count, 2, 3)
    grid = F.affine_grid(upright, [count, 1, height, width], align_corners=False)
    return F.grid_sample(images, grid + field.permute(0, 2, 3, 1), align_corners=False).clamp_(0, 1)


def spatial(
    images: Tensor,
    generator: Generator,
    rotation: float = 20.0,
    scale: float = 0.15,
    shift: float = 0.1,
    shear: float = 0.2,
) -> Tensor:
    """Each image turned, scaled, moved and sheared at random, uniformly up to these amounts in either direction.

    Args:
        rotation: in degrees.
        scale: relative.
        shift: share of the image's size, each way.
        shear: horizontal move per height.
    """
    count, _, height, width = images.shape
    turn, size, lean, across, down = (2 * torch.rand(5, count, generator=generator) - 1).unbind()
    angle, size, lean = turn * math.radians(rotation), 1 + scale * size, shear * lean
    cos, sin = angle.cos() / size, angle.sin() / size
    rows = [cos, -sin + lean * cos, 2 * shift * across, sin, cos + lean * sin, 2 * shift * down]
    matrices = torch.stack(rows, 1).view(count, 2, 3)
    grid = F.affine_grid(matrices, [count, 1, height, width], align_corners=False)
    return F.grid_sample(images, grid, align_corners=False).clamp_(0, 1)


def background_gradient(images: Tensor, generator: Generator, strength: float = 0.7) -> Tensor:
    """Behind each image a linear gradient in a random direction, from 0 to a random brightness up to ``strength``."""
    count, _, height, width = images.shape
    angle, brightness = torch.rand(2, count, 1, 1, 1, generator=generator).unbind()
    angle = 2 * math.pi * angle
    ys = torch.linspace(-1, 1, height).view(1, 1, -1, 1)
    xs = torch.linspace(-1, 1, width).view(1, 1, 1, -1)
    along = xs * angle.cos() + ys * angle.sin()
    reach = angle.cos().abs() + angle.sin().abs()
    return torch.maximum(images, strength * brightness * (along / reach + 1) / 2)


def white_noise(images: Tensor, generator: Generator, strength: float = 0.3) -> Tensor:
    """Independent Gaussian noise of this standard deviation on every pixel."""
    return (images + strength * torch.randn(images.shape, generator=generator)).clamp_(0, 1)
