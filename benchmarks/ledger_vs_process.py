"""Does the ledger agree with the operating system? Its total at the peak against the growth of the process's peak.

Every workload runs in fresh processes: under the ledger; under nothing but `process_peak`, so that
the ledger's own memory is not in the figure that it is held against; and once more like that after
`memfit.release_freed_memory()`, which `memfit.fit` calls, so that the allocator keeps no large holes. So

    process = ledger + what operators allocate inside, which is no tensor + holes that the allocator keeps
            - what is allocated but never written to,

where the holes are the second process less the third. A fourth process runs forward once and counts the last term:
the pages of the tensors that forward keeps which the system never had to provide (`mincore`). The region of
`process_peak` starts after the imports and two tiny training steps of the same kind (which load the libraries' code),
before the model is built. The claim: within 10 % on workloads of 100 MB and more.

    python benchmarks/ledger_vs_process.py [workload ...]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from time import process_time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from memfit import release_freed_memory
from memfit.ledger import ledger, process_peak
from memfit.ledger.report import format_bytes

RESULTS = Path(__file__).parent / "results" / "ledger_vs_process.json"
STEPS = 2

Loss = Callable[[nn.Module, Tensor], Tensor]
Workload = tuple[nn.Module, Tensor, Loss]
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


def linear(small: bool) -> Workload:
    width = 8 if small else 2048
    model = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(width, width), nn.GELU())))
    return model, torch.randn(4 if small else 256, width), mean_square


def encoder(small: bool) -> Workload:
    return Encoder(16 if small else 512, 6), torch.randn(2, 8, 16) if small else torch.randn(4, 128, 512), mean_square


def encoder_checkpointed(small: bool) -> Workload:
    model = Encoder(16 if small else 512, 6, checkpointed=True)
    return model, torch.randn(2, 8, 16) if small else torch.randn(4, 128, 512), mean_square


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
    return model, torch.randn(2, 3, 16, 16) if small else torch.randn(24, 3, 64, 64), mean_square


def residual(small: bool) -> Workload:
    channels = 8 if small else 64
    model = nn.Sequential(nn.Conv2d(3, channels, 7, stride=2, padding=3), *(Residual(channels) for _ in range(6)))
    return model, torch.randn(2, 3, 16, 16) if small else torch.randn(8, 3, 112, 112), mean_square


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


def measure(name: str, with_ledger: bool) -> Figures:
    """Run one workload in this process, which should be a fresh one."""
    make, (optimizer_type, options) = WORKLOADS[name]
    torch.manual_seed(0)
    model, batch, loss = make(small=True)
    train(model, optimizer_type(model.parameters(), **options), batch, loss)
    del model, batch, loss

    figures: Figures = {}
    with process_peak() as process:
        model, batch, loss = make(small=False)
        optimizer = optimizer_type(model.parameters(), **options)
        started = process_time()
        if with_ledger:
            with ledger(model, optimizer) as book:
                train(model, optimizer, batch, loss)
        else:
            train(model, optimizer, batch, loss)
        figures["seconds"] = process_time() - started
    figures |= {"growth": process.growth, "method": process.method}
    if with_ledger:
        figures |= {"peak": book.peak.to_dict(), "instant": book.to_dict()["instant"]}
    return figures


class LargeTensors(TorchDispatchMode):
    """Keeps an eye on the storages of 1 MiB and more that operators make, without keeping them alive."""

    def __init__(self) -> None:
        super().__init__()
        self.references: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor) and value.untyped_storage().nbytes() >= 1 << 20:
                storage = value.untyped_storage()
                self.references[storage._cdata] = weakref.ref(storage)
        return result


def not_resident(storage: torch.UntypedStorage) -> int:
    """Bytes of a storage for which the system has not had to provide memory (Linux)."""
    page = os.sysconf("SC_PAGESIZE")
    first = -(-storage.data_ptr() // page)
    count = (storage.data_ptr() + storage.nbytes()) // page - first  # whole pages
    resident = (ctypes.c_ubyte * count)()
    if ctypes.CDLL(None).mincore(ctypes.c_void_p(first * page), ctypes.c_size_t(count * page), resident):
        raise OSError("mincore failed")
    return page * sum(not there & 1 for there in resident)


def untouched(name: str) -> Figures:
    """Bytes that forward keeps and never wrote to; run in a fresh process without holes."""
    make, _ = WORKLOADS[name]
    torch.manual_seed(0)
    model, batch, loss = make(small=False)
    with LargeTensors() as seen:
        value = loss(model, batch)
    kept = [storage for reference in seen.references.values() if (storage := reference()) is not None]
    assert value.requires_grad
    return {"untouched": sum(not_resident(storage) for storage in kept)}


def in_fresh_process(name: str, *options: str) -> Figures:
    command = [sys.executable, __file__, "--one", name, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workloads", nargs="*", help=f"of {', '.join(WORKLOADS)}")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--no-holes", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--with-ledger", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--untouched", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.no_holes and not release_freed_memory():
        sys.exit("This system's allocator cannot be told to return freed memory.")
    if arguments.one:
        figures = untouched(arguments.one) if arguments.untouched else measure(arguments.one, arguments.with_ledger)
        print(json.dumps(figures))
        return

    rows = []
    print(f"{'workload':<34}{'ledger':>11}{'no holes':>11}{'diff':>8}{'process':>11}{'diff':>8}{'unused':>11}  peak in")
    for name in arguments.workloads or WORKLOADS:
        measured = in_fresh_process(name, "--with-ledger")
        plain, compact = in_fresh_process(name), in_fresh_process(name, "--no-holes")
        unused = in_fresh_process(name, "--no-holes", "--untouched")["untouched"]
        total, instant = measured["peak"]["total"], measured["instant"]
        row = {
            "workload": name,
            "ledger": measured["peak"],
            "instant": instant,
            "process_growth": plain["growth"],
            "process_growth_without_holes": compact["growth"],
            "process_growth_under_ledger": measured["growth"],
            "allocated_but_untouched": unused,
            "difference": total / plain["growth"] - 1,
            "difference_without_holes": total / compact["growth"] - 1,
            "method": plain["method"],
            "cpu_seconds": plain["seconds"],
            "cpu_seconds_without_holes": compact["seconds"],
            "cpu_seconds_under_ledger": measured["seconds"],
        }
        rows.append(row)
        sizes = format_bytes(total), format_bytes(compact["growth"]), format_bytes(plain["growth"])
        differences = f"{row['difference_without_holes']:+.1%}", f"{row['difference']:+.1%}"
        print(
            f"{name:<34}{sizes[0]:>11}{sizes[1]:>11}{differences[0]:>8}{sizes[2]:>11}{differences[1]:>8}"
            f"{format_bytes(unused):>11}  {instant['phase']} {instant['operator']}",
            flush=True,
        )
    if not arguments.workloads:
        RESULTS.parent.mkdir(exist_ok=True)
        about = {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "system": f"{platform.system()} {platform.machine()}",
            "steps": STEPS,
        }
        RESULTS.write_text(json.dumps({"about": about, "workloads": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
