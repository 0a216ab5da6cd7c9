"""The state of a run as a tree for a checkpoint, and back: everything is compared before anything is changed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from memfit.errors import CheckpointError

_DIGEST = "_sha256"  # so ends the name of a setting that tells nobody anything but whether it is the same


def pack(model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler | None) -> dict[str, Any]:
    """What training changes, by reference, and what tells whether it fits another model, optimizer and scheduler."""
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": None if scheduler is None else scheduler.state_dict(),
        "kinds": _kinds(optimizer, scheduler),
        "trained": _trained(model, optimizer),
    }


def strangers(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """Shapes of the optimizer's parameters that are not the model's: a checkpoint would not hold their values."""
    known = {id(parameter) for parameter in model.parameters()}
    return [_describe(p) for group in optimizer.param_groups for p in group["params"] if id(p) not in known]


def compare_settings(saved: Mapping[str, Any] | None, current: Mapping[str, Any] | None, path: object) -> None:
    """Refuse a resume with other settings.

    Raises:
        CheckpointError: names each setting that differs, and both its values.
    """
    listed = differing_settings(saved or {}, current or {})
    if listed:
        raise CheckpointError(
            f"{path}: the checkpoint was made with other settings: {listed}: "
            "resume with the same settings, or start anew without resuming."
        )


def differing_settings(saved: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    """The settings that differ, in words; none, where all are the same."""
    then, now = saved, json.loads(json.dumps(current))
    differing = []
    for key in dict.fromkeys([*then, *now]):
        texts = [json.dumps(values[key], sort_keys=True) if key in values else "not given" for values in (then, now)]
        if texts[0] != texts[1] and key.endswith(_DIGEST):
            differing.append(f"other {key.removesuffix(_DIGEST).replace('_', ' ')}")
        elif texts[0] != texts[1]:
            differing.append(f"{key} was {texts[0]} and is {texts[1]}")
    return "; ".join(differing)


def compare(tree: Mapping[str, Any], model: nn.Module, optimizer: Optimizer, scheduler: object, path: object) -> None:
    """Refuse a checkpoint of another model, optimizer or scheduler.

    Raises:
        CheckpointError: says what differs; nothing has been changed.
    """
    for what, then, now in zip(("optimizer", "scheduler"), tree["kinds"], _kinds(optimizer, scheduler), strict=True):
        if then != now:
            raise CheckpointError(
                f"{path}: the checkpoint was made with {then or 'no ' + what} and not with {now or 'no ' + what}: "
                f"resume with the same {what}."
            )
    saved, current = tree["model"], model.state_dict()
    shared = [name for name in current if name in saved]
    pairs = {name: (saved[name], current[name]) for name in shared if isinstance(current[name], Tensor)}
    shapes = {name: [_describe(value) for value in pair] for name, pair in pairs.items()}
    differing = [
        f"{name!r} is {then} in it and {now} in the model" for name, (then, now) in shapes.items() if then != now
    ]
    problems = [
        start + _listed(names)
        for start, names in (
            ("it has no ", [repr(name) for name in current if name not in saved]),
            ("the model has no ", [repr(name) for name in saved if name not in current]),
            ("", differing),
        )
        if names
    ]
    if not problems and tree["trained"] != _trained(model, optimizer):
        problems = ["the optimizer holds other parameters, or in another order"]
    if problems:
        raise CheckpointError(
            f"{path}: the checkpoint is of another model: {'; '.join(problems)}: "
            "resume with the model that it was made with."
        )


def unpack(
    tree: Mapping[str, Any], model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler | None, path: object
) -> None:
    """Load what :func:`pack` gave, after :func:`compare`. The optimizer keeps the tree's tensors as its own.

    Raises:
        CheckpointError: the model, the optimizer or the scheduler refuses the state.
    """
    try:
        model.load_state_dict(tree["model"])
        optimizer.load_state_dict(tree["optimizer"])
        if scheduler is not None:
            scheduler.load_state_dict(tree["scheduler"])
    except (RuntimeError, ValueError, KeyError) as problem:
        first = str(problem).splitlines()[0]
        raise CheckpointError(f"{path}: the checkpoint does not fit this model and optimizer: {first}") from problem
    _keep_dtypes(tree["optimizer"]["state"], optimizer)


def _keep_dtypes(saved: Mapping[int, Any], optimizer: Optimizer) -> None:
    """``Optimizer.load_state_dict`` casts state to the parameter's dtype: keep float32 moments of bfloat16 weights."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, entries in saved.items():
        state = optimizer.state[parameters[index]]
        for key, value in entries.items():
            loaded = state.get(key)
            if isinstance(value, Tensor) and isinstance(loaded, Tensor) and loaded.dtype != value.dtype:
                state[key] = value.to(loaded.device)


def _kinds(optimizer: Optimizer, scheduler: object) -> tuple[str, str | None]:
    return type(optimizer).__qualname__, None if scheduler is None else type(scheduler).__qualname__


def _trained(model: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    """For each group of the optimizer, the names of its parameters in the model."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def _listed(items: list[str], most: int = 3) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def _describe(tensor: object) -> str:
    if not isinstance(tensor, Tensor):
        return "no tensor"
    shape = "x".join(str(size) for size in tensor.shape) or "scalar"
    return f"{str(tensor.dtype).removeprefix('torch.')} {shape}"
