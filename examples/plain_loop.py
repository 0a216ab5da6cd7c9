"""A plain training loop with low-rank gradients: accumulation, clipping, a schedule, and a plain model at the end.

    python examples/plain_loop.py

The data are made up on the spot: vectors that are noisy mixtures of a few hidden patterns, one class for each pattern.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memfit

FEATURES, WIDTH, CLASSES = 256, 512, 32


def build() -> nn.Module:
    return nn.Sequential(
        nn.Linear(FEATURES, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, CLASSES)
    )


def made_up_batches(batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    patterns = torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    while True:
        labels = torch.randint(CLASSES, (batch,), generator=generator)
        noise = torch.randn(batch, FEATURES, generator=generator)
        yield torch.tanh(patterns[labels] + 2.5 * noise), labels


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    x, labels = next(made_up_batches(2000, seed=1))
    return (model(x).argmax(1) == labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small network through low-rank gradients.")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--accumulate", type=int, default=4, help="micro-batches per step")
    parser.add_argument("--save", default="model.pt", help="where the trained weights go")
    arguments = parser.parse_args()
    if arguments.steps < 3 or arguments.accumulate < 1:
        parser.error("--steps must be at least 3, and --accumulate at least 1")
    if not Path(arguments.save).absolute().parent.is_dir():
        parser.error(f"--save {arguments.save}: there is no such folder")

    torch.manual_seed(0)
    model = build()
    dense_numbers = sum(p.numel() for p in model.parameters())

    # Convert before the optimizer is made: from here on the factors are the parameters that train.
    try:
        memfit.convert_(model, memfit.LowRankGradient(rank=arguments.rank))
    except memfit.ConversionError as error:
        parser.error(str(error))
    trained = [p for p in model.parameters() if p.requires_grad]
    print(f"trains {sum(p.numel() for p in trained):,} numbers in place of {dense_numbers:,}")

    optimizer = torch.optim.AdamW(trained, lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=arguments.steps)
    batches = made_up_batches(16, seed=2)

    def step() -> float:
        optimizer.zero_grad()
        total = 0.0
        # The sum of the gradients is kept in factors: no buffer of a weight's size.
        for _ in range(arguments.accumulate):
            x, labels = next(batches)
            loss = F.cross_entropy(model(x), labels) / arguments.accumulate
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        return total

    step()
    with memfit.ledger(model, optimizer) as book:  # measure a step; leave this out once you know where the memory goes
        step()
    print(book)
    for number in range(3, arguments.steps + 1):
        loss = step()
        if number % 100 == 0 or number == arguments.steps:
            print(f"step {number}: loss {loss:.3f}, accuracy on new data {accuracy(model):.1%}")

    torch.save(memfit.state_dict(model), arguments.save)  # the plain model's keys
    plain = build()
    plain.load_state_dict(torch.load(arguments.save, weights_only=True))
    print(f"the plain model from {arguments.save}: accuracy {accuracy(plain):.1%}")


if __name__ == "__main__":
    main()
