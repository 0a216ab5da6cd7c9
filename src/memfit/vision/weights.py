"""Weights to start from: memfit's own files, other safetensors files, and torchvision's ``.pth`` files."""

from __future__ import annotations

import io
import pickle
import struct
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from memfit import model_file
from memfit.choose import listed
from memfit.errors import DataError
from memfit.run.finite import all_finite
from memfit.storage import kind_if_not_plain
from memfit.vision.classifier import HEADER_KEY, ClassifierConfig

# What torch.load raises for files that are damaged, or that hold more than tensors.
_DAMAGE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    struct.error,
)


def load_weights(model: nn.Module, path: str | Path, classes: Sequence[str] | None = None) -> tuple[str, ...]:
    """Copy the weights of a file into a net, in place.

    The head, which is the last layer, is left as it is where the file has it for another number of classes, for classes
    of other names (a file of memfit says their names), or not at all. Loading executes no code of the file.

    Args:
        model: the net.
        path: a ``.safetensors`` file, or a ``.pth`` or ``.pt`` file of a state dict.
        classes: names of the classes that the net's head is for.

    Returns:
        the keys that were left as they are: none, or those of the head.

    Raises:
        DataError: the file is missing, damaged or no state dict of plain tensors, its keys, shapes or kinds of numbers
            are not the net's, or a weight is not finite. The net is then unchanged.
    """
    tensors, file_classes = _read(Path(path))
    own = model.state_dict()
    name = head_name(model)
    head = [key for key in own if key.startswith(f"{name}." if name else "")]
    # Files of before 2018 have no counts of batches, and only a batch norm without momentum reads them.
    expected = {key for key in own if key in tensors or not key.endswith("num_batches_tracked")}
    fresh = {key for key in head if key not in tensors or tensors[key].shape[1:] == own[key].shape[1:]}
    if all(key in tensors and tensors[key].shape == own[key].shape for key in head) and (
        classes is None or file_classes is None or tuple(classes) == file_classes
    ):
        fresh = set()
    wrong = {
        "lacks": sorted(expected - fresh - set(tensors)),
        "has besides": sorted(set(tensors) - set(own)),
        "has in other shapes": sorted(
            key for key in expected - fresh if key in tensors and tensors[key].shape != own[key].shape
        ),
        "has in other kinds of numbers": sorted(
            key
            for key in expected - fresh
            if key in tensors and not model_file.converts(tensors[key].dtype, own[key].dtype)
        ),
    }
    if any(wrong.values()):
        reasons = "; ".join(f"it {what} {listed(keys, most=4)}" for what, keys in wrong.items() if keys)
        raise DataError(f"{path}: these are not the weights of this model: {reasons}.")
    # In the net's own dtypes, in which a number that is too large for them is none.
    taken = {key: tensors[key].to(own[key].dtype) for key in expected - fresh}
    broken = [key for key, tensor in taken.items() if not all_finite([tensor])]
    if broken:
        raise DataError(f"{path}: the weights {listed(broken, most=4)} are not finite; fetch or write the file again.")
    model.load_state_dict(taken, strict=False)
    return tuple(key for key in own if key in fresh)


def head_name(model: nn.Module) -> str:
    """The name of the net's last layer with a matrix, which decides among the classes."""
    layers = [
        name
        for name, module in model.named_modules()
        if any(parameter.dim() >= 2 for parameter in module.parameters(recurse=False))
    ]
    return layers[-1] if layers else ""


def _read(path: Path) -> tuple[Mapping[str, Tensor], tuple[str, ...] | None]:
    """The tensors, and the classes' names where the file says them."""
    if path.suffix == ".safetensors":
        tensors, metadata = model_file.read(path)
        if HEADER_KEY not in metadata:
            return tensors, None
        config = model_file.read_config(path, metadata, HEADER_KEY, "classifier", ClassifierConfig.from_dict)
        return tensors, config.classes
    if path.suffix not in (".pth", ".pt"):
        raise DataError(f"{path}: weights are read from .safetensors, .pth and .pt files; is this one of them?")
    payload = model_file.read_bytes(path)
    try:
        with warnings.catch_warnings():  # about pickles of other kinds, which the error is about as well
            warnings.simplefilter("ignore")
            state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except _DAMAGE as error:
        raise DataError(
            f"{path}: not a file of plain tensors, or a damaged one; write it by torch.save(model.state_dict(), ...)."
        ) from error
    if (
        not isinstance(state, Mapping)
        or not state
        or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items())
    ):
        raise DataError(f"{path}: holds no state dict; write it by torch.save(model.state_dict(), ...).")
    for key, tensor in state.items():
        if kind := kind_if_not_plain(tensor):
            raise DataError(f"{path}: {key!r} is a {kind}; write plain dense tensors.")
    return state, None
