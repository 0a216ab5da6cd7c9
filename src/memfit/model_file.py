"""A model's file: one safetensors file whose header carries the model's configuration as JSON.

Loading one never executes code.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import safetensors
import safetensors.torch
from torch import Tensor

from memfit.errors import DataError
from memfit.files import atomic_write

C = TypeVar("C")


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
        DataError: the file is missing or cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except IsADirectoryError as error:
        raise DataError(f"{path}: this is a folder; give the model file in it, such as model.safetensors.") from error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"{path}: there is no such model file.") from error
    except OSError as error:
        raise DataError(f"{path}: the model file cannot be read: {error.strerror or error}.") from error


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


def check_tensors(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    what: str,
    optional: Iterable[str] = (),
) -> None:
    """Refuse a file whose tensors are not those of a model.

    Args:
        path: the file, for messages.
        tensors: those of the file.
        expected: the model's state dict; the tensors may be on the meta device.
        what: the kind of the model, for messages: ``"recognizer"``.
        optional: names that may be missing.

    Raises:
        DataError: a tensor is missing, too many, of another shape or kind, or not finite.
    """
    for name, model_tensor in expected.items():
        found = tensors.get(name)
        if found is None and name in optional:
            continue
        floating = model_tensor.is_floating_point()
        if found is None or found.shape != model_tensor.shape or found.is_floating_point() != floating:
            has = "lacks it" if found is None else f"has {found.dtype} {tuple(found.shape)}"
            kind = "float" if floating else "whole numbers"
            raise DataError(
                f"{path}: {name} should be {kind} {tuple(model_tensor.shape)} by its configuration, but the file {has}."
            )
        if not bool(found.isfinite().all()):
            raise DataError(f"{path}: the weights {name} are not finite; write the model again.")
    foreign = sorted(set(tensors) - set(expected))
    if foreign:
        raise DataError(f"{path}: the tensor {foreign[0]!r} does not belong to a {what}.")


def _header(payload: bytes) -> Mapping[str, str]:
    """The metadata of safetensors bytes: their first eight are the length of a JSON header."""
    (length,) = struct.unpack("<Q", payload[:8])
    metadata = json.loads(payload[8 : 8 + length]).get("__metadata__", {})
    return metadata if isinstance(metadata, dict) else {}
