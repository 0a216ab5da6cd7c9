"""When low-rank factors change their basis, and what then becomes of the optimizer's moments.

No call in the user's loop is needed: torch tells of every optimizer's step.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

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

_refreshing: weakref.WeakSet[LowRankMatrix] = weakref.WeakSet()
_optimizers = WeakIdKeyDictionary()  # factor -> a weak reference to the optimizer that last moved it


def watch(matrix: LowRankMatrix) -> None:
    """From now on call ``matrix.before_step`` and ``after_step`` around the steps of the optimizers of its factors.

    The one before each step of the optimizer that holds the right factor, the other after the left factor's.
    """
    _refreshing.add(matrix)


def _before_any_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if _refreshing:
        matrices = {id(matrix.right): matrix for matrix in _refreshing}
        for parameter in [p for group in optimizer.param_groups for p in group["params"]]:
            if id(parameter) in matrices:
                matrices[id(parameter)].before_step()


def _after_any_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not _refreshing:
        return
    matrices = {id(matrix.left): matrix for matrix in _refreshing}
    factors = {id(factor) for matrix in _refreshing for factor in (matrix.left, matrix.right)}
    held = [p for group in optimizer.param_groups for p in group["params"] if id(p) in factors]
    for factor in held:
        _optimizers[factor] = weakref.ref(optimizer)
    # In the optimizer's order, the same in all processes: the merge of a sharded weight is a conversation of theirs.
    for factor in held:
        if id(factor) in matrices:
            matrices[id(factor)].after_step()


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
