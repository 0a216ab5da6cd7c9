"""Parameters that are spread over several processes, as ``fully_shard`` and tensor parallelism leave them."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from torch import Tensor


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether a tensor is a DTensor."""
    # Who has a DTensor has imported its module; `import memfit` need not.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def any_sharded(tensors: Iterable[Tensor | None]) -> bool:
    """Whether one of the tensors is a DTensor."""
    return any(is_sharded(tensor) for tensor in tensors)


def replicated(whole: Tensor, like: Tensor) -> Tensor:
    """A tensor that all processes have, so that it can meet ``like`` in an operator: as a DTensor where that is one.

    Needs no communication, and no autograd: call it under ``torch.no_grad()``.
    """
    if not is_sharded(like):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh  # type: ignore[attr-defined]
    return DTensor.from_local(whole.to(like.device), mesh, [Replicate()] * mesh.ndim, run_check=False)


def full(tensor: Tensor) -> Tensor:
    """All of a tensor, on every process where it is a DTensor: they must all call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
