"""The contract between techniques and the verbs of ``memfit.convert``.

A *technique* is a frozen dataclass of plain values. What it does to a layer type is one small class, a
:class:`ConvertedLayer`, which takes the place of the layer's class while the layer object stays the same: references,
hooks and ``isinstance`` checks of the user go on working.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import fields
from pkgutil import resolve_name
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn


class Technique(ABC):
    """What to do to a layer; subclasses are frozen dataclasses of plain values.

    Attributes:
        layers: for each layer type that the technique converts, the class that takes its place. The type is matched
            exactly: a subclass may read its weights in ways that the technique does not know.
        late_layers: the same for layer types of packages that memfit does not import: from the type's full name to
            the full name of the class that takes its place, in a module that is imported when a model has such a layer.
    """

    layers: ClassVar[Mapping[type[nn.Module], type[ConvertedLayer]]]
    late_layers: ClassVar[Mapping[str, str]] = {}

    def __str__(self) -> str:
        """As it would be written: what was not given is left out."""
        given = [each for each in fields(cast(Any, self)) if getattr(self, each.name) != each.default]
        return f"{type(self).__name__}({', '.join(f'{each.name}={getattr(self, each.name)!r}' for each in given)})"

    def converter(self, kind: type[nn.Module]) -> type[ConvertedLayer] | None:
        """The class that takes the place of a layer type, or None where the technique does not convert it."""
        late = self.late_layers.get(f"{kind.__module__}.{kind.__qualname__}")
        return self.layers.get(kind) if late is None else resolve_name(late)


class ConvertedLayer(nn.Module):
    """Base of the classes that take the place of a layer's class while it is converted."""

    technique: Technique
    takes_weights: ClassVar[bool] = True
    """Whether the conversion is of the layer's weights; if not, layers without any convert as well."""

    @classmethod
    @abstractmethod
    def weight_names(cls, layer: nn.Module) -> list[str]:
        """Names of the layer's parameters that the conversion takes over."""

    @classmethod
    def unsupported(cls, layer: nn.Module, technique: Technique) -> str | None:
        """Why this layer is better left as it is, as the end of a sentence, or None.

        Globs with wildcards leave it out; a plain name is refused.
        """
        return None

    @classmethod
    def parts(cls, layer: nn.Module) -> dict[str, type[ConvertedLayer]]:
        """Child modules that are one layer with this one, by name, and the classes that take their classes' place.

        They are converted whenever this layer is, and never without it.
        """
        return {}

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
    def plain_state(self, made: dict[nn.Module, Tensor]) -> dict[str, Tensor]:
        """The state that the plain layer would have: its own keys, effective weights, detached.

        Args:
            made: effective weights by what holds them, of the layers before this one; tied ones are taken from there.
        """

    @classmethod
    @abstractmethod
    def reading(cls, layer: nn.Module, weight: str) -> Hashable:
        """How the layer reads a weight: owners of one tied weight can share it when these are equal."""

    @abstractmethod
    def tie_(self, weight: str, other: ConvertedLayer, other_weight: str) -> None:
        """Share what ``other_weight`` of another converted layer has become: before, both were one Parameter."""


@torch.no_grad()
def put_parameter(layer: nn.Module, order: Sequence[str], name: str, parameter: nn.Parameter) -> None:
    """Register a parameter again at its place in ``order``, so that ``layer.parameters()`` lists as it did before."""
    layer._parameters[name] = parameter
    layer._parameters.update({key: layer._parameters.pop(key) for key in order if key in layer._parameters})
