"""How much faster is a filtered backward than the exact one, layer by layer?

Every distinct convolution of ResNet-18 and of MobileNetV2 at 224 x 224, and six more, each by itself: PyTorch's own
backward, memfit's with patches of 2, 4 and 7 (as it is, with the C++ operator, and with kernels as planes), and
the authors' public operator where its file is given, in turn in one process, a few calls at a time, each with the
channels first and with the channels last. Medians; of each, the better layout counts.

The time of a filtered backward is all that backward does, through autograd, and the pooling of the input that forward
does more. Forward is compared as a whole. The floor of any filtered backward is timed too: to read the input and the
output's gradient once, and to write the input's gradient once.

Goals: faster than exact on every layer from patches of 2 on, on depthwise layers at least 2 times; 10 times in
geometric mean on dense 3 x 3 layers with patches of 4; against the authors' operator, backward 2 times faster in
geometric mean with patches of 2 and 4 and slower on none, and forward not slower.

    python benchmarks/gradient_filter_layers.py [--peer .../GradientFilter-CVPR23] [--rounds 5]

The C++ operator needs a compiler and ninja.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import platform
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import memfit
from memfit.activations.gradient_filter import FilteredConv2d
from memfit.activations.patches import pool
from memfit.activations.plan import plan
from memfit.native import FILTERED, operator
from memfit.vision import models

RESULTS = Path(__file__).parent / "results" / "gradient_filter_layers.json"
PATCHES = (2, 4, 7)
BATCHES = (8, 1)
THREADS = (2, 1)
BLOCK = 3
OURS: dict[str, Callable[[int], memfit.GradientFilter]] = {
    "memfit": memfit.GradientFilter,
    "native": lambda patch: memfit.GradientFilter(patch, native=True),
    "planar": lambda patch: memfit.GradientFilter(patch, taps="planar"),
}
METHODS = (*OURS, "peer")
LAYOUTS = {"first": torch.contiguous_format, "last": torch.channels_last}


class Layer(NamedTuple):
    """A convolution and the size of its input map; whether the input needs a gradient."""

    inputs: int
    outputs: int
    kernel: int
    stride: int
    groups: int
    size: int
    inner: bool = True

    @property
    def title(self) -> str:
        kind = "depthwise" if self.is_depthwise else f"{self.inputs} to {self.outputs}"
        kind = f"{self.inputs} {kind}" if self.is_depthwise else kind
        stride = f", stride {self.stride}" if self.stride > 1 else ""
        return f"{kind}, {self.kernel} x {self.kernel}{stride}, {self.size} x {self.size}"

    @property
    def is_depthwise(self) -> bool:
        return self.groups > 1

    def make(self) -> nn.Conv2d:
        padding = self.kernel // 2
        return nn.Conv2d(self.inputs, self.outputs, self.kernel, self.stride, padding, groups=self.groups, bias=False)


NOTED = [
    Layer(64, 64, 3, 1, 1, 56),
    Layer(128, 128, 3, 1, 1, 28),
    Layer(256, 256, 3, 1, 1, 14),
    Layer(512, 512, 3, 1, 1, 7),
    Layer(96, 576, 1, 1, 1, 28),
    Layer(576, 576, 3, 1, 576, 14),
]


def layers_of(name: str) -> list[Layer]:
    """The distinct convolutions of a net of the zoo, in order, at 224 x 224."""
    found: dict[Layer, None] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        found[
            Layer(
                module.in_channels,
                module.out_channels,
                module.kernel_size[0],
                module.stride[0],
                module.groups,
                inputs[0].shape[2],
                inner=module.in_channels > 3,
            )
        ] = None

    model = getattr(models, name)(1000)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note)
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, 224, 224))
    return list(found)


class Variant(NamedTuple):
    """One way to compute a layer: forward, backward, and what of forward is the filter's."""

    forward: Callable[[], Tensor]
    backward: Callable[[], None]
    extra: Callable[[], object] | None


def variant(module: nn.Module, x: Tensor, g: Tensor) -> Variant:
    y = module(x)
    leaves = [each for each in (x, *module.parameters()) if each.requires_grad]

    def backward() -> None:
        for leaf in leaves:
            leaf.grad = None
        torch.autograd.backward(y, g, retain_graph=True)

    extra = None
    if isinstance(module, FilteredConv2d):
        technique: memfit.GradientFilter = module.technique  # type: ignore[assignment]
        patch, windows = (technique.patch, technique.patch), module._windows()
        sizes = ((x.shape[2], x.shape[3]), (y.shape[2], y.shape[3]))
        cuts = plan(*sizes, windows, patch, technique.taps).inputs
        pooled = x.detach()
        by = operator(FILTERED).pool if technique.native else None
        extra = lambda: pool(pooled, cuts) if by is None else by(pooled, *cuts)  # noqa: E731
    return Variant(lambda: module(x), backward, extra)


def variants(layer: Layer, batch: int, peer: Any) -> Iterator[tuple[tuple[str, int, str], Variant]]:
    """By method, patch (0: exact) and layout. All read the same input and the same gradient of the output."""
    torch.manual_seed(0)
    exact = layer.make()
    x = torch.randn(batch, layer.inputs, layer.size, layer.size)
    g = torch.randn_like(exact(x))
    for layout, memory_format in LAYOUTS.items():
        x = x.detach().contiguous(memory_format=memory_format).requires_grad_(layer.inner)
        g = g.contiguous(memory_format=memory_format)
        yield ("floor", 0, layout), Variant(lambda: None, floor(x, g, layer.inner), None)
        for method, patch in [("exact", 0), *((m, p) for p in PATCHES for m in METHODS)]:
            module: nn.Module = layer.make()
            module.load_state_dict(exact.state_dict())
            if method in OURS:
                memfit.convert_(module, OURS[method](patch), where="")
            elif method == "peer":
                if peer is None:
                    continue
                module = peer.wrap_conv_layer(module, patch, True)
            yield (method, patch, layout), variant(module.to(memory_format=memory_format), x, g)


def floor(x: Tensor, g: Tensor, inner: bool) -> Callable[[], None]:
    """What no filtered backward can do without."""
    x, g = x.detach(), g.detach()

    def call() -> None:
        x.sum()
        g.sum()
        if inner:
            torch.empty_like(x).fill_(1.0)

    return call


def block(call: Callable[[], object]) -> list[float]:
    """Seconds of calls in a row, without the first, which finds caches and free memory as another method left them."""
    seconds = []
    for _ in range(BLOCK + 1):
        started = perf_counter()
        result = call()
        seconds.append(perf_counter() - started)
        del result
    return seconds[1:]


def measure(layer: Layer, batch: int, rounds: int, peer: Any) -> dict[str, Any]:
    """Medians in milliseconds."""
    ways = dict(variants(layer, batch, peer))
    times: dict[tuple[str, int, str], dict[str, list[float]]] = {
        key: {part: [] for part in ("forward", "backward", "extra")} for key in ways
    }
    for _ in range(rounds):
        for key, way in ways.items():
            for part in ("forward", "backward", "extra"):
                call = getattr(way, part)
                if call is not None:
                    times[key][part] += block(call)
    median = {
        key: {part: statistics.median(seen) * 1e3 if seen else 0.0 for part, seen in parts.items()}
        for key, parts in times.items()
    }

    def best(method: str, patch: int, *parts: str) -> float:
        return min(sum(median[method, patch, layout][part] for part in parts) for layout in LAYOUTS)

    row: dict[str, Any] = {
        "layer": layer._asdict(),
        "title": layer.title,
        "batch": batch,
        "exact_backward_ms": best("exact", 0, "backward"),
        "exact_forward_ms": best("exact", 0, "forward"),
        "floor_ms": best("floor", 0, "backward"),
        "patches": {},
        "by_layout_ms": {"/".join(map(str, key)): parts for key, parts in median.items()},
    }
    for patch in PATCHES:
        entry = row["patches"][str(patch)] = {}
        for method in OURS:
            ours = best(method, patch, "backward", "extra")
            entry[method] = {"ms": ours, "speedup": row["exact_backward_ms"] / ours}
            if peer is not None:
                entry[method] |= {
                    "of_peer_backward": best("peer", patch, "backward") / best(method, patch, "backward"),
                    "of_peer_forward": best("peer", patch, "forward") / best(method, patch, "forward"),
                }
    return row


def geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(math.log(value) for value in values)) if values else math.nan


def summary(rows: list[dict[str, Any]], method: str) -> dict[str, Any]:
    """The goals' figures, of all rows."""
    out: dict[str, Any] = {}
    for patch in map(str, PATCHES):
        entries = [(row, row["patches"][patch][method]) for row in rows]

        def speedups(kind: Callable[[dict[str, Any]], bool], entries: Any = entries) -> list[float]:
            return [entry["speedup"] for row, entry in entries if kind(row["layer"])]

        kinds = {
            "dense_3x3": speedups(lambda layer: layer["kernel"] == 3 and layer["groups"] == 1),
            "1x1": speedups(lambda layer: layer["kernel"] == 1),
            "depthwise": speedups(lambda layer: layer["groups"] > 1),
        }
        floors = [row["exact_backward_ms"] / row["floor_ms"] for row, entry in entries if entry["speedup"] < 1]
        slowest, entry = min(entries, key=lambda each: each[1]["speedup"])
        out[patch] = {
            "rows": len(entries),
            "speedup": {kind: geometric_mean(seen) for kind, seen in kinds.items()},
            "least": {kind: min(seen, default=math.nan) for kind, seen in kinds.items()},
            "slower_than_exact": sum(entry["speedup"] < 1 for _, entry in entries),
            "floor_of_these": {"mean": geometric_mean(floors), "most": max(floors, default=math.nan)},
            "depthwise_below_2": [sum(each < 2 for each in kinds["depthwise"]), len(kinds["depthwise"])],
            "slowest": [slowest["title"], slowest["batch"], slowest["threads"], entry["speedup"]],
        }
        if "of_peer_backward" in entries[0][1]:
            for part in ("backward", "forward"):
                ratios = [entry[f"of_peer_{part}"] for _, entry in entries]
                out[patch][f"of_peer_{part}"] = {
                    "mean": geometric_mean(ratios),
                    "least": min(ratios),
                    "below_1": sum(each < 1 for each in ratios),
                }
    return out


def load_peer(folder: Path) -> Any:
    path = folder / "classification" / "custom_op" / "conv_avg.py"
    spec = importlib.util.spec_from_file_location("conv_avg", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peer", type=Path, help="a checkout of the authors' repository")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--nets", nargs="*", default=["noted", "resnet18", "mobilenet_v2"])
    parser.add_argument("--threads", type=int, nargs="*", default=THREADS)
    parser.add_argument("--batches", type=int, nargs="*", default=BATCHES)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    peer = None if options.peer is None else load_peer(options.peer)
    layers: dict[Layer, str] = {}
    for net in reversed(options.nets):
        layers.update(dict.fromkeys(NOTED if net == "noted" else layers_of(net), net))
    rows = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for layer, net in layers.items():
            for batch in options.batches:
                row = {"net": net, "threads": threads, **measure(layer, batch, options.rounds, peer)}
                rows.append(row)
                told = "  ".join(
                    f"p={p} {' '.join(format(entry[method]['speedup'], '5.1f') for method in OURS)}"
                    for p, entry in row["patches"].items()
                )
                exact = row["exact_backward_ms"]
                print(f"{net:13}{layer.title:42} batch {batch} threads {threads} {exact:8.2f} ms {told}", flush=True)
    figures = {method: summary(rows, method) for method in OURS}
    print(json.dumps(figures, indent=1))
    options.out.write_text(
        json.dumps(
            {
                "machine": {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__},
                "rounds": options.rounds,
                "summary": figures,
                "rows": rows,
            },
            indent=1,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
