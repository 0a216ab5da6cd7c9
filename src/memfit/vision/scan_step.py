"""Training steps that leave no trace: run as often as wanted, each sees the same random numbers and buffers.

From such steps comes what a layer is looked at with: its real inputs, and the real gradients of what it gives.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memfit.errors import TrainingError
from memfit.ledger.target import Task, loss_of
from memfit.run import random_state
from memfit.run.finite import MovingBuffers, all_finite
from memfit.run.modes import same_modes


class Steps:
    """Forward and backward passes of a task, as many as wanted.

    Gradients are returned and not put into ``.grad``; nothing is optimized.

    Args:
        task: the model in the mode in which it is to be looked at, a batch, and a loss.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.trained = [parameter for parameter in task.model.parameters() if parameter.requires_grad]
        self._random = random_state.capture()
        self._buffers = MovingBuffers(task.model)

    @contextmanager
    def one(self) -> Iterator[None]:
        """A step happens in here; afterwards modes, buffers and random state are what they were."""
        with ExitStack() as stack:
            stack.enter_context(random_state.undisturbed())
            stack.enter_context(same_modes(self.task.model))
            if "torch._dynamo" in sys.modules:  # else nothing is compiled, and importing it takes seconds
                stack.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code calls no new hooks
            stack.enter_context(torch.enable_grad())
            random_state.restore(self._random)
            stack.callback(self._buffers.undo)
            self._buffers.note()
            yield

    def loss(self) -> Tensor:
        """The loss, with its graph.

        Raises:
            MemfitError: it is no scalar tensor.
            TrainingError: it is not finite, or no parameter that trains has a part in it.
        """
        loss = loss_of(self.task)
        if not loss.requires_grad:
            raise TrainingError("the loss depends on no parameter that trains: there is no gradient to filter.")
        if not all_finite([loss.detach()]):
            raise TrainingError(
                f"the loss of the batch is {loss.item()}, and so are its gradients: look at the batch and the weights."
            )
        return loss

    def gradients(self, loss: Tensor) -> list[Tensor | None]:
        """Of all parameters that train, in the order of ``trained``, laid out as ``.grad`` would be."""
        found = torch.autograd.grad(loss, self.trained, allow_unused=True)
        return [
            gradient
            if gradient is None or gradient.stride() == weight.stride()
            else torch.empty_like(weight).copy_(gradient)
            for weight, gradient in zip(self.trained, found, strict=True)
        ]


@dataclass
class Call:
    """One call of a layer in a step.

    Attributes:
        x: what it was given, in its own memory format, without history.
        needs_gradient: whether its gradient is asked for.
        gradient: of what the layer gave; None where the loss does not depend on that.
        autocast: the dtype, where the layer was called under autocast.
    """

    x: Tensor
    needs_gradient: bool
    gradient: Tensor | None = None
    autocast: torch.dtype | None = None


def calls_of(layers: Mapping[str, nn.Module], steps: Steps) -> dict[str, list[Call]]:
    """The calls of each layer in one step; a layer that the loss does not depend on is left out.

    Holds all the inputs and output gradients of these layers at once.

    Raises:
        TrainingError: a gradient is not finite.
    """
    calls: dict[str, list[Call]] = {name: [] for name in layers}
    with steps.one():
        with ExitStack() as hooks:
            for name, layer in layers.items():
                hook = _noting(calls[name])
                # The first of the hooks sees what the layer itself gives.
                handle = layer.register_forward_hook(hook, prepend=True, with_kwargs=True)
                hooks.callback(handle.remove)
            loss = steps.loss()
        # The hooks are off: what activation checkpointing calls again in backward has been seen.
        steps.gradients(loss)
    reached = {name: [call for call in found if call.gradient is not None] for name, found in calls.items()}
    for name, found in reached.items():
        if not all_finite(call.gradient for call in found if call.gradient is not None):
            raise TrainingError(
                f"the gradient of what layer '{name}' gives is not finite: look at the batch and the weights."
            )
    return {name: found for name, found in reached.items() if found}


def _noting(calls: list[Call]) -> Any:
    def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x = args[0] if args else kwargs["input"]
        if not output.requires_grad:
            return
        kind = x.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        call = Call(x.detach(), x.requires_grad, autocast=autocast)
        calls.append(call)

        def note_gradient(gradient: Tensor) -> None:
            call.gradient = gradient.detach()

        output.register_hook(note_gradient)

    return note
