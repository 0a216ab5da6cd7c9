"""One file for a tree of tensors and plain values: written atomically, read exactly as it was, never executed.

The file is a safetensors file that any reader of that format opens. Its header's metadata carries the structure of the
tree as JSON (``structure``), what the file is (``format``, ``version``), and the CRC-32 of the whole file with the
checksum's own eight digits as zeros (``checksum``), which tells a damaged file from a good one.

The writing is done here and not by ``safetensors.torch.save_file``: tensors on a device come over one at a time and
never all at once, the checksum takes no pass of its own, and the half-written file of a killed run has a name that is
known (:mod:`memfit.files`). Reading goes through the safetensors library, which checks the header.
"""

from __future__ import annotations

import base64
import json
import math
import os
import struct
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, TypeAlias, Union

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from memfit.errors import CheckpointError
from memfit.files import atomic_write, check_ordinary
from memfit.storage import NATIVE_DTYPES, Stored, kind_if_not_plain, lay_out

FORMAT = "memfit.checkpoint"
VERSION = 1

Tree: TypeAlias = Union[bool, int, float, str, bytes, Tensor, "Sequence[Tree]", "Mapping[Any, Tree]", None]

_NO_CHECKSUM = "00000000"
_HEADER_LIMIT = 100_000_000  # bytes; the safetensors format's own
_ALIGNMENT = 64  # bytes; where the data starts, so that mapped tensors are aligned for vector instructions
_BLOCK = 1 << 20


def save(path: str | os.PathLike[str], tree: Tree) -> None:
    """Write a tree to one file, atomically.

    Tensors that share memory are stored once. A contiguous or permuted tensor on the CPU is written from where it is;
    another (on a device, or with gaps) is copied, one at a time.

    Args:
        path: the file; an earlier one is replaced once the new one is whole and on the disk.
        tree: nested dicts (keys: strings, numbers, bools, None), lists and tuples of tensors (any device, dense, any
            shape and strides, any dtype but quantized ones), numbers, strings, bytes, bools and None. Subclasses of
            these come back as the plain type; ``requires_grad`` and the device are not stored.

    Raises:
        CheckpointError: the file cannot be written, or the tree has something that a checkpoint cannot hold. The
            earlier file is intact, and nothing is left beside it.
    """
    found: list[tuple[str, Tensor, dict[str, Any]]] = []
    structure = _encode(tree, "", found, path)
    entries = lay_out(found)
    header = _header(structure, entries, path)
    with atomic_write(path, "checkpoint", CheckpointError) as file:
        checksum = 0
        for block in _blocks(header, entries):
            file.write(block)
            checksum = zlib.crc32(block, checksum)
        file.seek(8 + header.index(_checksum_field(_NO_CHECKSUM)))
        file.write(_checksum_field(f"{checksum:08x}"))


def load(path: str | os.PathLike[str], *, mapped: Collection[str] = ()) -> Tree:
    """Read a tree that :func:`save` wrote, with every value, shape, stride and dtype as it was, on the CPU.

    Tensors that shared memory share it again; the same tensor in two places is the same object again.

    Args:
        path: the file.
        mapped: keys of the outermost dict whose tensors are windows onto the file, to copy out of and let go: they take
            no memory of their own but the system's file cache. All others have their own memory.

    Raises:
        CheckpointError: there is no such file, or it is truncated, damaged, of a newer version, or something else.
    """
    structure = _verified_structure(path)
    entries: dict[str, Tensor] = {}
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            windows = _names(structure, mapped)
            for name in file.keys():  # noqa: SIM118 - it is no dict
                tensor = file.get_tensor(name)
                # Bytes that stand for another dtype may lie where a tensor of that dtype may not.
                entries[name] = tensor if name in windows and tensor.dtype != torch.uint8 else tensor.clone()
    except (OSError, SafetensorError) as problem:
        raise _damaged(path) from problem
    views: dict[str, Tensor] = {}
    try:
        return _decode(structure, entries, views)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError, struct.error) as problem:
        raise _damaged(path) from problem


def _encode(value: Tree, where: str, found: list[tuple[str, Tensor, dict[str, Any]]], path: object) -> Any:
    """JSON for a tree. Lists, strings, ints, bools, None and finite floats stand for themselves; the rest is a JSON
    object with a tag. A tensor's object is filled in once all tensors are known."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": struct.pack(">d", value).hex()}
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, Tensor):
        reference: dict[str, Any] = {}
        if kind := kind_if_not_plain(value):
            raise CheckpointError(f"{path}: {where} is a {kind}: a checkpoint holds plain dense tensors only.")
        found.append((where, value.detach(), reference))
        return {"tensor": reference}
    if isinstance(value, list | tuple):
        items = [_encode(item, f"{where}.{index}".lstrip("."), found, path) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, Mapping):
        pairs = []
        for key, item in value.items():
            if not (key is None or isinstance(key, str | int | float)):
                raise CheckpointError(
                    f"{path}: {where or 'the tree'} has the key {key!r}: a checkpoint's keys are strings and numbers."
                )
            pairs.append([_encode(key, where, found, path), _encode(item, f"{where}.{key}".lstrip("."), found, path)])
        if all(isinstance(key, str) for key in value):
            return {"dict": dict(pairs)}
        return {"items": pairs}
    raise CheckpointError(
        f"{path}: {where or 'the tree'} is a {type(value).__module__}.{type(value).__qualname__}, which a checkpoint "
        "cannot hold: it holds tensors, numbers, strings, bytes, None, and lists, tuples and dicts of them."
    )


def _decode(node: Any, entries: Mapping[str, Tensor], views: dict[str, Tensor]) -> Any:
    if isinstance(node, list):
        return [_decode(item, entries, views) for item in node]
    if not isinstance(node, dict):
        return node
    ((tag, content),) = node.items()
    if tag == "tensor":
        identity = json.dumps(content)
        if identity not in views:
            views[identity] = _view(content, entries)
        return views[identity]
    if tag == "float":
        return struct.unpack(">d", bytes.fromhex(content))[0]
    if tag == "bytes":
        return base64.b64decode(content)
    if tag == "tuple":
        return tuple(_decode(item, entries, views) for item in content)
    if tag == "dict":
        return {key: _decode(item, entries, views) for key, item in content.items()}
    if tag == "items":
        return {_decode(key, entries, views): _decode(item, entries, views) for key, item in content}
    raise ValueError(tag)


def _view(reference: Mapping[str, Any], entries: Mapping[str, Tensor]) -> Tensor:
    """The tensor that a reference means: a whole entry of the file, or a strided view of one."""
    entry = entries[reference["name"]]
    if "dtype" not in reference:
        return entry
    dtype = getattr(torch, reference["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise ValueError(dtype)
    flat = entry if entry.dtype == dtype else entry[: entry.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
    return torch.as_strided(flat, reference["shape"], reference["stride"], reference["offset"])


def _names(structure: Any, keys: Collection[str]) -> frozenset[str]:
    """Names of the entries that only the outermost ``keys`` refer to."""

    def collect(node: Any) -> Iterator[str]:
        if isinstance(node, list):
            for item in node:
                yield from collect(item)
        elif isinstance(node, dict):
            for tag, content in node.items():
                if tag == "tensor":
                    yield content["name"]
                elif tag == "dict":
                    yield from collect(list(content.values()))
                else:
                    yield from collect(content)

    outermost = structure.get("dict", {}) if isinstance(structure, dict) else {}
    wanted = {name for key in keys if key in outermost for name in collect(outermost[key])}
    others = {name for key, node in outermost.items() if key not in keys for name in collect(node)}
    return frozenset(wanted - others)


def _header(structure: Any, entries: Sequence[Stored], path: object) -> bytes:
    """The safetensors header: JSON, the metadata first, padded with spaces."""
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "checksum": _NO_CHECKSUM,
        "structure": json.dumps(structure, separators=(",", ":"), allow_nan=False),
    }
    header: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": NATIVE_DTYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [position, position + entry.nbytes],
        }
        position += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    if len(text) > _HEADER_LIMIT:
        raise CheckpointError(f"{path}: the checkpoint has more names and plain values than the file format can hold.")
    return text


def _blocks(header: bytes, entries: Sequence[Stored]) -> Iterator[bytes | memoryview]:
    yield len(header).to_bytes(8, "little")
    yield header
    for entry in entries:
        yield entry.raw()


def _checksum_field(checksum: str) -> bytes:
    return f'"checksum":"{checksum}"'.encode()


def _verified_structure(path: str | os.PathLike[str]) -> Any:
    """The structure in the header of a file that is whole and ours."""
    check_ordinary(path, "checkpoint", CheckpointError)
    try:
        with open(path, "rb") as file:
            return _read_structure(path, file)
    except OSError as problem:
        raise CheckpointError(f"{path}: the checkpoint cannot be read: {problem.strerror}.") from problem


def _read_structure(path: str | os.PathLike[str], file: BinaryIO) -> Any:
    foreign = CheckpointError(f"{path}: this is not a checkpoint of memfit, or its beginning is damaged: give another.")
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > _HEADER_LIMIT:
        raise foreign
    if length > size - 8:
        raise _truncated(path) if size > 8 and file.read(1) == b"{" else foreign
    raw = file.read(length)
    try:
        header = json.loads(raw)
        metadata = header.pop("__metadata__")
        if metadata["format"] != FORMAT:
            raise foreign
        version = int(metadata["version"])
        if version > VERSION:
            raise CheckpointError(
                f"{path}: the checkpoint is of version {version}, and this memfit reads up to {VERSION}: update memfit."
            )
        expected = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        checksum = str(metadata["checksum"])
        if size < expected:
            raise _truncated(path)
        whole = zlib.crc32(raw.replace(_checksum_field(checksum), _checksum_field(_NO_CHECKSUM), 1), zlib.crc32(prefix))
        while block := file.read(_BLOCK):
            whole = zlib.crc32(block, whole)
        if f"{whole:08x}" != checksum:
            raise _damaged(path)
        return json.loads(metadata["structure"])
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as problem:
        raise foreign from problem


def _truncated(path: object) -> CheckpointError:
    return CheckpointError(f"{path}: the checkpoint is truncated: copy it again, or delete it and start anew.")


def _damaged(path: object) -> CheckpointError:
    return CheckpointError(
        f"{path}: the checkpoint is damaged, its content does not match its checksum: "
        "copy it again, or delete it and start anew."
    )
