"""Pictures for the tests of the vision room: made up ones, learned in seconds, and real ones where they are at hand."""

from __future__ import annotations

import os
from pathlib import Path

import numpy
import pytest

COLOURS = {"blue": (40, 60, 200), "green": (50, 180, 60), "red": (210, 50, 40)}


def pictures(per_class: int, seed: int, size: int = 20) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Noisy patches of one colour for each class, in mixed order: uint8 ``(images, size, size, 3)``, and labels."""
    generator = numpy.random.default_rng(seed)
    labels = generator.permutation(numpy.arange(len(COLOURS)).repeat(per_class))
    tints = numpy.array(list(COLOURS.values()))[labels][:, None, None]
    noise = generator.normal(0, 30, (len(labels), size, size, 3))
    return (tints + noise).clip(0, 255).astype(numpy.uint8), labels


@pytest.fixture(scope="module", autouse=True)
def in_one_thread(one_thread: None) -> None:
    """All of this room."""


@pytest.fixture(scope="session")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ``.npz`` of three classes; must not be changed."""
    path = tmp_path_factory.mktemp("arrays") / "colours.npz"
    x_train, y_train = pictures(8, seed=0)
    x_test, y_test = pictures(4, seed=1)
    numpy.savez(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test, classes=list(COLOURS))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with 5 images of each class."""
    image_module = pytest.importorskip("PIL.Image", reason='needs pip install "memfit[vision]"')
    root = tmp_path / "images"
    x, y = pictures(5, seed=0)
    for number, (pixels, label) in enumerate(zip(x, y, strict=True)):
        place = root / list(COLOURS)[label]
        place.mkdir(parents=True, exist_ok=True)
        image_module.fromarray(pixels).save(place / f"{number:02}.png")
    return root


@pytest.fixture(scope="session")
def cifar() -> Path:
    """The subset of CIFAR-10."""
    root = Path(__file__).parents[2]
    path = Path(os.environ.get("MEMFIT_DATA", root.parent / "shared" / "data")) / "cifar10-subset.npz"
    if not path.is_file():
        pytest.skip(f"needs the CIFAR-10 subset {path} (set MEMFIT_DATA)")
    return path
