"""Which storages a tensor stands on, and which tensors an object holds."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from types import FunctionType, ModuleType
from typing import TypeAlias

import torch
from torch import Tensor, UntypedStorage, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

PLAIN = frozenset({Tensor, nn.Parameter})
"""The tensor types whose storage is their own."""

Memory: TypeAlias = UntypedStorage | Tensor
"""What holds a tensor's bytes: a storage or, where Python can see none, the tensor itself."""

_COMPRESSED_ROWS = (torch.sparse_csr, torch.sparse_bsr)
_OPAQUE = (type, ModuleType, FunctionType, nn.Module)


def storages(tensor: Tensor) -> Sequence[Memory]:
    """The storages that a tensor stands on: one, or those of the parts of a sparse tensor or of a wrapper subclass.

    A tensor in a layout of oneDNN's (``to_mkldnn``, weights in blocks) has none that Python can see; it stands for its
    own memory. Another tensor on the same memory (its ``detach()``) cannot be told from one with memory of its own.
    """
    if type(tensor) in PLAIN:
        return _own(tensor)
    with torch._C.DisableTorchFunctionSubclass():
        if is_traceable_wrapper_subclass(tensor):
            names, _ = tensor.__tensor_flatten__()
            parts = [getattr(tensor, name) for name in names]
            # A DTensor also names its mesh, which is no tensor.
            return [storage for part in parts if isinstance(part, Tensor) for storage in storages(part)]
        return _own(tensor)


def size(memory: Memory) -> int:
    """The bytes of a storage, or of the elements of a tensor that stands for its own memory (padding aside)."""
    if isinstance(memory, Tensor):
        return memory.numel() * memory.element_size()
    return memory.nbytes()


def shape(tensor: Tensor) -> tuple[int, ...]:
    """The tensor's shape; ``()`` where it has none that is one: nested, or not initialized yet."""
    try:
        return tuple(tensor.shape)
    except RuntimeError:
        return ()


def _own(tensor: Tensor) -> Sequence[Memory]:
    try:
        return (tensor.untyped_storage(),)
    except (NotImplementedError, RuntimeError):
        return _parts(tensor)


def _parts(tensor: Tensor) -> Sequence[Memory]:
    """What a tensor stands on that has no storage of its own."""
    if tensor.layout is torch._mkldnn:  # type: ignore[attr-defined]
        return (tensor,)
    parts: tuple[Tensor, ...] = ()
    if tensor.layout is torch.sparse_coo:
        parts = (tensor._indices(), tensor._values())
    elif tensor.layout in _COMPRESSED_ROWS:
        parts = (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        parts = (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
    return [part.untyped_storage() for part in parts]


def tensors_in(value: object, depth: int = 6) -> Iterator[Tensor]:
    """All tensors in a nest of mappings, sequences and plain objects, as an optimizer keeps its state.

    Args:
        value: anything; modules, functions and classes are not looked into.
        depth: how many levels to follow, so that an object that refers to itself has an end.
    """
    if isinstance(value, Tensor):
        yield value
        return
    if depth == 0 or value is None or isinstance(value, (str, bytes, int, float, *_OPAQUE)):
        return
    if isinstance(value, Mapping):
        parts = list(value.values())
    elif isinstance(value, (list, tuple, set, frozenset)):
        parts = list(value)
    else:
        parts = list(getattr(value, "__dict__", {}).values())
    for part in parts:
        yield from tensors_in(part, depth - 1)


def reachable() -> Iterator[Tensor]:
    """All tensors that the garbage collector knows of; takes tens of milliseconds."""
    for value in gc.get_objects():
        if type(value) in PLAIN:
            yield value
