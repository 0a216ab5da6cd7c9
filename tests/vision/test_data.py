"""Labelled images are read whole and divided the same way each time, and what is wrong is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy
import pytest
import torch

from memfit.errors import DataError
from memfit.vision import data
from memfit.vision.data import load_images
from memfit.vision.images import load_image

pytest.importorskip("PIL", reason='needs pip install "memfit[vision]"')


def names(folder: Path, size: int = 8) -> tuple[list[str], list[str]]:
    found = load_images(folder, size)
    return found.train.names, found.test.names


def test_a_folder_is_divided_within_each_class(folder):
    found = load_images(folder, 8)
    assert found.classes == ("blue", "green", "red")
    assert found.train.labels.bincount().tolist() == [4, 4, 4]
    assert found.test.labels.bincount().tolist() == [1, 1, 1]
    assert not set(found.train.names) & set(found.test.names)
    assert "12 training images and 3 held-out test images of 3 classes" in found.description
    for images in (found.train, found.test):
        for index, name in enumerate(images.names):
            assert name.startswith(found.classes[images.labels[index]] + "/")
            assert torch.equal(images.pixels([index])[0], load_image(folder / name, 8))


def test_which_images_are_held_out_hardly_moves_when_some_are_added(folder):
    train, test = names(folder)
    shutil.copy(folder / "red" / Path(train[-1]).name, folder / "red" / "another.png")
    more_train, more_test = names(folder)
    assert set(more_train) | set(more_test) == {*train, *test, "red/another.png"}
    assert len(set(test) - set(more_test)) <= 1
    assert [name for name in more_test if "red" not in name] == [name for name in test if "red" not in name]


@pytest.mark.parametrize("held_out", ["val", "test"])
def test_folders_for_training_and_testing_are_taken_as_they_are(folder, tmp_path, held_out):
    for part, numbers in (("train", slice(0, 3)), (held_out, slice(3, 5))):
        for place in folder.iterdir():
            (tmp_path / "split" / part / place.name).mkdir(parents=True)
            for file in sorted(place.iterdir())[numbers]:
                shutil.copy(file, tmp_path / "split" / part / place.name)
    train, test = names(tmp_path / "split")
    assert (len(train), len(test)) == (9, 6)
    assert all(name.startswith("train/") for name in train)
    assert all(name.startswith(f"{held_out}/") for name in test)
    shutil.rmtree(tmp_path / "split" / held_out / "red")  # a class that is not tested
    assert load_images(tmp_path / "split", 8).test.labels.bincount(minlength=3).tolist() == [2, 2, 0]
    (tmp_path / "split" / held_out / "blue").rename(tmp_path / "split" / held_out / "bleu")
    with pytest.raises(DataError, match="bleu"):
        load_images(tmp_path / "split", 8)
    shutil.rmtree(tmp_path / "split" / held_out)  # then a part of train is held out
    train, test = names(tmp_path / "split")
    assert (len(train), len(test)) == (6, 3)


def test_a_class_may_be_called_train(folder):
    (folder / "red").rename(folder / "train")
    assert load_images(folder, 8).classes == ("blue", "green", "train")


def test_hidden_files_and_other_files_are_left_out_and_counted(folder):
    (folder / ".git").mkdir()
    (folder / "red" / ".thumbnail.png").write_bytes(b"junk")
    (folder / "red" / "notes.txt").write_text("junk")
    (folder / "readme.md").write_text("junk")
    found = load_images(folder, 8)
    assert len(found.train) + len(found.test) == 15
    assert "1 other files left out" in found.description


def test_images_that_are_not_kept_in_memory_are_the_same(folder, arrays, monkeypatch):
    kept = [load_images(path, 8) for path in (folder, arrays)]
    monkeypatch.setattr(data, "KEPT_BYTES", 0)
    for before, path in zip(kept, (folder, arrays), strict=True):
        after = load_images(path, 8)
        assert after.train._kept is None
        assert before.train._kept is not None
        assert after.sha256 == before.sha256
        for ours, theirs in ((after.train, before.train), (after.test, before.test)):
            assert torch.equal(ours.pixels(range(len(ours))), theirs.pixels(range(len(theirs))))


def test_the_hash_tells_contents_and_classes_apart(folder):
    first = load_images(folder, 8).sha256
    assert load_images(folder, 8).sha256 == first
    (folder / "red").rename(folder / "rot")
    second = load_images(folder, 8).sha256
    file = sorted((folder / "rot").iterdir())[0]
    shutil.copy(sorted((folder / "blue").iterdir())[0], file)
    assert len({first, second, load_images(folder, 8).sha256}) == 3


def empty_the_folder(folder: Path) -> str:
    shutil.rmtree(folder)
    folder.mkdir()
    return "no subfolders"


def remove_the_folder(folder: Path) -> str:
    shutil.rmtree(folder)
    return "no such folder"


def put_a_file_there(folder: Path) -> str:
    shutil.rmtree(folder)
    folder.write_text("mine")
    return "this is a file"


def leave_one_class(folder: Path) -> str:
    for name in ("red", "green"):
        shutil.rmtree(folder / name)
    return "one class 'blue'"


def empty_a_class(folder: Path) -> str:
    for file in (folder / "red").iterdir():
        file.unlink()
    return "red: has no images"


def leave_no_pictures_in_a_class(folder: Path) -> str:
    for file in (folder / "red").iterdir():
        file.rename(file.with_suffix(".heic"))
    return "red: has no images"


def leave_one_image_in_a_class(folder: Path) -> str:
    for file in sorted((folder / "red").iterdir())[1:]:
        file.unlink()
    return "red: has one image"


def damage_an_image(folder: Path) -> str:
    file = sorted((folder / "red").iterdir())[2]
    file.write_bytes(file.read_bytes()[:-40])
    return f"{file.name}: the image is damaged"


def empty_an_image(folder: Path) -> str:
    file = sorted((folder / "red").iterdir())[2]
    file.write_bytes(b"")
    return f"{file.name}: the file is empty"


def put_a_folder_with_a_pictures_name(folder: Path) -> str:
    (folder / "red" / "x.png").mkdir()
    return r"x\.png: this is a folder"


def leave_images_without_classes(folder: Path) -> str:
    for place in list(folder.iterdir()):
        for file in place.iterdir():
            file.rename(folder / f"{place.name}-{file.name}")
        place.rmdir()
    return "into a subfolder"


@pytest.mark.parametrize(
    "spoil",
    [
        empty_the_folder,
        remove_the_folder,
        put_a_file_there,
        leave_one_class,
        empty_a_class,
        leave_no_pictures_in_a_class,
        leave_one_image_in_a_class,
        damage_an_image,
        empty_an_image,
        put_a_folder_with_a_pictures_name,
        leave_images_without_classes,
    ],
)
def test_a_bad_folder_is_one_sentence_that_names_what_is_wrong(folder, spoil):
    complaint = spoil(folder)
    with pytest.raises(DataError, match=complaint) as refused:
        load_images(folder, 8)
    assert str(refused.value).startswith(str(folder))


def test_arrays_are_read_as_they_are(arrays):
    with numpy.load(arrays) as file:
        x, y = file["x_train"], file["y_train"]
    found = load_images(arrays, 20)
    assert found.classes == ("blue", "green", "red")
    assert torch.equal(found.train.pixels(range(len(x))), torch.from_numpy(x))
    assert found.train.labels.tolist() == y.tolist()
    assert (len(found.train), len(found.test)) == (24, 12)


def test_labels_in_a_column_and_no_names_of_classes_are_fine(tmp_path):
    x, y = numpy.zeros((4, 6, 5), numpy.uint8), numpy.array([[0], [1], [0], [1]], numpy.uint8)
    numpy.savez_compressed(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x[:2], y_test=y[:2])
    found = load_images(tmp_path / "a.npz", 4)
    assert found.classes == ("0", "1")
    assert found.test.labels.tolist() == [0, 1]


X = numpy.zeros((4, 6, 6, 3), numpy.uint8)
Y = numpy.array([0, 1, 0, 1])


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"x_train": None}, "no array x_train"),
        ({"y_test": None, "x_test": None}, "no array x_test and no array y_test"),
        ({"x_train": X.astype(numpy.float32)}, "x_train holds float32 numbers"),
        ({"x_test": numpy.full(X.shape, numpy.nan)}, "x_test holds float64 numbers"),
        ({"x_train": X.astype(numpy.int64)}, "x_train holds int64"),
        ({"x_train": X.transpose(0, 3, 1, 2)}, r"x_train has the shape \(4, 3, 6, 6\)"),
        ({"x_train": X[0, 0]}, r"x_train has the shape \(6, 3\)"),
        ({"x_train": X[..., [0, 0, 0, 0]]}, r"x_train has the shape \(4, 6, 6, 4\)"),
        ({"x_test": X[:0], "y_test": Y[:0]}, r"x_test has the shape \(0, 6, 6, 3\)"),
        ({"x_train": X[:, :0]}, r"x_train has the shape \(4, 0, 6, 3\)"),
        ({"x_train": X[:3]}, "x_train has 3 images, but y_train 4 labels"),
        ({"y_train": Y.astype(float)}, "y_train holds float64"),
        ({"y_train": Y > 0}, "y_train holds bool"),
        ({"y_train": numpy.zeros((4, 2), int)}, r"y_train has the shape \(4, 2\)"),
        ({"y_train": numpy.array([0, 1, 2, -1])}, "label -1"),
        ({"y_test": numpy.array([0, 1, 2, 0])}, "y_test has the label 2; labels are from 0 to 1"),
        ({"y_train": numpy.array([0, 1, 7, 1]), "classes": numpy.array(["a", "b"])}, "label 7"),
        ({"y_train": numpy.array([0, 2, 0, 2])}, "label 1"),
        ({"y_train": numpy.array([0, 2**40, 0, 1])}, "label 2; number"),
        ({"y_train": Y * 0, "y_test": Y * 0}, "one class"),
        ({"classes": numpy.array(["a", "b", "c"])}, "class 'c' has no images"),
        ({"classes": numpy.array(["a", "a"])}, "classes has the name 'a' more than once"),
        ({"classes": numpy.array([b"caf\xe9", b"caf\xe8"])}, r"the name 'caf\ufffd' \(read as UTF-8\) more than once"),
        ({"classes": numpy.array([])}, "different names"),
        ({"classes": numpy.array([1, 2])}, "different names"),
        ({"classes": numpy.array(["a", None], object)}, "plain arrays"),
        ({"x_train": numpy.array([None] * 4, object)}, "plain arrays"),
    ],
)
def test_bad_arrays_are_one_sentence_that_names_what_is_wrong(tmp_path, changes, complaint):
    whole = {"x_train": X, "y_train": Y, "x_test": X, "y_test": Y, **changes}
    numpy.savez(tmp_path / "a.npz", **{name: array for name, array in whole.items() if array is not None})
    with pytest.raises(DataError, match=complaint) as refused:
        load_images(tmp_path / "a.npz", 6)
    assert str(refused.value).startswith(f"{tmp_path / 'a.npz'}: ")


def test_a_damaged_file_of_arrays_is_one_sentence(tmp_path, arrays):
    path = tmp_path / "a.npz"
    whole = arrays.read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2], whole[:-30], whole[:4000] + b"junk" + whole[4004:]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a\.npz: "):
            load_images(path, 8)
    with path.open("wb") as file:
        numpy.save(file, X)
    with pytest.raises(DataError, match="holds one array"):
        load_images(path, 8)
    path.with_suffix(".zip").write_bytes(whole)
    with pytest.raises(DataError, match=r"an \.npz file"):
        load_images(path.with_suffix(".zip"), 8)
