"""How the device learns: the five schemes of the method's paper, each as a learner with one step per sample."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from memfit.convert import convert_
from memfit.errors import ConversionError, MemfitError, TrainingError
from memfit.gradients.streaming_low_rank import StreamingLowRank
from memfit.nvm.model import weight_layers
from memfit.weights.cell_array import CellArray
from memfit.weights.in_cells import CellSGD, put_in_cells_
from memfit.weights.pixel_writes import PixelWrites
from memfit.weights.quantized_sgd import BIASES, QuantizedSGD

Scheme = Literal["inference", "bias", "sgd", "low-rank", "low-rank-max-norm"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
TITLES: Mapping[Scheme, str] = {
    "inference": "inference only",
    "bias": "biases only",
    "sgd": "SGD",
    "low-rank": "low rank",
    "low-rank-max-norm": "low rank, max-norm",
}

RANK = 4  # of the low-rank schemes, as in the paper


@dataclass(frozen=True)
class Rates:
    """Learning rates.

    Attributes:
        weights: of the weights in cells.
        biases: of all other parameters, which are written at every sample in every scheme that learns.

    Raises:
        MemfitError: one is not a number of at least 0.
    """

    weights: float
    biases: float

    def __post_init__(self) -> None:
        for what, value in (("weights", self.weights), ("biases", self.biases)):
            if not 0 <= value <= 1e6:
                raise MemfitError(f"the learning rate of the {what} must be from 0 to 1,000,000, not {value:g}.")


RATES: Mapping[Scheme, Rates] = {
    "inference": Rates(0.0, 0.0),
    "bias": Rates(0.0, 0.03),
    "sgd": Rates(0.1, 0.03),
    "low-rank": Rates(0.3, 0.03),
    "low-rank-max-norm": Rates(0.05, 0.01),
}
"""Each scheme's own, the best of one grid for all over the four worlds: see ``benchmarks/nvm.py``."""


class Writes(NamedTuple):
    """When a low-rank scheme writes.

    Attributes:
        period: samples from write to write.
        density: of a weight's cells; where fewer would change, they wait for another period.
        agreement: of the samples of a sum; where there is less, they wait too. None: not asked for. See
            :class:`memfit.StreamingLowRank`.
        unbiased: the estimator of the sums.
    """

    period: int
    density: float
    agreement: float | None = None
    unbiased: bool = True

    def settings(self) -> dict[str, Any]:
        """For a checkpoint: all but defaults. Those of earlier versions, with a period and a density alone, go on."""
        return {name: value for name, value in self._asdict().items() if value != self._field_defaults.get(name, ...)}


WRITES: Mapping[Scheme, Writes] = {
    "low-rank": Writes(10, 0.03),
    "low-rank-max-norm": Writes(8, 0.1, agreement=0.0, unbiased=False),
}
"""What is best in worlds that drift as fast as the paper's. Longer periods write less, and follow drift less well."""


class Learner:
    """A model on the device, and how it learns from one sample.

    Weights of ``nn.Conv2d`` and ``nn.Linear`` are put into cells; all other parameters are held in 16 bits.

    Args:
        model: converted in place, and put into eval mode: statistics of one sample would mean nothing.
        scheme: how to learn.
        rates: how fast.
        limit: of the cells; None for each layer's own. See :func:`memfit.weights.in_cells.put_in_cells_`.
        seed: of the random numbers that the scheme draws.
        writes: of the low-rank schemes; None for the scheme's own.
        native: use C++ operators where there are any; see :class:`memfit.StreamingLowRank`.

    Attributes:
        arrays: the cells.

    Raises:
        MemfitError: the model has no layer whose weight could be in cells, or biases that 16 bits don't hold.
    """

    def __init__(
        self,
        model: nn.Module,
        scheme: Scheme,
        rates: Rates,
        *,
        limit: float | None,
        seed: int,
        writes: Writes | None = None,
        native: bool = False,
    ) -> None:
        self.model, self.scheme = model.eval(), scheme
        layers = [layer for _, layer in weight_layers(model)]
        if not layers:
            raise MemfitError("the model has no nn.Conv2d and no nn.Linear, whose weights would be in the memory.")
        weights = {layer.weight for layer in layers}
        if len(weights) < len(layers):
            raise MemfitError(
                "two layers of the model share one weight, and each weight is in cells of its own: untie it."
            )
        others = [each for each in model.parameters() if each not in weights and each.requires_grad]
        _check_range(model, weights)
        self._optimizers: list[Optimizer] = []
        self._pixel_writes: list[PixelWrites] = []
        groups: list[dict[str, Any]] = [{"params": others, "lr": rates.biases}] if others else []
        if scheme in ("low-rank", "low-rank-max-norm"):
            when = writes or WRITES[scheme]
            technique = StreamingLowRank(
                rank=RANK,
                period=when.period,
                unbiased=when.unbiased,
                max_norm=scheme == "low-rank-max-norm",
                min_write_density=when.density,
                min_agreement=when.agreement,
                weight_range=limit,
                bias_bits=None,
                seed=seed,
                native=native,
            )
            for layer in layers:
                if isinstance(layer, nn.Conv2d) and layer.groups > 1:
                    raise ConversionError(
                        f"a convolution of it has {layer.groups} groups, of which each would need a sum of its own: "
                        "leave the low-rank schemes out, or give a model without groups."
                    )
                rank = min(RANK, *layer.weight.flatten(1).shape)
                convert_(model, replace(technique, rank=rank), where=partial(_is, layer))
            # They have no gradients of their own: the optimizer's steps tell the layers when to write, and how much.
            groups.append({"params": [layer.weight for layer in layers], "lr": rates.weights})
        else:
            put_in_cells_(layers, limit=limit)
        if scheme == "sgd":
            self._optimizers.append(CellSGD(layers, rates.weights))
            self._pixel_writes = [PixelWrites(layer) for layer in layers if isinstance(layer, nn.Conv2d)]
        elif scheme in ("inference", "bias"):
            for weight in weights:
                weight.requires_grad_(False)
        if scheme != "inference" and groups:
            normalize = scheme == "low-rank-max-norm"
            self._optimizers.append(QuantizedSGD(groups, rates.biases, *BIASES, normalize=normalize))
        self.arrays = [module for module in model.modules() if isinstance(module, CellArray)]

    def learn(self, sample: Tensor, label: Tensor) -> bool:
        """Predict, then learn.

        Args:
            sample: one, with a batch axis of 1.
            label: its class, (1,), int64.

        Returns:
            Whether the prediction was right.

        Raises:
            TrainingError: the loss is not finite, or a weight would become no number.
        """
        if not self._optimizers:
            with torch.no_grad():
                return int(self.model(sample).argmax()) == int(label)
        logits = self.model(sample)
        loss = F.cross_entropy(logits, label)
        if not math.isfinite(loss.item()):
            raise TrainingError(f"the loss of {self.scheme!r} is not finite any more: lower the learning rates.")
        loss.backward()
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return int(logits.argmax()) == int(label)

    def worst_cell_by_pixel(self) -> int | None:
        """Writes of the most written cell, had SGD no buffer for a convolution's gradient; None for other schemes."""
        if self.scheme != "sgd":
            return None
        counts = [each.writes for each in self._pixel_writes] + [each.writes for each in self.arrays]
        return max(int(each.max()) for each in counts)

    def count_reads_(self, samples: int) -> None:
        """Note what so many samples have read: each cell once forward, and where there is learning, once backward."""
        for array in self.arrays:
            array.count_read_(samples * (2 if self._optimizers else 1))

    def state(self) -> dict[str, Any]:
        """All that later steps depend on, as a tree for a checkpoint."""
        return {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state`."""
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def _is(layer: nn.Module, name: str, module: nn.Module) -> bool:
    return module is layer


def _check_range(model: nn.Module, weights: set[Tensor]) -> None:
    _, low, high = BIASES
    for name, parameter in model.named_parameters():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise MemfitError(
                f"the parameter {name!r} is of {parameter.dtype}: the simulation takes float32 or float64."
            )
        if not bool(parameter.detach().isfinite().all()):
            raise MemfitError(f"the parameter {name!r} is not finite (NaN or infinite).")
        if parameter in weights and not parameter.requires_grad:
            raise MemfitError(f"the weight {name!r} is frozen: what is in cells learns; leave it trainable.")
        largest = float(parameter.detach().abs().max()) if parameter.numel() else 0.0
        if parameter not in weights and not largest < high:
            raise MemfitError(
                f"the parameter {name!r} has values of up to {largest:g}, and the device holds [{low:g}, {high:g}) in "
                "16 bits: scale the model, or freeze what does not learn into a buffer."
            )
