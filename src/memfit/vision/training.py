"""What of a net trains: the chosen modules; all else is frozen, and its batch norms keep their statistics."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from memfit.choose import listed
from memfit.errors import MemfitError
from memfit.ledger.target import describe_failure
from memfit.run.modes import evaluating


def train_only(model: nn.Module, patterns: Sequence[str]) -> None:
    """Let the named modules train, with all that is in them, and nothing else; in place.

    Args:
        model: the net; it is put into train mode, but for the batch norms of what is frozen.
        patterns: names and globs over ``model.named_modules()``; ``"*"`` is the whole net.

    Raises:
        MemfitError: a pattern matches no module, or what is matched has no parameters.
    """
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    nothing = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]
    if nothing:
        raise MemfitError(
            f"no module of the model has a name that matches {listed(nothing)}: its modules are "
            f"{listed(name for name, _ in model.named_children())}, and those within them."
        )
    model.train().requires_grad_(False)
    chosen: set[nn.Module] = set()
    for name, module in model.named_modules():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            module.requires_grad_(True)
            chosen.update(module.modules())
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise MemfitError(f"{listed(patterns)} has no parameters: choose modules that have some to train.")
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module not in chosen:
            module.eval()


def check_scores(model: nn.Module, name: str, classes: int, size: int) -> None:
    """Find out with one image whether a net takes the images and gives a score for each class.

    Raises:
        MemfitError: it does not.
    """
    where = f"{name}: the model, given images of shape (1, 3, {size}, {size}),"
    try:
        scores = _scores_of_one(model, size)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise MemfitError(describe_failure(where, error, "smaller images need less")) from error
    if not isinstance(scores, Tensor) or scores.shape != (1, classes):
        found = tuple(scores.shape) if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
        raise MemfitError(f"{where} gives {found}, and should give scores of shape (1, {classes}).")
    if not scores.is_floating_point():
        raise MemfitError(f"{where} gives {scores.dtype} scores, and should give floating-point ones.")


def fewest_images(model: nn.Module, size: int) -> int:
    """The fewest images that a batch may have: 2 where a batch norm that trains sees one value for each, else 1."""
    lone = False

    def look(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal lone
        lone |= inputs[0].numel() == inputs[0].shape[1]

    hooks = [
        module.register_forward_pre_hook(look)
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.training
    ]
    try:
        _scores_of_one(model, size)
    finally:
        for hook in hooks:
            hook.remove()
    return 2 if lone else 1


def _scores_of_one(model: nn.Module, size: int) -> object:
    with evaluating(model):
        return model(torch.zeros(1, 3, size, size).contiguous(memory_format=torch.channels_last))
