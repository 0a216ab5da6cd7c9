"""Does fine-tuning with a gradient filter lose accuracy, and what does it save in time and memory?

CIFAR-10's subset in two halves: a ResNet-18 and a MobileNetV2 of half the width learn one at 80 x 80 and at last
160 x 160. Then their last four convolutions with their batch norms (layer4 of the one, the last inverted residual and
the convolution after it of the other, as in the paper) and the head are fine-tuned at 224 x 224 on 3,000 images of the
other half: exactly, with patches of 2, 4 and 7, and with kernels that count as planes or whole, also with some images
exact for the weights. All else is frozen and batch norms stand still, as in the paper. The halves are of the
classes, with a new head for the other five, or of the images, with the head as it is: new tasks, and new data of the
same. The learning rate of each method is the best of a grid of whole runs on a seed of its own; then three seeds.

Cosines of filtered gradients to the exact ones are those of the last convolutions, after an epoch of fine-tuning.

Time of a training step and memory are of the nets in full width at 224 x 224, the channels last: methods in turn in one
process, medians; the process's peak in a fresh process for each, and the ledger of the same step.

Goals: with patches of 2 at most 1 % less accurate (absolute) than exact fine-tuning; a step at least 2 times faster
where the backward dominates.

    python benchmarks/gradient_filter_finetune.py --data .../cifar10-subset.npz --work DIR [--only steps memory]
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memfit
from cifar_halves import BATCH, LAST, NETS, WIDTH, Images, Net, accuracy, features, halves, load_data, pretrained
from memfit.activations.plan import Taps
from memfit.vision.filter_scan import filter_scan

RESULTS = Path(__file__).parent / "results" / "gradient_filter_finetune.json"
PATCHES = (0, 2, 4, 7)  # 0: exact
METHODS: dict[str, memfit.GradientFilter | None] = {
    "exact": None,
    "2": memfit.GradientFilter(2),
    "4": memfit.GradientFilter(4),
    "7": memfit.GradientFilter(7),
    "2 planar": memfit.GradientFilter(2, taps="planar"),
    "2 apart": memfit.GradientFilter(2, taps="apart"),
    "2 planar, exact every 4": memfit.GradientFilter(2, taps="planar", exact_every=4),
    "2 planar, exact every 3": memfit.GradientFilter(2, taps="planar", exact_every=3),
    "2 planar, exact every 2": memfit.GradientFilter(2, taps="planar", exact_every=2),
    "4 planar, exact every 4": memfit.GradientFilter(4, taps="planar", exact_every=4),
    "7 planar, exact every 4": memfit.GradientFilter(7, taps="planar", exact_every=4),
}
SPLITS = ("classes", "images")
RATES = {"classes": (0.03, 0.1, 0.3), "images": (0.003, 0.01, 0.03)}
SEEDS = (0, 1, 2)
GRID_SEED = 100
EPOCHS, IMAGES = 6, 3000  # images to fine-tune on


def tune(
    net: Net, state: dict[str, Tensor], train: Images, test: Images, method: str, rate: float, seed: int, epochs: int
) -> float:
    """Accuracy after fine-tuning the last convolutions and the head on the frozen part's features."""
    torch.manual_seed(seed)
    model = net.build(int(train.y.max()) + 1, WIDTH)
    own = model.state_dict()
    fresh = {name: each for name, each in own.items() if name not in state}
    model.load_state_dict({**state, **fresh})
    _, tail = net.split(model.to(memory_format=LAST))
    technique = METHODS[method]
    if technique is not None:
        memfit.convert_(tail, technique)
    steps_per_epoch = len(train.y) // BATCH
    optimizer = torch.optim.SGD(tail.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps_per_epoch)
    for _ in range(epochs):
        tail.train()
        for each in tail.modules():
            if isinstance(each, nn.BatchNorm2d):
                each.eval()
        for picked in torch.randperm(len(train.y))[: steps_per_epoch * BATCH].split(BATCH):
            optimizer.zero_grad()
            loss = F.cross_entropy(tail(train.x[picked].contiguous(memory_format=LAST)), train.y[picked])
            loss.backward()
            nn.utils.clip_grad_norm_(tail.parameters(), 2.0)
            optimizer.step()
            scheduler.step()
            if not math.isfinite(loss.item()):
                return 0.0
    return accuracy(tail, test.x, test.y, None)


def measure_gradients(net: Net, data: Path, work: Path) -> dict[str, Any]:
    """Cosines of each of the last convolutions' filtered gradients to the exact ones, after an epoch of fine-tuning."""
    train, test = load_data(data)
    (first, second), (first_test, _) = halves("classes", train, False), halves("classes", test, True)
    model, _ = pretrained(net, "classes", first, first_test, work)
    frozen, tail = net.split(model.eval())
    some = Images(features(frozen, second.x[:IMAGES]), second.y[:IMAGES])
    torch.manual_seed(0)
    cast("Any", tail[-1] if net.name == "resnet18" else tail[-1][-1]).reset_parameters()  # other classes
    optimizer = torch.optim.SGD(tail.parameters(), lr=0.03, momentum=0.9)
    for picked in torch.randperm(IMAGES).split(BATCH):
        optimizer.zero_grad()
        F.cross_entropy(tail(some.x[picked].contiguous(memory_format=LAST)), some.y[picked]).backward()
        nn.utils.clip_grad_norm_(tail.parameters(), 2.0)
        optimizer.step()
    batch = (some.x[:BATCH].contiguous(memory_format=LAST), some.y[:BATCH])
    report: dict[str, Any] = {}
    for taps in get_args(Taps):
        scan = filter_scan(tail, batch, lambda m, b: F.cross_entropy(m(b[0]), b[1]), PATCHES[1:], rounds=1, taps=taps)
        report[taps] = {
            layer.name: {
                str(each.patch): {
                    "weight": each.weight and each.weight.cosine,
                    "input": each.input and each.input.cosine,
                }
                for each in layer.filtered
            }
            for layer in scan.layers
        }
        print(net.name, taps, json.dumps(report[taps]), flush=True)
    return report


def measure_accuracy(
    net: Net,
    split: str,
    methods: Sequence[str],
    data: Path,
    work: Path,
    report: dict[str, Any],
    keep: Callable[[], None],
) -> None:
    """Put each method's accuracies into the report, and keep that after each."""
    train, test = load_data(data)
    (first, second), (first_test, second_test) = halves(split, train, False), halves(split, test, True)
    model, before = pretrained(net, split, first, first_test, work)
    print(f"{net.name}, {split}: {before:.4f} on the half of its own", flush=True)
    state = {
        name: each.clone()
        for name, each in model.state_dict().items()
        if split == "images" or not name.startswith(net.head.partition(".")[0])
    }
    frozen, _ = net.split(model)
    some = Images(*(each[:IMAGES] for each in second))
    parts = [Images(features(frozen, each.x), each.y) for each in (some, second_test)]
    report |= {"pretrained_accuracy": before, "train": len(parts[0].y), "test": len(parts[1].y)}
    rows = report.setdefault("methods", {})
    for method in methods:
        grid = {rate: tune(net, state, *parts, method, rate, GRID_SEED, EPOCHS) for rate in RATES[split]}
        best = max(grid, key=lambda rate: grid[rate])
        seeds = [tune(net, state, *parts, method, best, seed, EPOCHS) for seed in SEEDS]
        rows[method] = {
            "grid": {str(rate): value for rate, value in grid.items()},
            "rate": best,
            "accuracies": seeds,
            "mean": statistics.fmean(seeds),
        }
        for each in rows.values():
            each["loss_against_exact"] = rows["exact"]["mean"] - each["mean"] if "exact" in rows else None
        print(f"{net.name}, {split}, {method}: rate {best}, {[round(each, 4) for each in seeds]}", flush=True)
        keep()


def training(
    net: Net, trains: Sequence[str] | None, technique: memfit.GradientFilter | None, batch: int
) -> tuple[nn.Module, Callable[[], None]]:
    """A net in full width at 224 x 224 and its training step; ``trains`` None: everything, filtered from there on."""
    torch.manual_seed(0)
    model = net.build(10, 1.0).to(memory_format=LAST)
    chosen = net.last if trains is None else trains
    if trains is not None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith((*(f"{each}." for each in trains), net.head)))
    model.train()
    for each in model.modules():
        if isinstance(each, nn.BatchNorm2d):
            each.eval()
    if technique is not None:
        where = "*" if trains is None else [f"{name}.*" for name in chosen]
        memfit.convert_(model, technique, where=where)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4, momentum=0.9)
    x = torch.randn(batch, 3, 224, 224).contiguous(memory_format=LAST)
    y = torch.randint(0, 10, (batch,))

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    step.optimizer = optimizer  # type: ignore[attr-defined]
    step.forward = lambda: model(x)  # type: ignore[attr-defined]
    return model, step


def measure_steps(net: Net, rounds: int, batch: int) -> dict[str, Any]:
    """Seconds of a step and of its forward: for the last four convolutions, these on stored features, and all."""
    report: dict[str, Any] = {"batch": batch}
    for what, trains in (("last four convolutions", net.last), ("all layers", None)):
        steps = {method: training(net, trains, technique, batch)[1] for method, technique in METHODS.items()}
        report[what] = _in_turn(steps, rounds)
    report["last four convolutions on stored features"] = _in_turn(
        {method: _on_features(net, technique, batch) for method, technique in METHODS.items()}, rounds
    )
    for what, row in report.items():
        if isinstance(row, dict):
            print(net.name, what, {method: round(each["speedup"], 2) for method, each in row.items()}, flush=True)
    return report


def _on_features(net: Net, technique: memfit.GradientFilter | None, batch: int) -> Callable[[], None]:
    torch.manual_seed(0)
    model = net.build(10, 1.0).to(memory_format=LAST).eval()
    frozen, tail = net.split(model)
    with torch.no_grad():
        stored = frozen(torch.randn(batch, 3, 224, 224).contiguous(memory_format=LAST))
    y = torch.randint(0, 10, (batch,))
    if technique is not None:
        memfit.convert_(tail, technique)
    optimizer = torch.optim.SGD(tail.parameters(), lr=1e-4, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(tail(stored), y).backward()
        optimizer.step()

    step.forward = lambda: tail(stored)  # type: ignore[attr-defined]
    return step


def _in_turn(steps: dict[str, Any], rounds: int) -> dict[str, dict[str, float]]:
    seconds: dict[str, list[float]] = {method: [] for method in steps}
    forward: dict[str, list[float]] = {method: [] for method in steps}
    for turn in range(-1, rounds):
        for method, step in steps.items():
            for call, seen in ((step, seconds[method]), (step.forward, forward[method])):
                started = perf_counter()
                result = call()
                if turn >= 0:
                    seen.append(perf_counter() - started)
                del result
    exact = statistics.median(seconds["exact"])
    return {
        method: {
            "step_s": statistics.median(seen),
            "forward_s": statistics.median(forward[method]),
            "speedup": exact / statistics.median(seen),
            "bound_by_forward": exact / statistics.median(forward[method]),
        }
        for method, seen in seconds.items()
    }


def measure_memory_here(net: Net, everything: bool, patch: int, batch: int) -> dict[str, Any]:
    """The peak of a step's process, and the ledger of the step, in this very process."""
    trains = None if everything else net.last
    memfit.release_freed_memory()  # as memfit.fit does
    technique = memfit.GradientFilter(patch) if patch else None
    _, small = training(net, trains, technique, 1)
    small()  # loads the libraries' code
    model, step = training(net, trains, technique, batch)
    with memfit.process_peak() as process:
        for _ in range(2):
            step()
    with memfit.ledger(model, step.optimizer) as book:  # type: ignore[attr-defined]
        step()
    return {"process_growth": process.growth, "ledger": book.peak.to_dict(), "kept": kept_bytes(model, net, batch)}


def kept_bytes(model: nn.Module, net: Net, batch: int) -> int:
    """Bytes that autograd keeps for each of the last convolutions by itself, without their parameters."""
    total = 0
    chosen = [m for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and name.startswith(net.last)]
    handles = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal total
        seen: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, nn.Parameter):
                seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = inputs[0].detach().requires_grad_(True)
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            type(module).forward(module, x)
        total += sum(seen.values())

    for module in chosen:
        handles.append(module.register_forward_pre_hook(note))
    with torch.no_grad():
        model(torch.randn(batch, 3, 224, 224).contiguous(memory_format=LAST))
    for handle in handles:
        handle.remove()
    return total


def measure_memory(net: Net, batch: int) -> dict[str, Any]:
    report: dict[str, Any] = {"batch": batch}
    for what in ("last four convolutions", "all layers"):
        rows = report[what] = {}
        for patch in PATCHES:
            command = [sys.executable, __file__, "--memory-of", net.name, what, str(patch), str(batch)]
            rows[str(patch)] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        exact = rows["0"]
        for patch, each in rows.items():
            each["kept_less"] = 1 - each["kept"] / exact["kept"]
            each["activations_of_exact"] = each["ledger"]["activations"] / exact["ledger"]["activations"]
            each["process_of_exact"] = each["process_growth"] / exact["process_growth"]
            print(net.name, what, "patch", patch, {k: v for k, v in each.items() if isinstance(v, float)}, flush=True)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, help="cifar10-subset.npz")
    parser.add_argument("--work", type=Path, help="folder for the pretrained nets")
    parser.add_argument("--nets", nargs="*", default=list(NETS))
    parser.add_argument("--only", nargs="*", default=["steps", "memory", "gradients", "accuracy"])
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS, help="whose accuracy")
    parser.add_argument("--split", nargs="*", default=list(SPLITS), choices=SPLITS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--memory-of", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.memory_of:
        name, what, patch, batch = options.memory_of
        print(json.dumps(measure_memory_here(NETS[name], what == "all layers", int(patch), int(batch))))
        return
    report = json.loads(options.out.read_text()) if options.out.exists() else {}

    def keep() -> None:
        options.out.write_text(json.dumps(report, indent=1) + "\n")

    report["machine"] = {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__}
    report["threads"] = torch.get_num_threads()
    for name in options.nets:
        net, row = NETS[name], report.setdefault(name, {})
        if "steps" in options.only:
            row["steps"] = measure_steps(net, options.rounds, options.batch)
        if "memory" in options.only:
            row["memory"] = measure_memory(net, options.batch)
        if "gradients" in options.only:
            row["gradients"] = measure_gradients(net, options.data, options.work)
        if "accuracy" in options.only:
            for split in options.split:
                found = row.setdefault("accuracy", {}).setdefault(split, {})
                measure_accuracy(net, split, options.methods, options.data, options.work, found, keep)
        keep()


if __name__ == "__main__":
    main()
