"""What autograd keeps for each layer between forward and backward, and who else keeps the same memory.

A layer's input is often the output of an activation function that keeps it too: then a layer that does without it
saves nothing. So memory is told apart by storage, and each storage has the list of all that keep it.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from memfit.ledger.tensors import Memory, size, storages
from memfit.vision.scan_step import Steps

PROGRAM = "the program"
"""Stands for whoever holds memory that is there after the step as well, such as the batch."""


@dataclass(frozen=True)
class Kept:
    """What is kept for one layer. All numbers are bytes; parameters are not counted.

    Attributes:
        nbytes: all that autograd keeps for the layer.
        own: the part of it that nobody else keeps.
        by: who else keeps the rest: names of modules (``""`` is the model itself or the loss), or :data:`PROGRAM`.
    """

    nbytes: int
    own: int
    by: tuple[str, ...]


@dataclass
class _Storage:
    nbytes: int
    alive: weakref.ref[Memory]
    keepers: dict[str, None] = field(default_factory=dict)


def kept_by(layers: Mapping[str, nn.Module], steps: Steps) -> tuple[dict[str, Kept], int]:
    """Run a forward pass, and find what is kept for backward.

    What activation checkpointing computes anew is kept by nobody.

    Args:
        layers: by name, as in the model.
        steps: of the model.

    Returns:
        what is kept for each layer, and the bytes that are kept for the whole model and go with backward.
    """
    weights = {memory._cdata for parameter in steps.task.model.parameters() for memory in storages(parameter)}
    found: dict[int, _Storage] = {}
    with steps.one():
        loss = _forward(steps, found, weights)
        del loss
    gc.collect()
    for storage in found.values():
        if storage.alive() is not None:
            storage.keepers[PROGRAM] = None
    kept = {name: _kept(name, [each for each in found.values() if name in each.keepers]) for name in layers}
    return kept, sum(storage.nbytes for storage in found.values() if PROGRAM not in storage.keepers)


def _forward(steps: Steps, found: dict[int, _Storage], weights: set[int]) -> Tensor:
    names = {id(module): name for name, module in steps.task.model.named_modules()}
    inside: list[tuple[int, str]] = []

    def begin(module: nn.Module, args: Any) -> None:
        # A module that is none of the model's, as a loss function: what it keeps is put down to where it is called.
        inside.append((id(module), names.get(id(module), inside[-1][1] if inside else "")))

    def end(module: nn.Module, args: Any, output: Any) -> None:
        if inside and inside[-1][0] == id(module):
            inside.pop()

    def pack(tensor: Tensor) -> Tensor:
        for memory in storages(tensor):
            if memory._cdata in weights:
                continue
            storage = found.get(memory._cdata)
            if storage is None or storage.alive() is not memory:  # what the loss does not depend on is gone already
                storage = found[memory._cdata] = _Storage(size(memory), weakref.ref(memory))
            storage.keepers[inside[-1][1] if inside else ""] = None
        return tensor.detach()  # an operator's own result, with its history, would keep the graph alive for ever

    with ExitStack() as hooks:
        hooks.callback(register_module_forward_pre_hook(begin).remove)
        hooks.callback(register_module_forward_hook(end, always_call=True).remove)
        hooks.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))
        return steps.loss()


def _kept(name: str, kept: list[_Storage]) -> Kept:
    own = [storage for storage in kept if list(storage.keepers) == [name]]
    others = dict.fromkeys(keeper for storage in kept for keeper in storage.keepers if keeper != name)
    return Kept(sum(each.nbytes for each in kept), sum(each.nbytes for each in own), tuple(others))
