"""When low-rank factors change their basis, and what then becomes of the optimizer's moments.

No call in the user's loop is needed: torch tells of every optimizer's step.
"""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from memfit.sharding import replicated

if TYPE_CHECKING:
    from memfit.gradients.low_rank_matrix import LowRankMatrix

# What optimizers remember of a parameter, by how it changes with the parameter's coordinates. All else is reset.
_LINEAR = frozenset({"exp_avg", "momentum_buffer"})
_QUADRATIC = frozenset({"exp_avg_sq", "max_exp_avg_sq"})

_all: weakref.WeakSet[LowRankMatrix] = weakref.WeakSet()
_refreshing: weakref.WeakSet[LowRankMatrix] = weakref.WeakSet()
_optimizers = WeakIdKeyDictionary()  # factor -> a weak reference to the optimizer that last moved it
_looked_at: weakref.WeakSet[Optimizer] = weakref.WeakSet()
_steps = threading.local()  # .running: the steps that this thread is in, outermost first


class _Step(NamedTuple):
    """A call of an optimizer's step.

    Attributes:
        frame: torch's, from which the optimizer's own code and the hooks are called.
        own: the factors that this call looks after.
    """

    frame: FrameType
    own: list[nn.Parameter]


def watch(matrix: LowRankMatrix) -> None:
    """From now on call ``matrix.before_step`` and ``after_step`` around the steps of the optimizers of its factors.

    The one before each step of the optimizer that holds the right factor, the other after the left factor's; neither
    for a matrix that is never refreshed. An optimizer that would not train the factors is told of.
    """
    _all.add(matrix)
    if matrix.refresh is not None:
        _refreshing.add(matrix)


def unwatch(matrix: LowRankMatrix) -> None:
    """Undo :func:`watch`."""
    _all.discard(matrix)
    _refreshing.discard(matrix)


def _warn_once(optimizer: Optimizer) -> None:
    """Warn if an optimizer holds a weight from before its conversion and not the factors that train in its place."""
    if optimizer in _looked_at:
        return
    _looked_at.add(optimizer)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if any(id(matrix.base) in held and id(matrix.left) not in held for matrix in _all):
        warnings.warn(
            f"this {type(optimizer).__name__} was made before memfit.convert_ and does not train the converted layers: "
            "make it after the conversion.",
            stacklevel=4,
        )


def _before_any_step(optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
    """Torch's hook before a step: gradients of bases are put aside, after the closure where there is one."""
    if _all:
        _warn_once(optimizer)
    if not _refreshing:
        return None
    # Steps within a step are those of an optimizer that wraps or extends another: the outermost one counts.
    running = _running_steps()
    outer = {id(parameter) for step in running for parameter in step.own}
    factors = {id(factor) for matrix in _refreshing for factor in (matrix.left, matrix.right)}
    held = [p for group in optimizer.param_groups for p in group["params"] if id(p) in factors and id(p) not in outer]
    running.append(_Step(sys._getframe(1), held))
    of_right = {id(matrix.right): matrix for matrix in _refreshing}
    matrices = [of_right[id(parameter)] for parameter in held if id(parameter) in of_right]
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if not matrices or not callable(closure):
        _put_aside(matrices)
        return None

    def and_put_aside() -> Any:
        loss = closure()
        _put_aside(matrices)
        return loss

    if "closure" in kwargs:
        return args, {**kwargs, "closure": and_put_aside}
    return (args[0], and_put_aside, *args[2:]), kwargs


def _put_aside(matrices: list[LowRankMatrix]) -> None:
    for matrix in matrices:
        matrix.before_step()


def _after_any_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Torch's hook after a step: count it for each matrix whose left factor it has moved."""
    if not _refreshing:
        return
    matrices = {id(matrix.left): matrix for matrix in _refreshing}
    factors = {id(factor) for matrix in _refreshing for factor in (matrix.left, matrix.right)}
    for parameter in [p for group in optimizer.param_groups for p in group["params"] if id(p) in factors]:
        # Of one optimizer within another the inner one has the state, and comes first.
        known = _optimizer_of(parameter)
        if known is None or parameter in optimizer.state or parameter not in known.state:
            _optimizers[parameter] = weakref.ref(optimizer)
    running, frame = _running_steps(), sys._getframe(1)
    if running and running[-1].frame is frame:
        # In the optimizer's order, the same in all processes: merging a sharded weight is a conversation of theirs.
        for factor in running.pop().own:
            if id(factor) in matrices:
                matrices[id(factor)].after_step()


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


def _optimizer_of(factor: nn.Parameter) -> Optimizer | None:
    reference = _optimizers.get(factor)
    return None if reference is None else reference()


def move_moments(factor: nn.Parameter, coordinates: Tensor) -> None:
    """Bring the moments of a left factor (m x r) to new coordinates (r x r), ``u -> u C``.

    A mean of gradients moves as they do. A mean of their squares moves by the squares of C, which is right where their
    coordinates are uncorrelated (LDAdam, arXiv 2410.16103). Other state is reset.
    """
    optimizer = _optimizer_of(factor)
    if optimizer is None:
        return
    state = optimizer.state.get(factor, {})
    moments = {name for name, value in state.items() if isinstance(value, Tensor) and value.shape == factor.shape}
    if not moments or not moments <= _LINEAR | _QUADRATIC:
        reset_moments(factor)
        return
    for name in moments:
        moment = state[name]
        moved = (coordinates if name in _LINEAR else coordinates.square()).to(moment.dtype)
        if moment.is_sparse:  # of an embedding with sparse gradients
            moment = moment.coalesce()
            values = moment.values() @ moved
            state[name] = torch.sparse_coo_tensor(moment.indices(), values, moment.shape, check_invariants=False)
        else:
            moment.copy_(moment @ replicated(moved, moment))


def reset_moments(factor: nn.Parameter) -> None:
    """Bring a factor's optimizer state to what it was before the first step."""
    optimizer = _optimizer_of(factor)
    if optimizer is None:
        return
    if isinstance(optimizer, torch.optim.Adagrad):  # the one optimizer of torch that makes its state at once
        state = optimizer.state[factor]
        group = next(g for g in optimizer.param_groups if any(p is factor for p in g["params"]))
        state["sum"].fill_(group["initial_accumulator_value"])
        state["step"].zero_()
    elif isinstance(optimizer, torch.optim.LBFGS):  # keeps one history of all parameters, under the first one's name
        optimizer.state.clear()
    else:
        optimizer.state.pop(factor, None)
