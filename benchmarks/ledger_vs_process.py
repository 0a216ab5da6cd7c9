"""Does the ledger agree with the operating system? Its total at the peak against the growth of the process's peak.

Every workload runs twice, each time in a fresh process: once under the ledger, once under nothing but
`process_peak`, so that the ledger's own memory is not in the figure that it is held against. The region of
`process_peak` starts after the imports and one tiny training step of the same kind (which loads the libraries' code),
before the model is built. The claim: within 10 % on workloads of 100 MB and more.

    python benchmarks/ledger_vs_process.py [workload ...]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from memfit.ledger import ledger, process_peak
from memfit.ledger.report import format_bytes

RESULTS = Path(__file__).parent / "results" / "ledger_vs_process.json"
STEPS = 2

Loss = Callable[[nn.Module, Tensor], Tensor]
Workload = tuple[nn.Module, Tensor, Loss]


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


def linear(small: bool) -> Workload:
    width = 8 if small else 2048
    model = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(width, width), nn.GELU())))
    return model, torch.randn(4 if small else 256, width), mean_square


def encoder(small: bool) -> Workload:
    return Encoder(16 if small else 512, 6), torch.randn(2, 8, 16) if small else torch.randn(8, 256, 512), mean_square


def encoder_checkpointed(small: bool) -> Workload:
    model = Encoder(16 if small else 512, 6, checkpointed=True)
    return model, torch.randn(2, 8, 16) if small else torch.randn(8, 256, 512), mean_square


def language(small: bool) -> Workload:
    model = Language(50, 16, 2) if small else Language(20_000, 384, 4)
    return model, torch.randint(0, 50 if small else 20_000, (2, 8) if small else (4, 128)), next_token


def convolutional(small: bool) -> Workload:
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
    return model, torch.randn(2, 3, 16, 16) if small else torch.randn(16, 3, 96, 96), mean_square


def residual(small: bool) -> Workload:
    channels = 8 if small else 64
    model = nn.Sequential(nn.Conv2d(3, channels, 7, stride=2, padding=3), *(Residual(channels) for _ in range(6)))
    return model, torch.randn(2, 3, 16, 16) if small else torch.randn(8, 3, 128, 128), mean_square


def recurrent(small: bool) -> Workload:
    model = Recurrent(8, 16, 3, 4) if small else Recurrent(80, 1024, 3, 32)
    return model, torch.randn(5, 2, 8) if small else torch.randn(200, 8, 80), mean_square


SGD, MOMENTUM = (torch.optim.SGD, {"lr": 1e-3}), (torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9})
ADAM, FUSED = (torch.optim.AdamW, {"lr": 1e-4}), (torch.optim.AdamW, {"lr": 1e-4, "fused": True})

WORKLOADS = {
    "linear, SGD": (linear, SGD),
    "linear, momentum": (linear, MOMENTUM),
    "linear, AdamW": (linear, ADAM),
    "linear, fused AdamW": (linear, FUSED),
    "encoder, AdamW": (encoder, ADAM),
    "encoder checkpointed, AdamW": (encoder_checkpointed, ADAM),
    "language model tied, fused AdamW": (language, FUSED),
    "CNN, SGD": (convolutional, SGD),
    "residual CNN, AdamW": (residual, ADAM),
    "LSTM 3x1024, SGD": (recurrent, SGD),
    "LSTM 3x1024, fused AdamW": (recurrent, FUSED),
}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor, loss: Loss) -> None:
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()


def measure(name: str, with_ledger: bool) -> dict[str, object]:
    """Run one workload in this process, which should be a fresh one."""
    make, (optimizer_type, options) = WORKLOADS[name]
    torch.manual_seed(0)
    model, batch, loss = make(small=True)
    train(model, optimizer_type(model.parameters(), **options), batch, loss)
    del model, batch, loss

    figures: dict[str, object] = {}
    with process_peak() as process:
        model, batch, loss = make(small=False)
        optimizer = optimizer_type(model.parameters(), **options)
        started = perf_counter()
        if with_ledger:
            with ledger(model, optimizer) as book:
                train(model, optimizer, batch, loss)
        else:
            train(model, optimizer, batch, loss)
        figures["seconds"] = perf_counter() - started
    figures |= {"growth": process.growth, "method": process.method}
    if with_ledger:
        figures |= {"peak": book.peak.to_dict(), "instant": book.to_dict()["instant"]}
    return figures


def in_fresh_process(name: str, with_ledger: bool) -> dict[str, object]:
    command = [sys.executable, __file__, "--one", name, *(["--with-ledger"] if with_ledger else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workloads", nargs="*", help=f"of {', '.join(WORKLOADS)}")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--with-ledger", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.with_ledger)))
        return

    rows = []
    print(f"{'workload':<34}{'ledger':>12}{'process':>12}{'difference':>12}  peak in")
    for name in arguments.workloads or WORKLOADS:
        measured, plain = in_fresh_process(name, True), in_fresh_process(name, False)
        total, growth = measured["peak"]["total"], plain["growth"]
        row = {
            "workload": name,
            "ledger": measured["peak"],
            "process_growth": growth,
            "process_growth_under_ledger": measured["growth"],
            "difference": total / growth - 1,
            "instant": measured["instant"],
            "method": plain["method"],
            "seconds": plain["seconds"],
            "seconds_under_ledger": measured["seconds"],
        }
        rows.append(row)
        where = f"{row['instant']['phase']} {row['instant']['operator']}"
        print(f"{name:<34}{format_bytes(total):>12}{format_bytes(growth):>12}{row['difference']:>+12.1%}  {where}")
    if not arguments.workloads:
        RESULTS.parent.mkdir(exist_ok=True)
        about = {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "system": f"{platform.system()} {platform.machine()}",
            "allocator": {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")},
            "steps": STEPS,
        }
        RESULTS.write_text(json.dumps({"about": about, "workloads": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
