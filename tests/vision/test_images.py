"""Any picture becomes an upright square of eight-bit red, green and blue, and anything else is one sentence."""

from __future__ import annotations

import io
from contextlib import suppress
from pathlib import Path

import numpy
import pytest
import torch

from memfit.errors import DataError, MissingExtraError
from memfit.vision import images
from memfit.vision.images import decode_image, from_array, load_image

Image = pytest.importorskip("PIL.Image", reason='needs pip install "memfit[vision]"')

# Red above blue: turns, flips and swapped colours all show.
PIXELS = numpy.zeros((12, 12, 3), numpy.uint8)
PIXELS[:6, :, 0] = 240
PIXELS[6:, :, 2] = 240


def decoded(image, size: int = 12, kind: str = "PNG", **options) -> torch.Tensor:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return decode_image(file.getvalue(), "picture", size)


def test_pixels_come_as_they_are():
    assert torch.equal(decoded(Image.fromarray(PIXELS)), torch.from_numpy(PIXELS))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "BMP", "TIFF", "PPM", "GIF"])
def test_other_formats_are_read(kind):
    found = decoded(Image.fromarray(PIXELS), kind=kind)
    assert (found.int() - torch.from_numpy(PIXELS).int())[[1, -2]].abs().max() < 25


def test_gray_is_all_three_colours():
    gray = numpy.arange(144, dtype=numpy.uint8).reshape(12, 12)
    expected = torch.from_numpy(gray)[:, :, None].expand(12, 12, 3)
    assert torch.equal(decoded(Image.fromarray(gray)), expected)
    assert torch.equal(from_array(gray, 12), expected)
    assert torch.equal(from_array(gray[:, :, None], 12), expected)


def test_sixteen_bits_become_eight_and_not_white():
    gray = numpy.arange(144, dtype=numpy.uint16).reshape(12, 12) * 257
    assert torch.equal(decoded(Image.fromarray(gray))[:, :, 0], torch.arange(144, dtype=torch.uint8).reshape(12, 12))


def test_black_and_white_a_palette_and_cmyk_are_colours():
    assert set(decoded(Image.fromarray(PIXELS[:, :, 0] > 0)).unique().tolist()) == {0, 255}
    assert torch.equal(decoded(Image.fromarray(PIXELS).quantize(4)), torch.from_numpy(PIXELS))
    assert decoded(Image.fromarray(PIXELS).convert("CMYK"), kind="TIFF")[0, 0].tolist() == [240, 0, 0]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(mode):
    image = Image.new("RGBA", (12, 12), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 6, 12))
    found = decoded(image.quantize(4) if mode == "P" else image.convert(mode))
    assert found[0, 0].tolist() == [0, 0, 0]
    assert found[0, -1].tolist() == [255, 255, 255]


@pytest.mark.parametrize(("orientation", "turn"), [(3, 2), (6, 1), (8, 3)])
def test_a_photograph_is_turned_upright(orientation, turn):
    # The camera stored the picture turned, and says so.
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = Image.fromarray(numpy.rot90(PIXELS, turn).copy())
    assert torch.equal(decoded(turned, exif=exif), torch.from_numpy(PIXELS))


def test_the_middle_of_the_longer_side_is_kept():
    wide = numpy.zeros((10, 30, 3), numpy.uint8)
    wide[:, 10:20] = 200
    assert torch.equal(decoded(Image.fromarray(wide), size=10), torch.full((10, 10, 3), 200, dtype=torch.uint8))
    assert torch.equal(from_array(wide, 10), torch.full((10, 10, 3), 200, dtype=torch.uint8))


@pytest.mark.parametrize("size", [1, 5, 40])
def test_a_file_and_an_array_are_scaled_alike(size):
    x = numpy.random.default_rng(0).integers(0, 256, (17, 23, 3), dtype=numpy.uint8)
    found = from_array(x, size)
    assert found.shape == (size, size, 3)
    assert found.dtype == torch.uint8
    assert torch.equal(decoded(Image.fromarray(x), size=size), found)


def test_a_large_jpeg_is_scaled_as_a_whole_one_would_be():
    x = numpy.linspace(0, 255, 600, dtype=numpy.uint8)[None, :, None].repeat(600, 0).repeat(3, 2)
    found = decoded(Image.fromarray(x), size=20, kind="JPEG")
    assert (found.int() - from_array(x, 20).int()).abs().max() <= 4


def png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "PNG")
    return file.getvalue()


def jpeg() -> bytes:
    file = io.BytesIO()
    Image.fromarray(numpy.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=numpy.uint8)).save(file, "JPEG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "empty"),
        (b"not an image at all", "not an image"),
        (png()[:20], "image"),
        (png()[:-30], "damaged"),
        (jpeg()[: len(jpeg()) // 2], "damaged"),
    ],
    ids=["empty", "text", "header", "png", "jpeg"],
)
def test_a_damaged_file_is_one_sentence_with_its_name(tmp_path, content, complaint):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(DataError, match=complaint) as refused:
        load_image(path, 12)
    assert str(refused.value).startswith(f"{path}: ")


@pytest.mark.parametrize("whole", [png(), jpeg()], ids=["png", "jpeg"])
def test_no_damage_to_a_file_gets_past(whole):
    """Bytes changed at random: read all the same, or a DataError, and nothing else."""
    generator = numpy.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(whole)
        for place in generator.integers(0, len(whole), 3):
            damaged[place] = generator.integers(256)
        with suppress(DataError):
            assert decode_image(bytes(damaged), "picture", 12).shape == (12, 12, 3)


def test_floating_point_pixels_and_pixel_bombs_are_refused(monkeypatch):
    with pytest.raises(DataError, match="floating-point"):
        decoded(Image.fromarray(numpy.zeros((4, 4), numpy.float32)), kind="TIFF")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(DataError, match="too many pixels"):
        decoded(Image.fromarray(PIXELS))


def test_what_is_no_file_is_refused_by_name(tmp_path):
    for path, complaint in (
        (tmp_path, "a folder"),
        (tmp_path / "missing.png", "no such image"),
        (tmp_path / "n\0ull", "no such image"),
        (Path("/dev/null"), "a device"),
        (tmp_path / ("n" * 300), "cannot be read"),
    ):
        with pytest.raises(DataError, match=complaint):
            load_image(path, 12)


def test_without_pillow_the_extra_is_named_and_arrays_of_the_right_size_need_none(monkeypatch):
    def missing(module: str, extra: str):
        raise MissingExtraError(f"{module} {extra}")

    monkeypatch.setattr(images, "require", missing)
    assert torch.equal(from_array(PIXELS, 12), torch.from_numpy(PIXELS))
    for needs in (lambda: from_array(PIXELS, 10), lambda: decode_image(png(), "picture", 12)):
        with pytest.raises(MissingExtraError, match="vision"):
            needs()
