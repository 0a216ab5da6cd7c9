"""Which layers of a model a conversion takes: names, globs and callables, and the weights that several layers share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from memfit.errors import ConversionError
from memfit.technique import ConvertedLayer, Technique

Where = str | Sequence[str] | Callable[[str, nn.Module], bool]


class Choice(NamedTuple):
    """A layer to convert, the class that takes its class's place, and whether the user meant this very layer.

    ``whole`` is the name of the layer that it is a part of, else its own.
    """

    layer: nn.Module
    kind: type[ConvertedLayer]
    explicit: bool
    whole: str


class Owner(NamedTuple):
    """A place where a parameter is registered."""

    module: nn.Module
    name: str
    attribute: str

    def __str__(self) -> str:
        return f"{self.name}.{self.attribute}" if self.name else self.attribute


def choose(model: nn.Module, technique: Technique, where: Where) -> tuple[dict[str, Choice], list[list[Owner]]]:
    """The layers to convert by name, each once, and the weights they share; raises where the choice itself is wrong."""
    patterns = [where] if isinstance(where, str) else where
    if not callable(patterns):
        _check_names(model, patterns)
    chosen: dict[str, Choice] = {}
    passed: dict[str, str] = {}  # layers that the technique knows, left out, and why
    wholes: dict[int, str] = {}  # modules that are a part of another layer, and that layer's name
    inside: tuple[str, ...] = ()  # prefixes of converted layers, whose own submodules are not layers of the user's
    for name, module in model.named_modules():
        if isinstance(module, ConvertedLayer):
            inside += (name + "." if name else "",)
        elif name.startswith(inside) and inside:
            continue
        kind = technique.converter(type(module))
        if callable(patterns):
            suits = _has_matrix(module) or (kind is not None and not kind.takes_weights)
            wanted = explicit = bool(patterns(name, module)) and suits
        else:
            explicit = name in patterns
            wanted = explicit or any(fnmatchcase(name, pattern) for pattern in patterns)
        parts = {} if kind is None else kind.parts(module)
        for part in parts:
            wholes.setdefault(id(module.get_submodule(part)), name)
        if not wanted or name in chosen:
            continue
        if isinstance(module, ConvertedLayer):
            raise ConversionError(
                f"{label(name)} is converted already, by {module.technique}: call memfit.restore_ first."
            )
        reason = _unsupported(module, kind, technique)
        if id(module) in wholes:
            reason = f"is a part of {label(wholes[id(module)])} and converted together with it: choose that one"
        if kind is not None and reason is None:
            chosen[name] = Choice(module, kind, explicit, name)
            for part, part_kind in parts.items():
                child = module.get_submodule(part)
                if wholes[id(child)] == name:  # else two layers have it in common
                    chosen[f"{name}.{part}" if name else part] = Choice(child, part_kind, explicit, name)
        elif explicit:
            raise ConversionError(f"{label(name)} {reason}.")
        elif kind is not None and reason is not None:
            passed[name] = reason
    ties = _tie(model, chosen, passed)
    if not chosen:
        names = [name for name, module in model.named_modules() if technique.converter(type(module))]
        reasons = "; ".join(f"{label(name)} {reason}" for name, reason in list(passed.items())[:8])
        raise ConversionError(
            f"where={where!r} matched no layer that {technique} converts; "
            + (reasons or (f"the model has: {listed(names)}" if names else "the model has none"))
            + "."
        )
    return chosen, ties


def _check_names(model: nn.Module, patterns: Sequence[str]) -> None:
    """Raise for a pattern that is none, or one of several that names nothing: a slip would leave a layer dense."""
    if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ConversionError(
            f"where={patterns!r} is not possible: give a name or glob, a list of them, or a callable of name and layer."
        )
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    nothing = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]
    if nothing and len(patterns) > 1:
        raise ConversionError(f"where={patterns!r}: no layer has a name that matches {listed(nothing)}.")


def _unsupported(module: nn.Module, kind: type[ConvertedLayer] | None, technique: Technique) -> str | None:
    """Why a module is no candidate at all, as the end of a sentence, or None."""
    if kind is None:
        supported = [layer.__name__ for layer in technique.layers]
        supported += [name.rpartition(".")[2] + " of " + name.partition(".")[0] for name in technique.late_layers]
        return (
            f"is a {type(module).__name__}, which {type(technique).__name__} does not convert "
            f"(it converts {', '.join(supported)})"
        )
    weights = [module._parameters.get(name) for name in kind.weight_names(module)]
    if (kind.takes_weights and not weights) or any(weight is None for weight in weights):
        return "keeps its weight elsewhere (a parametrization or weight norm?): remove that first"
    if not all(weight.requires_grad for weight in weights if weight is not None):
        return "is frozen (requires_grad=False): there is no gradient to shrink"
    reason = kind.unsupported(module, technique)
    for part, part_kind in kind.parts(module).items():
        if reason is None and (flaw := _unsupported(module.get_submodule(part), part_kind, technique)):
            reason = f"has a part '{part}' that {flaw}"
    return reason


def _tie(model: nn.Module, chosen: dict[str, Choice], passed: dict[str, str]) -> list[list[Owner]]:
    """The weights that several chosen layers share, each with its owners.

    A shared weight is converted for all its owners or for none. Where an owner is not chosen, or reads the weight in
    another way, the others are taken out of ``chosen`` and into ``passed``, or refused if they were chosen explicitly.
    """
    owners: dict[int, list[Owner]] = {}
    for name, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(Owner(module, name, attribute))
    shared = [group for group in owners.values() if len(group) > 1]
    while True:
        ties: list[list[Owner]] = []
        out: dict[str, str] = {}
        for group in shared:
            taken = [owner for owner in group if _takes(chosen.get(owner.name), owner.attribute)]
            readings = {chosen[owner.name].kind.reading(owner.module, owner.attribute) for owner in taken}
            if len(taken) == len(group) and len(readings) == 1:
                ties.append(group)
                continue
            for owner in taken:
                others = listed(str(other) for other in group if other != owner)
                out[owner.name] = f"shares its {owner.attribute} with {others}" + (
                    ": converting one would untie them; choose all of them or leave it out of where"
                    if len(taken) < len(group)
                    else ", which store it the other way round: leave it out of where"
                )
        for name, reason in out.items():
            if chosen[name].explicit:
                raise ConversionError(f"{label(name)} {reason}.")
        wholes = {chosen[name].whole for name in out}
        for name in [name for name, choice in chosen.items() if choice.whole in wholes]:
            del chosen[name]
        passed.update(out)
        if not out:  # else a layer that was left out may share another of its weights
            return ties


def _takes(choice: Choice | None, attribute: str) -> bool:
    """Whether a layer is chosen, and the parameter is one that its conversion takes over."""
    return choice is not None and attribute in choice.kind.weight_names(choice.layer)


def _has_matrix(module: nn.Module) -> bool:
    return any(parameter.dim() >= 2 for parameter in module.parameters(recurse=False))


def label(name: str) -> str:
    return f"layer '{name}'" if name else "the model itself"


def listed(names: Iterable[str], most: int = 8) -> str:
    names = [f"'{name}'" for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
