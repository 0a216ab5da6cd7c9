"""An ``.npz`` file of the user's may be anything: it is read, or refused in one sentence."""

from __future__ import annotations

import io
import os
import struct
import zipfile
from pathlib import Path

import numpy
import pytest

from memfit.errors import DataError
from memfit.run.arrays import read_arrays

NUMBERS = numpy.arange(6).reshape(2, 3)


def npy(array: numpy.ndarray) -> bytes:
    written = io.BytesIO()
    numpy.save(written, array)
    return written.getvalue()


def headed(header: bytes) -> bytes:
    """An ``.npy`` of that header, and bytes that are enough for any array."""
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(64)


def zipped(path: Path, member: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("x.npy", member)
    return path


def refused(path: Path, complaint: str = "not an .npz file of plain arrays, or a damaged one") -> None:
    with pytest.raises(DataError, match=complaint) as error:
        read_arrays(path, ["x"])
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_arrays_of_any_compression_are_read(tmp_path, compression):
    found = read_arrays(zipped(tmp_path / "a.npz", npy(NUMBERS), compression), ["x"], ["y"])
    assert list(found) == ["x"]
    assert numpy.array_equal(found["x"], NUMBERS)


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("place", [44, 60, 90])
def test_damaged_compressed_arrays_are_refused(tmp_path, compression, place):
    path = zipped(tmp_path / "a.npz", npy(numpy.random.default_rng(0).integers(0, 9, 500)), compression)
    content = bytearray(path.read_bytes())
    content[place : place + 9] = b"\xff" * 9
    path.write_bytes(content)
    refused(path)


def test_members_that_are_no_arrays_are_refused(tmp_path):
    for content in (b"", b"text", b"\x93NUMPY", b"PK\x03\x04"):
        refused(zipped(tmp_path / "a.npz", content))
    with zipfile.ZipFile(tmp_path / "bytes.npz", "w") as file:
        file.writestr("x", b"numpy gives such a member as bytes")
    refused(tmp_path / "bytes.npz")


@pytest.mark.parametrize(
    "header",
    [
        b"{'descr': '|u1', 'fortran_order': False, 'shape': (4, 3), a      \x08    \n",
        b"{'descr': '|u1', 'fortran_order': False, 'shape': (-1,)}\n",
        b"{'descr': '|u1', 'fortran_order': False}\n",
        b"{'descr': 'nonsense', 'fortran_order': False, 'shape': (4,)}\n",
        b"{'descr': '|O', 'fortran_order': False, 'shape': (4,)}\n",
        b"{[]: 1}\n",
        b"if 1:\n        x\n    y\n",
        b"\xff\xfe\n",
        b"(" * 5000 + b"\n",
        b"",
    ],
)
def test_broken_headers_are_refused(tmp_path, header):
    refused(zipped(tmp_path / "a.npz", headed(header)))


def test_an_array_that_its_header_makes_too_large_is_refused(tmp_path):
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000000,)}\n"
    refused(zipped(tmp_path / "a.npz", headed(header)), "do not fit into memory")


def test_encrypted_arrays_are_refused(tmp_path):
    path = zipped(tmp_path / "a.npz", npy(NUMBERS))
    content = bytearray(path.read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + flags] |= 1  # encrypted, says each of the two headers
    path.write_bytes(content)
    refused(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "a.npz")
    refused(tmp_path / "a.npz", "this is a device or a pipe, not a file of arrays")
