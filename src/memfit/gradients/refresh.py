"""What becomes of the optimizer's moments when low-rank factors change their basis, and who would not train those."""

from __future__ import annotations

import warnings
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from memfit.gradients import steps
from memfit.sharding import replicated

if TYPE_CHECKING:
    from memfit.gradients.low_rank_matrix import LowRankMatrix

# What optimizers remember of a parameter, by how it changes with the parameter's coordinates. All else is reset.
_LINEAR = frozenset({"exp_avg", "momentum_buffer"})
_QUADRATIC = frozenset({"exp_avg_sq", "max_exp_avg_sq"})

_all: weakref.WeakSet[LowRankMatrix] = weakref.WeakSet()
_looked_at: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def watch(matrix: LowRankMatrix) -> None:
    """From now on call ``matrix.before_step`` and ``after_step`` around the steps of the optimizers of its factors.

    The one before each step of the optimizer that holds the right factor, the other after the left factor's; neither
    for a matrix that is never refreshed. An optimizer that would not train the factors is told of.
    """
    _all.add(matrix)
    if matrix.refresh is not None:
        steps.watch(matrix)


def unwatch(matrix: LowRankMatrix) -> None:
    """Undo :func:`watch`."""
    _all.discard(matrix)
    steps.unwatch(matrix)


def _warn_once(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Warn if an optimizer holds a weight from before its conversion and not the factors that train in its place."""
    if not _all or optimizer in _looked_at:
        return
    _looked_at.add(optimizer)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if any(id(matrix.base) in held and id(matrix.left) not in held for matrix in _all):
        warnings.warn(
            f"this {type(optimizer).__name__} was made before memfit.convert_ and does not train the converted layers: "
            "make it after the conversion.",
            stacklevel=3,
        )


register_optimizer_step_pre_hook(_warn_once)


def move_moments(factor: nn.Parameter, coordinates: Tensor) -> None:
    """Bring the moments of a left factor (m x r) to new coordinates (r x r), ``u -> u C``.

    A mean of gradients moves as they do. A mean of their squares moves by the squares of C, which is right where their
    coordinates are uncorrelated (LDAdam, arXiv 2410.16103). Other state is reset.
    """
    optimizer = steps.optimizer_of(factor)
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
    optimizer = steps.optimizer_of(factor)
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
