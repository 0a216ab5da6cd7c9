"""Which basis learns best: a study of ways to choose V in W + U V, on a small transformer and tinyshakespeare.

Each matrix of the blocks (width 128, 3 layers, rank 32 = width / 4) is trained by a rule that is given the dense
gradient G, so that rules can be compared that no layer could carry out; all else by AdamW. 300 steps of 16 x 64
characters, warm-up and cosine, each rule at the best learning rate of a first sweep. Validation loss, mean over seeds.

    python benchmarks/bases.py --text tinyshakespeare.txt [--rules power ...] [--seeds 0 1 2]

The figures are read in docs/bases.md. What won is `memfit.LowRankGradient(basis="power")`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from language_model import Options, Transformer, in_blocks, load, next_character, schedule, validate
from memfit.gradients.basis import moved_coordinates, power_basis

RESULTS = Path(__file__).parent / "results" / "bases.json"
RANK = 32


class Adam:
    """Adam's direction for one tensor."""

    def __init__(self, like: Tensor) -> None:
        self.mean, self.square, self.steps = torch.zeros_like(like), torch.zeros_like(like), 0

    def __call__(self, gradient: Tensor) -> Tensor:
        self.steps += 1
        self.mean.lerp_(gradient, 0.1)
        self.square.lerp_(gradient.square(), 0.001)
        scale = (self.square / (1 - 0.999**self.steps)).sqrt_().add_(1e-8)
        return self.mean / (1 - 0.9**self.steps) / scale


class Dense:
    """Adam on the dense gradient."""

    def __init__(self, weight: Tensor) -> None:
        self.adam = Adam(weight)

    def step(self, weight: Tensor, gradient: Tensor, lr: float) -> None:
        weight.sub_(lr * self.adam(gradient))


class GaLore:
    """Adam in the leading singular space of the gradient's smaller side, new every ``gap`` (arXiv 2403.03507)."""

    def __init__(self, weight: Tensor, gap: int = 50) -> None:
        self.gap, self.steps, self.adam = gap, 0, None

    def step(self, weight: Tensor, gradient: Tensor, lr: float) -> None:
        flip = gradient.shape[0] < gradient.shape[1]
        tall = gradient.t() if flip else gradient
        if self.steps % self.gap == 0:
            self.space = torch.linalg.svd(tall, full_matrices=False).Vh[:RANK]
        self.steps += 1
        low = tall @ self.space.t()
        self.adam = self.adam or Adam(low)
        change = lr * self.adam(low) @ self.space
        weight.sub_(change.t() if flip else change)


class Factors:
    """W + U V, with U trained by Adam.

    Args:
        weight: W.
        refresh: merge and change V every so many steps; 0 for never.
        probe: what turns V at a refresh: ``None`` a new Gaussian; else Q^T G, with Q an orthogonal basis of ``"U"``; of
            ``"dU"``, U's gradient; of ``"dU before"``, that of the step before; or of ``"moment"``, Adam's mean of it
            up to the step before. ``"mean"``: the running mean of V's gradients U^T G.
        singular: the rows of V are its singular vectors, rather than any orthogonal basis of the rows' space.
        train_right: V is trained by Adam too.
        moments: U's moments at a refresh: ``"moved"`` as `memfit.gradients.refresh` says; ``"filled"``, as moved, and
            what the old basis has not seen of a new row gets the mean square of the old; ``"reset"``.
    """

    def __init__(
        self,
        weight: Tensor,
        refresh: int = 15,
        probe: str | None = "U",
        singular: bool = True,
        train_right: bool = False,
        moments: str = "moved",
    ) -> None:
        self.refresh, self.probe, self.singular = refresh, probe, singular
        self.train_right, self.moments = train_right, moments
        self.left = weight.new_zeros(weight.shape[0], RANK)
        self.right = self.gaussian(weight)
        if probe:
            self.right = spanning_basis(self.right)
        self.adams = Adam(self.left), Adam(self.right)
        self.direction, self.d_left, self.steps = torch.zeros_like(self.right), self.left, 0

    @staticmethod
    def gaussian(weight: Tensor) -> Tensor:
        return torch.randn(RANK, weight.shape[1]) / RANK**0.5

    def step(self, weight: Tensor, gradient: Tensor, lr: float) -> None:
        before = self.left @ self.right
        d_left, d_right = gradient @ self.right.t(), self.left.t() @ gradient
        self.look(gradient, d_left, d_right)
        self.steps += 1
        if self.train_right:
            self.right = self.right - lr * self.adams[1](d_right)
        self.left = self.left - lr * self.adams[0](d_left)
        weight.add_(self.left @ self.right - before)
        if self.refresh and self.steps % self.refresh == 0:
            self.turn(weight)

    def look(self, gradient: Tensor, d_left: Tensor, d_right: Tensor) -> None:
        """Gather what the next V is made from."""
        probes = {"U": self.left, "dU": d_left, "dU before": self.d_left, "moment": self.adams[0].mean}
        if self.probe == "mean":
            self.direction.mul_(0.9).add_(d_right)
        elif self.probe and (self.steps + 1) % self.refresh == 0:
            self.direction = torch.linalg.qr(probes[self.probe]).Q.t() @ gradient
        self.d_left = d_left

    def turn(self, weight: Tensor) -> None:
        make = power_basis if self.singular else spanning_basis
        after = make(self.direction) if self.probe else self.gaussian(weight)
        change, adam = moved_coordinates(self.right, after), self.adams[0]
        if self.moments == "reset":
            adam = Adam(self.left)
        else:
            seen = change.square()
            unseen = (1 - seen.sum(0)).clamp(min=0) if self.moments == "filled" else 0
            adam.mean = adam.mean @ change
            adam.square = adam.square @ seen + unseen * adam.square.mean(1, keepdim=True)
        self.adams = adam, Adam(self.right)
        self.left, self.right = torch.zeros_like(self.left), after
        self.direction = torch.zeros_like(after)


def spanning_basis(direction: Tensor) -> Tensor:
    """An orthogonal basis of the rows' space, of the same scale as `power_basis` has."""
    rank, columns = direction.shape
    rows = torch.nn.functional.normalize(direction, dim=1)
    return torch.linalg.qr(rows.t()).Q.t() * (columns / rank) ** 0.5


Rule = Callable[[Tensor], Dense | GaLore | Factors]


def factors(**settings: Any) -> tuple[float, Rule]:
    return 3e-3, partial(Factors, **settings)


RULES: dict[str, tuple[float, Rule]] = {
    "dense Adam": (3e-3, Dense),
    "GaLore, every 50": (1e-2, GaLore),
    "power": factors(),
    **{f"power, every {steps}": factors(refresh=steps) for steps in (10, 20, 50)},
    "power, any basis": factors(singular=False),
    "power, from dU": factors(probe="dU"),
    "power, from dU, any basis": factors(probe="dU", singular=False),
    "power, from dU before": factors(probe="dU before"),
    "power, from Adam's mean": factors(probe="moment"),
    "power, V trained": factors(train_right=True),
    "power, moments filled": factors(moments="filled"),
    "power, moments reset": factors(moments="reset"),
    "mean gradient of V": factors(probe="mean", singular=False),
    "mean gradient of V, V trained": factors(probe="mean", singular=False, train_right=True),
    "random, V trained, never": factors(refresh=0, probe=None, train_right=True),
    "random, moments reset": factors(probe=None, moments="reset"),
}


def final_loss(text: Path, rule: Rule, lr: float, seed: int) -> float:
    """The validation loss after training from scratch with a rule; infinite where it diverged."""
    options = Options(text=text, width=128, layers=3, heads=4, context=64, batch=16, steps=300)
    training, held_out, tokens = load(text)
    torch.manual_seed(seed)
    model = Transformer(tokens, options.context, options.width, options.layers, options.heads)
    matrices = [layer.weight for name, layer in model.named_modules() if in_blocks(name, layer)]
    rules = [rule(weight.detach()) for weight in matrices]
    others = [p for p in model.parameters() if not any(p is weight for weight in matrices)]
    optimizer = torch.optim.AdamW(others, lr=lr)
    scheduler = LambdaLR(optimizer, schedule(options.steps))
    windows = training.unfold(0, options.context + 1, 1)
    order = torch.Generator().manual_seed(seed)
    for _ in range(options.steps):
        model.zero_grad()
        loss = next_character(model, windows[torch.randint(len(windows), (options.batch,), generator=order)])
        loss.backward()
        if not math.isfinite(loss.item()):
            return math.inf
        rate = scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
        with torch.no_grad():
            for weight, one in zip(matrices, rules, strict=True):
                one.step(weight, weight.grad, rate)
    return validate(model, held_out, options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[str, float]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in options.rules:
        lr, rule = RULES[name]
        losses = found.setdefault(name, {})
        for seed in options.seeds:
            if str(seed) not in losses:
                losses[str(seed)] = final_loss(options.text, rule, lr, seed)
                RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{name:34} {statistics.fmean(losses.values()):.4f}  {[round(loss, 4) for loss in losses.values()]}")


if __name__ == "__main__":
    main()
