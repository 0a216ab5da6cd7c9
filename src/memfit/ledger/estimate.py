"""`memfit.estimate(model, batch, loss, optimizer)`: the ledger of a training step that is never run.

A copy of model, optimizer and batch is made of fake tensors, which know their shape, dtype and device and have no data,
and goes through a training step under the ledger.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from memfit.errors import MemfitError
from memfit.ledger.book import Ledger

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode

B = TypeVar("B")
T = TypeVar("T")


def estimate(
    model: nn.Module,
    batch: B,
    loss: Callable[[nn.Module, B], Tensor],
    optimizer: Optimizer,
    *,
    device: str | torch.device = "cpu",
) -> Ledger:
    """The memory of a training step, without running it and without memory of the model's size.

    The step is the second one (``zero_grad``, the loss, ``backward``, ``step``), when the optimizer has its state.
    Nothing of the model, the optimizer, the batch or the random state changes. Time on the report is that of the
    estimate.

    Args:
        model: any module; also one on the device ``meta``, whose weights have no data.
        batch: what ``loss`` takes; tensors may be on ``meta`` as well.
        loss: ``(model, batch) -> scalar tensor``.
        optimizer: of the model's parameters.
        device: which device tensors on ``meta`` stand for.

    Returns:
        A ledger that is done: ``peak``, ``instant``, ``modules``, ``timeline``, ``print``.

    Raises:
        MemfitError: an argument is not what it should be, or what the step does depends on values that a fake tensor
            does not have (``.item()``, ``nonzero``; of torch's optimizers ASGD's and Adafactor's step).

    Example:
        >>> with torch.device("meta"):
        ...     model = nn.Linear(100_000, 100_000)
        >>> print(memfit.estimate(model, batch, loss, torch.optim.AdamW(model.parameters())))
    """
    if not isinstance(optimizer, Optimizer):
        raise MemfitError(f"memfit.estimate needs a torch.optim optimizer last, not {type(optimizer).__name__}.")
    fake = fake_tensor_mode()
    copied, optimizer, batch = fake_copy(fake, (model, optimizer, batch), device)
    with untouched(model):
        return second_step(fake, copied, batch, loss, optimizer)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Keep a model as it is while a copy of it goes through a step.

    Raises:
        MemfitError: the step has reached the model itself, for the loss does not use the one that it is given.
    """
    before = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in before:
        parameter.grad = None
    try:
        yield
    finally:
        reached = any(parameter.grad is not None for parameter, _ in before)
        for parameter, gradient in before:
            parameter.grad = gradient
    if reached:
        raise MemfitError(
            "memfit.estimate takes a copy of the model through a step, and the loss uses the model itself: "
            "have it use the model that it is called with, as in loss(model, batch)."
        )


def fake_tensor_mode() -> FakeTensorMode:
    """A mode under which operators only find out what their results look like."""
    # Not before it is needed: this imports a part of the compiler.
    from torch._subclasses.fake_tensor import FakeTensorMode

    _teach_shapes()
    return FakeTensorMode(allow_non_fake_inputs=True)


def fake_copy(fake: FakeTensorMode, value: T, device: str | torch.device = "cpu") -> T:
    """A deep copy with fake tensors in place of all tensors; those on ``meta`` are on ``device``."""
    with _FakeCopy(fake, torch.device(device)):
        return copy.deepcopy(value)


def second_step(
    fake: FakeTensorMode, model: nn.Module, batch: B, loss: Callable[[nn.Module, B], Tensor], optimizer: Optimizer
) -> Ledger:
    """The ledger of a training step after a first one; all arguments are made of ``fake``'s tensors.

    Raises:
        MemfitError: an operator's result depends on values.
    """
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        UnsupportedOperatorException,
    )

    try:
        with fake:
            _step(model, batch, loss, optimizer)
            with Ledger(model, optimizer, fake=True) as book:
                _step(model, batch, loss, optimizer)
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as error:
        raise MemfitError(
            f"memfit.estimate cannot follow {error.func}, whose result fake tensors do not know: "
            "measure a real step with memfit.ledger instead."
        ) from error
    return book


def _step(model: nn.Module, batch: B, loss: Callable[[nn.Module, B], Tensor], optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    loss(model, batch).backward()
    optimizer.step()


@cache
def _teach_shapes() -> None:
    """Tell torch the shapes of those operators of oneDNN's that low-rank recurrent layers use and it has none for."""

    def reordered(weight: Tensor, batch_size: int | None = None) -> Tensor:
        return weight.new_empty(weight.shape)

    def product(x: Tensor, other: Tensor, weight: Tensor, bias: Tensor | None, attr: str) -> Tensor:
        return x.new_empty((*x.shape[:-1], weight.shape[0]))

    for name, shape in (("_reorder_linear_weight", reordered), ("_linear_pointwise.binary", product)):
        with suppress(RuntimeError):  # another torch, which has none of it or knows the shape
            torch.library.register_fake(f"mkldnn::{name}", shape)


class _FakeCopy(TorchFunctionMode):
    """Deep copies have fake tensors in place of real ones; those on ``meta`` get a device."""

    def __init__(self, fake: FakeTensorMode, device: torch.device) -> None:
        super().__init__()
        self._fake = fake
        self._device = device

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch._C.TensorBase.clone:  # of a parameter's data
            return self._faked(args[0])
        if func is Tensor.__deepcopy__:
            tensor, memo = cast(tuple[Tensor, dict[int, Tensor]], args)
            if id(tensor) not in memo:
                memo[id(tensor)] = self._faked(tensor)
            return memo[id(tensor)]
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def _faked(self, tensor: Tensor) -> Tensor:
        if tensor.dim() == 0 and tensor.device.type == "cpu" and not tensor.requires_grad:
            # An optimizer's count of steps and the like, which it reads: as a constant it keeps its value.
            with torch._C.DisableTorchFunctionSubclass():
                value = tensor.item()
                with self._fake:
                    return torch.tensor(value, dtype=tensor.dtype)
        if tensor.device.type != "meta":
            return self._fake.from_tensor(tensor, static_shapes=True)
        with self._fake, torch._C.DisableTorchFunctionSubclass():
            made = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=self._device)
        return made.requires_grad_(tensor.requires_grad)
