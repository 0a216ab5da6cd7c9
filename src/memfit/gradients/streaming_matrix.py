"""A weight that is written rarely: its gradient adds up in a sum of low rank, and is applied once in a period.

With the sum G of n samples' gradients, n a multiple of the period B, and a learning rate eta, the weight becomes

    W <- Q(W - eta sqrt(n / B) G / n),

or, with max-norm, W - eta G / n with the mean divided by its largest element. Q is what the weight's cells hold. When
fewer cells would change than is worth a write, nothing is written, and G goes on adding up for another period. The root
makes up for the larger batch, as is usual for batches. With max-norm the step has its size whatever the batch: were it
larger for a sum that was not worth a write, that would be written soon all the same.

A sum may also have to agree with itself before it is written. With S_i the sum of the first i gradients, and G_i the
i-th, an exact or unbiased sum has, noise of the reductions aside,

    |S_n|^2 = sum_i |G_i|^2 + 2 sum_i <S_(i-1), G_i>.

The last part has mean zero when the gradients are independent and have none in common: its share of the whole tells a
direction that samples have in common from a sum of noise.

Source: Gural, Nadeau, Tikekar, Murmann, "Low-Rank Training of Deep Neural Networks for Emerging Memory Technology",
arXiv 2009.03887. There the root is for max-norm too.
"""

from __future__ import annotations

import math
import warnings
import zlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from memfit.errors import ConversionError, TrainingError
from memfit.gradients import steps
from memfit.gradients.kronecker_sum import KroneckerSum
from memfit.gradients.matrix_layer import WeightMatrix
from memfit.gradients.max_norm import max_norm
from memfit.gradients.steps import Watcher
from memfit.weights.cell_array import CellArray
from memfit.weights.in_cells import range_of

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from memfit.gradients.streaming_low_rank import StreamingLowRank


LONGEST_WAIT = 100
"""Periods that a biased sum waits at most. It keeps what is large and drops what is small, and the more has added up in
it, the less it hears of gradients in other directions; then it starts anew."""


class StreamingMatrix(WeightMatrix, Watcher):
    """One weight, and the running sum of its gradients.

    The weight's Parameter has no gradient, ever, and so no optimizer moves it or keeps anything for it; the step of the
    optimizer that holds it is what counts the samples, and its learning rate is the weight's.

    Attributes:
        terms: the sum.
        cells: what holds the weight, with the Parameter as its ``values``; None when it is not quantized.
        samples: steps of the optimizer since the last write.
        agreement: of the gradients since then, each with the sum of those before it: their inner products, added up.
    """

    terms: KroneckerSum
    cells: CellArray | None
    warned = False  # of steps that are too small
    # Models that were pickled by earlier versions have neither.
    min_agreement: float | None = None
    agreement = 0.0

    def __init__(self, weight: nn.Parameter, technique: StreamingLowRank, name: str) -> None:
        super().__init__()
        weight.grad = None  # an optimizer would still apply an old one, past the cells
        self.period = technique.period
        self.max_norm = technique.max_norm
        self.min_write_density = technique.min_write_density
        self.min_agreement = technique.min_agreement
        self.name = name
        self.samples = 0
        self.attempts = 0  # writes, and those that were put off
        self.average = 0.0  # of the gradients' largest elements
        rows = weight.shape[0]
        self.terms = KroneckerSum(
            rows,
            weight.numel() // rows,
            technique.rank,
            unbiased=technique.unbiased,
            bits=technique.factor_bits,
            block=technique.block,
            seed=zlib.crc32(f"{technique.seed}/{name}".encode()),
            dtype=torch.promote_types(weight.dtype, torch.float32),
            device=weight.device,
            native=technique.native,
        )
        if technique.weight_bits is None:
            self.register_module("cells", None)
            self.weight = weight
        else:
            reach = technique.weight_range or range_of(weight)
            self.cells = CellArray(weight, technique.weight_bits, -reach, reach)
        steps.watch(self)

    def __setstate__(self, state: dict[str, Any]) -> None:  # of a copy, or from a file
        super().__setstate__(state)
        steps.watch(self)

    def effective(self) -> nn.Parameter:
        """The weight's own Parameter."""
        # Not by attribute, which is slow in a module; this is asked for many times in a step.
        cells = self._modules["cells"]
        held = self._parameters["weight"] if cells is None else cells._parameters["values"]
        assert held is not None
        return held

    def restore_(self) -> nn.Parameter:
        steps.unwatch(self)
        weight = self.effective()
        weight.grad = None
        return weight

    def note(self, added: bool, agreement: float) -> None:
        """Add up how gradients agree; tell the user that a sample was left out, when it was."""
        self.agreement += agreement if math.isfinite(agreement) else 0.0
        if not added:
            warnings.warn(
                f"a gradient of {self.name} is not finite and was left out of its sum.", RuntimeWarning, stacklevel=2
            )

    def watched(self) -> tuple[nn.Parameter, nn.Parameter]:
        return self.effective(), self.effective()

    def before_step(self) -> None:
        if self.effective().grad is not None:
            raise TrainingError(
                f"the weight of {self.name} has a gradient that did not come through its layer, such as a penalty's: "
                "StreamingLowRank writes weights by the sum of their layers' terms alone; leave the weight out of it."
            )

    def after_step(self, optimizer: Optimizer) -> None:
        self.samples += 1
        if self.samples % self.period:
            return
        written = self._write(_learning_rate(self.effective(), optimizer))
        if written or (not self.terms.unbiased and self.samples >= LONGEST_WAIT * self.period):
            self.terms.reset()
            self.samples, self.agreement = 0, 0.0

    @torch.no_grad()
    def _write(self, lr: float) -> bool:
        """Apply the sum, if enough cells change by it; whether it was."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            _refuse_several_processes(torch.distributed.get_world_size())
        if not self._agrees():
            return False
        self.attempts += 1
        size = lr / self.samples
        blocks = self._blocks()
        whole = self.terms.matrix() if len(blocks) == 1 else None

        def part(rows: tuple[int, int]) -> Tensor:
            return self.terms.matrix(*rows) if whole is None else whole

        def wanted(rows: tuple[int, int]) -> Tensor:  # without quantization
            now = self.effective()[slice(*rows)]
            return now - (part(rows) * size).view(now.shape)

        if self.max_norm:
            largest = max(float(part(rows).abs().max()) for rows in blocks)
            divisor, self.average = max_norm(largest / self.samples, self.average, self.attempts)
            size /= divisor
        else:
            size *= math.sqrt(self.samples / self.period)
        if self.cells is None:
            left, right = self.terms.factors()
            if self.weight.is_contiguous() and self.weight.dtype == left.dtype:
                self.weight.view(self.terms.shape).addmm_(left, right.t(), alpha=-size)  # no copy of the weight
            else:
                for rows in blocks:
                    self.weight[slice(*rows)].copy_(wanted(rows))
            return True
        needed = max(1, math.ceil(self.min_write_density * self.cells.values.numel()))
        if len(blocks) == 1:
            written = self.cells.write_(wanted(blocks[0]), at_least=needed) > 0
        else:
            written = sum(self.cells.would_change(wanted(rows), rows[0]) for rows in blocks) >= needed
            for rows in blocks if written else []:
                self.cells.write_(wanted(rows), rows[0])
        if not written:
            self._warn_of_small_steps(lr, self.cells.step)
        return written

    def _agrees(self) -> bool:
        """Whether enough of the sum is what its samples agree in."""
        if self.min_agreement is None:
            return True
        return not 2 * self.agreement < self.min_agreement * self.terms.squared_norm()  # which may be no number

    def _warn_of_small_steps(self, lr: float, step: float) -> None:
        if self.max_norm and not self.warned and 0 < abs(lr) < step / 2:
            self.warned = True
            warnings.warn(
                f"nothing was written: lr={lr:g} is less than half the distance of two levels of the cells of "
                f"{self.name}, {step:g}, and with max_norm no weight moves further at once; raise lr.",
                RuntimeWarning,
                stacklevel=2,
            )

    def _blocks(self) -> list[tuple[int, int]]:
        """Runs of rows, each no larger than the workspace of an addition."""
        rows, columns = self.terms.shape
        several = max(1, (self.terms.rank + self.terms.block) * (rows + columns) // columns)
        return [(start, min(start + several, rows)) for start in range(0, rows, several)]

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.samples, self.attempts, self.average, self.agreement], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        samples, attempts, self.average, *agreement = state.tolist()
        self.agreement = agreement[0] if agreement else 0.0  # of which earlier versions had none
        self.samples, self.attempts = int(samples), int(attempts)


def _learning_rate(weight: nn.Parameter, optimizer: Optimizer) -> float:
    """That of the weight's group, negative where the optimizer maximizes."""
    group = next(group for group in optimizer.param_groups if any(each is weight for each in group["params"]))
    return -float(group["lr"]) if group.get("maximize") else float(group["lr"])


def _refuse_several_processes(count: int) -> None:
    if count > 1:
        raise ConversionError(
            f"StreamingLowRank learns from the samples of one process, and {count} train together here: their weights "
            "would drift apart; use LowRankGradient, or one process."
        )
