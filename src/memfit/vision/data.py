"""Labelled images, to train on and to test with: a folder with a subfolder for each class, or arrays in an ``.npz``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy
import torch
from torch import Tensor

from memfit.errors import DataError
from memfit.run.arrays import read_arrays
from memfit.run.held_out import hold_out
from memfit.run.identity import digest
from memfit.vision.images import SUFFIXES, decode_image, from_array, load_image, read_image

KEPT_BYTES = 256 << 20
"""Up to so many bytes of pixels stay in memory; more are read again whenever they are needed."""

_ARRAYS = ("x_train", "y_train", "x_test", "y_test")
_LAYOUT = "put the images of each class into a subfolder with the class's name"


class Images:
    """Labelled images, each a square of ``size`` pixels.

    Args:
        names: of each image, for reports.
        labels: class numbers, int64 of shape ``(images,)``.
        read: gives an image by its place: uint8 of shape ``(size, size, 3)``.
        kept: all images at once, uint8 of shape ``(images, size, size, 3)``, or None where each is read when needed.
    """

    def __init__(
        self, names: Sequence[str], labels: Tensor, read: Callable[[int], Tensor], kept: Tensor | None
    ) -> None:
        self.names, self.labels = list(names), labels
        self._read, self._kept = read, kept

    def __len__(self) -> int:
        return len(self.names)

    def pixels(self, chosen: Sequence[int]) -> Tensor:
        """The chosen images: uint8 of shape ``(len(chosen), size, size, 3)``."""
        if self._kept is not None:
            return self._kept[list(chosen)]
        return torch.stack([self._read(index) for index in chosen])


@dataclass(frozen=True)
class ImageData:
    """What a folder or file of images holds.

    Attributes:
        classes: names by class number.
        train: images to train on, at least one of each class.
        test: held-out images.
        description: a sentence for reports.
        sha256: of names, labels and contents.
    """

    classes: tuple[str, ...]
    train: Images
    test: Images
    description: str
    sha256: str


def load_images(path: str | Path, size: int) -> ImageData:
    """Read labelled images.

    Args:
        path: one of three:

            - a folder with a subfolder for each class. A fifth of the images of each class is held out; which ones is
              decided by a hash of the file names alone;
            - a folder with such folders ``train`` and ``val``, or ``test`` in place of ``val``;
            - an ``.npz`` file with ``x_train`` (images, height, width), or one more axis of 1 or 3 colours, uint8;
              ``y_train`` (images,), whole numbers from 0; ``x_test`` and ``y_test``; and, where wanted, ``classes``,
              their names.
        size: pixels of each image's side; see :func:`memfit.vision.images.load_image`.

    Raises:
        DataError: anything is wrong with the folder, an image or an array; the message names it.
        MissingExtraError: Pillow is not installed.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _from_folder(path, size)
        if not path.exists():
            raise DataError(f"{path}: there is no such folder or file.")
        if path.suffix != ".npz":
            raise DataError(f"{path}: this is a file; give a folder of images, or an .npz file of arrays.")
        return _from_arrays(path, size)
    except OSError as error:
        raise DataError(f"{path}: the data cannot be read: {error.strerror or error}.") from error


@dataclass(frozen=True)
class _File:
    path: Path
    name: str
    label: int


def _from_folder(folder: Path, size: int) -> ImageData:
    root = folder / "train" if _subfolders(folder / "train") else folder
    classes = [entry.name for entry in _subfolders(root)]
    if not classes:
        raise DataError(f"{root}: has no subfolders; {_LAYOUT}.")
    files, others = _files(root, folder, classes)
    if len(classes) == 1:
        raise DataError(f"{root}: has the one class {classes[0]!r}; at least two are needed to tell apart.")
    held_out = next((folder / name for name in ("val", "test") if _subfolders(folder / name)), None)
    if root == folder or held_out is None:
        train, test = _hold_out(root, files, classes)
    else:
        unknown = [entry.name for entry in _subfolders(held_out) if entry.name not in classes]
        if unknown:
            raise DataError(f"{held_out / unknown[0]}: {root} has no class of that name; {_LAYOUT}, the same in both.")
        train = files
        test, other_files = _files(held_out, folder, classes)
        others += other_files
    keep = (len(train) + len(test)) * size**2 * 3 <= KEPT_BYTES
    (train_images, train_sha256), (test_images, test_sha256) = (
        _load_files(share, size, keep) for share in (train, test)
    )
    more = f", {others} other files left out" if others else ""
    description = _describe(folder, train_images, test_images, classes, more)
    sha256 = digest((*classes, train_sha256, test_sha256))
    return ImageData(tuple(classes), train_images, test_images, description, sha256)


def _subfolders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _files(root: Path, folder: Path, classes: Sequence[str]) -> tuple[list[_File], int]:
    """The images of each class that has a subfolder in ``root``, and the number of files that are none."""
    files: list[_File] = []
    others = 0
    for label, name in enumerate(classes):
        if not (root / name).is_dir():
            continue
        entries = sorted(entry for entry in (root / name).iterdir() if not entry.name.startswith("."))
        images = [entry for entry in entries if entry.suffix.lower() in SUFFIXES]
        if not images:
            raise DataError(f"{root / name}: has no images (JPEG, PNG, ...); add some, or remove the folder.")
        others += len(entries) - len(images)
        files += [_File(path, path.relative_to(folder).as_posix(), label) for path in images]
    return files, others


def _hold_out(root: Path, files: Sequence[_File], classes: Sequence[str]) -> tuple[list[_File], list[_File]]:
    train: list[_File] = []
    test: list[_File] = []
    for label, name in enumerate(classes):
        own = [file for file in files if file.label == label]
        if len(own) < 2:
            raise DataError(
                f"{root / name}: has one image; at least 2 are needed, one to train on and one to test with."
            )
        for share, more in zip((train, test), hold_out(own, [file.name for file in own]), strict=True):
            share += more
    return train, test


def _load_files(files: Sequence[_File], size: int, keep: bool) -> tuple[Images, str]:
    """The images, each decoded once, so that a damaged one is found now and not in the middle of the training."""
    kept = torch.empty(len(files), size, size, 3, dtype=torch.uint8) if keep else None

    def contents() -> Iterable[str | bytes]:
        for index, file in enumerate(files):
            payload = read_image(file.path)
            pixels = decode_image(payload, file.path, size)
            if kept is not None:
                kept[index] = pixels
            yield file.name
            yield payload

    sha256 = digest(contents())
    labels = torch.tensor([file.label for file in files])
    return Images(
        [file.name for file in files], labels, lambda index: load_image(files[index].path, size), kept
    ), sha256


def _from_arrays(path: Path, size: int) -> ImageData:
    arrays = read_arrays(path, _ARRAYS, ("classes",))
    x_train, x_test = (_checked_pixels(path, name, arrays[name]) for name in ("x_train", "x_test"))
    y_train, y_test = (_checked_labels(path, name, arrays[name]) for name in ("y_train", "y_test"))
    for part, x, y in (("train", x_train, y_train), ("test", x_test, y_test)):
        if len(x) != len(y):
            raise DataError(f"{path}: x_{part} has {len(x)} images, but y_{part} {len(y)} labels.")
    classes = _classes(path, arrays.get("classes"), y_train)
    for name, y in (("y_train", y_train), ("y_test", y_test)):
        if y.min() < 0 or y.max() >= len(classes):
            wrong = int(y.min() if y.min() < 0 else y.max())
            raise DataError(f"{path}: {name} has the label {wrong}; labels are from 0 to {len(classes) - 1}.")
    present = set(numpy.unique(y_train).tolist())
    empty = [name for label, name in enumerate(classes) if label not in present]
    if empty:
        raise DataError(
            f"{path}: the class {empty[0]!r} has no images in x_train; add some, or number the classes anew."
        )
    if len(classes) < 2:
        raise DataError(f"{path}: has the one class {classes[0]!r}; at least two are needed to tell apart.")
    keep = (len(x_train) + len(x_test)) * size**2 * 3 <= KEPT_BYTES
    train = _images_of("train", x_train, y_train, size, keep)
    test = _images_of("test", x_test, y_test, size, keep)
    parts = [torch.from_numpy(numpy.ascontiguousarray(array)) for array in (x_train, y_train, x_test, y_test)]
    return ImageData(classes, train, test, _describe(path, train, test, classes), digest((*classes, *parts)))


def _checked_pixels(path: Path, name: str, array: numpy.ndarray) -> numpy.ndarray:
    if array.dtype != numpy.uint8:
        raise DataError(
            f"{path}: {name} holds {array.dtype} numbers; images are uint8, from 0 (black) to 255: convert them."
        )
    if array.ndim not in (3, 4) or (array.ndim == 4 and array.shape[3] not in (1, 3)):
        raise DataError(
            f"{path}: {name} has the shape {array.shape}; it must be (images, height, width), with an axis of 1 or 3 "
            "colours at the end where there is one."
        )
    if 0 in array.shape:
        raise DataError(f"{path}: {name} has the shape {array.shape}, and with it no pixel at all.")
    return array


def _checked_labels(path: Path, name: str, array: numpy.ndarray) -> numpy.ndarray:
    if array.dtype.kind not in "iu":
        raise DataError(f"{path}: {name} holds {array.dtype} values; labels are whole numbers from 0.")
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise DataError(f"{path}: {name} has the shape {array.shape}; it must be (images,), one label for each.")
    return array.astype(numpy.int64)


def _classes(path: Path, names: numpy.ndarray | None, labels: numpy.ndarray) -> tuple[str, ...]:
    if names is not None:
        if names.ndim != 1 or names.dtype.kind not in "US" or len(names) == 0:
            raise DataError(f"{path}: classes must be a list of different names.")
        given = names.tolist()
        classes = tuple(name.decode(errors="replace") if isinstance(name, bytes) else str(name) for name in given)
        twice = next((name for name, number in Counter(classes).items() if number > 1), None)
        if twice is not None:
            read = " (read as UTF-8)" if names.dtype.kind == "S" else ""
            raise DataError(f"{path}: classes has the name {twice!r}{read} more than once; give different names.")
        return classes
    used = numpy.unique(labels).tolist()
    # Looked at before names are made: labels that are no class numbers may be as large as they like.
    gap = next((before + 1 for before, after in pairwise([-1, *used]) if after > before + 1), None)
    if gap is not None:
        raise DataError(f"{path}: no image in x_train has the label {gap}; number the classes from 0, without gaps.")
    return tuple(map(str, range(max(used) + 1)))


def _images_of(part: str, x: numpy.ndarray, y: numpy.ndarray, size: int, keep: bool) -> Images:
    read = partial(_image_of, x, size)
    names = [f"{part} {index}" for index in range(len(x))]
    if not keep:
        return Images(names, torch.from_numpy(y), read, None)
    kept = torch.empty(len(x), size, size, 3, dtype=torch.uint8)
    for index in range(len(x)):
        kept[index] = read(index)
    return Images(names, torch.from_numpy(y), kept.__getitem__, kept)  # without the array, which is now needed no more


def _image_of(x: numpy.ndarray, size: int, index: int) -> Tensor:
    return from_array(x[index], size)


def _describe(path: Path, train: Images, test: Images, classes: Sequence[str], more: str = "") -> str:
    return (
        f"images from {path}: {len(train)} training images and {len(test)} held-out test images of "
        f"{len(classes)} classes{more}"
    )
