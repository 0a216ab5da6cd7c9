"""Layers whose weights are in cells, and the optimizer that writes them: what training without low rank costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from memfit.weights.cell_array import CellArray

CELLS = "weight_cells"


def put_in_cells_(layers: Iterable[nn.Module], bits: int = 8, limit: float | None = None) -> list[CellArray]:
    """Move the ``weight`` of each layer into a :class:`CellArray`, in place.

    The layer's ``weight`` stays the Parameter that it is, which the cells hold too: it is read as before, follows every
    drift, and is written by :class:`CellSGD` alone; another optimizer would go past the cells, uncounted. The cells are
    the layer's submodule ``weight_cells``, so that ``state_dict`` has them.

    Args:
        layers: with a floating-point ``weight`` each, such as ``nn.Linear`` and ``nn.Conv2d``.
        bits: of a cell.
        limit: cells hold [-limit, limit), a power of two; None for the smallest that holds the layer's weights.

    Returns:
        The arrays, in the order of the layers.
    """
    arrays = []
    for layer in layers:
        weight = layer.weight
        assert isinstance(weight, nn.Parameter)
        reach = range_of(weight) if limit is None else limit
        array = CellArray(weight, bits, -reach, reach)
        layer.add_module(CELLS, array)
        arrays.append(array)
    return arrays


def range_of(weight: Tensor) -> float:
    """The smallest power of two that is not below any weight's magnitude; 1 for weights that are all zero."""
    largest = float(weight.detach().abs().max()) if weight.numel() else 0.0
    return 2.0 ** math.ceil(math.log2(largest)) if largest > 0 else 1.0


class CellSGD(Optimizer):
    """Stochastic gradient descent on weights in cells, without momentum: W <- Q(W - lr G), at every step.

    What is below half a level's distance is lost: there is no other memory in which it could add up.

    Args:
        layers: those that :func:`put_in_cells_` was given.
        lr: learning rate.

    Raises:
        ValueError: a layer's weight is not in cells.
    """

    def __init__(self, layers: Iterable[nn.Module], lr: float) -> None:
        self._cells: dict[Tensor, CellArray] = {}
        for layer in layers:
            array = getattr(layer, CELLS, None)
            if not isinstance(array, CellArray):
                raise ValueError(f"the weight of {layer} is not in cells: put_in_cells_ it first.")
            assert isinstance(layer.weight, nn.Parameter)
            self._cells[layer.weight] = array
        super().__init__(list(self._cells), {"lr": lr})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Write every weight that has a gradient.

        Raises:
            TrainingError: a weight would become no number.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._cells[weight].write_(torch.sub(weight, weight.grad, alpha=group["lr"]))
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse parameters that are not in cells."""
        params = param_group["params"]
        strangers = [each for each in ([params] if isinstance(params, Tensor) else params) if each not in self._cells]
        if strangers:
            raise ValueError("CellSGD writes weights in cells only: give it their layers.")
        super().add_param_group(param_group)
