"""The streaming sum of outer products: is it unbiased, how fast is it, and what memory does it take?

Estimator: 10,000 draws on several shapes. The largest distance of their mean from the exact sum, in standard errors,
over all elements, beside what that is for as many normal numbers; the squared error of one addition, beside the least
that is possible; the biased sum beside the truncated singular value decomposition. The same with the C++ operator.

Speed: samples per second of the method's network (four convolutions, two dense layers, images of 28 x 28) on one core,
forward, backward, sums and optimizer, in turn with the reference of the tests, which adds one term at a time as the
method is written down, and with dense gradients. All samples are wrongly labelled, so that none is without a gradient.

Memory: what `memfit.ledger` sees of Linear layers from 10 x 10 to 2048 x 2048, of one sample and of a batch: the sums
between steps, and what an addition takes beside them, with NumPy's arrays and Python's own objects (some kilobytes).

    python benchmarks/kronecker_sum.py [--rounds 60]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import platform
import statistics
import tracemalloc
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memfit
from memfit.gradients.kronecker_sum import KroneckerSum
from memfit.gradients.mixing import least_variance
from memfit.ledger.report import format_bytes
from memfit.nvm.model import CharacterNet

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "kronecker_sum.json"
DRAWS, RANK, BLOCK, SPEED_GOAL = 10_000, 4, 32, 20.0
# rows, columns, rank, terms of each addition
SHAPES = [(8, 9, 2, (6,)), (10, 64, 4, (1,) * 6), (16, 144, 4, (49,)), (40, 60, 4, (10, 10)), (3, 50, 2, (5, 5))]
PYTHON = 6_000  # bytes of Python's own objects
SIDES = [10, 32, 128, 512, 2048]


def reference_class() -> type:
    """The slow implementation that the tests compare with."""
    path = HERE.parent / "tests" / "gradients" / "one_term_at_a_time.py"
    spec = importlib.util.spec_from_file_location("one_term_at_a_time", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: type = module.OneTermAtATime
    return found


# -- estimator ---------------------------------------------------------------------------------------------------------


def estimator(rows: int, columns: int, rank: int, additions: tuple[int, ...], native: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    count = sum(additions)
    left = torch.randn(rows, count, generator=generator) * 0.8 ** torch.arange(count)
    right = torch.randn(columns, count, generator=generator)
    exact = left.double() @ right.double().t()
    parts = list(zip(left.split(additions, 1), right.split(additions, 1), strict=True))
    total = KroneckerSum(rows, columns, rank, block=BLOCK, native=native)
    mean, square, errors = torch.zeros_like(exact), torch.zeros_like(exact), []
    for _ in range(DRAWS):
        total.reset()
        for part in parts:
            total.add(*part)
        drawn = total.matrix().double()
        mean += drawn / DRAWS
        square += drawn**2 / DRAWS
        errors.append(float((drawn - exact).square().sum()))
    deviation = ((square - mean**2) / DRAWS).sqrt()
    row: dict[str, Any] = {
        "shape": [rows, columns],
        "rank": rank,
        "additions": list(additions),
        "native": native,
        "largest_distance_in_standard_errors": float(((mean - exact).abs() / deviation).max()),
        "expected_of_normal_numbers": math.sqrt(2 * math.log(2 * rows * columns)),
        "squared_error": statistics.mean(errors) / float(exact.square().sum()),
    }
    values = torch.linalg.svdvals(exact).tolist()
    if len(additions) == 1:
        row["least_squared_error"] = least_variance(values[:count], rank) / float(exact.square().sum())
        biased = KroneckerSum(rows, columns, rank, unbiased=False, block=BLOCK, native=native)
        biased.add(left, right)
        u, s, v = torch.linalg.svd(exact, full_matrices=False)
        best = (u[:, :rank] * s[:rank]) @ v[:rank]
        row["biased_from_truncated_svd"] = float((biased.matrix() - best).norm() / best.norm())
    return row


# -- speed -------------------------------------------------------------------------------------------------------------


class Learner:
    """One sample at a time, with dense gradients."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = CharacterNet(28, 10)
        self.prepare()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)

    def prepare(self) -> None:
        pass

    def learn(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(x), y).backward()
        self.optimizer.step()


class Streaming(Learner):
    """With memfit."""

    native = False

    def prepare(self) -> None:
        technique = memfit.StreamingLowRank(rank=RANK, weight_range=1.0, factor_bits=None, native=self.native)
        memfit.convert_(self.model, technique)


class Native(Streaming):
    """With its C++ operator."""

    native = True


class OneByOne(Learner):
    """With the reference: each layer's input and output gradient are caught, and their terms added one by one."""

    def prepare(self) -> None:
        self.sums: dict[nn.Module, Any] = {}
        kind, generator = reference_class(), torch.Generator().manual_seed(0)
        for layer in self.model:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                rows, columns = layer.weight.flatten(1).shape
                self.sums[layer] = kind(rows, columns, RANK, True, generator)
                layer.weight.requires_grad_(False)
                layer.register_forward_hook(self.catch)

    def catch(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0].detach()

        def add(d: Tensor) -> None:
            if isinstance(layer, nn.Conv2d):
                patches = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)[0]  # type: ignore[arg-type]
                self.sums[layer].add(d[0].flatten(1), patches)
            else:
                self.sums[layer].add(d.t(), x.t())

        if output.requires_grad:
            output.register_hook(add)


def speed(rounds: int) -> dict[str, float]:
    """Median seconds of a sample; each round is one sample for the reference, and several for the others."""
    torch.set_num_threads(1)
    learners = {"dense": Learner(), "streaming": Streaming(), "native": Native(), "one_by_one": OneByOne()}
    generator = torch.Generator().manual_seed(1)
    taken: dict[str, list[float]] = {name: [] for name in learners}
    for number in range(rounds + 1):
        for name, learner in learners.items():
            for _ in range(1 if name == "one_by_one" else 10):
                x = torch.rand(1, 1, 28, 28, generator=generator)
                with torch.no_grad():
                    y = learner.model(x).argmin(1)
                started = perf_counter()
                learner.learn(x, y)
                if number:  # the first round warms up
                    taken[name].append(perf_counter() - started)
    return {name: statistics.median(each) for name, each in taken.items()}


# -- memory ------------------------------------------------------------------------------------------------------------


def memory(side: int, samples: int, bits: int | None) -> dict[str, Any]:
    layer = nn.Linear(side, side, bias=False)
    technique = memfit.StreamingLowRank(
        rank=RANK, block=BLOCK, period=10**9, weight_bits=None, bias_bits=None, factor_bits=bits
    )
    memfit.convert_(layer, technique)
    terms = next(module for module in layer.modules() if isinstance(module, KroneckerSum))
    d, a = torch.randn(samples, side), torch.randn(samples, side)
    terms.add_rows(d, a)
    tracemalloc.start()  # NumPy tells it of its arrays, in which small sums are computed
    terms.add_rows(d, a)
    in_numpy = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    with memfit.ledger(terms) as book:
        terms.add_rows(d, a)
    kept = sum(buffer.nbytes for buffer in terms.buffers())
    columns = RANK + min(samples, BLOCK)
    return {
        "side": side,
        "samples": samples,
        "factor_bits": bits or 32,
        "sums": kept,
        "allowed": RANK * 2 * side * (2 if bits else 4) + (8 if bits else 0),
        "workspace": book.peak.total - kept - d.nbytes - a.nbytes + in_numpy,
        "of_a_block": columns * 2 * side * 4,
        "documented": 4 * (4 * columns * 2 * side + 10 * columns**2) + PYTHON,
        "dense_gradient": side * side * 4,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="samples of the slow reference (default 60)")
    options = parser.parse_args()
    goals: list[tuple[str, bool]] = []

    print(
        f"{'shape':>10}{'rank':>6}{'additions':>14}{'distance':>10}{'normal':>8}{'error':>10}{'least':>10}{'biased':>10}"
    )
    estimators = [estimator(*shape, native) for native in (False, True) for shape in SHAPES]
    for row in estimators:
        shape, parts = "x".join(map(str, row["shape"])), ", ".join(map(str, row["additions"]))
        shape += "*" * row["native"]
        line = f"{shape:>10}{row['rank']:>6}{parts[:12]:>14}{row['largest_distance_in_standard_errors']:>10.2f}"
        line += f"{row['expected_of_normal_numbers']:>8.2f}{row['squared_error']:>10.5f}"
        if "least_squared_error" in row:
            line += f"{row['least_squared_error']:>10.5f}{row['biased_from_truncated_svd']:>10.1e}"
            goals.append(
                (
                    f"{shape}: the least error that is possible",
                    math.isclose(row["squared_error"], row["least_squared_error"], rel_tol=1e-3),
                )
            )
        print(line)
        far = row["largest_distance_in_standard_errors"]
        goals.append((f"{shape}: mean within 4 standard errors of the exact sum, everywhere", far <= 4))

    seconds = speed(options.rounds)
    for name, each in seconds.items():
        print(f"{name:12}{1000 * each:>9.2f} ms a sample{1 / each:>9.1f} samples/s")
    for way in ("streaming", "native"):
        ratio = seconds["one_by_one"] / seconds[way]
        words = f"{way}: {ratio:.0f} times the reference's samples per second (at least {SPEED_GOAL:g})"
        goals.append((words, ratio >= SPEED_GOAL))

    memories = [memory(side, samples, bits) for bits in (None, 16) for side in SIDES for samples in (1, 256)]
    print(f"{'side':>6}{'samples':>9}{'bits':>6}{'sums':>12}{'workspace':>12}{'a block':>12}{'dense':>12}")
    for row in memories:
        sizes = "".join(
            f"{format_bytes(row[key]):>12}" for key in ("sums", "workspace", "of_a_block", "dense_gradient")
        )
        print(f"{row['side']:>6}{row['samples']:>9}{row['factor_bits']:>6}{sizes}")
    goals.append(("r (n + m) words between samples", all(row["sums"] <= row["allowed"] for row in memories)))
    within = all(row["workspace"] <= row["documented"] for row in memories)
    goals.append(("a workspace of at most 4 q (n + m) + 10 q^2 words and 6 KB, q = r + block", within))
    for what, met in goals:
        print(f"  {'met' if met else 'MISSED':6} {what}")
    about = {
        "torch": torch.__version__,
        "threads": 1,
        "rank": RANK,
        "block": BLOCK,
        "draws": DRAWS,
        "system": f"{platform.system()} {platform.machine()}",
    }
    result = {"about": about, "estimator": estimators, "seconds_per_sample": seconds, "memory": memories}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
