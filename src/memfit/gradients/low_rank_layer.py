"""What every layer with low-rank matrices shares, and the simplest of them, Linear."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from memfit.convert import ConvertedLayer, Technique, put_parameter
from memfit.errors import ConversionError
from memfit.gradients.low_rank_matrix import LowRankMatrix, matrix_shape
from memfit.gradients.refresh import unwatch

if TYPE_CHECKING:
    from memfit.gradients.low_rank import LowRankGradient


class LowRankLayer(ConvertedLayer):
    """A layer whose matrices are :class:`LowRankMatrix`; subclasses say which matrices, and how to compute forward.

    Reading a converted weight by its own name (``layer.weight``) gives the effective weight, so that code which
    reaches into the layer computes with the right one. It is a new tensor each time: writing to it changes nothing.
    """

    low_rank: nn.ModuleDict
    _plain_order: tuple[str, ...]
    plain_class: ClassVar[type[nn.Module]]
    inputs_first: ClassVar[bool] = False
    """Whether the weights are stored inputs by outputs, so that their matrix is the transpose."""

    @classmethod
    def unsupported(cls, layer: nn.Module, technique: Technique) -> str | None:
        """A matrix with a side below the rank: factors would be larger than it."""
        rank = cast("LowRankGradient", technique).rank
        for name in cls.weight_names(layer):
            sides = matrix_shape(cast(Tensor, layer._parameters[name]), cls.inputs_first)
            if rank > min(sides):
                return (
                    f"has a {name} of {sides[0]} x {sides[1]}, so the rank may be at most {min(sides)}, not {rank}: "
                    "lower it, or leave the layer out of where"
                )
        return None

    @classmethod
    def obstacle(cls, layer: nn.Module, technique: Technique) -> str | None:
        for name in cls.weight_names(layer):
            weight = cast(Tensor, layer._parameters[name])
            if not weight.is_floating_point():
                return f"has a {name} of dtype {weight.dtype}, which does not train"
        return None

    @classmethod
    def convert_(cls, layer: nn.Module, technique: Technique, name: str) -> None:
        order = tuple(layer._parameters)
        matrices = nn.ModuleDict()
        for weight in cls.weight_names(layer):
            parameter = cast(nn.Parameter, layer._parameters.pop(weight))
            matrices[weight] = LowRankMatrix(
                parameter, cast("LowRankGradient", technique), f"{name}.{weight}", cls.inputs_first
            )
        layer.__class__ = cls
        converted = cast(LowRankLayer, layer)
        converted.technique = technique
        converted._plain_order = order
        converted.low_rank = matrices.train(layer.training)

    def restore_(self) -> None:
        matrices = self.low_rank
        order = self._plain_order
        del self.low_rank, self.technique, self._plain_order
        self.__dict__.pop("_tied_weights_keys", None)
        self.__class__ = self.plain_class  # type: ignore[assignment]
        for name, matrix in matrices.items():
            matrix = cast(LowRankMatrix, matrix)
            matrix.merge_()
            unwatch(matrix)
            matrix.base.grad = None
            matrix.base.requires_grad_(True)
            put_parameter(self, order, name, matrix.base)

    @classmethod
    def reading(cls, layer: nn.Module, weight: str) -> Hashable:
        return cls.inputs_first

    def tie_(self, weight: str, other: ConvertedLayer, other_weight: str) -> None:
        self.low_rank[weight] = cast(LowRankLayer, other).low_rank[other_weight]
        # save_pretrained of transformers asks each module which tensors are another's too, and refuses aliases else.
        self._tied_weights_keys = {**self.__dict__.get("_tied_weights_keys", {}), f"low_rank.{weight}": other_weight}

    def plain_state(self, made: dict[nn.Module, Tensor]) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        with torch.no_grad():
            for name in self._plain_order:
                if name in self.low_rank:
                    matrix = self.matrix(name)
                    if matrix not in made:
                        made[matrix] = matrix.effective()
                    state[name] = made[matrix]
                elif (parameter := self._parameters[name]) is not None:
                    state[name] = parameter.detach()
            for name, buffer in self._buffers.items():
                if buffer is not None and name not in self._non_persistent_buffers_set:
                    state[name] = buffer
        return state

    def reset_parameters(self) -> None:
        raise ConversionError("a converted layer cannot be initialized anew: call memfit.restore_ first.")

    def matrix(self, name: str) -> LowRankMatrix:
        return cast(LowRankMatrix, self.low_rank[name])

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules", {})
        if "low_rank" in modules and name in modules["low_rank"]:
            return modules["low_rank"][name].effective()
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        modules = self.__dict__.get("_modules", {})
        if "low_rank" in modules and name in modules["low_rank"]:
            raise ConversionError(f"{name} of a converted layer cannot be set: call memfit.restore_ first.")
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.technique}"


class LowRankLinear(LowRankLayer, nn.Linear):
    """``nn.Linear`` trained through low-rank factors."""

    plain_class = nn.Linear

    @classmethod
    def weight_names(cls, layer: nn.Module) -> list[str]:
        return ["weight"]

    def forward(self, input: Tensor) -> Tensor:
        return self.matrix("weight").linear(input, self.bias)
