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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from memfit.errors import MemfitError
from memfit.ledger.account import LINES, Instant, LiveTensor, Peak
from memfit.ledger.advice import Advice, advise
from memfit.ledger.book import Ledger
from memfit.ledger.process import process_peak
from memfit.ledger.target import ProfileConfig, Task, describe_failure, load_target, loss_of, prepare
from memfit.run.interrupts import stopping_in_order
from memfit.schedule.allocator import release_freed_memory

_COMPILED = (
    "Part of the step is compiled. The ledger sees no tensor of compiled code, so its step ran uncompiled; the "
    "process's peak is that of compiled steps, the compiler's own memory included."
)


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
        task, optimizer = prepare(make(), config)
        task.model.train()
        for _ in range(config.steps):
            _step(task, optimizer)
    compiled = _has_compiled()
    with Ledger(task.model, optimizer) as book:
        _step(task, optimizer)
    del optimizer
    advice, why_none = [], ""
    try:
        advice = advise(task, config, book.peak)
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


def _has_compiled() -> bool:
    """Whether torch's compiler has been at work in this process."""
    compiler = sys.modules.get("torch._dynamo.utils")
    return compiler is not None and bool(compiler.counters["frames"])


def _step(task: Task, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss_of(task).backward()
    optimizer.step()


def _load_optimizers() -> None:
    """The first step of a process's first optimizer imports a lot, which is none of the task's memory."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    torch.optim.AdamW([parameter]).step()


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
        advice = "memfit.estimate needs no memory of the model's size"
        found = {"error": describe_failure(config["target"], error, advice)}
    Path(result).write_text(json.dumps(found), encoding="utf-8")
