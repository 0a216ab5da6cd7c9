"""Does the ledger agree with the operating system, and the estimate with both?

Every workload runs in fresh processes: under the ledger; under nothing but `process_peak`, so that the ledger's own
memory is not in the figure that it is held against; once more like that after `memfit.release_freed_memory()`, which
`memfit.fit` calls, so that the allocator keeps no large holes; and as `memfit.estimate`, which runs nothing. The region
of `process_peak` starts after the imports and two tiny training steps of the same kind (which load the libraries'
code), before the model is built.

Goals, on workloads of 100 MB and more: the ledger's total within 10 % of the growth of the process's peak, and the
estimate's within 5 % of the ledger's.

    python benchmarks/ledger_vs_process.py [workload ...]
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import memfit
from memfit.ledger import ledger, process_peak
from memfit.ledger.report import format_bytes

RESULTS = Path(__file__).parent / "results" / "ledger_vs_process.json"
STEPS = 2

Loss = Callable[[nn.Module, Tensor], Tensor]
Task = tuple[nn.Module, Tensor, Loss]
Figures = dict[str, Any]


def mean_square(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


class Encoder(nn.Module):
    """A pre-norm transformer encoder with or without activation checkpointing."""

    def __init__(self, width: int, layers: int, checkpointed: bool = False) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 8, 4 * width, dropout=0.1, batch_first=True, norm_first=True)
            for _ in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
        return x


class Residual(nn.Module):
    """Two 3x3 convolutions with batch norm around a skip."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + x)


class Recurrent(nn.Module):
    """An LSTM with a linear layer on top."""

    def __init__(self, inputs: int, hidden: int, layers: int, classes: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(inputs, hidden, layers)
        self.top = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.top(self.lstm(x)[0])


class Language(nn.Module):
    """Token embedding tied to the output layer, around an encoder."""

    def __init__(self, tokens: int, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.encoder = Encoder(width, layers)
        self.head = nn.Linear(width, tokens, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(x)))


def next_token(model: nn.Module, batch: Tensor) -> Tensor:
    logits = model(batch)
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


def linear(small: bool) -> Task:
    width = 8 if small else 2048
    model = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(width, width), nn.GELU())))
    return model, torch.randn(4 if small else 256, width), mean_square


def encoder(small: bool) -> Task:
    return Encoder(16 if small else 512, 6), torch.randn(2, 8, 16) if small else torch.randn(4, 128, 512), mean_square


def encoder_checkpointed(small: bool) -> Task:
    model = Encoder(16 if small else 512, 6, checkpointed=True)
    return model, torch.randn(2, 8, 16) if small else torch.randn(4, 128, 512), mean_square


def language(small: bool) -> Task:
    model = Language(50, 16, 2) if small else Language(20_000, 384, 4)
    return model, torch.randint(0, 50 if small else 20_000, (2, 8) if small else (4, 128)), next_token


def convolutional(small: bool) -> Task:
    channels = (8, 16) if small else (64, 128)
    model = nn.Sequential(
        nn.Conv2d(3, channels[0], 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels[0], channels[0], 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(channels[0], channels[1], 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels[1], channels[1], 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
    )
    return model, torch.randn(2, 3, 16, 16) if small else torch.randn(24, 3, 64, 64), mean_square


def residual(small: bool) -> Task:
    channels = 8 if small else 64
    model = nn.Sequential(nn.Conv2d(3, channels, 7, stride=2, padding=3), *(Residual(channels) for _ in range(6)))
    return model, torch.randn(2, 3, 16, 16) if small else torch.randn(8, 3, 112, 112), mean_square


def recurrent(small: bool) -> Task:
    model = Recurrent(8, 16, 3, 4) if small else Recurrent(80, 1024, 3, 32)
    return model, torch.randn(5, 2, 8) if small else torch.randn(200, 8, 80), mean_square


@dataclass(frozen=True)
class Workload:
    """What is trained: a task in full or tiny size, an optimizer, and a rank where its layers are converted."""

    make: Callable[[bool], Task]
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    rank: int | None = None
    sides: str = "both"

    def build(self, small: bool) -> tuple[nn.Module, torch.optim.Optimizer, Tensor, Loss]:
        torch.manual_seed(0)
        model, batch, loss = self.make(small)
        if self.rank is not None:
            memfit.convert_(model, memfit.LowRankGradient(4 if small else self.rank, sides=self.sides))
        return model, self.optimizer([p for p in model.parameters() if p.requires_grad]), batch, loss


SGD, MOMENTUM = partial(torch.optim.SGD, lr=1e-3), partial(torch.optim.SGD, lr=1e-3, momentum=0.9)
ADAM, FUSED = partial(torch.optim.AdamW, lr=1e-4), partial(torch.optim.AdamW, lr=1e-4, fused=True)

WORKLOADS = {
    "linear, SGD": Workload(linear, SGD),
    "linear, momentum": Workload(linear, MOMENTUM),
    "linear, AdamW": Workload(linear, ADAM),
    "linear, fused AdamW": Workload(linear, FUSED),
    "linear, low-rank AdamW": Workload(linear, ADAM, rank=32),
    "linear, low-rank left, AdamW": Workload(linear, ADAM, rank=32, sides="left"),
    "encoder, AdamW": Workload(encoder, ADAM),
    "encoder, low-rank AdamW": Workload(encoder, ADAM, rank=32),
    "encoder checkpointed, AdamW": Workload(encoder_checkpointed, ADAM),
    "encoder checkpointed, low-rank SGD": Workload(encoder_checkpointed, SGD, rank=32),
    "language model tied, fused AdamW": Workload(language, FUSED),
    "CNN, SGD": Workload(convolutional, SGD),
    "CNN, low-rank AdamW": Workload(convolutional, ADAM, rank=8),
    "residual CNN, AdamW": Workload(residual, ADAM),
    "LSTM 3x1024, SGD": Workload(recurrent, SGD),
    "LSTM 3x1024, fused AdamW": Workload(recurrent, FUSED),
    "LSTM 3x1024, low-rank AdamW": Workload(recurrent, ADAM, rank=32),
}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor, loss: Loss, steps: int = STEPS) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()


def measure(name: str, how: str) -> Figures:
    """Run one workload in this process, which should be a fresh one; `how` is one of ``HOW``."""
    workload = WORKLOADS[name]
    if how == "estimate":
        started = perf_counter()
        model, optimizer, batch, loss = workload.build(small=False)
        peak = memfit.estimate(model, batch, loss, optimizer).peak
        return {"peak": peak.to_dict(), "seconds": perf_counter() - started}
    if how == "no holes" and not memfit.release_freed_memory():
        sys.exit("This system's allocator cannot be told to return freed memory.")
    model, optimizer, batch, loss = workload.build(small=True)
    train(model, optimizer, batch, loss)
    del model, optimizer, batch, loss

    with process_peak() as process:
        model, optimizer, batch, loss = workload.build(small=False)
        train(model, optimizer, batch, loss, steps=STEPS - 1)
        with ledger(model, optimizer) if how == "ledger" else nullcontext() as book:
            started = process_time()
            train(model, optimizer, batch, loss, steps=1)
            seconds = process_time() - started
    figures: Figures = {"growth": process.growth, "method": process.method, "seconds": seconds}
    if book is not None:
        figures |= {"peak": book.peak.to_dict(), "instant": book.to_dict()["instant"]}
    return figures


HOW = ("ledger", "process", "no holes", "estimate")


def in_fresh_process(name: str, how: str) -> Figures:
    done = subprocess.run([sys.executable, __file__, name, "--how", how], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} ({how}) failed:\n{done.stderr}")
    return json.loads(done.stdout)


def row(name: str) -> Figures:
    found = {how: in_fresh_process(name, how) for how in HOW}
    total, estimate = found["ledger"]["peak"]["total"], found["estimate"]["peak"]["total"]
    return {
        "ledger": found["ledger"]["peak"],
        "instant": found["ledger"]["instant"],
        "estimate": found["estimate"]["peak"],
        "estimate_of_ledger": estimate / total - 1,
        "process_growth": found["process"]["growth"],
        "process_growth_without_holes": found["no holes"]["growth"],
        "process_growth_under_ledger": found["ledger"]["growth"],
        "ledger_of_process": total / found["process"]["growth"] - 1,
        "ledger_of_process_without_holes": total / found["no holes"]["growth"] - 1,
        "method": found["process"]["method"],
        "cpu_seconds": found["process"]["seconds"],
        "cpu_seconds_under_ledger": found["ledger"]["seconds"],
        "estimate_seconds": found["estimate"]["seconds"],
    }


def show(name: str, figures: Figures) -> None:
    instant = figures["instant"]
    cells = [
        format_bytes(figures["ledger"]["total"]),
        format_bytes(figures["process_growth_without_holes"]),
        f"{figures['ledger_of_process_without_holes']:+.1%}",
        format_bytes(figures["process_growth"]),
        f"{figures['ledger_of_process']:+.1%}",
        format_bytes(figures["estimate"]["total"]),
        f"{figures['estimate_of_ledger']:+.1%}",
    ]
    print(
        f"{name:<36}" + "".join(f"{cell:>11}" for cell in cells),
        f" {instant['phase']} {instant['operator']}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workloads", nargs="*", metavar="workload", help=f"of {', '.join(WORKLOADS)} (default: all)")
    parser.add_argument("--how", choices=HOW, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := set(arguments.workloads) - set(WORKLOADS):
        parser.error(f"unknown workload {', '.join(sorted(unknown))}: choose from {', '.join(WORKLOADS)}")
    if arguments.how:
        print(json.dumps(measure(arguments.workloads[0], arguments.how)))
        return

    heads = ("ledger", "no holes", "ledger of", "process", "ledger of", "estimate", "of ledger")
    print(f"{'':<36}" + "".join(f"{head:>11}" for head in heads) + "  peak in")
    rows = {}
    for name in arguments.workloads or WORKLOADS:
        rows[name] = row(name)
        show(name, rows[name])
    for key, limit, what in (
        ("ledger_of_process_without_holes", 0.10, "the ledger is within 10 % of the process without holes"),
        ("ledger_of_process", 0.10, "the ledger is within 10 % of the process as it comes"),
        ("estimate_of_ledger", 0.05, "the estimate is within 5 % of the ledger"),
    ):
        within = sum(abs(figures[key]) <= limit for figures in rows.values())
        print(f"{what} in {within} of {len(rows)}; largest {max(abs(figures[key]) for figures in rows.values()):.1%}")
    if not arguments.workloads:
        RESULTS.parent.mkdir(exist_ok=True)
        about = {
            "torch": torch.__version__,
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "system": f"{platform.system()} {platform.machine()}",
            "steps": STEPS,
        }
        RESULTS.write_text(json.dumps({"about": about, "workloads": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
