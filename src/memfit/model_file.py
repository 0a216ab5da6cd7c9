"""A model's file: one safetensors file whose header carries the model's configuration as JSON.

Loading one never executes code.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from memfit.errors import DataError
from memfit.files import atomic_write, read_file
from memfit.run.finite import all_finite

C = TypeVar("C")

# Floats of 8 bits are not among them: such weights have scales beside them, without which they are others.
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_KINDS = {**dict.fromkeys(_FLOATS, "float of 16 bits or more"), **dict.fromkeys(_WHOLE, "whole numbers")}


def write(path: str | Path, state: Mapping[str, Tensor], key: str, config: Mapping[str, object]) -> None:
    """Write a model: beside its target first, then renamed, so that an earlier file stays until the end.

    Args:
        path: the file, usually ``model.safetensors``.
        state: a state dict (for a converted model: what ``memfit.state_dict`` returns).
        key: of the header's entry that holds the configuration; it tells the kind of the model.
        config: the configuration, as JSON values.

    Raises:
        DataError: the file cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    payload = safetensors.torch.save(tensors, metadata={key: json.dumps(config, sort_keys=True)})
    with atomic_write(path, "model", DataError) as file:
        file.write(payload)


def read(path: str | Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """The tensors of a safetensors file, and its header's metadata.

    Raises:
        DataError: the file is missing, cannot be read, or is damaged.
    """
    payload = read_bytes(path)
    try:
        return safetensors.torch.load(payload), _header(payload)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise DataError(f"{path}: not a safetensors file, or a damaged one; fetch or write it again.") from error


def read_bytes(path: str | Path) -> bytes:
    """The content of a model's file.

    Raises:
        DataError: it is missing, no ordinary file, or cannot be read.
    """
    return read_file(path, "model file", DataError)


def read_config(
    path: str | Path, metadata: Mapping[str, str], key: str, what: str, parse: Callable[[Mapping[str, object]], C]
) -> C:
    """The configuration in a model's header.

    Args:
        path: the file, for messages.
        metadata: what :func:`read` gave.
        key: the header's entry.
        what: the kind of the model, for messages: ``"recognizer"``.
        parse: makes the configuration of its JSON object; raises ValueError where it is none.

    Raises:
        DataError: the header has no such entry, or it is wrong.
    """
    if key not in metadata:
        raise DataError(f"{path}: a safetensors file, but not a memfit {what} (its header has no {key!r}).")
    try:
        values = json.loads(metadata[key])
        if not isinstance(values, dict):
            raise ValueError("the configuration is not a JSON object")
        return parse(values)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: the {what}'s configuration in the header is wrong: {error}.") from error


def converts(found: torch.dtype, own: torch.dtype) -> bool:
    """Whether numbers of a file become those of a model by nothing but rounding."""
    return found == own or (own in _KINDS and _KINDS.get(found) == _KINDS[own])


def checked_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str
) -> dict[str, Tensor]:
    """The tensors of a file in a model's dtypes; a file whose tensors are not those of the model is refused.

    Args:
        path: the file, for messages.
        tensors: those of the file.
        expected: the model's state dict; the tensors may be on the meta device.
        what: the kind of the model, for messages: ``"recognizer"``.

    Raises:
        DataError: a tensor is missing, too many, of another shape or kind, or not finite.
    """
    checked = {}
    for name, own in expected.items():
        found = tensors.get(name)
        if found is None or found.shape != own.shape or not converts(found.dtype, own.dtype):
            has = "lacks it" if found is None else f"has {found.dtype} {tuple(found.shape)}"
            kind = _KINDS.get(own.dtype, own.dtype)
            raise DataError(
                f"{path}: {name} should be {kind} {tuple(own.shape)} by its configuration, but the file {has}."
            )
        checked[name] = found.to(own.dtype)
        if not all_finite([checked[name]]):  # asked last: a larger number may be none in the model's dtype
            raise DataError(f"{path}: the weights {name} are not finite; write the model again.")
    foreign = sorted(set(tensors) - set(expected))
    if foreign:
        raise DataError(f"{path}: the tensor {foreign[0]!r} does not belong to a {what}.")
    return checked


def _header(payload: bytes) -> Mapping[str, str]:
    """The metadata of safetensors bytes: their first eight are the length of a JSON header."""
    (length,) = struct.unpack("<Q", payload[:8])
    metadata = json.loads(payload[8 : 8 + length]).get("__metadata__", {})
    return metadata if isinstance(metadata, dict) else {}
