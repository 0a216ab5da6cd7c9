import pytest
import torch
from torch import Tensor

from memfit.nvm.augment import background_gradient, elastic, spatial, white_noise

KINDS = [elastic, spatial, background_gradient, white_noise]


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def squares(count: int = 6, size: int = 28) -> Tensor:
    images = torch.zeros(count, 1, size, size)
    images[:, :, size // 4 : size // 2, size // 4 : -size // 4] = 1
    return images


@pytest.mark.parametrize("augment", KINDS)
@pytest.mark.parametrize("size", [8, 28])
def test_images_stay_images_each_changes_in_its_own_way_and_the_input_stays(augment, size):
    images = squares(size=size)
    before = images.clone()
    found = augment(images, random())
    assert torch.equal(images, before)
    assert found.shape == images.shape
    assert 0 <= float(found.min()) <= float(found.max()) <= 1
    assert all(not torch.equal(found[0], other) for other in found[1:])
    assert torch.equal(found, augment(images, random()))
    assert not torch.equal(found, augment(images, random(1)))


def test_no_strength_changes_nothing():
    images = squares()
    for found in (
        elastic(images, random(), strength=0),
        spatial(images, random(), rotation=0, scale=0, shift=0, shear=0),
        background_gradient(images, random(), strength=0),
        white_noise(images, random(), strength=0),
    ):
        torch.testing.assert_close(found, images, atol=1e-5, rtol=0)


def test_the_elastic_field_has_the_displacement_that_was_asked_for():
    # A ramp across: its value tells where each pixel came from.
    ramp = torch.linspace(0, 1, 28).view(1, 1, 1, 28).expand(200, 1, 28, 28).contiguous()
    moved = elastic(ramp, random(), strength=1.5)
    inside = (slice(None), slice(None), slice(5, -5), slice(5, -5))
    across = (moved[inside] - ramp[inside]) * 27
    assert float(across.square().mean().sqrt()) == pytest.approx(1.5, rel=0.25)
    neighbours = across[..., 1:] - across[..., :-1]
    assert float(neighbours.abs().max()) < 2.5  # smooth


def test_a_shift_moves_the_whole_image_by_no_more_than_was_asked_for():
    images = torch.zeros(50, 1, 28, 28)
    images[:, :, 12:16, 12:16] = 1
    found = spatial(images, random(), rotation=0, scale=0, shift=0.1, shear=0)
    at = torch.arange(28.0)
    for axis in (2, 3):
        weights = found.sum(dim=5 - axis).squeeze(1)
        centre = (weights * at).sum(1) / weights.sum(1)
        moved = (centre - 13.5).abs()
        assert float(moved.max()) <= 2.8 + 1e-4
        assert float(moved.max()) > 1.5


def test_a_background_gradient_is_linear_and_leaves_the_ink():
    images = squares(50)
    found = background_gradient(images, random(), strength=0.7)
    assert torch.equal(found[images == 1], images[images == 1])
    rows = found[:, 0, 0]  # where there is no ink
    torch.testing.assert_close(rows[:, 2:] - 2 * rows[:, 1:-1] + rows[:, :-2], torch.zeros(50, 26), atol=1e-5, rtol=0)
    assert 0.35 < float(found[images == 0].max()) <= 0.7


def test_white_noise_has_its_strength_on_every_pixel_alone():
    grey = torch.full((20, 1, 28, 28), 0.5)
    noise = white_noise(grey, random(), strength=0.1) - grey
    assert float(noise.std()) == pytest.approx(0.1, rel=0.03)
    assert float((noise[..., 1:] * noise[..., :-1]).mean()) == pytest.approx(0, abs=5e-4)
