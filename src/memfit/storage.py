"""How tensors lie in a file: each piece of memory once, whatever views of it there are.

A tensor that owns its memory is stored as itself. Tensors whose memory overlaps (tied weights, a transpose, a slice of
another) are stored as one run of memory, and each is a strided view of it again after reading.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# What every release of the safetensors library reads; any other dtype is stored as its bytes.
NATIVE_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def kind_if_not_plain(tensor: Tensor) -> str:
    """What a tensor is, in words, that is no plain dense one with numbers in it; ``""`` for a plain one."""
    plain = tensor.detach()
    if (
        type(plain) is Tensor
        and plain.layout == torch.strided
        and not (plain.is_quantized or plain.is_meta or plain.is_nested)
    ):
        return ""
    return f"{type(plain).__name__} of layout {plain.layout}, dtype {plain.dtype}, on {plain.device}"


@dataclass(frozen=True)
class Stored:
    """One entry of a file.

    Attributes:
        name: unique in the file.
        dtype: one of :data:`NATIVE_DTYPES`.
        shape: of that dtype.
        source: a tensor whose elements, in order, are the entry's bytes.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    source: Tensor

    @property
    def nbytes(self) -> int:
        return self.source.numel() * self.source.itemsize

    def raw(self) -> memoryview:
        """The bytes, copied only when they are not on the CPU or not in order."""
        if self.source.numel() == 0:
            return memoryview(b"")
        ordered = self.source.cpu().contiguous()
        # Not reshape(-1): an axis of one element may have any stride, and a view of other dtype takes none but 1.
        return ordered.as_strided((ordered.numel(),), (1,)).view(torch.uint8).numpy().data


@dataclass
class _Tensor:
    """A tensor to store, where it was found, and the reference to fill in; extents in bytes of its storage."""

    name: str
    tensor: Tensor
    reference: dict[str, Any]
    start: int = 0
    stop: int = 0


def lay_out(found: Sequence[tuple[str, Tensor, dict[str, Any]]]) -> list[Stored]:
    """Decide which entries hold the tensors.

    Args:
        found: for each tensor its name (need not be unique), itself (detached, dense), and a dict that is filled in:
            ``name`` of its entry and, when the tensor is not that entry as it is, ``dtype``, ``shape``, ``stride``
            and ``offset`` (both in elements) of its view of the entry.

    Returns:
        The entries in the file's order: larger elements first, so that all are aligned.
    """
    entries: list[Stored] = []
    used: set[str] = set()
    for group in _sharing(found):
        name = group[0].name or "tensor"
        while name in used or name == "__metadata__":
            name += "'"
        used.add(name)
        entries.append(_store(name, group))
    return sorted(entries, key=lambda entry: -entry.dtype.itemsize)


def _sharing(found: Iterable[tuple[str, Tensor, dict[str, Any]]]) -> list[list[_Tensor]]:
    """Groups of tensors whose extents in memory overlap, in the order of each group's first tensor."""
    storages: dict[object, list[_Tensor]] = {}
    order: dict[int, int] = {}
    for index, (name, tensor, reference) in enumerate(found):
        lazy = tensor.is_conj() or tensor.is_neg()  # its memory is not its value
        item = _Tensor(name, tensor.resolve_conj().resolve_neg() if lazy else tensor, reference)
        order[id(item)] = index
        if tensor.numel() == 0 or lazy:
            storages[index] = [item]
            continue
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        item.start = int(tensor.storage_offset()) * tensor.itemsize
        item.stop = item.start + (last + 1) * tensor.itemsize
        storages.setdefault((tensor.device, tensor.untyped_storage().data_ptr()), []).append(item)

    groups: list[list[_Tensor]] = []
    for items in storages.values():
        stop = -1
        for item in sorted(items, key=lambda item: (item.start, order[id(item)])):
            if item.start < stop:
                groups[-1].append(item)
            else:
                groups.append([item])
                stop = -1
            stop = max(stop, item.stop)
    for group in groups:
        group.sort(key=lambda item: order[id(item)])
    return sorted(groups, key=lambda group: order[id(group[0])])


def _store(name: str, group: Sequence[_Tensor]) -> Stored:
    """The entry for a group; fills in its references."""
    tensor = group[0].tensor
    views = {(item.tensor.dtype, item.start, item.tensor.shape, item.tensor.stride()) for item in group}
    for item in group:
        item.reference["name"] = name
    if len(views) == 1 and tensor.dtype in NATIVE_DTYPES and (tensor.is_contiguous() or not _is_dense(tensor)):
        return Stored(name, tensor.dtype, tuple(tensor.shape), tensor)  # gaps or repetitions are not stored

    if len(views) == 1 and not _is_dense(tensor):
        tensor = tensor.contiguous()
        group = [_Tensor(item.name, tensor, item.reference) for item in group]
    itemsize = tensor.itemsize
    if len(views) > 1:
        # Every view starts at a multiple of its own itemsize from the storage's start; 16 is a multiple of each.
        start = min(item.start for item in group)
        mixed = any(item.tensor.dtype != tensor.dtype for item in group)
        start, stop = (start // 16 * 16 if mixed else start), max(item.stop for item in group)
        whole = torch.empty(0, dtype=torch.uint8 if mixed else tensor.dtype, device=tensor.device)
        step = whole.itemsize
        whole.set_(tensor.untyped_storage(), start // step, ((stop - start) // step,), (1,))
    else:
        start = int(tensor.storage_offset()) * itemsize
        whole = tensor.as_strided((tensor.numel(),), (1,))
    for item in group:
        view = item.tensor
        item.reference.update(
            dtype=str(view.dtype).removeprefix("torch."),
            shape=list(view.shape),
            stride=list(view.stride()),
            offset=view.storage_offset() - start // view.itemsize,
        )
    native = whole.dtype in NATIVE_DTYPES
    shape = (whole.numel(),) if native else (whole.numel() * whole.itemsize,)
    return Stored(name, whole.dtype if native else torch.uint8, shape, whole)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a run of memory, each once, in whatever order of the axes."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
