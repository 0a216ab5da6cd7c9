"""`memfit.ledger(model, optimizer)`: the five lines of a training step's memory, as a context manager."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from time import perf_counter
from types import TracebackType

from torch import nn
from torch.optim import Optimizer

from memfit.errors import MemfitError
from memfit.ledger.account import Account, AtPeak, Instant, LiveTensor, Peak, Sample
from memfit.ledger.report import text
from memfit.ledger.tracker import Tracker


class Ledger(AbstractContextManager["Ledger"]):
    """Measures the tensor memory of everything that runs inside the context, on five lines.

    Every tensor storage that an operator touches in the region is on exactly one line for all of its life. The
    region may hold any number of training steps, or a part of one. After it, nothing is left behind: no hook, and
    nothing that keeps a tensor alive. Regions may be nested.

    The tensors that count are those on the model's kind of device (CPU or GPU); tensors without data (meta, fake)
    have no bytes. What an operator allocates for itself and frees before it returns is no tensor; it shows for oneDNN's
    convolutions and LSTMs on x86, where it is computed from the shapes, and :func:`memfit.process_peak` sees all of it.
    A compiled model runs uncompiled inside the region.

    Args:
        model: its parameters and buffers are on the line "weights", and its modules' names are those of
            :attr:`modules`.
        *optimizers: the optimizers that step in the region. Their state counts from the start; the state of one that
            is not named counts from the first use on.
        fake: count fake tensors, at the size of what they stand for, and nothing else (:func:`memfit.estimate`).

    Raises:
        MemfitError: an argument is not what it should be, or the same ledger is entered twice.

    Example:
        >>> with memfit.ledger(model, optimizer) as book:
        ...     loss(model(batch)).backward()
        ...     optimizer.step()
        >>> print(book)
        >>> book.peak.activations, book.peak.total
    """

    def __init__(self, model: nn.Module, *optimizers: Optimizer, fake: bool = False) -> None:
        if not isinstance(model, nn.Module):
            raise MemfitError(f"memfit.ledger needs a torch.nn.Module first, not {type(model).__name__}.")
        for optimizer in optimizers:
            if not isinstance(optimizer, Optimizer):
                raise MemfitError(
                    "memfit.ledger needs torch.optim optimizers after the model, "
                    f"as in ledger(model, optimizer), not {type(optimizer).__name__}."
                )
        self._account = Account()
        self._tracker: Tracker | None = Tracker(self._account, model, optimizers, fake)
        self._watching: AbstractContextManager[None] | None = None
        self._started = 0.0
        self._figures: AtPeak | None = None

    def __enter__(self) -> Ledger:
        if self._watching is not None or self._tracker is None:
            raise MemfitError("This ledger has been used already; make a new one with memfit.ledger(...).")
        self._started = perf_counter()
        self._watching = self._tracker.watching()
        self._watching.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._watching is not None
        try:
            self._watching.__exit__(kind, error, traceback)
        finally:
            self._tracker = self._watching = None

    def _at_peak(self) -> AtPeak:
        if self._figures is not None:
            return self._figures
        figures = self._account.at_peak(self._started)
        if self._tracker is None:
            self._figures = figures
        return figures

    @property
    def peak(self) -> Peak:
        """The five lines, in bytes, at the first instant of the largest total; while the region is open, up to now."""
        return self._at_peak().peak

    @property
    def instant(self) -> Instant:
        """When, in which phase, module and operator the peak was reached."""
        return self._at_peak().instant

    @property
    def modules(self) -> Mapping[str, Peak]:
        """The lines at the peak by module name, largest total first; they add up to :attr:`peak`.

        A module's figure is its own, without that of its children. ``""`` is the model itself and whatever belongs to
        no module: the batch, the loss, what an optimizer makes for all parameters together.
        """
        modules = self._at_peak().modules
        return dict(sorted(modules.items(), key=lambda item: -item[1].total))

    @property
    def tensors(self) -> list[LiveTensor]:
        """The tensors that are there at the peak, largest first: shape, line, and what made them."""
        return list(self._at_peak().tensors)

    @property
    def timeline(self) -> list[Sample]:
        """Seconds since the region's start and the five lines, at the start and after every event."""
        return self._account.timeline(self._started)

    def to_dict(self) -> dict[str, object]:
        """The peak, its instant, modules and ten largest tensors as plain values for JSON; bytes are integers."""
        peak, instant, _, tensors = self._at_peak()
        return {
            "peak": peak.to_dict(),
            "instant": {
                "seconds": instant.seconds,
                "phase": instant.phase,
                "module": instant.module,
                "operator": instant.operator,
            },
            "modules": {name: lines.to_dict() for name, lines in self.modules.items()},
            "tensors": [tensor.to_dict() for tensor in tensors[:10]],
        }

    def __str__(self) -> str:
        return text(self.peak, self.instant)


def ledger(model: nn.Module, *optimizers: Optimizer) -> Ledger:
    """Measure the tensor memory of a training step on five lines; see :class:`Ledger`."""
    return Ledger(model, *optimizers)
