"""Where in the training step the program is: the phase, the module, the operator.

Nothing of this touches the autograd graph. Whether an operator belongs to backward, and to which module, is read from
the autograd node that runs it: its sequence number says when, and so in which module's forward, it was made.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from memfit.ledger.account import BACKWARD, FORWARD, RECOMPUTE, START, STEP, Account

_AccumulateGrad = type(get_gradient_edge(nn.Parameter(torch.empty(0))).node)
_graph_task = torch._C._current_graph_task_id
_node = torch._C._current_autograd_node
_sequence_number = torch.autograd._get_sequence_nr


class Position:
    """Follows a training step; notes in the account when a backward begins and ends and when a step ends.

    Args:
        account: where these boundaries are noted.
        model: its modules' names are the ones reported.
        before_step: called with an optimizer right before its step.
        after_step: called with it right after.
    """

    def __init__(
        self,
        account: Account,
        model: nn.Module,
        before_step: Callable[[Optimizer], None],
        after_step: Callable[[Optimizer], None],
    ) -> None:
        self.phase = START
        self.in_backward = False
        self.later_round = False
        """Whether a backward is over, or the module that ran first in the region has been called again."""
        self._account = account
        self._before_step = before_step
        self._after_step = after_step
        self._thread = threading.get_ident()
        self._names = {id(module): name for name, module in model.named_modules()}
        self._owners = {
            id(parameter): name
            for name, module in reversed(list(model.named_modules()))  # a tied weight belongs to its first module
            for parameter in module.parameters(recurse=False)
        }
        self._func: Any = None
        self._graph_task = -1
        self._steps = 0
        self._first_module: int | None = None
        # Modules in forward, innermost last: id, name, whether its forward runs inside of a backward.
        self._stack: list[tuple[int, str, bool]] = []
        # From which autograd sequence number on forward was in which module.
        self._since: list[int] = []
        self._module_since: list[str] = []

    @contextmanager
    def following(self) -> Iterator[None]:
        """Hooks in place for the duration of the context; whatever happens in it, none is left behind."""
        handles = (
            register_module_forward_pre_hook(self._module_begins),
            register_module_forward_hook(self._module_ends, always_call=True),
            register_optimizer_step_pre_hook(self._step_begins),
            register_optimizer_step_post_hook(self._step_ends),
        )
        with ExitStack() as stack:
            for handle in handles:
                stack.callback(handle.remove)
            yield

    def forget_callbacks(self) -> None:
        """Let go of whom the beginnings and ends of steps are reported to."""
        self._before_step = self._after_step = lambda optimizer: None

    def owner(self, parameter: Tensor) -> str | None:
        """Name of the module that a parameter of the model belongs to."""
        return self._owners.get(id(parameter))

    @property
    def operator(self) -> str:
        """Name of the operator at work, as in ``"aten.mm"``."""
        return _name(self._func)

    def accumulates_into(self) -> Tensor | None:
        """The parameter whose gradient the autograd engine is putting in place, if it is doing that."""
        node = _node()
        return getattr(node, "variable", None) if type(node) is _AccumulateGrad else None

    def advance(self, func: Any) -> None:
        """Find out which phase of the step the operator ``func`` belongs to."""
        self._func = func
        task = _graph_task()
        if task == -1:
            if self.in_backward:
                self._account.backward_ends.append(len(self._account))
                self._graph_task, self.in_backward = -1, False
                self.later_round = True
            self.phase = STEP if self._steps else FORWARD
            return
        if task != self._graph_task:
            self._account.backward_begins.append(len(self._account))
            self._graph_task, self.in_backward = task, True
        if self._steps:
            phase = STEP
        elif torch.is_grad_enabled() or (self._stack and self._stack[-1][2]):
            phase = RECOMPUTE
        else:
            phase = BACKWARD
        if phase is BACKWARD and self.phase is RECOMPUTE:
            # What a recomputation leaves behind is what forward would have kept.
            self._account.backward_begins.append(len(self._account))
        self.phase = phase

    def module(self) -> str:
        """Name of the module at work: in backward, the one whose forward made the autograd node that runs."""
        if self._stack and (not self.in_backward or self._stack[-1][2]):
            return self._stack[-1][1]
        node = _node() if self.in_backward else None
        if node is None:
            return ""
        parameter = self.accumulates_into()
        if parameter is not None:
            return self._owners.get(id(parameter), "")
        at = bisect_right(self._since, node._sequence_nr()) - 1
        return self._module_since[at] if at >= 0 else ""

    def _module_begins(self, module: nn.Module, args: Any) -> None:
        inside = _graph_task() != -1
        if threading.get_ident() != self._thread and not inside:
            return
        if not self._stack and not inside:
            self._steps = 0  # a step that an exception ended never said so; one with a closure has set this aside
            if self._first_module is None:
                self._first_module = id(module)
            elif self._first_module == id(module):
                self.later_round = True
        parent = self._stack[-1][1] if self._stack else ""
        name = self._names.get(id(module), parent)
        self._stack.append((id(module), name, inside))
        self._note_module(name)

    def _module_ends(self, module: nn.Module, args: Any, output: Any) -> None:
        # The hook also runs for a module whose forward raised, even if it did so before its beginning was noted.
        if self._stack and self._stack[-1][0] == id(module):
            self._stack.pop()
            self._note_module(self._stack[-1][1] if self._stack else "")

    def _note_module(self, name: str) -> None:
        # Sequence numbers count per thread, and the threads in which backward runs on a GPU have their own.
        if threading.get_ident() == self._thread:
            self._since.append(_sequence_number())
            self._module_since.append(name)

    def _step_begins(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if threading.get_ident() != self._thread and _graph_task() == -1:
            return None
        self.advance(None)
        self._before_step(optimizer)
        self._steps += 1
        if not any(_is_closure(value) for value in (*args, *kwargs.values())):
            return None
        positional = tuple(self._set_apart(value) for value in args)
        named = {name: self._set_apart(value) for name, value in kwargs.items()}
        return positional, named

    def _set_apart(self, value: Any) -> Any:
        """A closure such that what it runs is forward and backward, not step; any other value as it is."""
        if not _is_closure(value):
            return value

        @wraps(value)
        def closure(*args: Any, **kwargs: Any) -> Any:
            steps, self._steps = self._steps, 0
            result = value(*args, **kwargs)
            self._steps = steps  # not when it raises: then the step is over
            return result

        return closure

    def _step_ends(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if threading.get_ident() != self._thread and _graph_task() == -1:
            return
        self._after_step(optimizer)
        self._steps = max(0, self._steps - 1)
        if not self._steps:
            self._account.step_ends.append(len(self._account))


def _is_closure(value: Any) -> bool:
    return callable(value) and not isinstance(value, (Optimizer, nn.Module))


@cache
def _name(func: Any) -> str:
    """Name of an operator for people: ``aten.mm``."""
    return str(func).removesuffix(".default") if func is not None else ""
