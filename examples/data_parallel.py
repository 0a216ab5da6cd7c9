"""Data-parallel training with low-rank gradients: the processes exchange the gradients of factors alone.

    python examples/data_parallel.py                                        # two processes on this machine's CPU
    torchrun --nproc-per-node 4 examples/data_parallel.py                   # or as many as you like, as with any script
    torchrun --nproc-per-node 2 examples/data_parallel.py --shard           # fully_shard (FSDP2) in place of DDP

The data are made up on the spot; each process has its own share of them.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import subprocess
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import memfit

FEATURES, WIDTH, CLASSES = 256, 512, 32


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(FEATURES, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, CLASSES)
    )


def share_of_the_data(seed: int, count: int = 2000) -> tuple[Tensor, Tensor]:
    patterns = torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    noise = torch.randn(count, FEATURES, generator=generator)
    return torch.tanh(patterns[labels] + 2.5 * noise), labels


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small network in several processes.")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--accumulate", type=int, default=2, help="micro-batches per step and process")
    parser.add_argument("--shard", action="store_true", help="shard weights, factors and states over the processes")
    parser.add_argument("--save", default="model.pt", help="where the trained weights go")
    arguments = parser.parse_args()
    if "RANK" not in os.environ:  # not started by torchrun: do as it does
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        sys.exit(subprocess.call([*torchrun, *sys.argv]))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    train(arguments)  # a function of its own: a wrapped model that outlives its process group can hang at exit,
    gc.collect()  # and fully_shard's live on until they are collected
    dist.destroy_process_group()


def train(arguments: argparse.Namespace) -> None:
    rank, processes = dist.get_rank(), dist.get_world_size()

    # Convert first, wrap second, make the optimizer last. The bases come from the seed: the same in all processes.
    model = memfit.convert_(build(), memfit.LowRankGradient(rank=arguments.rank, refresh=50))
    wrapped: nn.Module
    if arguments.shard:
        mesh = init_device_mesh("cpu", (processes,))
        for layer in model.children():
            if isinstance(layer, nn.Linear):  # which a converted layer still is
                fully_shard(layer, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    else:
        wrapped = DistributedDataParallel(model)
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=3e-3)
    if rank == 0:
        dense = sum(p.nbytes for p in build().parameters())
        print(f"reduces {sum(p.nbytes for p in trained):,} bytes per step in place of {dense:,}")

    def reducing(last: bool) -> contextlib.AbstractContextManager[None]:
        """Gradients are reduced at the last micro-batch of a step only."""
        if isinstance(wrapped, DistributedDataParallel):
            return contextlib.nullcontext() if last else wrapped.no_sync()
        wrapped.set_requires_gradient_sync(last)  # type: ignore[operator]
        return contextlib.nullcontext()

    x, labels = share_of_the_data(seed=1 + rank)
    order = torch.Generator().manual_seed(rank)
    for number in range(1, arguments.steps + 1):
        optimizer.zero_grad()
        for part in range(arguments.accumulate):
            chosen = torch.randint(len(x), (32,), generator=order)
            with reducing(part + 1 == arguments.accumulate):
                loss = F.cross_entropy(wrapped(x[chosen]), labels[chosen]) / arguments.accumulate
                loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()  # identical in all processes, refreshes included
        if rank == 0 and number % 40 == 0:
            print(f"step {number}: loss {loss.item() * arguments.accumulate:.3f}")

    # The weights in force under the plain model's keys. All processes take part: sharded ones gather each weight.
    state = memfit.state_dict(model)
    state = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}
    if rank == 0:
        torch.save(state, arguments.save)
        plain = build()
        plain.load_state_dict(torch.load(arguments.save, weights_only=True))
        x, labels = share_of_the_data(seed=0)
        with torch.no_grad():
            accuracy = (plain(x).argmax(1) == labels).float().mean().item()
        print(f"the plain model from {arguments.save}: accuracy on new data {accuracy:.1%}")


if __name__ == "__main__":
    main()
