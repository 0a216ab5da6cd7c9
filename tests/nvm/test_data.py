import gzip
import os
from pathlib import Path

import numpy
import pytest
import torch

from memfit.errors import DataError, MissingExtraError
from memfit.nvm.data import load_images

MNIST = Path(os.environ.get("MEMFIT_DATA", Path(__file__).parents[2] / "../shared/data")) / "mnist.npz"


def some(number: int = 40, size: int = 8, classes: int = 3) -> dict[str, numpy.ndarray]:
    random = numpy.random.default_rng(0)
    return {
        "x_train": random.integers(0, 256, (number, size, size)).astype("uint8"),
        "y_train": numpy.arange(number) % classes,
    }


def saved(path: Path, **arrays: object) -> Path:
    numpy.savez(path, **arrays)
    return path


def idx(array: numpy.ndarray) -> bytes:
    sizes = numpy.array(array.shape, dtype=">u4").tobytes()
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype("uint8").tobytes()


def test_online_images_are_the_test_images_or_a_fifth_that_is_not_trained_on(tmp_path):
    arrays = some()
    images = load_images(saved(tmp_path / "a.npz", **arrays))
    assert (len(images.train), len(images.online), images.classes, images.size) == (32, 8, 3, 8)
    assert torch.equal(torch.cat([images.train, images.online])[:, 0], torch.tensor(arrays["x_train"]))
    images = load_images(
        saved(tmp_path / "b.npz", **arrays, x_test=arrays["x_train"][:25], y_test=arrays["y_train"][:25])
    )
    assert (len(images.train), len(images.online)) == (40, 25)


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files_hold_what_the_npz_holds(tmp_path, zipped):
    arrays = some()
    for name, key in (("train-images-idx3-ubyte", "x_train"), ("train-labels-idx1-ubyte", "y_train")):
        content = idx(arrays[key])
        (tmp_path / (name + ".gz" * zipped)).write_bytes(gzip.compress(content) if zipped else content)
    ours, theirs = load_images(tmp_path), load_images(saved(tmp_path / "a.npz", **arrays))
    assert torch.equal(ours.train, theirs.train)
    assert torch.equal(ours.online_labels, theirs.online_labels)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x_train": numpy.zeros((40, 8, 8))}, "uint8"),
        ({"x_train": numpy.zeros((40, 8, 9), "uint8")}, "uint8"),
        ({"x_train": numpy.zeros((40, 4, 4), "uint8")}, "8 x 8 pixels or more"),
        ({"x_train": numpy.zeros((5, 8, 8), "uint8"), "y_train": numpy.arange(5)}, "too few"),
        ({"y_train": numpy.zeros(40)}, "whole number"),
        ({"y_train": numpy.arange(39)}, "whole number"),
        ({"y_train": numpy.arange(40) - 1}, "from 0"),
        ({"y_train": numpy.zeros(40, int)}, "one class"),
        ({"x_test": numpy.zeros((30, 8, 8), "uint8")}, "only one"),
        ({"x_test": numpy.zeros((30, 9, 9), "uint8"), "y_test": numpy.arange(30)}, "another size"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_in_one_sentence(tmp_path, change, words):
    path = saved(tmp_path / "a.npz", **{**some(), **change})
    with pytest.raises(DataError, match=words) as caught:
        load_images(path)
    assert str(path) in str(caught.value)


def test_files_that_are_none_are_refused_in_one_sentence(tmp_path):
    whole = saved(tmp_path / "whole.npz", **some()).read_bytes()
    for name, content in (
        ("cut.npz", whole[: len(whole) // 2]),
        ("empty.npz", b""),
        ("text.npz", b"hello"),
        ("picture.png", b"hello"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=name):
            load_images(tmp_path / name)
    with pytest.raises(DataError, match="no such"):
        load_images(tmp_path / "missing.npz")
    with pytest.raises(DataError, match="no array y_train"):
        load_images(saved(tmp_path / "half.npz", x_train=some()["x_train"]))
    with pytest.raises(DataError, match="plain arrays"):
        load_images(saved(tmp_path / "objects.npz", x_train=numpy.array([{}], dtype=object), y_train=[0]))
    folder = tmp_path / "idx"
    folder.mkdir()
    with pytest.raises(DataError, match="train-images"):
        load_images(folder)
    (folder / "train-images-idx3-ubyte").write_bytes(idx(some()["x_train"])[:-1])
    with pytest.raises(DataError, match="truncated"):
        load_images(folder)
    (folder / "train-images-idx3-ubyte").unlink()
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(some()["x_train"]))[:-9])
    with pytest.raises(DataError, match="damaged"):
        load_images(folder)


def test_without_a_path_the_digits_of_scikit_learn_are_plainly_called_that():
    pytest.importorskip("sklearn", reason="the small digits come with scikit-learn")
    images = load_images(None)
    assert (len(images.train) + len(images.online), images.size, images.classes) == (1797, 8, 10)
    assert "scikit-learn's digits of 8 x 8 pixels, not MNIST" in images.description
    assert int(images.train.max()) == 255


def test_without_a_path_and_scikit_learn_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtraError, match=r"memfit\[nvm\]"):
        load_images(None)


@pytest.mark.skipif(not MNIST.exists(), reason=f"{MNIST} is not there: MNIST as .npz")
def test_mnist_is_read():
    images = load_images(MNIST)
    assert (len(images.train), len(images.online), images.size, images.classes) == (60_000, 10_000, 28, 10)
