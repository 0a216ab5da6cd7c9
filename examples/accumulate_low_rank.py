"""An effective batch of 1,000 on the memory of one: gradients of many samples add up at low rank.

    python examples/accumulate_low_rank.py

Ordinary accumulation keeps one number for each weight from sample to sample. Here a layer's gradients add up in
r (m + n) numbers, and the mean over the batch is applied at once, with no tensor of the weights' size. The loop is the
plain one. The data are made up on the spot: noisy patterns with a tenth of wrong labels, for which small batches are
no good.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memfit

FEATURES, WIDTH, CLASSES = 256, 512, 16


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES))


def samples(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """One at a time."""
    patterns = torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    while True:
        label = torch.randint(CLASSES, (1,), generator=generator)
        x = torch.tanh(patterns[label] + 3.0 * torch.randn(1, FEATURES, generator=generator))
        if torch.rand((), generator=generator) < 0.1:
            label = torch.randint(CLASSES, (1,), generator=generator)
        yield x, label


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """On new samples; those whose label is wrong cannot be told."""
    stream = samples(seed=1)
    x, labels = (torch.cat(each) for each in zip(*(next(stream) for _ in range(1000)), strict=True))
    return (model(x).argmax(1) == labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train on large batches, one sample at a time, at low rank.")
    parser.add_argument("--batch", type=int, default=1000, help="samples per step")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1.0)
    arguments = parser.parse_args()
    if arguments.batch < 1 or arguments.steps < 1:
        parser.error("--batch and --steps must be at least 1")

    torch.manual_seed(0)
    model = build()
    dense_gradient = 4 * sum(p.numel() for p in model.parameters())
    try:
        # One step of the optimizer is one period. Nothing is quantized, and the mean is applied as it is.
        technique = memfit.StreamingLowRank(
            rank=arguments.rank, period=1, max_norm=False, weight_bits=None, bias_bits=None, factor_bits=None
        )
        memfit.convert_(model, technique)
    except memfit.ConversionError as error:
        parser.error(str(error))
    optimizer = torch.optim.SGD(model.parameters(), lr=arguments.lr)
    stream = samples(seed=2)

    def step(count: int) -> None:
        optimizer.zero_grad()
        for _ in range(count):
            x, label = next(stream)
            (F.cross_entropy(model(x), label) / arguments.batch).backward()
        optimizer.step()

    with memfit.ledger(model, optimizer) as book:  # a few samples tell: the rest of the batch takes no more
        step(3)
    print(f"gradients at the peak: {book.peak.gradients:,} bytes, in place of {dense_gradient:,}")
    for number in range(1, arguments.steps + 1):
        step(arguments.batch)
        print(f"step {number}, {number * arguments.batch:,} samples: accuracy {accuracy(model):.1%}")
    memfit.restore_(model)  # plain nn.Linear again, with the trained weights


if __name__ == "__main__":
    main()
