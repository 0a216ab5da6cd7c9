"""The training loop: a plain one, that can be killed at any instant and goes on as if it had not been.

Each step is ``zero_grad``, the loss, ``backward``, clipping, ``optimizer.step``, ``scheduler.step``, in this order and
with nothing in between that computes: a run gives the weights that the same loop written by hand gives.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from memfit import checkpoint as checkpoints
from memfit.convert import ConvertedLayer
from memfit.errors import CheckpointError, TrainingError
from memfit.files import check_writable
from memfit.gradients.low_rank_matrix import LowRankMatrix
from memfit.run import records, state
from memfit.run.finite import MovingBuffers, all_finite, weights_are_finite
from memfit.run.interrupts import Interrupts
from memfit.run.position import Position, batch_bytes
from memfit.run.progress import Progress
from memfit.run.records import FitResult, StepRecord
from memfit.schedule.allocator import release_freed_memory

if TYPE_CHECKING:
    from memfit.ledger import Peak

B = TypeVar("B")

__all__ = ["FitResult", "StepRecord", "fit"]


def fit(
    model: nn.Module,
    loss: Callable[[nn.Module, B], Tensor],
    batches: Iterable[B],
    optimizer: Optimizer,
    *,
    steps: int,
    scheduler: LRScheduler | None = None,
    max_grad_norm: float | None = None,
    checkpoint: str | Path | None = None,
    every: int = 25,
    resume: bool = False,
    settings: Mapping[str, Any] | None = None,
    patience: int = 3,
    progress: bool = False,
    on_step: Callable[[StepRecord], None] | None = None,
    measure: bool = True,
) -> FitResult:
    """Train a model for ``steps`` steps, with exact resume from a checkpoint.

    Memory that steps free goes back to the operating system at once (:func:`memfit.release_freed_memory`), unless the
    model trains recurrent layers of torch's own: backward through them makes and frees gradients of a weight's size at
    every time step, and the page faults would double the time.
    A run that was killed at any instant and is resumed with the same arguments ends with bit-identical weights,
    optimizer state and losses. ``docs/checkpoints.md`` says what is stored, and what exactness asks of the data.

    Args:
        model: any module, converted or not. It trains in train mode: a model in eval mode is put into train mode and,
            at the end, back; a model in train mode keeps the modes of its parts (a batch norm in eval mode stays so).
        loss: ``(model, batch) -> scalar tensor`` to call ``backward`` on.
        batches: iterated anew for each epoch, as often as the steps need: a DataLoader, a list, a class of yours.
        optimizer: any of torch's protocol, also one that needs a closure (LBFGS).
        steps: of the whole run, those before a resume included.
        scheduler: stepped after each update; a ReduceLROnPlateau is given the batch's loss.
        max_grad_norm: clip the gradients' total 2-norm to this.
        checkpoint: the file to write every ``every`` steps, at the end, and at the first Ctrl-C or SIGTERM, at which
            the current step ends and ``fit`` returns; a second one raises ``KeyboardInterrupt`` at once. Without a
            checkpoint, signals are left alone.
        every: steps between checkpoints.
        resume: go on from ``checkpoint`` when that file exists, else start from the beginning, so that the same command
            can be given again whenever a run was killed. A finished run is loaded, and nothing is done. Without
            ``resume``, an earlier file stays until this run's first checkpoint replaces it.
        settings: what the run was made with, as JSON values: stored, and compared at a resume.
        patience: so many batches in a row without a finite loss and finite gradients end the run. Each is skipped:
            weights, buffers, optimizer and scheduler stay as they are. No checkpoint is written at such a step.
        progress: show step, loss, time per step and memory on stderr.
        on_step: called with each new record, before the step's checkpoint is written.
        measure: let the ledger watch the second step (or the only one), and any later one whose batch has more bytes
            than those watched so far.

    Returns:
        Records of all steps, the largest peak, where it resumed, and whether a signal ended it.

    Raises:
        CheckpointError: the checkpoint cannot be written (found out before the first step where possible), or the one
            to resume from is damaged, foreign, of more than ``steps`` steps, or made with other settings, another model
            or another optimizer. The model is then as it was.
        TrainingError: ``patience`` is used up, no step had a finite loss and finite gradients, or the weights are not
            finite. The last checkpoint of this run, when there is one, is loaded back into model, optimizer and
            scheduler. Or the loss depends on no parameter that trains.
        DataError: an epoch has no batches.
        ValueError: an argument out of range, or an optimizer that was made before :func:`memfit.convert_`.

    Example:
        >>> result = memfit.fit(model, loss, loader, optimizer, steps=1000, checkpoint="run.safetensors", resume=True)
        >>> print(result.records[-1].loss, result.peak)
    """
    for name, value, least in (("steps", steps, 0), ("every", every, 1), ("patience", patience, 1)):
        if value < least:
            raise ValueError(f"{name}={value} is not possible: give a whole number of at least {least}.")
    if checkpoint is None and resume:
        raise ValueError("resume=True needs a checkpoint to resume from: give checkpoint=PATH.")
    if _made_before_conversion(model, optimizer):
        raise ValueError("the optimizer was made before memfit.convert_, and would not train the layer: make it after.")
    if checkpoint is not None and (strangers := state.strangers(model, optimizer)):
        raise ValueError(
            f"the optimizer holds parameters that are not the model's ({', '.join(strangers[:4])}), which the "
            "checkpoint would not have: make them part of the model."
        )
    run = _Run(
        model,
        loss,
        Position(batches, tracked=checkpoint is not None),
        optimizer,
        scheduler,
        max_grad_norm=max_grad_norm,
        patience=patience,
        measure=measure,
        path=None if checkpoint is None else Path(checkpoint),
        settings=None if settings is None else json.loads(json.dumps(dict(settings))),
    )
    if not any(_trains_as_torch_does(module) for module in model.modules() if isinstance(module, nn.RNNBase)):
        release_freed_memory()
    modes = {module: module.training for module in model.modules()}
    if not model.training:
        model.train()
    try:
        with run.interrupts as interrupts:
            resumed_from = run.begin(resume, steps)
            with Progress(steps, resumed_from, progress) as display:
                while run.done < steps and interrupts.signal is None:
                    record = run.advance(last=run.done + 1 == steps)
                    if record is None:
                        break
                    display.show(record, run.peak)
                    if on_step is not None:
                        on_step(record)
                    run.end_step(due=record.step % every == 0 or record.step == steps, last=record.step == steps)
            if interrupts.signal is not None and run.done > resumed_from and run.saved_at != run.done:
                run.end_step(due=True)
            run.position.close()
    finally:
        optimizer.zero_grad(set_to_none=True)
        for module, training in modes.items():
            module.training = training
    return FitResult(run.records, run.peak, resumed_from, interrupts.signal is not None, interrupts.signal)


def _made_before_conversion(model: nn.Module, optimizer: Optimizer) -> bool:
    """Whether the optimizer holds a frozen weight and not the factors that train in its place."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    matrices = (module for module in model.modules() if isinstance(module, LowRankMatrix))
    return any(id(matrix.base) in held and id(matrix.left) not in held for matrix in matrices)


def _is_missing(path: Path) -> bool:
    """Whether there is certainly no such file; where one cannot see (no permission, a disk error), reading says why."""
    try:
        path.stat()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return False


class _NotFinite(Exception):
    """Leaves an optimizer's step from within its closure, before anything has changed."""


@dataclass
class _Run(Generic[B]):
    """The state of one call of :func:`fit`, and its arguments.

    Attributes:
        measured_bytes: of the largest batch that the ledger has watched; -1 when there is none.
        bad_in_a_row: steps without an update since the last one with.
        saved_at: the step of the checkpoint at ``path``, when that is this run's own.
    """

    model: nn.Module
    loss: Callable[[nn.Module, B], Tensor]
    position: Position[B]
    optimizer: Optimizer
    scheduler: LRScheduler | None
    max_grad_norm: float | None
    patience: int
    measure: bool
    path: Path | None
    settings: dict[str, Any] | None
    records: list[StepRecord] = field(default_factory=list)
    peak: Peak | None = None
    measured_bytes: int = -1
    bad_in_a_row: int = 0
    saved_at: int | None = None

    def __post_init__(self) -> None:
        self.interrupts = Interrupts(enabled=self.path is not None)
        self.buffers = MovingBuffers(self.model)
        closure = signature(self.optimizer.step).parameters.get("closure")
        self.needs_closure = closure is not None and closure.default is Parameter.empty

    @property
    def done(self) -> int:
        return len(self.records)

    def begin(self, resume: bool, steps: int) -> int:
        """Load the checkpoint, if there is one to resume from; returns its step, or 0."""
        if self.path is None:
            return 0
        check_writable(self.path, "checkpoint", CheckpointError)
        if not resume or _is_missing(self.path):
            return 0
        tree = self._load()
        state.compare_settings(tree["settings"], self.settings, self.path)
        state.compare(tree, self.model, self.optimizer, self.scheduler, self.path)
        earlier = records.unpack(tree["records"])
        if len(earlier) > steps:
            raise CheckpointError(
                f"{self.path}: the checkpoint has {len(earlier)} steps, more than the {steps} asked for: "
                "ask for as many, or start anew without resuming."
            )
        self.position.restore(tree["position"], self.path, stop=lambda: self.interrupts.signal is not None)
        state.unpack(tree, self.model, self.optimizer, self.scheduler, self.path)
        self.records = earlier
        self.peak = None if tree["peak"] is None else records.unpack_peak(tree["peak"])
        self.measured_bytes = tree["measured_bytes"]
        self.saved_at = self.done
        return self.done

    def advance(self, last: bool) -> StepRecord | None:
        """One step; None when a signal has ended the data before it."""
        try:
            batch = self.position.next()
        except RuntimeError:
            if self.interrupts.signal is not None:  # the batch will not come: the DataLoader's workers have ended too
                return None
            raise
        size = batch_bytes(batch)
        # The run's first step also allocates what stays; a resume has loaded that.
        largest_so_far = size > self.measured_bytes if self.measured_bytes >= 0 else self.done > 0 or last
        peak: Peak | None = None
        start = time.perf_counter()
        if self.measure and largest_so_far:
            from memfit.ledger import ledger  # here, so that a run that measures nothing does not load it

            with ledger(self.model, self.optimizer) as book:
                value, updated = self._step(batch)
            peak, self.measured_bytes = book.peak, size
            if self.peak is None or peak.total > self.peak.total:
                self.peak = peak
        else:
            value, updated = self._step(batch)
        record = StepRecord(self.done + 1, value, time.perf_counter() - start, peak, skipped=not updated)
        self.records.append(record)
        self.bad_in_a_row = 0 if updated else self.bad_in_a_row + 1
        return record

    def end_step(self, due: bool, last: bool = False) -> None:
        """Give up after too many bad batches, or where no batch was good; write the checkpoint when it is due."""
        if self.bad_in_a_row >= self.patience:
            several = f"{self.patience} batches in a row, up to " if self.patience > 1 else ""
            self._give_up(f"the loss or its gradients are not finite at {several}step {self.done}")
        if last and self.bad_in_a_row == self.done:
            self._give_up("the loss or its gradients are not finite at any step")
        if due and not weights_are_finite(self.model):
            self._give_up(f"the weights are not finite after step {self.done}")
        if due and self.path is not None and self.bad_in_a_row == 0:
            self._save(self.path)

    def _step(self, batch: B) -> tuple[float, bool]:
        """The loss, and whether an update was made; without one, nothing has changed."""
        values: list[float] = []

        def evaluate() -> Tensor:
            self.optimizer.zero_grad(set_to_none=True)
            with torch.enable_grad():
                loss = self.loss(self.model, batch)
            values.append(loss.item())
            # Once an optimizer with a closure has moved the weights, its line search deals with what it finds there.
            first = len(values) == 1
            if first and not math.isfinite(values[0]):
                raise _NotFinite
            if not loss.requires_grad:
                raise TrainingError("the loss depends on no parameter that trains: unfreeze some, or detach less.")
            loss.backward()
            if not self._clip() and first:
                raise _NotFinite
            return loss.detach()

        self.buffers.note()
        try:
            if self.needs_closure:
                self.optimizer.step(cast(Callable[[], float], evaluate))
            else:
                evaluate()
                self.optimizer.step()
        except _NotFinite:
            self.buffers.undo()
            self.optimizer.zero_grad(set_to_none=True)
            return values[0], False
        self.buffers.keep()
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(values[0])
        elif self.scheduler is not None:
            self.scheduler.step()
        return values[0], True

    def _clip(self) -> bool:
        """Clip the gradients; whether they are finite."""
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        if self.max_grad_norm is not None:
            return bool(torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm).isfinite())
        return all_finite(parameter.grad for parameter in parameters if parameter.grad is not None)

    def _save(self, path: Path) -> None:
        tree = {
            **state.pack(self.model, self.optimizer, self.scheduler),
            "settings": self.settings,
            "position": self.position.state(),
            "records": records.pack(self.records),
            "peak": None if self.peak is None else records.pack_peak(self.peak),
            "measured_bytes": self.measured_bytes,
        }
        checkpoints.save(path, tree)
        self.saved_at = self.done

    def _load(self) -> dict[str, Any]:
        """The checkpoint; the model's part are windows onto the file, for they are copied into the model."""
        assert self.path is not None
        tree = checkpoints.load(self.path, mapped=("model",))
        if not (isinstance(tree, dict) and {"model", "optimizer", "position", "records"} <= tree.keys()):
            raise CheckpointError(f"{self.path}: this checkpoint was not written by memfit.fit: give another.")
        return tree

    def _give_up(self, why: str) -> None:
        """Go back to the last good weights and raise."""
        if self.saved_at is None:
            end = "there is no checkpoint of this run to go back to"
        else:
            state.unpack(self._load(), self.model, self.optimizer, self.scheduler, self.path)
            end = f"the weights of step {self.saved_at} are back, from {self.path}"
        raise TrainingError(f"{why}; {end}: lower the learning rate, or look at the data of these steps.")


def _trains_as_torch_does(layer: nn.Module) -> bool:
    return not isinstance(layer, ConvertedLayer) and any(weight.requires_grad for weight in layer.parameters())
