"""One of two processes that train with DistributedDataParallel; prints what it found as JSON.

Run as ``python ddp_worker.py RANK INIT_METHOD``, by test_data_parallel.py.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import memfit

STEPS = 5

# Each is (kind of the model, settings of the technique, arguments of DistributedDataParallel, micro-batches per step).
RUNS: dict[str, tuple[str, dict[str, Any], dict[str, Any], int]] = {
    "both": ("linear", {}, {}, 1),
    "both, refresh": ("linear", {"refresh": 2}, {}, 1),
    "both, refresh, micro-batches": ("linear", {"refresh": 2}, {}, 2),
    "both, refresh, in the buckets": ("linear", {"refresh": 2}, {"gradient_as_bucket_view": True}, 1),
    "both, power, micro-batches": ("linear", {"refresh": 2, "basis": "power"}, {}, 2),
    "left": ("linear", {"sides": "left"}, {}, 1),
    "left, refresh, micro-batches": ("linear", {"sides": "left", "refresh": 2}, {}, 2),
    "lstm, refresh": ("lstm", {"refresh": 2}, {"static_graph": True}, 1),
    "lstm, left, micro-batches": ("lstm", {"sides": "left"}, {}, 2),
}


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(24, 20, batch_first=True)
        self.head = nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x.unflatten(1, (2, 24)))[0][:, -1])


def build(kind: str, settings: dict[str, Any] | None) -> nn.Module:
    """A model in float64, the same in every process; dense where there are no settings."""
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Linear(48, 40), nn.BatchNorm1d(40).eval(), nn.Tanh(), nn.Linear(40, 10))
    model = (linear if kind == "linear" else Recurrent()).double()
    return model if settings is None else memfit.convert_(model, memfit.LowRankGradient(rank=2, **settings))


class Traffic(TorchDispatchMode):
    """Adds up the bytes that this process hands to each kind of collective."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            sent = sum(leaf.nbytes for leaf in tree_leaves(args[0]) if isinstance(leaf, Tensor))
            self.bytes[func.overloadpacket.__name__.strip("_")] += sent
        return func(*args, **(kwargs or {}))


def train(model: nn.Module, x: Tensor, y: Tensor, micro_batches: int = 1) -> Counter[str]:
    """Some steps of Adam; returns the bytes of the last step's collectives."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    parts = list(zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True))
    for _ in range(STEPS):
        optimizer.zero_grad()
        with Traffic() as traffic:
            for index, (part_x, part_y) in enumerate(parts):
                waits = index + 1 < len(parts) and isinstance(model, DistributedDataParallel)
                with model.no_sync() if waits else contextlib.nullcontext():
                    (nn.functional.mse_loss(model(part_x), part_y) / len(parts)).backward()
        optimizer.step()
    return traffic.bytes


def same_everywhere(model: nn.Module) -> bool:
    """Whether all processes have the same bits."""
    mine = torch.cat([p.detach().flatten() for p in model.parameters()])
    theirs = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(theirs, mine)
    return all(torch.equal(other, mine) for other in theirs)


def difference(model: nn.Module, other: nn.Module) -> float:
    """The largest one of two models' weights in force."""
    pairs = zip(memfit.state_dict(model).values(), memfit.state_dict(other).values(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def main() -> None:
    rank, method = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=2)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, 48, generator=generator).double()
    y = torch.randn(16, 10, generator=generator).double()
    own_x, own_y = x.chunk(2)[rank], y.chunk(2)[rank]
    found: dict[str, Any] = {}
    for name, (kind, settings, arguments, micro_batches) in RUNS.items():
        alone, replica, dense = build(kind, settings), build(kind, settings), build(kind, None)
        train(alone, x, y)
        traffic = train(DistributedDataParallel(replica, **arguments), own_x, own_y, micro_batches)
        found[name] = {
            "difference": difference(replica, alone),
            "moved": difference(replica, dense),
            "same everywhere": same_everywhere(replica),
            "traffic": dict(traffic),
            "trained bytes": sum(p.nbytes for p in replica.parameters() if p.requires_grad),
            "buffer bytes": sum(buffer.nbytes for buffer in replica.buffers()),
        }
    for kind in ("linear", "lstm"):
        dense = build(kind, None)
        found[f"dense {kind}"] = {"traffic": dict(train(DistributedDataParallel(dense), own_x, own_y))}

    replica = build("linear", {})
    wrapped = DistributedDataParallel(replica)
    inner, outer = memfit.state_dict(replica), memfit.state_dict(wrapped)
    found["prefixed keys"] = list(outer) == [f"module.{name}" for name in inner]
    build("linear", None).load_state_dict(inner)
    try:
        memfit.convert_(wrapped, memfit.LowRankGradient(rank=2))
    except memfit.ConversionError as error:
        found["refusal"] = str(error)
    print(json.dumps(found), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
