"""How large a transformer trains under a hard limit on memory, by method?

Every attempt is a process of its own. It loads the libraries and trains two steps of a tiny net, then has the kernel
limit its data segment (RLIMIT_DATA: all private writable memory) to what it takes by now plus the budget, and trains
three steps of a pre-norm transformer, 512 wide, on 64 characters. The largest number of layers that trains is found by
bisection. Freed memory is given back to the system in all methods alike (`memfit.release_freed_memory`).

Goal: where dense fused AdamW dies at P parameters, low-rank AdamW trains at least 2.5 P.

    python benchmarks/largest_model.py [--budget-mib 768] [--methods adamw-fused low-rank ...] [--rank 16]

Linux only: other systems do not enforce the limit.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import memfit
from language_model import Transformer, in_blocks, next_character
from memfit.ledger import LINES, Peak, ledger
from memfit.ledger.report import format_bytes, svg
from methods import METHODS, CannotError, Optimizer, Setting

RESULTS = Path(__file__).parent / "results" / "largest_model.json"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "largest-model.svg"
REFERENCE, OURS, GOAL = "adamw-fused", ("low-rank", "low-rank-left"), 2.5
TOKENS, CONTEXT, WIDTH, HEADS, STEPS = 128, 64, 512, 8, 3
# How torch, Python, the C++ library and BLAS say that the system gave them no memory.
OUT_OF_MEMORY = re.compile(r"allocate memory|MemoryError|bad_alloc|not enough memory|[Mm]emory allocation|ENOMEM")

Figures = dict[str, Any]


class Attempt(NamedTuple):
    """What one process tries to train."""

    method: str
    layers: int
    rank: int
    budget: int

    def command(self, *flags: str) -> list[str]:
        sizes = ["--layers", str(self.layers), "--rank", str(self.rank), "--budget-mib", str(self.budget >> 20)]
        return [sys.executable, __file__, "--one", self.method, *sizes, *flags]


# -- in the limited process ----------------------------------------------------------------------------------------


def build(method: str, layers: int, rank: int, width: int = WIDTH) -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(0)
    model = Transformer(TOKENS, CONTEXT, width, layers, HEADS)
    return METHODS[method].build(model, Setting(rank, 1e-4, in_blocks))


def train(model: nn.Module, optimizer: Optimizer, steps: int) -> float:
    """The last loss, which is finite."""
    batch = torch.randint(TOKENS, (1, CONTEXT + 1), generator=torch.Generator().manual_seed(0))
    for _ in range(steps):
        optimizer.zero_grad()
        loss = next_character(model, batch)
        loss.backward()
        optimizer.step()
    if not math.isfinite(loss.item()):
        raise RuntimeError("the loss is not finite")
    return loss.item()


def data_bytes() -> int:
    """What RLIMIT_DATA counts of this process."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmData"].removesuffix("kB")) * 1024


def in_this_process(attempt: Attempt, with_ledger: bool) -> Figures:
    memfit.release_freed_memory()
    train(*build(attempt.method, layers=1, rank=8, width=64), steps=2)
    before = data_bytes()
    if with_ledger:
        model, optimizer = build(attempt.method, attempt.layers, attempt.rank)
        train(model, optimizer, 1)
        with ledger(model, *([optimizer] if isinstance(optimizer, torch.optim.Optimizer) else [])) as book:
            train(model, optimizer, 1)
        return {"ledger": book.peak.to_dict()}
    limit = before + attempt.budget
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    model, optimizer = build(attempt.method, attempt.layers, attempt.rank)
    return {"loss": train(model, optimizer, STEPS), "before": before, "limit": limit}


# -- in the process that asks --------------------------------------------------------------------------------------


def run(attempt: Attempt, *flags: str) -> Figures | None:
    """The attempt's figures, or None when it died of memory.

    Raises:
        CannotError: the method cannot be used here, or died of something else.
    """
    done = subprocess.run(attempt.command(*flags), capture_output=True, text=True, check=False)
    if done.returncode == 0:
        figures: Figures = json.loads(done.stdout)
        if "cannot" in figures:
            raise CannotError(figures["cannot"])
        return figures
    # Some libraries do not look at what they got, and fall over it.
    if done.returncode < 0 or OUT_OF_MEMORY.search(done.stderr):
        return None
    raise CannotError("fails: " + (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1])


def parameters(layers: int) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Transformer(TOKENS, CONTEXT, WIDTH, layers, HEADS).parameters())


def largest(method: str, rank: int, budget: int) -> Figures:
    """The row of a method: the most layers that train, and the fewest more that die."""
    trains, dies, figures = 0, None, {}
    attempts: list[tuple[int, bool]] = []
    while dies is None or dies - trains > 1:
        layers = max(8, 2 * trains) if dies is None else (trains + dies) // 2
        found = run(Attempt(method, layers, rank, budget))
        attempts.append((layers, found is not None))
        print(f"{METHODS[method].title}: {layers} layers {'train' if found else 'die'}", file=sys.stderr)
        if found is None:
            dies = layers
        else:
            trains, figures = layers, found
    row = {
        "layers": trains,
        "parameters": parameters(trains) if trains else 0,
        "dies_at_layers": dies,
        "dies_at_parameters": parameters(dies),
        "attempts": attempts,
        **figures,
    }
    if trains and not METHODS[method].opaque:
        row |= run(Attempt(method, trains, rank, budget), "--ledger") or {}
    return row


def draw(rows: dict[str, Figures]) -> str:
    """The ledger's lines of each method's largest net, as a picture that stands alone."""
    peaks = {
        f"{row['title']}: {row['parameters'] / 1e6:.0f} million parameters": Peak(
            **{n: row["ledger"][n] for n in LINES}
        )
        for row in rows.values()
        if "ledger" in row
    }
    page = "<style>svg{background:#fff;color:#1a1a1a}</style><title>"
    return svg(peaks, title="The largest net that trains").replace("<title>", page, 1) + "\n"


def show(rows: dict[str, Figures]) -> None:
    dense = rows.get(REFERENCE, {}).get("dies_at_parameters")
    print(f"\n{'':26}{'layers':>8}{'trains':>12}{'dies at':>12}{'of P':>8}   P: where fused AdamW dies")
    for row in rows.values():
        if "cannot" in row:
            print(f"{row['title']:26}  {row['cannot']}")
            continue
        row["of_dense"] = row["parameters"] / dense if dense else None
        trains, dies = (f"{row[key] / 1e6:>10.1f} M" for key in ("parameters", "dies_at_parameters"))
        ratio = f"{row['of_dense']:>8.2f}" if dense else ""
        print(f"{row['title']:26}{row['layers']:>8}{trains}{dies}{ratio}")
    for method in OURS:
        if (value := rows.get(method, {}).get("of_dense")) is not None:
            verdict = "met" if value >= GOAL else "MISSED"
            print(f"  {verdict:6} {METHODS[method].title}: {value:.2f} P (at least {GOAL} P)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    chosen = ["adamw-fused", "sgd", "galore", "apollo", "adam8bit", *OURS]
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=chosen, metavar="METHOD")
    parser.add_argument("--budget-mib", type=int, default=768, help="memory to train in, in MiB (default 768)")
    parser.add_argument("--rank", type=int, default=16, help="of all methods (default 16)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default benchmarks/results")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="default docs/images")
    parser.add_argument("--one", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--ledger", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not sys.platform.startswith("linux"):
        sys.exit("This system does not enforce RLIMIT_DATA.")
    budget = options.budget_mib << 20
    if options.one:
        # What libraries print while they load goes to stderr: stdout is for the figures.
        report = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        try:
            figures = in_this_process(Attempt(options.one, options.layers, options.rank, budget), options.ledger)
        except CannotError as error:
            figures = {"cannot": str(error)}
        print(json.dumps(figures), file=report, flush=True)
        return

    print(f"{format_bytes(budget)} beyond what Python and the libraries take, rank {options.rank}")
    rows: dict[str, Figures] = {}
    for method in options.methods:
        rows[method] = {"title": METHODS[method].title}
        try:
            rows[method] |= largest(method, options.rank, budget)
        except CannotError as error:
            rows[method]["cannot"] = str(error)
    show(rows)
    about = {
        "budget": budget,
        "rank": options.rank,
        "width": WIDTH,
        "tokens": CONTEXT,
        "steps": STEPS,
        "goal": GOAL,
        "torch": torch.__version__,
    }
    options.results.parent.mkdir(exist_ok=True)
    options.results.write_text(json.dumps({"about": about, "methods": rows}, indent=1) + "\n")
    options.picture.parent.mkdir(exist_ok=True)
    options.picture.write_text(draw(rows))


if __name__ == "__main__":
    main()
