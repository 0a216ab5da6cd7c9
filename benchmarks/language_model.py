"""A transformer learns tinyshakespeare's characters from scratch: how low does the loss get in equal steps, by method?

Three million parameters, pre-norm, embedding and head not tied. All methods get the same weights to start from, the
same batches, schedule (linear warm-up, cosine to a tenth) and grid of learning rates, and are quoted at their best by
the validation loss after the last step. Low-rank, GaLore and APOLLO train the blocks' matrices at rank width / 4 and
all else densely. Validation is on fixed windows of the text's last tenth.

Goals: low-rank at most GaLore's and APOLLO's loss at equal rank, and within 2 % of dense AdamW's.

    python benchmarks/language_model.py --text tinyshakespeare.txt [--methods adamw-fused low-rank galore apollo]
        [--lrs 5e-4 1.5e-3 5e-3 1.5e-2 5e-2] [--seeds 0 1 2] [--steps 500] [--jobs 2]

A method of memfit's takes arguments of `memfit.LowRankGradient` after a colon: `low-rank:basis=power,refresh=100`. Each
finished run is written at once, and a run that is there already is not run again: a stopped benchmark goes on. To study
one setting in Python, call `train(Options(text=..., low_rank={"basis": "power"}))`.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from memfit.errors import require
from methods import METHODS, Setting

RESULTS = Path(__file__).parent / "results" / "language_model.json"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "language-model.svg"
REFERENCE, PEERS = "adamw-fused", ("galore", "apollo")
VALIDATION_WINDOWS = 256


@dataclass(frozen=True)
class Options:
    """One run.

    Attributes:
        text: a file of plain text; its last tenth is for validation.
        method: a key of ``methods.METHODS``.
        low_rank: further arguments of ``memfit.LowRankGradient`` for memfit's methods.
        lr: the highest learning rate of the schedule.
        rank: of factors and projections; None for width / 4.
        validate_every: steps between validations; the last step is always validated. 0 for the last step alone.
        seed: of the weights and of the order of the batches.
    """

    text: Path
    method: str = "low-rank"
    low_rank: Mapping[str, Any] = field(default_factory=dict)
    lr: float = 3e-3
    seed: int = 0
    steps: int = 500
    validate_every: int = 100
    batch: int = 8
    context: int = 128
    width: int = 256
    layers: int = 4
    heads: int = 4
    rank: int | None = None


class Losses(NamedTuple):
    """Mean cross entropies in nats per character.

    ``training`` is every step's; ``validation`` has (step, loss) pairs, the last one after the last step. A run whose
    loss is no longer finite ends there, and its last validation loss is infinite.
    """

    training: list[float]
    validation: list[tuple[int, float]]

    @property
    def final(self) -> float:
        """The validation loss after the last step."""
        return self.validation[-1][1]


class Block(nn.Module):
    """Attention and MLP, each on the normed stream and added to it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.attended = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        split = self.queries_keys_values(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1)).transpose(1, 3)
        q, k, v = split.unbind(2)  # each (batch, heads, time, width of a head)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attended(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_mlp(x))))


class Transformer(nn.Module):
    """Tokens (batch, time) to logits (batch, time, tokens)."""

    def __init__(self, tokens: int, context: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.token = nn.Embedding(tokens, width)
        self.place = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, tokens, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # As GPT-2: what is added to the stream starts smaller, so that the stream does not grow with depth.
                added = name.endswith(("attended.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if added else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.place.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def in_blocks(name: str, module: nn.Module) -> bool:
    """The layers whose matrices the low-rank methods train as such."""
    return name.startswith("blocks.") and isinstance(module, nn.Linear)


def next_character(model: nn.Module, windows: Tensor) -> Tensor:
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


def load(text: Path) -> tuple[Tensor, Tensor, int]:
    """Characters as numbers: the first nine tenths, the last tenth, and how many different ones there are."""
    raw = text.read_text(encoding="utf-8")
    alphabet = {character: number for number, character in enumerate(sorted(set(raw)))}
    numbers = torch.tensor([alphabet[character] for character in raw])
    return (*numbers.tensor_split([len(numbers) * 9 // 10]), len(alphabet))


@torch.no_grad()
def validate(model: nn.Module, characters: Tensor, options: Options) -> float:
    """The mean loss on evenly spaced windows, the same for every run."""
    windows = characters.unfold(0, options.context + 1, 1)
    windows = windows[torch.linspace(0, len(windows) - 1, VALIDATION_WINDOWS).long()]
    return statistics.fmean(next_character(model, some).item() for some in windows.split(32))


def schedule(steps: int) -> Callable[[int], float]:
    """Up over the first tenth of the steps, then down a cosine to a tenth."""
    warm = max(1, steps // 10)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    return factor


def train(options: Options) -> Losses:
    """Train one model from scratch, on as many threads as torch is set to.

    Raises:
        CannotError: the method's package is not installed.
    """
    training, held_out, tokens = load(options.text)
    torch.manual_seed(options.seed)
    model: nn.Module = Transformer(tokens, options.context, options.width, options.layers, options.heads)
    rank = options.rank or options.width // 4
    setting = Setting(rank, options.lr, in_blocks, low_rank=tuple(options.low_rank.items()))
    model, optimizer = METHODS[options.method].build(model, setting)
    assert isinstance(optimizer, torch.optim.Optimizer)
    scheduler = LambdaLR(optimizer, schedule(options.steps))
    order = torch.Generator().manual_seed(options.seed)
    windows = training.unfold(0, options.context + 1, 1)
    losses = Losses([], [])
    for step in range(1, options.steps + 1):
        batch = windows[torch.randint(len(windows), (options.batch,), generator=order)]
        optimizer.zero_grad()
        loss = next_character(model, batch)
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.training.append(loss.item())
        if not math.isfinite(losses.training[-1]):
            losses.validation.append((step, math.inf))
            break
        due = options.validate_every and step % options.validate_every == 0
        if due or step == options.steps:
            losses.validation.append((step, validate(model, held_out, options)))
    if not math.isfinite(losses.final):
        losses.validation[-1] = (losses.validation[-1][0], math.inf)
    return losses


# -- the grid ------------------------------------------------------------------------------------------------------


def parse_method(label: str) -> tuple[str, dict[str, Any]]:
    """``"low-rank:basis=power,refresh=100"`` -> the method, and further arguments."""
    method, _, arguments = label.partition(":")
    if method not in METHODS or METHODS[method].compiles or "per-layer" in method:
        raise argparse.ArgumentTypeError(f"unknown method {method!r}")
    if arguments and not method.startswith("low-rank"):
        raise argparse.ArgumentTypeError(f"{method} takes no arguments")
    found: dict[str, Any] = {}
    for argument in arguments.split(",") if arguments else ():
        name, _, value = argument.partition("=")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):  # a word
            found[name] = value
    return method, found


def run(label: str, options: Options) -> dict[str, Any]:
    """One point of the grid, in a process of one thread."""
    torch.set_num_threads(1)
    started = time.process_time()
    losses = train(options)
    # JSON knows no infinity: a loss that is not finite is null.
    validation = [(step, loss if math.isfinite(loss) else None) for step, loss in losses.validation]
    return {
        "method": label,
        "lr": options.lr,
        "seed": options.seed,
        "net": net(options),
        "validation": validation,
        "training": [round(loss, 4) if math.isfinite(loss) else None for loss in losses.training],
        "cpu_seconds": time.process_time() - started,
    }


def net(options: Options) -> dict[str, int]:
    """What must be equal for two runs to be held against each other."""
    names = ("steps", "batch", "context", "width", "layers", "heads")
    return {**{name: getattr(options, name) for name in names}, "rank": options.rank or options.width // 4}


def final(run: dict[str, Any]) -> float:
    loss = run["validation"][-1][1]
    return math.inf if loss is None else loss


Runs = dict[tuple[str, float, int], dict[str, Any]]
"""By method, learning rate and seed."""


def on_seed(runs: Runs, label: str, seed: int) -> dict[float, float]:
    """Learning rate -> final loss, of what has run."""
    return {lr: final(run) for (method, lr, of), run in sorted(runs.items()) if (method, of) == (label, seed)}


def wanted(runs: Runs, label: str, lrs: list[float], seeds: list[int]) -> list[tuple[str, float, int]]:
    """What a method has to run next; nothing when it is done."""
    losses = on_seed(runs, label, seeds[0])
    if not losses:
        return [(label, lrs[len(lrs) // 2], seeds[0])]
    best = min(losses, key=losses.__getitem__)
    place = lrs.index(best)
    neighbours = [(label, lr, seeds[0]) for lr in lrs[max(0, place - 1) : place + 2] if lr not in losses]
    return neighbours or [(label, best, seed) for seed in seeds if (label, best, seed) not in runs]


def summarize(runs: Runs, labels: list[str], lrs: list[float], seeds: list[int]) -> dict[str, dict[str, Any]]:
    """Each method's losses on the first seed by learning rate, and over all seeds at the best of them."""
    summary = {}
    for label in labels:
        by_lr = on_seed(runs, label, seeds[0])
        best = min(by_lr, key=by_lr.__getitem__)
        at_best = [runs[label, best, seed] for seed in seeds]
        summary[label] = {
            "loss": statistics.fmean(map(final, at_best)),
            "losses": [loss if math.isfinite(loss := final(run)) else None for run in at_best],
            "best_lr": best,
            "at_edge_of_grid": len(lrs) > 1 and best in (min(lrs), max(lrs)),
            "loss_by_lr": {f"{lr:g}": loss if math.isfinite(loss) else None for lr, loss in by_lr.items()},
            "cpu_seconds": statistics.fmean(run["cpu_seconds"] for run in at_best),
            "curve": at_best[0]["validation"],
        }
    for row in summary.values():
        row.update(of_dense=row["loss"] / summary[REFERENCE]["loss"] if REFERENCE in summary else None)
    return summary


def show(summary: dict[str, dict[str, Any]], lrs: list[float]) -> None:
    print(f"{'validation loss':36}" + "".join(f"{lr:>9g}" for lr in lrs) + f"{'mean':>9}{'of dense':>10}{'CPU':>8}")
    for label, row in summary.items():
        losses = [row["loss_by_lr"].get(f"{lr:g}") or math.nan for lr in lrs]
        print(
            f"{label:36}"
            + "".join(f"{loss:>9.3f}" for loss in losses)
            + f"{row['loss']:>9.3f}{row['of_dense'] or math.nan:>10.3f}{row['cpu_seconds']:>6.0f} s"
            + ("  (best at the edge of the grid: widen --lrs)" if row["at_edge_of_grid"] else "")
        )
    for label in (label for label in summary if label.startswith("low-rank")):
        limits = {
            f"loss of {peer}'s": summary[label]["loss"] / summary[peer]["loss"] for peer in PEERS if peer in summary
        }
        goals = [(what, value, 1.0) for what, value in limits.items()]
        if REFERENCE in summary:
            goals.append(("loss of dense AdamW's", summary[label]["of_dense"], 1.02))
        for what, value, limit in goals:
            print(f"  {'met' if value <= limit else 'MISSED':6} {label}: {what} {value:.3f} (at most {limit:.2f})")


def draw(summary: dict[str, dict[str, Any]], picture: Path) -> None:
    """Validation loss over the steps, each method at its best learning rate."""
    pyplot = require("matplotlib.pyplot", extra="bench")
    figure, axes = pyplot.subplots(figsize=(7.2, 3.6), layout="constrained")
    for label, row in summary.items():
        steps, losses = zip(*((step, loss) for step, loss in row["curve"] if loss is not None), strict=True)
        axes.plot(steps, losses, marker="o", markersize=3, label=f"{label} ({row['best_lr']:g}): {row['loss']:.3f}")
    axes.set(xlabel="steps", ylabel="validation loss, nats per character")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    picture.parent.mkdir(exist_ok=True)
    figure.savefig(picture, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="tinyshakespeare.txt, or any other plain text")
    parser.add_argument(
        "--methods", nargs="+", default=[REFERENCE, "low-rank", "low-rank:basis=power", *PEERS], metavar="METHOD"
    )
    parser.add_argument("--lrs", nargs="+", type=float, default=[5e-4, 1.5e-3, 5e-3, 1.5e-2, 5e-2], metavar="LR")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--steps", type=int, default=Options.steps)
    parser.add_argument("--width", type=int, default=Options.width)
    parser.add_argument("--layers", type=int, default=Options.layers)
    parser.add_argument("--batch", type=int, default=Options.batch)
    parser.add_argument("--rank", type=int, help="default: width / 4")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each (default 2)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default benchmarks/results")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="default docs/images")
    arguments = parser.parse_args()

    def options(label: str, lr: float, seed: int) -> Options:
        method, low_rank = parse_method(label)
        return Options(
            text=arguments.text,
            method=method,
            low_rank=low_rank,
            lr=lr,
            seed=seed,
            steps=arguments.steps,
            validate_every=max(1, arguments.steps // 5),
            batch=arguments.batch,
            width=arguments.width,
            layers=arguments.layers,
            rank=arguments.rank,
        )

    lrs, seeds = sorted(arguments.lrs), arguments.seeds
    try:
        firsts = [options(label, lrs[0], 0) for label in arguments.methods]
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))
    wanted_net = net(firsts[0])
    arguments.results.parent.mkdir(exist_ok=True)
    written = json.loads(arguments.results.read_text()) if arguments.results.exists() else {"runs": []}
    runs: Runs = {(run["method"], run["lr"], run["seed"]): run for run in written["runs"] if run["net"] == wanted_net}
    with ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn")) as pool:
        running: dict[Any, str] = {}
        while True:
            idle = [label for label in arguments.methods if label not in running.values()]
            for point in (point for label in idle for point in wanted(runs, label, lrs, seeds)):
                running[pool.submit(run, point[0], options(*point))] = point[0]
            if not running:
                break
            finished = next(as_completed(running))
            del running[finished]
            result = finished.result()
            runs[result["method"], result["lr"], result["seed"]] = result
            written["runs"].append(result)
            arguments.results.write_text(json.dumps(written) + "\n")
            print(f"{result['method']} at {result['lr']:g}, seed {result['seed']}: {final(result):.4f}", flush=True)

    summary = summarize(runs, arguments.methods, lrs, seeds)
    written |= {"about": {**wanted_net, "torch": torch.__version__, "seeds": seeds}, "methods": summary}
    arguments.results.write_text(json.dumps(written) + "\n")
    show(summary, lrs)
    draw(summary, arguments.picture)


if __name__ == "__main__":
    main()
