"""Images of single characters with their labels: MNIST from a file of the user's, or scikit-learn's small digits."""

from __future__ import annotations

import gzip
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from torch import Tensor

from memfit.errors import DataError, require
from memfit.files import read_file
from memfit.run.arrays import read_arrays

_IDX = {
    "x_train": "train-images",
    "y_train": "train-labels",
    "x_test": "t10k-images",
    "y_test": "t10k-labels",
}
_HELD_OUT_SHARE = 5
_FEWEST = 20
_MOST_AXES = 3


@dataclass(frozen=True)
class Images:
    """Images to pretrain on, and others that the device meets online.

    Attributes:
        train: (n, 1, height, width), uint8, to pretrain on.
        train_labels: (n,), int64.
        online: (m, 1, height, width), uint8, none of which is in ``train``.
        online_labels: (m,), int64.
        classes: how many; labels are 0 to ``classes - 1``.
        description: a sentence for reports.
    """

    train: Tensor
    train_labels: Tensor
    online: Tensor
    online_labels: Tensor
    classes: int
    description: str

    @property
    def size(self) -> int:
        """Height and width."""
        return self.train.shape[-1]


def load_images(path: Path | None) -> Images:
    """Read images; the test images, or where there are none every fifth image, are for online learning.

    Args:
        path: an ``.npz`` file (``x_train`` (n, h, h) uint8, ``y_train``, and if there are any ``x_test``, ``y_test``),
            a folder of IDX files (``train-images-idx3-ubyte`` and its kin, gzipped or not), or None for the 1,797
            digits of 8 x 8 pixels that come with scikit-learn.

    Raises:
        DataError: the file cannot be used; the message says why.
        MissingExtraError: no path was given, and scikit-learn is not installed.
    """
    if path is None:
        return _scikit_learn_digits()
    try:
        if path.is_dir():
            arrays = _read_idx_folder(path)
        elif path.suffix == ".npz":
            arrays = read_arrays(path, ("x_train", "y_train"), ("x_test", "y_test"))
        else:
            raise DataError(f"{path}: give an .npz file with x_train and y_train, or a folder of IDX files.")
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file or folder.") from error
    except OSError as error:
        raise DataError(f"{path}: it can't be read ({error.strerror or error}).") from error
    return _images(arrays, str(path), path.name)


def _scikit_learn_digits() -> Images:
    datasets = require("sklearn.datasets", extra="nvm")
    digits = datasets.load_digits()
    # 16 levels of grey. They are ordered by writer: the last are other people's.
    images = (digits.images * (255 / 16)).round().astype("uint8")
    arrays = {"x_train": images, "y_train": digits.target}
    return _images(arrays, "scikit-learn's digits", "scikit-learn's digits of 8 x 8 pixels, not MNIST")


def _read_idx_folder(folder: Path) -> dict[str, numpy.ndarray]:
    arrays = {}
    for name, beginning in _IDX.items():
        files = sorted(entry for entry in os.listdir(folder) if entry.startswith(beginning))
        if files:
            arrays[name] = _read_idx(folder / files[0])
        elif name.endswith("train"):
            raise DataError(f"{folder}: there is no file {beginning}-idx{3 if name[0] == 'x' else 1}-ubyte[.gz] in it.")
    return arrays


def _read_idx(path: Path) -> numpy.ndarray:
    """An IDX file: two zero bytes, the type (8 is uint8), the number of axes, their sizes, the data."""
    content = read_file(path, "IDX file", DataError)
    try:
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: the gzip file is damaged.") from error
    axes = content[3] if len(content) >= 4 else 0
    sizes = (
        numpy.frombuffer(content[4 : 4 + 4 * axes], dtype=">u4").astype(int) if len(content) >= 4 + 4 * axes else None
    )
    if (
        content[:3] != b"\0\0\x08"
        or not 0 < axes <= _MOST_AXES
        or sizes is None
        or len(content) != 4 + 4 * axes + int(sizes.prod())
    ):
        raise DataError(f"{path}: this is no IDX file of bytes, or a truncated one.")
    return numpy.frombuffer(content, dtype="uint8", offset=4 + 4 * axes).reshape(tuple(sizes))


def _images(arrays: dict[str, numpy.ndarray], where: str, name: str) -> Images:
    """Checked, and split where there are no test images."""
    train, train_labels = _checked(arrays["x_train"], arrays["y_train"], where)
    if ("x_test" in arrays) != ("y_test" in arrays):
        raise DataError(f"{where}: of x_test and y_test there is only one.")
    if "x_test" in arrays:
        online, online_labels = _checked(arrays["x_test"], arrays["y_test"], where)
        if online.shape[1:] != train.shape[1:]:
            raise DataError(f"{where}: test images are of another size than the others.")
    else:
        first_online = len(train) - len(train) // _HELD_OUT_SHARE
        online, online_labels = train[first_online:], train_labels[first_online:]
        train, train_labels = train[:first_online], train_labels[:first_online]
    classes = 1 + int(max(train_labels.max(), online_labels.max()))
    if len(train_labels.unique()) < 2:
        raise DataError(f"{where}: all images are of one class: there is nothing to tell apart.")
    size = f"{train.shape[-2]} x {train.shape[-1]}"
    description = f"{name}: {len(train):,} images of {size} to pretrain on, {len(online):,} others online."
    return Images(train, train_labels, online, online_labels, classes, description)


def _checked(images: numpy.ndarray, labels: numpy.ndarray, where: str) -> tuple[Tensor, Tensor]:
    if images.ndim != 3 or images.dtype != numpy.uint8 or images.shape[1] != images.shape[2]:
        raise DataError(
            f"{where}: images must be an array (number, size, size) of uint8, not {images.dtype} {images.shape}."
        )
    if images.shape[1] < 8:
        raise DataError(f"{where}: images must be of 8 x 8 pixels or more, not {images.shape[1]} x {images.shape[2]}.")
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) != len(images):
        raise DataError(
            f"{where}: labels must be one whole number per image ({len(images)}), not {labels.dtype} {labels.shape}."
        )
    if len(images) < _FEWEST:
        raise DataError(f"{where}: {len(images)} images are too few: {_FEWEST} are the least.")
    if int(labels.min()) < 0 or int(labels.max()) > 255:
        raise DataError(f"{where}: labels must be from 0 to 255, not {labels.min()} to {labels.max()}.")
    return torch.tensor(images).unsqueeze(1), torch.tensor(labels.astype("int64"))
