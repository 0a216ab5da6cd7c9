"""One of two processes that train with FSDP2's fully_shard; prints what it found as JSON.

Run as ``python fsdp_worker.py RANK INIT_METHOD``, by test_fsdp.py.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import memfit

STEPS = 5
TOKENS, WIDTH, LENGTH = 11, 24, 6

# Each is (kind of the model, settings of the technique, micro-batches per step).
RUNS: dict[str, tuple[str, dict[str, Any], int]] = {
    "linear": ("linear", {}, 2),
    "linear, refresh": ("linear", {"refresh": 2}, 1),
    "linear, left, refresh": ("linear", {"sides": "left", "refresh": 2}, 1),
    "linear, power": ("linear", {"refresh": 2, "basis": "power"}, 1),
    "convolution, refresh": ("convolution", {"refresh": 2}, 1),
    "transformer, power": ("transformer", {"refresh": 2, "basis": "power"}, 2),
    "transformer, left": ("transformer", {"sides": "left"}, 1),
    "lstm, refresh": ("lstm", {"refresh": 2}, 1),
    "lstm, left, rematerialized": ("lstm", {"sides": "left", "rematerialize": True}, 2),
}


class Block(nn.Module):
    """Attention and a feed-forward layer, with residuals that are added in place."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, dim=-1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        y = self.down(F.gelu(self.up(x)))
        y += x
        return y


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, TOKENS)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Stack(nn.Module):
    """A layer between two Linear ones, of sizes that two processes cannot halve."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.first = nn.Linear(WIDTH, 21)
        self.middle = middle
        self.last = nn.Linear(19, TOKENS)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.first(self.embed(tokens)))
        if isinstance(self.middle, nn.Conv1d):
            x = self.middle(F.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2)
        else:
            x = self.middle(x)
        return self.last(torch.tanh(x[0] if isinstance(x, tuple) else x))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: Stack(nn.Linear(21, 19)),
    "convolution": lambda: Stack(nn.Conv1d(21, 19, 3)),
    "lstm": lambda: Stack(nn.LSTM(21, 19, batch_first=True)),
    "transformer": Transformer,
}


def build(kind: str, settings: dict[str, Any] | None) -> nn.Module:
    """A model in float64, the same in every process; dense where there are no settings."""
    torch.manual_seed(0)
    model = MODELS[kind]().double()
    if settings is None:
        return model
    return memfit.convert_(model, memfit.LowRankGradient(rank=3, **settings))


def shard(model: nn.Module, **arguments: Any) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    inner = list(model.blocks) if isinstance(model, Transformer) else [model.first, model.middle, model.last]
    for module in inner:
        fully_shard(module, mesh=mesh, **arguments)
    return fully_shard(model, mesh=mesh, **arguments)


class Traffic(TorchDispatchMode):
    """Adds up the bytes that this process hands to each kind of collective, and notes the ranks of DTensors' own."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            # The second argument is what is sent, the first where it arrives.
            sent = sum(leaf.nbytes for leaf in tree_leaves(args[1]) if isinstance(leaf, Tensor))
            self.bytes[func.overloadpacket.__name__.strip("_")] += sent
        return func(*args, **(kwargs or {}))


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def train(
    model: nn.Module,
    tokens: Tensor,
    micro_batches: int = 1,
    optimizer: torch.optim.Optimizer | None = None,
    steps: int = STEPS,
) -> Counter[str]:
    """Some steps of next-token prediction; returns the bytes of the last forward and backward's collectives."""
    optimizer = optimizer or optimizer_of(model)
    parts = tokens.chunk(micro_batches)
    for _ in range(steps):
        optimizer.zero_grad()
        with Traffic() as traffic:
            for index, part in enumerate(parts):
                if micro_batches > 1 and hasattr(model, "set_requires_gradient_sync"):
                    model.set_requires_gradient_sync(index + 1 == len(parts))
                out = model(part[:, :-1])
                (F.cross_entropy(out.flatten(0, 1), part[:, 1:].flatten()) / len(parts)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return traffic.bytes


def full(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}


def difference(state: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The largest one of two states with the same keys."""
    assert list(state) == list(other)
    return max((state[name] - other[name]).abs().max().item() for name in state)


def refusal(act: Callable[[], object]) -> str:
    try:
        act()
    except memfit.MemfitError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def compare(kind: str, settings: dict[str, Any], tokens: Tensor, rank: int, micro_batches: int) -> dict[str, Any]:
    """Sharded training on half of the batch each against one process on all of it."""
    alone, dense = build(kind, settings), build(kind, None)
    train(alone, tokens)
    expected = memfit.state_dict(alone)
    sharded = shard(build(kind, settings))
    traffic = train(sharded, tokens.chunk(2)[rank], micro_batches)
    with torch.no_grad():
        sharded(tokens)  # after which the outermost layers' parameters are still gathered
    found = full(memfit.state_dict(sharded))
    moved = difference(found, dense.state_dict())
    dense.load_state_dict(found)
    return {
        "difference": difference(found, expected),
        "moved": moved,
        "sharded": all(isinstance(p, DTensor) for p in sharded.parameters()),
        "traffic": dict(traffic),
        "trained numbers": sum(p.numel() for p in alone.parameters() if p.requires_grad),
    }


def resume(tokens: Tensor) -> dict[str, float]:
    """A run that goes over to another model and optimizer in the middle, by the state that torch's checkpoints take."""
    settings = {"refresh": 2}
    straight = shard(build("transformer", settings))
    train(straight, tokens)
    first = shard(build("transformer", settings))
    optimizer = optimizer_of(first)
    train(first, tokens, optimizer=optimizer, steps=3)
    whole = dcp.StateDictOptions(full_state_dict=True)
    model_state, optimizer_state = dcp.get_state_dict(first, optimizer)
    second = shard(build("transformer", settings))
    other = optimizer_of(second)
    dcp.set_state_dict(second, other, model_state_dict=model_state, optim_state_dict=optimizer_state)
    train(second, tokens, optimizer=other, steps=STEPS - 3)
    expected = memfit.state_dict(straight)
    gathered = build("transformer", settings)
    gathered.load_state_dict(dcp.get_model_state_dict(second, options=whole))
    return {
        "resumed": difference(full(memfit.state_dict(second)), full(expected)),
        "gathered": difference(memfit.state_dict(gathered), full(expected)),
    }


def mixed_precision(tokens: Tensor) -> dict[str, Any]:
    """bfloat16 in forward and backward, float32 in what is sharded and trained."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = shard(build("transformer", {}).float(), mp_policy=policy)

    def loss() -> float:
        out = model(tokens[:, :-1]).float()
        return F.cross_entropy(out.flatten(0, 1), tokens[:, 1:].flatten()).item()

    before = loss()
    train(model, tokens, steps=12)
    after = loss()
    return {
        "before": before,
        "after": after,
        "dtypes": sorted({str(v.dtype) for v in memfit.state_dict(model).values()}),
    }


def account(tokens: Tensor) -> dict[str, int]:
    """The ledger of a sharded model's step: bytes of the weights at the start, and what they should be."""
    model = shard(build("linear", {}))
    optimizer = optimizer_of(model)
    with memfit.ledger(model, optimizer) as book:
        train(model, tokens, optimizer=optimizer, steps=1)
    own = sum(p.to_local().nbytes for p in model.parameters() if isinstance(p, DTensor))
    return {"weights": book.timeline[0].lines.weights, "own": own, "all": sum(p.nbytes for p in model.parameters())}


def main() -> None:
    # A view as a layer's output: fully_shard would miss its backward after an in-place op of the user's.
    warnings.filterwarnings("error", message=r".*FSDPLowRankLinear\) returned a view")
    rank, method = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=2)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(TOKENS, (8, LENGTH), generator=generator)
    found: dict[str, Any] = {}
    for name, (kind, settings, micro_batches) in RUNS.items():
        found[name] = compare(kind, settings, tokens, rank, micro_batches)
    for kind in MODELS:
        dense = shard(build(kind, None))
        found[f"dense {kind}"] = {"traffic": dict(train(dense, tokens.chunk(2)[rank]))}
    found["resume"] = resume(tokens.chunk(2)[rank])
    found["mixed precision"] = mixed_precision(tokens.chunk(2)[rank])
    found["account"] = account(tokens.chunk(2)[rank])
    found["convert_"] = refusal(lambda: memfit.convert_(shard(build("linear", None)), memfit.LowRankGradient(rank=2)))
    found["restore_"] = refusal(lambda: memfit.restore_(shard(build("linear", {}))))
    print(json.dumps(found), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
