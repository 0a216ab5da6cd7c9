"""What layers share whose weight matrices are modules of their own while they are converted."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from memfit.convert import ConvertedLayer, Technique, put_parameter
from memfit.errors import ConversionError


class WeightMatrix(nn.Module):
    """What takes the place of one weight of a layer."""

    @abstractmethod
    def effective(self) -> Tensor:
        """The weight in force, of the weight's shape and dtype."""

    @abstractmethod
    def restore_(self) -> nn.Parameter:
        """The weight's own Parameter, trained, to be an ordinary one again."""


class MatrixLayer(ConvertedLayer):
    """A layer whose weights are each a :class:`WeightMatrix`; subclasses say which, and how to compute forward.

    Reading a converted weight by its own name (``layer.weight``) gives the effective weight, so that code which
    reaches into the layer computes with the right one.
    """

    plain_class: ClassVar[type[nn.Module]]
    holder: ClassVar[str]
    """Name of the submodule, an ``nn.ModuleDict``, that has the matrices by the names of the weights."""
    inputs_first: ClassVar[bool] = False
    """Whether the weights are stored inputs by outputs, so that their matrix is the transpose."""
    _plain_order: tuple[str, ...]

    @classmethod
    @abstractmethod
    def make_matrix(cls, weight: nn.Parameter, technique: Technique, name: str) -> WeightMatrix:
        """What takes the place of a weight, called ``name`` in its model."""

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
            matrices[weight] = cls.make_matrix(parameter, technique, f"{name}.{weight}")
        layer.__class__ = cls
        converted = cast(MatrixLayer, layer)
        converted.technique = technique
        converted._plain_order = order
        converted.add_module(cls.holder, matrices.train(layer.training))

    def restore_(self) -> None:
        matrices, order = self.matrices, self._plain_order
        delattr(self, self.holder)
        del self.technique, self._plain_order
        self.__dict__.pop("_tied_weights_keys", None)
        self.__class__ = self.plain_class  # type: ignore[assignment]
        for name, matrix in matrices.items():
            put_parameter(self, order, name, cast(WeightMatrix, matrix).restore_())

    @classmethod
    def reading(cls, layer: nn.Module, weight: str) -> Hashable:
        return cls.inputs_first

    def tie_(self, weight: str, other: ConvertedLayer, other_weight: str) -> None:
        self.matrices[weight] = cast(MatrixLayer, other).matrices[other_weight]
        # save_pretrained of transformers asks each module which tensors are another's too, and refuses aliases else.
        self._tied_weights_keys = {
            **self.__dict__.get("_tied_weights_keys", {}),
            f"{self.holder}.{weight}": other_weight,
        }

    def plain_state(self, made: dict[nn.Module, Tensor]) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        with torch.no_grad():
            for name in self._plain_order:
                if name in self.matrices:
                    matrix = cast(WeightMatrix, self.matrices[name])
                    if matrix not in made:
                        made[matrix] = matrix.effective().detach()
                    state[name] = made[matrix]
                elif (parameter := self._parameters[name]) is not None:
                    state[name] = parameter.detach()
            for name, buffer in self._buffers.items():
                if buffer is not None and name not in self._non_persistent_buffers_set:
                    state[name] = buffer
        return state

    def reset_parameters(self) -> None:
        raise ConversionError("a converted layer cannot be initialized anew: call memfit.restore_ first.")

    @property
    def matrices(self) -> nn.ModuleDict:
        """The matrices by the names of the weights."""
        return cast(nn.ModuleDict, self._modules[self.holder])

    def __getattr__(self, name: str) -> Any:
        parameters = self.__dict__.get("_parameters", {})
        if name in parameters:  # first what is asked for at each forward
            return parameters[name]
        matrices = self.__dict__.get("_modules", {}).get(self.holder)
        if matrices is not None and name in matrices:
            return matrices[name].effective()
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        matrices = self.__dict__.get("_modules", {}).get(self.holder)
        if matrices is not None and name in matrices:
            raise ConversionError(f"{name} of a converted layer cannot be set: call memfit.restore_ first.")
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.technique}"
