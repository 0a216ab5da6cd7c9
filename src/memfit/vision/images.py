"""One picture as numbers: whatever Pillow reads becomes a square of red, green and blue, upright, eight bits each."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy
import torch
from torch import Tensor

from memfit.errors import DataError, require
from memfit.files import read_file

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".avif"}
)

# What Pillow's readers raise for damaged files, as found by damaging files of each kind.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, LookupError, TypeError, OverflowError)


def load_image(path: str | Path, size: int) -> Tensor:
    """Read a picture.

    Args:
        path: a JPEG, PNG, WebP, BMP, GIF, TIFF or PNM file, or any other that Pillow reads.
        size: pixels of the square's side; the shorter side is brought to it, and the middle of the longer is kept.

    Returns:
        uint8 of shape ``(size, size, 3)``: red, green, blue. Turned upright where the camera noted how; transparent
        parts are white; gray is all three colours; 16 bits become 8; of an animation, the first picture.

    Raises:
        DataError: the file is missing, unreadable, damaged, or no picture.
        MissingExtraError: Pillow is not installed.
    """
    return decode_image(read_image(path), path, size)


def read_image(path: str | Path) -> bytes:
    """The content of a picture's file.

    Raises:
        DataError: it is missing, no ordinary file, or cannot be read.
    """
    return read_file(path, "image", DataError)


def decode_image(payload: bytes, where: str | Path, size: int) -> Tensor:
    """The same as :func:`load_image` of a file's content; ``where`` is what an error's message begins with."""
    image_module, operations = require("PIL.Image", extra="vision"), require("PIL.ImageOps", extra="vision")
    if not payload:
        raise DataError(f"{where}: the file is empty; remove it or fetch it again.")
    try:
        with warnings.catch_warnings():
            # A large photograph is no attack; from twice the size on Pillow refuses.
            warnings.simplefilter("ignore", image_module.DecompressionBombWarning)
            with image_module.open(io.BytesIO(payload)) as opened:
                opened.draft(
                    "RGB", (2 * size, 2 * size)
                )  # JPEGs are read at a fraction of their size where that is enough
                image = operations.exif_transpose(opened)
        return _square(_three_colours(image), size)
    except image_module.UnidentifiedImageError as error:
        raise DataError(f"{where}: not an image that can be read; remove it or save it as JPEG or PNG.") from error
    except image_module.DecompressionBombError as error:
        raise DataError(f"{where}: the image says that it has too many pixels; scale it down first.") from error
    except MemoryError as error:
        raise DataError(f"{where}: the image does not fit into memory; scale it down first.") from error
    except _DAMAGE as error:
        raise DataError(f"{where}: the image is damaged ({error}); remove it or fetch it again.") from error


def from_array(pixels: numpy.ndarray, size: int) -> Tensor:
    """A picture of an array: uint8 of shape ``(height, width)`` or ``(height, width, 1 or 3)``, as :func:`load_image`.

    Raises:
        MissingExtraError: it is of another size, and Pillow is not installed.
    """
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.shape[:2] == (size, size):
        return torch.from_numpy(numpy.broadcast_to(pixels, (size, size, 3)).copy())
    image_module = require("PIL.Image", extra="vision")
    image = image_module.fromarray(numpy.ascontiguousarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels))
    return _square(image.convert("RGB"), size)


def _three_colours(image: Image.Image) -> Image.Image:
    image_module = require("PIL.Image", extra="vision")
    if image.mode.startswith("I"):  # 16 bits of gray, which Pillow would cut off at 255
        gray = numpy.asarray(image).astype(numpy.int64)
        return image_module.fromarray((gray.clip(0, 65535) // 257).astype(numpy.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, whose range is unknown")
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = image_module.new("RGBA", image.size, "white")
        return image_module.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _square(image: Image.Image, size: int) -> Tensor:
    image_module, operations = require("PIL.Image", extra="vision"), require("PIL.ImageOps", extra="vision")
    if image.size != (size, size):
        image = operations.fit(image, (size, size), image_module.Resampling.BILINEAR)
    return torch.from_numpy(numpy.asarray(image).copy())
