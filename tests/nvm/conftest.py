from pathlib import Path

import numpy
import pytest

from memfit.nvm.data import Images, load_images


@pytest.fixture(scope="module", autouse=True)
def in_one_thread(one_thread: None) -> None:
    """All of this room."""


def stripes(number: int, size: int = 8) -> dict[str, numpy.ndarray]:
    """Images of three classes that are easy to tell apart: a bar at the left, in the middle, at the right."""
    random = numpy.random.default_rng(0)
    labels = random.integers(0, 3, number)
    images = random.integers(0, 40, (number, size, size))
    for image, label in zip(images, labels, strict=True):
        image[:, 1 + 2 * label : 3 + 2 * label] += 180
    return {"x_train": images.astype("uint8"), "y_train": labels}


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ``.npz`` file of such images."""
    path = tmp_path_factory.mktemp("data") / "stripes.npz"
    numpy.savez(path, **stripes(300))
    return path


@pytest.fixture(scope="session")
def images(data: Path) -> Images:
    return load_images(data)
