"""What does one training step cost, in memory and in time: low-rank gradients against dense training and the peers.

Same model, same batch, same rank for all. Memory: each method trains three steps in a fresh process, and the figure is
the growth of the process's peak resident memory from after the imports and two steps of a tiny net of the same kind
(which load the libraries' code) to their end; once with the C library's allocator as it is, and once after
`memfit.release_freed_memory()`, which `memfit.fit` calls. From a process of its own, the ledger's lines, of the methods
whose step it can see into.

Time: one process per method, which waits for its turn: the first step of each, then one step of each in turn, so that
what else the machine does hits all alike; medians, and medians of the ratios round by round. Twice, as for memory. All
processes live at the same time: the Llama's take about 16 GiB.

A method that cannot train a workload has a row that says why. LoRA, and methods that update within backward, are shown
but are no peers to beat: the former does not train all weights, the latter can neither accumulate gradients nor clip.

    python benchmarks/low_rank_gradient.py [workload ...] [--methods low-rank adamw-fused ...] [--rounds 9] [--rank 32]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from torch import nn

import memfit
from memfit.ledger import LINES, Peak, ledger, process_peak
from memfit.ledger.report import format_bytes, svg
from methods import METHODS, CannotError, Optimizer, Setting
from workloads import WORKLOADS, Task, Workload

RESULTS = Path(__file__).parent / "results" / "low_rank_gradient.json"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "low-rank-gradient.svg"
PICTURED = "linear-256"
REFERENCE, OURS = "adamw-fused", ("low-rank", "low-rank-left")
STEPS, TINY_RANK = 3, 8

Row = dict[str, Any]


# -- in the measured process ---------------------------------------------------------------------------------------


class Training:
    """One method on one workload, ready to step."""

    def __init__(self, workload: Workload, method: str, rank: int, small: bool = False) -> None:
        torch.manual_seed(0)
        self.task: Task = workload.make(small)
        self.parameters = sum(parameter.numel() for parameter in self.task.model.parameters())
        setting = Setting(TINY_RANK if small else rank, workload.lr, workload.layers, workload.inner)
        built: tuple[nn.Module, Optimizer] = METHODS[method].build(self.task.model, setting)
        self.model, self.optimizer = built

    def step(self) -> float:
        """One step; its seconds."""
        started = time.perf_counter()
        self.optimizer.zero_grad()
        loss = self.task.loss(self.model, self.task.batch)
        loss.backward()
        self.optimizer.step()
        seconds = time.perf_counter() - started
        if not math.isfinite(loss.item()):
            raise RuntimeError("the loss is not finite")
        return seconds


def in_this_process(options: argparse.Namespace, report: TextIO) -> Row:
    """What ``--one`` asks for; nothing large has run in this process before."""
    workload, method = WORKLOADS[options.workloads[0]], options.one
    torch.set_num_threads(options.threads)
    if options.release:
        memfit.release_freed_memory()
    tiny = Training(workload, method, options.rank, small=True)
    for _ in range(2):
        tiny.step()
    del tiny
    if options.ledger:
        training = Training(workload, method, options.rank)
        training.step()
        optimizers = [training.optimizer] if isinstance(training.optimizer, torch.optim.Optimizer) else []
        with ledger(training.model, *optimizers) as book:
            training.step()
        return {"ledger": book.peak.to_dict(), "instant": book.to_dict()["instant"]}
    with process_peak() as process:
        training = Training(workload, method, options.rank)
        seconds = [training.step() for _ in range(1 if options.in_turn else STEPS)]
    if options.in_turn:
        print(json.dumps(seconds), file=report, flush=True)
        for _ in sys.stdin:  # one line for each turn
            print(json.dumps(training.step()), file=report, flush=True)
    return {"growth": process.growth, "seconds": seconds, "parameters": training.parameters}


# -- in the process that asks --------------------------------------------------------------------------------------


class Asked(NamedTuple):
    """What a process is asked to measure, but for the method."""

    workload: str
    rank: int
    threads: int

    def command(self, method: str, *flags: str) -> list[str]:
        rank, threads = str(self.rank), str(self.threads)
        return [sys.executable, __file__, self.workload, "--one", method, "--rank", rank, "--threads", threads, *flags]


def environment(compiled: str) -> dict[str, str]:
    """With an empty cache for compiled code, so that a first step compiles what it needs."""
    return {**os.environ, "TORCHINDUCTOR_CACHE_DIR": compiled, "TRITON_CACHE_DIR": compiled}


def fresh_process(asked: Asked, method: str, *flags: str) -> Row:
    """One measurement; what went wrong, where something did, under "cannot"."""
    with tempfile.TemporaryDirectory() as compiled:
        done = subprocess.run(
            asked.command(method, *flags),
            env=environment(compiled),
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        return {"cannot": "fails: " + (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]}
    return json.loads(done.stdout)


class Turns:
    """Long-lived processes, one per method, that make one step when it is their turn."""

    def __init__(self, asked: Asked, methods: list[str], *flags: str) -> None:
        self.first: dict[str, float] = {}
        self.times: dict[str, list[float]] = {method: [] for method in methods}
        self._processes: dict[str, subprocess.Popen[str]] = {}
        self._compiled = tempfile.TemporaryDirectory()
        for method in methods:
            self._processes[method] = subprocess.Popen(
                asked.command(method, "--in-turn", *flags),
                env=environment(f"{self._compiled.name}/{method}"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            self.first[method] = self._answer(method)[0]

    def _answer(self, method: str) -> Any:
        stdout = self._processes[method].stdout
        assert stdout is not None
        return json.loads(stdout.readline())

    def run(self, rounds: int) -> None:
        """One step of each per round; the first round is not kept."""
        for kept in [False] + [True] * rounds:
            for method, process in self._processes.items():
                assert process.stdin is not None
                print("step", file=process.stdin, flush=True)
                seconds = self._answer(method)
                if kept:
                    self.times[method].append(seconds)

    def close(self) -> None:
        for process in self._processes.values():
            process.communicate()
        self._compiled.cleanup()


def memory(asked: Asked, method: str) -> Row:
    """A method's memory, each figure from a process of its own; the first steps' seconds come along."""
    as_is, released = fresh_process(asked, method), fresh_process(asked, method, "--release")
    lines = {} if METHODS[method].opaque else fresh_process(asked, method, "--ledger")
    for figures in (as_is, released, lines):
        if "cannot" in figures:
            return {"cannot": figures["cannot"]}
    return {
        "parameters": as_is["parameters"],
        "growth": as_is["growth"],
        "growth_released": released["growth"],
        "first_steps": as_is["seconds"][:1],
        "first_steps_released": released["seconds"][:1],
        **lines,
    }


def measure(asked: Asked, methods: list[str], rounds: int) -> dict[str, Row]:
    """All rows of a workload."""
    rows: dict[str, Row] = {}
    for method in methods:
        rows[method] = {"title": METHODS[method].title, **memory(asked, method)}
        growth = rows[method].get("growth")
        said = rows[method]["cannot"] if growth is None else f"the peak grows by {format_bytes(growth)}"
        print(f"{asked.workload}, {METHODS[method].title}: {said}", file=sys.stderr)
    able = [method for method in methods if "cannot" not in rows[method]]
    for suffix, flags in (("", ()), ("_released", ("--release",))):
        turns = Turns(asked, able, *flags)
        turns.run(rounds)
        turns.close()
        for method in able:
            rows[method]["first_steps" + suffix].append(turns.first[method])
            rows[method]["seconds" + suffix] = turns.times[method]
    return rows


def compare(rows: dict[str, Row]) -> None:
    """Add to every row its medians and its ratios to fused AdamW and, where those ran, to the peers."""
    able = {method: row for method, row in rows.items() if "cannot" not in row}
    peers = [method for method in able if METHODS[method].is_counted_peer]
    for suffix in ("", "_released"):
        lightest = min(peers, key=lambda peer: able[peer]["growth" + suffix], default=None)
        for row in able.values():
            row["first_step" + suffix] = statistics.median(row["first_steps" + suffix])
            row["step" + suffix] = statistics.median(row["seconds" + suffix])
            if REFERENCE in able:
                row["growth_ratio" + suffix] = row["growth" + suffix] / able[REFERENCE]["growth" + suffix]
                row["step_ratio" + suffix] = ratio_by_round(row, able[REFERENCE], suffix)
            if lightest is not None:
                row["lightest_peer" + suffix] = lightest
                row["growth_ratio_to_peer" + suffix] = row["growth" + suffix] / able[lightest]["growth" + suffix]
            if "galore" in able:
                row["step_ratio_to_galore" + suffix] = ratio_by_round(row, able["galore"], suffix)


def ratio_by_round(row: Row, reference: Row, suffix: str) -> float:
    rounds = zip(row["seconds" + suffix], reference["seconds" + suffix], strict=True)
    return statistics.median(ours / theirs for ours, theirs in rounds)


def goals(workload: Workload, rows: dict[str, Row]) -> list[Row]:
    """What is asked of memfit's methods, with the figure that it is held against; only what was measured."""
    found: list[Row] = []
    for method in OURS:
        row = rows.get(method, {"cannot": "not run"})
        for suffix, how in (("", "as is"), ("_released", "released")):
            limits = {
                "growth of fused AdamW's": ("growth_ratio", workload.peak_goal),
                "growth of the lightest peer's": ("growth_ratio_to_peer", 0.60),
                "step of fused AdamW's": ("step_ratio", workload.step_goal),
                "step of GaLore's": ("step_ratio_to_galore", 0.65),
            }
            values = {
                what: (row[key + suffix], limit) for what, (key, limit) in limits.items() if row.get(key + suffix)
            }
            if "cannot" not in row:
                values["first step of the steady one"] = (row["first_step" + suffix] / row["step" + suffix], 2.0)
                if "growth" in rows.get("sgd", {}):
                    values["growth of SGD's"] = (row["growth" + suffix] / rows["sgd"]["growth" + suffix], 1.0)
            found += [
                {
                    "method": method,
                    "allocator": how,
                    "goal": what,
                    "limit": limit,
                    "value": value,
                    "met": value <= limit,
                }
                for what, (value, limit) in values.items()
            ]
    return found


def show(workload: Workload, rows: dict[str, Row], reached: list[Row]) -> None:
    print(f"\n{workload.title}")
    print(
        f"{'':26}{'peak growth':>12}{'ratio':>7}{'released':>12}{'ratio':>7}{'ledger':>12}"
        f"{'first step':>12}{'step':>9}{'ratio':>7}{'released':>10}{'ratio':>7}"
    )
    for method, row in rows.items():
        if "cannot" in row:
            print(f"{row['title']:26}  {row['cannot']}")
            continue
        peak = row.get("ledger")
        cells = [
            f"{format_bytes(row['growth']):>12}{row.get('growth_ratio', math.nan):>7.2f}",
            f"{format_bytes(row['growth_released']):>12}{row.get('growth_ratio_released', math.nan):>7.2f}",
            f"{format_bytes(peak['total']) if peak else '-':>12}",
            f"{row['first_step']:>10.2f} s{row['step']:>7.3f} s{row.get('step_ratio', math.nan):>7.2f}",
            f"{row['step_released']:>8.3f} s{row.get('step_ratio_released', math.nan):>7.2f}",
        ]
        note = METHODS[method].not_counted
        print(f"{row['title']:26}" + "".join(cells) + (f"  ({note})" if note else ""))
    for goal in reached:
        verdict = "met" if goal["met"] else "MISSED"
        print(
            f"  {verdict:6} {METHODS[goal['method']].title}, {goal['allocator']}: {goal['goal']} {goal['value']:.2f}"
            f" (at most {goal['limit']:.2f})"
        )


def draw(rows: dict[str, Row]) -> str:
    """The ledger's lines of the methods, as a picture that stands alone."""
    peaks = {
        f"{row['title']} (process: {format_bytes(row['growth'])})": Peak(**{n: row["ledger"][n] for n in LINES})
        for method, row in rows.items()
        if "ledger" in row and not METHODS[method].not_counted
    }
    page = "<style>svg{background:#fff;color:#1a1a1a}</style><title>"
    return svg(peaks).replace("<title>", page, 1) + "\n"


def versions() -> dict[str, str]:
    found = {}
    for package in ["torch", "transformers", *{method.package for method in METHODS.values() if method.package}]:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return dict(sorted(found.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", metavar="workload", help=f"of {', '.join(WORKLOADS)} (default: all)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds (default 9)")
    parser.add_argument("--rank", type=int, default=32, help="of all methods (default 32)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default benchmarks/results")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="default docs/images")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each process (default: all)")
    for flag in ("--one", "--ledger", "--release", "--in-turn"):
        kind: dict[str, Any] = {"choices": METHODS} if flag == "--one" else {"action": "store_true"}
        parser.add_argument(flag, help=argparse.SUPPRESS, **kind)
    options = parser.parse_args()
    if unknown := set(options.workloads) - set(WORKLOADS):
        parser.error(f"unknown workload {', '.join(sorted(unknown))}: choose from {', '.join(WORKLOADS)}")
    if options.one:
        # What libraries print while they load goes to stderr: stdout is for the figures.
        report = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        try:
            figures = in_this_process(options, report)
        except CannotError as error:
            figures = {"cannot": str(error)}
        if not options.in_turn:
            print(json.dumps(figures), file=report, flush=True)
        return

    options.results.parent.mkdir(exist_ok=True)
    for name in options.workloads or WORKLOADS:
        workload = WORKLOADS[name]
        rows = measure(Asked(name, options.rank, options.threads), options.methods, options.rounds)
        compare(rows)
        reached = goals(workload, rows)
        show(workload, rows, reached)
        about = {
            "title": workload.title,
            "rank": options.rank,
            "rounds": options.rounds,
            "threads": options.threads,
            "versions": versions(),
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "load_at_end": os.getloadavg(),
        }
        # Written after each workload, beside what is there of the others: a full run takes hours.
        written = json.loads(options.results.read_text()) if options.results.exists() else {}
        written[name] = {"about": about, "methods": rows, "goals": reached}
        options.results.write_text(json.dumps(written, indent=1) + "\n")
        if name == PICTURED:
            options.picture.parent.mkdir(exist_ok=True)
            options.picture.write_text(draw(rows))


if __name__ == "__main__":
    main()
