"""What would take less memory than a task as it is: some conversions and optimizers, by an estimate of each."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from memfit.convert import convert_
from memfit.errors import ConversionError, MemfitError
from memfit.ledger.account import Peak
from memfit.ledger.estimate import fake_copy, fake_tensor_mode, second_step, untouched
from memfit.ledger.report import format_bytes
from memfit.ledger.target import ProfileConfig, Task, fused_adam, load_target, parse_conversion, prepare

_RANKS = (16, 8, 4)
_WORTH_SAYING, _TRUSTED = 0.95, 0.05


@dataclass(frozen=True)
class Advice:
    """A setting that would take less, by an estimate of the same step.

    Attributes:
        change: the conversion or the optimizer to try, as the command line takes it.
        before: the peak as it is, by the same estimate.
        after: the peak with the change.
    """

    change: str
    before: Peak
    after: Peak

    def __str__(self) -> str:
        moved = {
            line: value - self.after.to_dict()[line] for line, value in self.before.to_dict().items() if line != "total"
        }
        most = max(moved, key=lambda line: moved[line])
        saved = 1 - self.after.total / self.before.total
        return f"{self.change} would take {saved:.0%} less at the peak, most of it from the {most}"


def advise(task: Task, config: ProfileConfig, measured: Peak) -> list[Advice]:
    """Settings whose estimate is clearly below that of the task as it is, the smallest first.

    Raises:
        MemfitError: the task cannot be estimated, or the estimate is not what was measured.
    """
    plain = load_target(config.target)() if config.conversions else task
    before = _estimated(plain, config)
    if abs(before.total - measured.total) > _TRUSTED * measured.total:
        raise MemfitError(
            f"an estimate of the step finds {format_bytes(before.total)} where {format_bytes(measured.total)} were "
            "measured: the loss may use tensors that are neither in the model nor in the batch."
        )
    found = []
    for changed, change in _candidates(plain, config):
        try:
            after = _estimated(plain, changed)
        except MemfitError:
            continue
        if after.total < _WORTH_SAYING * before.total:
            found.append(Advice(change, before, after))
    return sorted(found, key=lambda advice: advice.after.total)


def _candidates(task: Task, config: ProfileConfig) -> list[tuple[ProfileConfig, str]]:
    found = []
    if not config.conversions:
        recurrent = any(isinstance(module, torch.nn.RNNBase) for module in task.model.modules())
        for more in ("", ", sides='left'", *([", sides='left', rematerialize=True"] if recurrent else [])):
            for rank in _RANKS:
                conversion = f"LowRankGradient(rank={rank}{more})@*"
                if _converts(task, conversion):
                    found.append((replace(config, conversions=(conversion,)), f"--convert {conversion!r}"))
                    break
    if fused := fused_adam(config.optimizer):
        found.append((replace(config, optimizer=fused), f"--optimizer {fused!r}"))
    return found


def _converts(task: Task, conversion: str) -> bool:
    try:
        fake = fake_tensor_mode()
        model = fake_copy(fake, task.model)
        parsed = parse_conversion(conversion)
        with fake:
            convert_(model, parsed.technique, parsed.where)
    except ConversionError:
        return False
    return True


def _estimated(task: Task, config: ProfileConfig) -> Peak:
    fake = fake_tensor_mode()
    model, batch = fake_copy(fake, (task.model, task.batch))
    with fake:
        made, optimizer = prepare(Task(model, batch, task.loss), config)
    with untouched(task.model):
        return second_step(fake, made.model, batch, task.loss, optimizer).peak
