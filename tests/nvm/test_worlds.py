import pytest
import torch

from memfit.nvm import CellArray
from memfit.nvm.worlds import CHUNK, WORLDS, ImageStream, drift_


@pytest.mark.parametrize("world", WORLDS)
def test_a_chunk_depends_on_the_seed_and_its_number_alone(images, world):
    stream = ImageStream(images, world, seed=3, shift_every=200)
    later, earlier = stream.chunk(5), stream.chunk(1)
    again = ImageStream(images, world, seed=3, shift_every=200)
    for one, other in zip((*earlier, *later), (*again.chunk(1), *again.chunk(5)), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(earlier[0], later[0])
    assert not torch.equal(earlier[0], ImageStream(images, world, seed=4, shift_every=200).chunk(1)[0])
    assert earlier[0].shape == (CHUNK, 1, 8, 8)
    assert earlier[0].dtype == torch.float32


def test_only_the_shifting_world_shows_other_images(images):
    control = ImageStream(images, "control", 0, shift_every=100)
    for world in ("analog", "digital"):
        assert torch.equal(control.chunk(2)[0], ImageStream(images, world, 0, shift_every=100).chunk(2)[0])
    shifted = ImageStream(images, "shift", 0, shift_every=100)
    labels = shifted.chunk(0)[1]
    assert [len(part.unique()) <= 2 for part in labels.split(50)] == [True, True]
    for number in range(1, 4):  # the same images, changed
        assert torch.equal(shifted.chunk(number)[1], control.chunk(number)[1])
        assert not torch.equal(shifted.chunk(number)[0], control.chunk(number)[0])
    # From the fifth on it begins anew.
    assert [len(part.unique()) <= 2 for part in shifted.chunk(4)[1].split(50)] == [True, True]


def test_the_noise_and_the_gradient_come_in_their_turn(images):
    shifted, control = (ImageStream(images, world, 0, shift_every=100) for world in ("shift", "control"))
    gradient = shifted.chunk(2)[0] - control.chunk(2)[0]
    assert float(gradient.min()) >= -1e-6  # a background is only added
    noise = shifted.chunk(3)[0] - control.chunk(3)[0]
    assert float(noise.std()) == pytest.approx(0.2, abs=0.1)
    assert float(noise.min()) < -0.2


def test_drift_comes_every_tenth_sample_and_only_in_its_worlds():
    arrays = [CellArray(torch.zeros(400)), CellArray(torch.zeros(3, 300))]
    for world in ("control", "shift"):
        for sample in range(1, 101):
            drift_(arrays, world, 0, sample)
        assert not any(array.values.any() for array in arrays)
    for sample in range(1, 1001):
        before = arrays[1].values.clone()
        drift_(arrays, "analog", 0, sample)
        assert torch.equal(before, arrays[1].values) == bool(sample % 10)
    # 10 / sqrt(100,000) each time, 100 times
    assert float(arrays[1].values.std()) == pytest.approx(0.316, rel=0.1)


def test_bits_flip_as_often_as_the_horizon_says():
    array = CellArray(torch.zeros(20_000))
    flips = 0
    for sample in range(10, 201, 10):
        before = (array.values / array.step).round().long() + 128
        drift_([array], "digital", 0, sample)
        after = (array.values / array.step).round().long() + 128
        flips += sum(int((((before ^ after) >> bit) & 1).sum()) for bit in range(8))
    # 160,000 bits, 20 times, 1e-4 each
    assert flips == pytest.approx(320, abs=5 * 320**0.5)


def test_the_same_drift_meets_all_devices_of_a_seed():
    for world in ("analog", "digital"):
        ones = [CellArray(torch.zeros(500)) for _ in range(3)]
        for seed, array in zip((7, 7, 8), ones, strict=True):
            for sample in range(10, 500, 10):
                drift_([array], world, seed, sample)
        assert torch.equal(ones[0].values, ones[1].values)
        assert not torch.equal(ones[0].values, ones[2].values)
