"""The one verb for every technique that changes layers, ``convert_``, its way back, ``restore_``, and ``state_dict``.

A *technique* is a frozen dataclass of plain values. What it does to a layer type is one small class, a
:class:`ConvertedLayer`, which takes the place of the layer's class while the layer object stays the same: references,
hooks and ``isinstance`` checks of the user go on working.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import ClassVar

import torch
from torch import Tensor, nn

from memfit.errors import ConversionError

Where = str | Sequence[str] | Callable[[str, nn.Module], bool]


class Technique(ABC):
    """What to do to a layer; subclasses are frozen dataclasses of plain values.

    Attributes:
        layers: for each layer type that the technique converts, the class that takes its place. The type is matched
            exactly: a subclass may read its weights in ways that the technique does not know.
    """

    layers: ClassVar[Mapping[type[nn.Module], type[ConvertedLayer]]]


class ConvertedLayer(nn.Module):
    """Base of the classes that take the place of a layer's class while it is converted."""

    technique: Technique

    @classmethod
    @abstractmethod
    def weight_names(cls, layer: nn.Module) -> list[str]:
        """Names of the layer's parameters that the conversion takes over."""

    @classmethod
    @abstractmethod
    def obstacle(cls, layer: nn.Module, technique: Technique) -> str | None:
        """Why this layer cannot be converted, as the end of a sentence, or None."""

    @classmethod
    @abstractmethod
    def convert_(cls, layer: nn.Module, technique: Technique, name: str) -> None:
        """Turn ``layer`` (called ``name`` in its model) into this class, in place."""

    @abstractmethod
    def restore_(self) -> None:
        """Turn this layer back into its plain class, in place, with the effective weights."""

    @abstractmethod
    def plain_state(self) -> dict[str, Tensor]:
        """The state that the plain layer would have: its own keys, effective weights, detached."""


def convert_(model: nn.Module, technique: Technique, where: Where = "*") -> nn.Module:
    """Convert layers of a model in place, and return the model.

    Make the optimizer after the conversion: the parameters that train are the converted layers' own.

    Args:
        model: any module; it may itself be the layer.
        technique: for example ``memfit.LowRankGradient(rank=16)``.
        where: which layers. A glob over the names of ``model.named_modules()`` (``"encoder.*"``), several globs, or a
            callable ``(name, module) -> bool``. A glob with wildcards takes the layers that the technique supports
            and that train; a plain name, or a callable's yes, must be such a layer. The model itself is called ``""``.

    Raises:
        ConversionError: nothing matched; a layer is unsupported, frozen, converted already, shares its weight with
            another layer, or does not suit the technique (for example a rank above the layer's). The model is then
            unchanged.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
        >>> convert_(model, memfit.LowRankGradient(rank=8), where="0")
    """
    chosen = _choose(model, technique, where)
    _refuse_tied_weights(model, technique, chosen)
    obstacles = {name: technique.layers[type(layer)].obstacle(layer, technique) for name, layer in chosen.items()}
    if any(obstacles.values()):
        reasons = "; ".join(f"{_label(name)} {reason}" for name, reason in obstacles.items() if reason)
        raise ConversionError(f"{technique} cannot convert these layers: {reasons}.")
    for name, layer in chosen.items():
        technique.layers[type(layer)].convert_(layer, technique, name)
    return model


def restore_(model: nn.Module) -> nn.Module:
    """Turn every converted layer of a model back into its plain class, with the trained weights, and return the model.

    The original parameter objects come back, so that weights keep their identity; the factors are gone. Make a new
    optimizer to train on. A model without converted layers is returned as it is.
    """
    for layer in [module for module in model.modules() if isinstance(module, ConvertedLayer)]:
        layer.restore_()
    return model


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The model's state with the original model's keys and the effective weights.

    Loads into the original model with ``load_state_dict``, and is what one saves to use the model elsewhere. To go on
    training, save ``model.state_dict()`` instead: it has the factors.

    Returns:
        Detached tensors in the original order. Unconverted ones share memory with the model; effective weights are new.
    """
    plain: dict[int, dict[str, Tensor]] = {}  # once for each layer: one under two names stays tied

    def replace(layer: nn.Module, state: dict[str, Tensor], prefix: str, metadata: object) -> None:
        for key in [key for key in state if key.startswith(prefix)]:
            del state[key]
        values = plain.setdefault(id(layer), layer.plain_state())  # type: ignore[operator]
        state.update({prefix + name: value for name, value in values.items()})

    # Hooks, for wrappers around a layer rename its keys: they must find the plain ones.
    layers = [module for module in model.modules() if isinstance(module, ConvertedLayer)]
    hooks = [layer.register_state_dict_post_hook(replace) for layer in layers]
    try:
        return dict(model.state_dict())
    finally:
        for hook in hooks:
            hook.remove()


def _choose(model: nn.Module, technique: Technique, where: Where) -> dict[str, nn.Module]:
    """The layers to convert by name, each once; raises where the choice itself is wrong."""
    patterns = [where] if isinstance(where, str) else where
    chosen: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()  # prefixes of converted layers, whose own submodules are not layers of the user's
    for name, module in model.named_modules():
        if isinstance(module, ConvertedLayer):
            inside += (name + "." if name else "",)
        elif name.startswith(inside) and inside:
            continue
        if callable(patterns):
            wanted = explicit = bool(patterns(name, module)) and _has_matrix(module)
        else:
            explicit = name in patterns
            wanted = explicit or any(fnmatchcase(name, pattern) for pattern in patterns)
        if not wanted:
            continue
        if isinstance(module, ConvertedLayer):
            raise ConversionError(
                f"{_label(name)} is converted already, by {module.technique}: call memfit.restore_ first."
            )
        reason = _unsupported(module, technique)
        if reason is None:
            chosen[name] = module
        elif explicit:
            raise ConversionError(f"{_label(name)} {reason}.")
    if not chosen:
        names = [name for name, module in model.named_modules() if type(module) in technique.layers]
        raise ConversionError(
            f"where={where!r} matched no layer that {technique} converts; "
            + (f"the model has: {_listed(names)}." if names else "the model has none.")
        )
    return chosen


def _unsupported(module: nn.Module, technique: Technique) -> str | None:
    """Why a module is no candidate at all, as the end of a sentence, or None."""
    kind = type(module)
    if kind not in technique.layers:
        supported = ", ".join(layer.__name__ for layer in technique.layers)
        return f"is a {kind.__name__}, which {type(technique).__name__} does not convert (it converts {supported})"
    weights = [module._parameters.get(name) for name in technique.layers[kind].weight_names(module)]
    if not weights or any(weight is None for weight in weights):
        return "keeps its weight elsewhere (a parametrization or weight norm?): remove that first"
    if not all(weight.requires_grad for weight in weights if weight is not None):
        return "is frozen (requires_grad=False): there is no gradient to shrink"
    return None


def _refuse_tied_weights(model: nn.Module, technique: Technique, chosen: Mapping[str, nn.Module]) -> None:
    """A converted weight must be one layer's alone; a layer that appears under several names is one layer."""
    owners: dict[int, list[tuple[nn.Module, str, str]]] = {}
    for name, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, name, attribute))
    for name, layer in chosen.items():
        for weight in technique.layers[type(layer)].weight_names(layer):
            sharing = owners[id(layer._parameters[weight])]
            if len(sharing) > 1:
                others = [
                    f"{owner}.{attribute}" if owner else attribute
                    for module, owner, attribute in sharing
                    if (module, attribute) != (layer, weight)
                ]
                raise ConversionError(
                    f"{_label(name)} shares its {weight} with {_listed(others)}: converting one would untie them; "
                    f"leave it out of where."
                )


def _has_matrix(module: nn.Module) -> bool:
    return any(parameter.dim() >= 2 for parameter in module.parameters(recurse=False))


def _label(name: str) -> str:
    return f"layer '{name}'" if name else "the model itself"


def _listed(names: Iterable[str], most: int = 8) -> str:
    names = [f"'{name}'" for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


@torch.no_grad()
def put_parameter(layer: nn.Module, order: Sequence[str], name: str, parameter: nn.Parameter) -> None:
    """Register a parameter again at its place in ``order``, so that ``layer.parameters()`` lists as it did before."""
    layer._parameters[name] = parameter
    layer._parameters.update({key: layer._parameters.pop(key) for key in order if key in layer._parameters})
