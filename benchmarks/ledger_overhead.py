"""What does the ledger itself cost, in time and in memory?

A pre-norm transformer of ten layers trains with AdamW, one step as it is and one under the ledger in turn, in one
process: medians, and the median of the ratios round by round. The ledger's own memory is what Python's allocator holds
for it at the end of three steps (`tracemalloc`), with all events, beside the total that it reports.

Goals, for the large net: at most 2 times the time of a step, and less than 2 % of the total. The small one has hardly
anything to compute and shows the cost of each operator's entry.

    python benchmarks/ledger_overhead.py [--rounds 15]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tracemalloc
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from memfit.ledger import ledger
from memfit.ledger.report import format_bytes

RESULTS = Path(__file__).parent / "results" / "ledger_overhead.json"
STEPS, TIME_GOAL, MEMORY_GOAL = 3, 2.0, 0.02


class Size(NamedTuple):
    width: int
    batch: int
    tokens: int


SIZES = {
    "10 layers, 512 wide, 512 tokens": Size(512, 4, 128),
    "10 layers, 128 wide, 64 tokens": Size(128, 2, 32),
}


class Training:
    def __init__(self, size: Size) -> None:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(size.width, 8, 4 * size.width, batch_first=True, norm_first=True)
        self.model = nn.TransformerEncoder(layer, 10, enable_nested_tensor=False)
        self.batch: Tensor = torch.randn(size.batch, size.tokens, size.width)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)

    def step(self) -> float:
        started = perf_counter()
        self.optimizer.zero_grad()
        self.model(self.batch).square().mean().backward()
        self.optimizer.step()
        return perf_counter() - started

    def step_in_ledger(self) -> float:
        started = perf_counter()
        with ledger(self.model, self.optimizer):
            self.step()
        return perf_counter() - started


def in_this_process(size: Size, rounds: int) -> dict[str, Any]:
    training = Training(size)
    training.step()
    training.step_in_ledger()
    plain, watched = [], []
    for _ in range(rounds):
        plain.append(training.step())
        watched.append(training.step_in_ledger())
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    with ledger(training.model, training.optimizer) as book:
        for _ in range(STEPS):
            training.step()
        own = tracemalloc.get_traced_memory()[0] - before
    return {
        "step": statistics.median(plain),
        "step_in_ledger": statistics.median(watched),
        "time_ratio": statistics.median(ours / theirs for ours, theirs in zip(watched, plain, strict=True)),
        "own_memory": own,
        "total": book.peak.total,
        "memory_share": own / book.peak.total,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="steps of each kind (default 15)")
    parser.add_argument("--one", choices=SIZES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(in_this_process(SIZES[options.one], options.rounds)))
        return
    rows: dict[str, Any] = {}
    print(f"{'':34}{'step':>10}{'in ledger':>11}{'ratio':>7}{'its memory':>13}{'of':>13}{'share':>8}")
    for name in SIZES:
        command = [sys.executable, __file__, "--one", name, "--rounds", str(options.rounds)]
        row = rows[name] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        times = f"{1000 * row['step']:>7.0f} ms{1000 * row['step_in_ledger']:>8.0f} ms{row['time_ratio']:>7.2f}"
        sizes = f"{format_bytes(row['own_memory']):>13}{format_bytes(row['total']):>13}{row['memory_share']:>8.2%}"
        print(f"{name:34}{times}{sizes}")
    large = next(iter(rows.values()))
    for what, value, goal in (
        ("the time of a step", large["time_ratio"], TIME_GOAL),
        ("its memory, of the total", large["memory_share"], MEMORY_GOAL),
    ):
        print(f"  {'met' if value <= goal else 'MISSED':6} {what}: {value:.3f} (at most {goal:g})")
    about = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "rounds": options.rounds,
        "steps": STEPS,
        "system": f"{platform.system()} {platform.machine()}",
    }
    RESULTS.write_text(json.dumps({"about": about, "sizes": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
