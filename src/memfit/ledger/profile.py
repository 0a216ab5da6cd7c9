"""Where one training task's memory goes: its ledger and its process's peak, from a fresh process, and what would help.

The fresh process makes the task, trains some steps with nothing but the operating system watching, one more under the
ledger, and estimates what other settings would take.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from memfit.convert import convert_
from memfit.errors import ConversionError, MemfitError
from memfit.ledger.account import LINES, Instant, LiveTensor, Peak
from memfit.ledger.book import Ledger
from memfit.ledger.estimate import fake_copy, fake_tensor_mode, second_step, untouched
from memfit.ledger.process import process_peak
from memfit.ledger.report import format_bytes
from memfit.ledger.source import is_users
from memfit.ledger.target import Task, fused_adam, load_target, parse_conversion, parse_optimizer
from memfit.run.interrupts import stopping_in_order
from memfit.schedule.allocator import release_freed_memory

_RANKS = (16, 8, 4)
_WORTH_SAYING, _TRUSTED = 0.95, 0.05
_COMPILED = (
    "Part of the step is compiled. The ledger sees no tensor of compiled code, so its step ran uncompiled; the "
    "process's peak is that of compiled steps, the compiler's own memory included."
)


@dataclass(frozen=True)
class ProfileConfig:
    """What to profile.

    Attributes:
        target: ``package.module:function`` or ``file.py:function``, which returns ``(model, batch, loss)``.
        optimizer: of ``torch.optim``, such as ``AdamW`` or ``SGD(lr=0.1, momentum=0.9)``.
        conversions: each such as ``LowRankGradient(rank=16)@encoder.*``, in this order.
        steps: training steps for the process's peak; the ledger sees one more.
    """

    target: str
    optimizer: str = "AdamW"
    conversions: tuple[str, ...] = ()
    steps: int = 3

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise MemfitError(f"a profile takes 1 step or more, not {self.steps}.")
        parse_optimizer(self.optimizer)
        for conversion in self.conversions:
            parse_conversion(conversion)


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


@dataclass(frozen=True)
class Profile:
    """What was found.

    Attributes:
        config: what was profiled.
        peak: the five lines at the ledger's peak, in bytes.
        instant: when that was.
        modules: the lines at the peak by module, largest first.
        tensors: the largest tensors of the peak.
        timeline: seconds and the five lines, in the order of ``LINES``, after every event of the step.
        growth: bytes by which the process's peak grew, model and all; freed memory goes back to the system at once.
        advice: what would take less, most first.
        no_advice: why no estimate could be made, else empty.
        notes: what to know about the figures.
    """

    config: ProfileConfig
    peak: Peak
    instant: Instant
    modules: Mapping[str, Peak]
    tensors: Sequence[LiveTensor]
    timeline: Sequence[tuple[float, ...]]
    growth: int
    advice: Sequence[Advice] = field(default_factory=list)
    no_advice: str = ""
    notes: Sequence[str] = field(default_factory=list)

    @property
    def unseen(self) -> int:
        """Bytes that the process took beyond the ledger's total: temporaries inside of operators, code, small holes."""
        return self.growth - self.peak.total

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; bytes are integers."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Profile:
        """The profile that :meth:`to_dict` wrote, JSON's lists included."""
        config = values["config"]
        return cls(
            config=ProfileConfig(**{**config, "conversions": tuple(config["conversions"])}),
            peak=Peak(**values["peak"]),
            instant=Instant(**values["instant"]),
            modules={name: Peak(**lines) for name, lines in values["modules"].items()},
            tensors=[LiveTensor(**{**tensor, "shape": tuple(tensor["shape"])}) for tensor in values["tensors"]],
            timeline=[tuple(sample) for sample in values["timeline"]],
            growth=values["growth"],
            advice=[Advice(each["change"], Peak(**each["before"]), Peak(**each["after"])) for each in values["advice"]],
            no_advice=values["no_advice"],
            notes=values["notes"],
        )


def profile(config: ProfileConfig) -> Profile:
    """Profile a task in a fresh process; what it prints goes to standard error.

    Raises:
        MemfitError: the target, the optimizer or a conversion is not what it should be, or the task fails.
    """
    with tempfile.TemporaryDirectory() as folder, stopping_in_order():
        result = Path(folder) / "profile.json"
        child = subprocess.Popen([sys.executable, "-c", _CHILD, json.dumps(asdict(config)), str(result)], stdout=2)
        try:
            status = child.wait()
        finally:
            child.kill()
        if not result.exists():
            how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
            perhaps = ", perhaps for lack of memory" if status == -signal.SIGKILL else ""
            raise MemfitError(f"{config.target}: its process {how}{perhaps}; there is no profile.")
        values = json.loads(result.read_text(encoding="utf-8"))
    if "error" in values:
        raise MemfitError(values["error"])
    return Profile.from_dict(values)


def profile_here(config: ProfileConfig) -> Profile:
    """Profile a task in this process, in which nothing large should have run before."""
    release_freed_memory()
    _load_optimizers()
    make = load_target(config.target)
    with process_peak() as process:
        task, optimizer = _made(make(), config)
        task.model.train()
        for _ in range(config.steps):
            _step(task, optimizer)
    compiled = _has_compiled()
    with Ledger(task.model, optimizer) as book:
        _step(task, optimizer)
    del optimizer
    advice, why_none = [], ""
    try:
        advice = _advice(task, config, book.peak)
    except MemfitError as error:
        why_none = str(error)
    except Exception as error:  # the user's code, which has run on real tensors and does not on fake ones
        why_none = f"the step fails on fake tensors with {type(error).__name__}: {error}"
    return Profile(
        config=config,
        peak=book.peak,
        instant=book.instant,
        modules=book.modules,
        tensors=book.tensors[:10],
        timeline=[(sample.seconds, *(getattr(sample.lines, line) for line in LINES)) for sample in book.timeline],
        growth=process.growth,
        advice=advice,
        no_advice=why_none,
        notes=[_COMPILED] if compiled else [],
    )


def _made(task: Task, config: ProfileConfig) -> tuple[Task, torch.optim.Optimizer]:
    for text in config.conversions:
        conversion = parse_conversion(text)
        convert_(task.model, conversion.technique, conversion.where)
    trained = [parameter for parameter in task.model.parameters() if parameter.requires_grad]
    return task, parse_optimizer(config.optimizer)(trained)


def _has_compiled() -> bool:
    """Whether torch's compiler has been at work in this process."""
    compiler = sys.modules.get("torch._dynamo.utils")
    return compiler is not None and bool(compiler.counters["frames"])


def _step(task: Task, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss = task.loss(task.model, task.batch)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise MemfitError(f"the target's loss(model, batch) must return a scalar tensor, not {_described(loss)}.")
    loss.backward()
    optimizer.step()


def _described(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__


def _load_optimizers() -> None:
    """The first step of a process's first optimizer imports a lot, which is none of the task's memory."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    torch.optim.AdamW([parameter]).step()


# -- what would help -----------------------------------------------------------------------------------------------


def _advice(task: Task, config: ProfileConfig, measured: Peak) -> list[Advice]:
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
        made, optimizer = _made(Task(model, batch, task.loss), config)
    with untouched(task.model):
        return second_step(fake, made.model, batch, task.loss, optimizer).peak


# -- the fresh process ---------------------------------------------------------------------------------------------


# A name of memfit's, so that its frame is none of the user's; and nothing of the working directory's in place of a
# library.
_CHILD = """\
__name__ = "memfit"
import sys
sys.path[:1] = [folder for folder in sys.path[:1] if folder]
from memfit.ledger.profile import main_of_fresh_process
main_of_fresh_process(*sys.argv[1:])
"""


def main_of_fresh_process(config_text: str, result: str) -> None:
    """Profile, and leave what was found, or why nothing was, in the file ``result``."""
    config = json.loads(config_text)
    try:
        found = profile_here(ProfileConfig(**{**config, "conversions": tuple(config["conversions"])})).to_dict()
    except MemfitError as error:
        found = {"error": str(error)}
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:  # the user's code; where it failed is what they need
        said = " ".join(str(error).split()) or "no message"
        found = {"error": f"{config['target']} fails with {type(error).__name__}: {said} (at {_place_of(error)})."}
    Path(result).write_text(json.dumps(found), encoding="utf-8")


def _place_of(error: Exception) -> str:
    """File and line of the user's code in which an error came up, or went into a library."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    frames = [(frame.f_globals.get("__name__"), frame, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    users = [each for each in frames if is_users(each[0])] or frames
    _, frame, line = users[-1]
    return f"{frame.f_code.co_filename}:{line}"
