"""Who wants to know when an optimizer steps. No call in the user's loop is needed: torch tells of every step."""

from __future__ import annotations

import sys
import threading
import weakref
from abc import ABC, abstractmethod
from types import FrameType
from typing import Any, ClassVar, NamedTuple, cast

from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

_watchers: weakref.WeakSet[Watcher] = weakref.WeakSet()
_optimizers = WeakIdKeyDictionary()  # parameter -> a weak reference to the optimizer that last stepped with it
_steps = threading.local()  # .running: the steps that this thread is in, outermost first


class Watcher(ABC):
    """What is told of the steps of its parameters' optimizers, from :func:`watch` on."""

    has_moments: ClassVar[bool] = False
    """Whether :func:`optimizer_of` is to know the optimizers of the watched parameters."""

    @abstractmethod
    def watched(self) -> tuple[nn.Parameter | None, nn.Parameter]:
        """The parameter before whose optimizer's steps, and the one after whose steps, this wants to be told."""

    def before_step(self) -> None:
        """An optimizer is about to step; the gradients are there, those of its closure too."""
        return

    @abstractmethod
    def after_step(self, optimizer: Optimizer) -> None:
        """An optimizer has stepped: ``optimizer``, or one that is within it."""


class _Step(NamedTuple):
    """A call of an optimizer's step.

    Attributes:
        frame: torch's, from which the optimizer's own code and the hooks are called.
        own: the watched parameters that this call looks after.
    """

    frame: FrameType
    own: list[nn.Parameter]


def watch(watcher: Watcher) -> None:
    """From now on tell ``watcher`` of steps."""
    _watchers.add(watcher)


def unwatch(watcher: Watcher) -> None:
    """Undo :func:`watch`."""
    _watchers.discard(watcher)


def optimizer_of(parameter: nn.Parameter) -> Optimizer | None:
    """The optimizer that last stepped with a parameter; of one within another the one with the state.

    Known of parameters of watchers that have moments.
    """
    reference = _optimizers.get(parameter)
    return None if reference is None else reference()


def _before_any_step(optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
    """Torch's hook before a step: watchers are told after the closure, where there is one."""
    if not _watchers:
        return None
    # Steps within a step are those of an optimizer that wraps or extends another: the outermost one counts.
    running = _running_steps()
    outer = {id(parameter) for step in running for parameter in step.own}
    pairs = [(watcher, *watcher.watched()) for watcher in _watchers]
    wanted = {id(parameter) for _, *both in pairs for parameter in both}
    held = [p for group in optimizer.param_groups for p in group["params"] if id(p) in wanted and id(p) not in outer]
    running.append(_Step(sys._getframe(1), held))
    first = {id(before): watcher for watcher, before, _ in pairs if before is not None}
    told = [first[id(parameter)] for parameter in held if id(parameter) in first]
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if not told or not callable(closure):
        _tell(told)
        return None

    def and_tell() -> Any:
        loss = closure()
        _tell(told)
        return loss

    if "closure" in kwargs:
        return args, {**kwargs, "closure": and_tell}
    return (args[0], and_tell, *args[2:]), kwargs


def _tell(watchers: list[Watcher]) -> None:
    for watcher in watchers:
        watcher.before_step()


def _after_any_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Torch's hook after a step."""
    if not _watchers:
        return
    pairs = [(watcher, *watcher.watched()) for watcher in _watchers]
    wanted = {id(parameter) for watcher, *both in pairs if watcher.has_moments for parameter in both}
    if wanted:
        for parameter in [p for group in optimizer.param_groups for p in group["params"] if id(p) in wanted]:
            # Of one optimizer within another the inner one has the state, and comes first.
            known = optimizer_of(parameter)
            if known is None or parameter in optimizer.state or parameter not in known.state:
                _optimizers[parameter] = weakref.ref(optimizer)
    running, frame = _running_steps(), sys._getframe(1)
    if running and running[-1].frame is frame:
        last = {id(after): watcher for watcher, _, after in pairs}
        # In the optimizer's order, the same in all processes: merging a sharded weight is a conversation of theirs.
        for parameter in running.pop().own:
            if id(parameter) in last:
                last[id(parameter)].after_step(optimizer)


def _running_steps() -> list[_Step]:
    """The steps that this thread is inside of; one that has raised is not running any more."""
    callers: set[int] = set()
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        callers.add(id(frame))
        frame = frame.f_back
    _steps.running = [step for step in getattr(_steps, "running", []) if id(step.frame) in callers]
    return cast("list[_Step]", _steps.running)


register_optimizer_step_pre_hook(_before_any_step)
register_optimizer_step_post_hook(_after_any_step)
