"""An LSTM recognizer of 21 million parameters: what does a training step cost in memory and in time, by method?

Memory: each method trains in a fresh process. The figure is the growth of the process's peak resident memory from after
the imports and two steps of a tiny recognizer of the same kind (which load the libraries' code) to the end of three
steps; beside it, from a process of its own, the ledger's total. Every method runs twice: with the C library's allocator
as it is, and after `memfit.release_freed_memory()`, which `memfit.fit` calls where no dense LSTM trains.

Time: all methods in one process, one step each in turn, medians.

Goals: low-rank Adam's growth at most 0.45 of dense fused Adam's and at most dense SGD's; its step at most 0.8 of dense
fused Adam's; its saved activations at most the dense LSTM's.

    python benchmarks/lstm_recognizer.py [--rounds 7]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import memfit
from memfit.ledger import LINES, Peak, ledger, process_peak
from memfit.ledger.report import format_bytes, svg
from memfit.speech.batches import Batch, ctc_loss
from memfit.speech.model import Recognizer, RecognizerConfig

RESULTS = Path(__file__).parent / "results" / "lstm_recognizer.json"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "lstm-memory.svg"
BATCH, FRAMES, STEPS = 8, 200, 3
LARGE = RecognizerConfig(features=40, stack=2, layers=3, hidden=1024, bidirectional=False)
TINY = RecognizerConfig(features=40, stack=2, layers=1, hidden=16, bidirectional=False)

LOW_RANK = {
    "low-rank Adam": memfit.LowRankGradient(rank=16),
    "low-rank Adam, left": memfit.LowRankGradient(rank=16, sides="left"),
    "low-rank Adam, rematerialized": memfit.LowRankGradient(rank=16, rematerialize=True),
}
DENSE = ("dense Adam, fused", "dense SGD")
METHODS = (*DENSE, *LOW_RANK)


def build(method: str, config: RecognizerConfig) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Recognizer(config)
    if method in LOW_RANK:
        memfit.convert_(model, LOW_RANK[method])
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if method == "dense SGD":
        return model, torch.optim.SGD(parameters, lr=1e-3)
    return model, torch.optim.Adam(parameters, lr=1e-4, fused=True)


def batch(config: RecognizerConfig, frames: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch(
        torch.randn(BATCH, frames * config.stack, config.features, generator=generator),
        torch.full((BATCH,), frames * config.stack),
        torch.randint(1, len(config.alphabet), (BATCH, frames // 8), generator=generator),
        torch.full((BATCH,), frames // 8),
    )


def step(model: nn.Module, optimizer: torch.optim.Optimizer, data: Batch) -> None:
    optimizer.zero_grad()
    ctc_loss(model, data).backward()
    optimizer.step()


def in_this_process(method: str, with_ledger: bool, release: bool) -> dict[str, Any]:
    """One method's memory, measured in the process that this is called in."""
    if release:
        memfit.release_freed_memory()
    tiny, optimizer = build(method, TINY)
    for _ in range(2):
        step(tiny, optimizer, batch(TINY, 16))
    if with_ledger:
        model, optimizer = build(method, LARGE)
        data = batch(LARGE, FRAMES)
        step(model, optimizer, data)
        with ledger(model, optimizer) as book:
            step(model, optimizer, data)
        return book.peak.to_dict()
    with process_peak() as process:
        model, optimizer = build(method, LARGE)
        data = batch(LARGE, FRAMES)
        for _ in range(STEPS):
            step(model, optimizer, data)
    return {"growth": process.growth, "parameters": sum(p.numel() for p in Recognizer(LARGE).parameters())}


def fresh_process(method: str, *options: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", method, *options]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def interleaved_times(methods: tuple[str, ...], rounds: int) -> dict[str, list[float]]:
    """Seconds per step of each method, one step of each in turn, the first round left out."""
    memfit.release_freed_memory()
    data = batch(LARGE, FRAMES)
    built = {method: build(method, LARGE) for method in methods}
    times: dict[str, list[float]] = {method: [] for method in methods}
    for _ in range(rounds + 1):
        for method, (model, optimizer) in built.items():
            started = time.perf_counter()
            step(model, optimizer, data)
            times[method].append(time.perf_counter() - started)
    return {method: values[1:] for method, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default 7)")
    parser.add_argument("--one", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--ledger", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--release", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(in_this_process(options.one, options.ledger, options.release)))
        return

    rows: dict[str, dict[str, Any]] = {}
    for method in METHODS:
        as_is = fresh_process(method)
        rows[method] = {
            "growth_bytes": as_is["growth"],
            "growth_bytes_released": fresh_process(method, "--release")["growth"],
            "ledger": fresh_process(method, "--ledger"),
        }
        print(f"{method}: measured", file=sys.stderr)
    for method, times in interleaved_times(METHODS, options.rounds).items():
        rows[method] |= {"seconds_per_step": times, "seconds_median": statistics.median(times)}

    dense = rows["dense Adam, fused"]
    pair: Callable[[str], list[float]] = lambda key: [  # noqa: E731
        statistics.median(ours / theirs for ours, theirs in zip(row[key], dense[key], strict=True))
        for row in rows.values()
    ]
    for row, ratio in zip(rows.values(), pair("seconds_per_step"), strict=True):
        row["time_ratio"] = ratio
        row["growth_ratio"] = row["growth_bytes"] / dense["growth_bytes"]
        row["growth_ratio_released"] = row["growth_bytes_released"] / dense["growth_bytes_released"]
        row["growth_ratio_released_to_as_is"] = row["growth_bytes_released"] / dense["growth_bytes"]

    print(f"\n{'':36} {'process-peak growth':>22} {'released':>17} {'ledger':>11} {'kept':>11} {'step':>14}")
    for method, row in rows.items():
        print(
            f"{method:36} {format_bytes(row['growth_bytes']):>12} ({row['growth_ratio']:.2f} x) "
            f"{format_bytes(row['growth_bytes_released']):>11} ({row['growth_ratio_released']:.2f}) "
            f"{format_bytes(row['ledger']['total']):>10} {format_bytes(row['ledger']['activations']):>10} "
            f"{row['seconds_median']:>6.2f} s ({row['time_ratio']:.2f} x)"
        )
    RESULTS.parent.mkdir(exist_ok=True)
    about = {
        "parameters": as_is["parameters"],
        "batch": BATCH,
        "frames": FRAMES,
        "rounds": options.rounds,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "load_at_end": os.getloadavg(),
    }
    RESULTS.write_text(json.dumps({"about": about, "methods": rows}, indent=1) + "\n")
    draw(rows)


def draw(rows: dict[str, dict[str, Any]]) -> None:
    """The ledger's lines of some methods, as a picture that stands alone."""
    shown = ("dense Adam, fused", "dense SGD", "low-rank Adam", "low-rank Adam, rematerialized")
    peaks = {method: Peak(**{line: rows[method]["ledger"][line] for line in LINES}) for method in shown}
    PICTURE.parent.mkdir(exist_ok=True)
    page = "<style>svg{background:#fff;color:#1a1a1a}</style><title>"
    PICTURE.write_text(svg(peaks).replace("<title>", page, 1) + "\n")


if __name__ == "__main__":
    main()
