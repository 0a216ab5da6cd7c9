"""What to simulate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from memfit.errors import MemfitError
from memfit.nvm.pretrain import STEPS
from memfit.nvm.schemes import RATES, SCHEMES, WRITES, Rates, Scheme, Writes
from memfit.nvm.worlds import SHIFT_EVERY, WORLDS, World
from memfit.run.counts import check_count
from memfit.weights.technology import technology


@dataclass(frozen=True)
class NvmConfig:
    """What to simulate.

    Attributes:
        data: MNIST, as :func:`memfit.nvm.data.load_images` reads it; None for scikit-learn's small digits.
        worlds: some of :data:`~memfit.nvm.worlds.WORLDS`.
        schemes: some of :data:`~memfit.nvm.schemes.SCHEMES`.
        samples: that each device sees.
        seed: of the offline training, the stream, the drift and the schemes' own random numbers.
        lr: learning rate of the weights; None for each scheme's own in :data:`~memfit.nvm.schemes.RATES`.
        bias_lr: the same of all other parameters.
        period: samples between the writes of the low-rank schemes; None for each scheme's own in
            :data:`~memfit.nvm.schemes.WRITES`.
        memory: a preset of :data:`~memfit.weights.technology.TECHNOLOGIES`.
        samples_per_second: that lifetimes are projected for.
        model: ``package.module:function`` or ``file.py:function`` that returns a trained ``nn.Module``, which takes one
            sample with a batch axis to logits; None for the method's network, trained offline here.
        stream: the same for a function that returns an iterable of (input, label), the same at every call.
        shift_every: samples between two shifts of the distribution, in the world that has them.
        pretraining_steps: of the offline training.
        native: use C++ operators where there are any, for the low-rank schemes; see :class:`memfit.StreamingLowRank`.

    Raises:
        MemfitError: a value that is out of range, or choices that do not go together.
    """

    data: Path | None = None
    worlds: tuple[World, ...] = WORLDS
    schemes: tuple[Scheme, ...] = SCHEMES
    samples: int = 10_000
    seed: int = 0
    lr: float | None = None
    bias_lr: float | None = None
    period: int | None = None
    memory: str = "rram"
    samples_per_second: float = 1.0
    model: str | None = None
    stream: str | None = None
    shift_every: int = SHIFT_EVERY
    pretraining_steps: int = STEPS
    native: bool = False

    def __post_init__(self) -> None:
        for what, given, known in (("world", self.worlds, WORLDS), ("scheme", self.schemes, SCHEMES)):
            unknown = [each for each in given if each not in known]
            if unknown or not given:
                raise MemfitError(f"a {what} is one of {', '.join(known)}, not {', '.join(unknown) or 'none'}.")
        for what, value in (
            ("number of samples", self.samples),
            ("period", 1 if self.period is None else self.period),
            ("number of steps", self.pretraining_steps),
        ):
            check_count(what, value)
        if self.shift_every < 100 or self.shift_every % 100:
            raise MemfitError(f"shifts come every 100, 200, 300 ... samples, not every {self.shift_every}.")
        if not 0 <= self.seed < 2**63:
            raise MemfitError(f"the seed must be from 0 to 2^63 - 1, not {self.seed}.")
        if not 0 < self.samples_per_second < math.inf:
            raise MemfitError(f"the rate must be a positive number of samples a second, not {self.samples_per_second}.")
        if self.stream is not None and self.data is not None:
            raise MemfitError("data and a stream of one's own are two sources of samples: give one of them.")
        if self.stream is not None and self.model is None:
            raise MemfitError("a stream of one's own needs a model of one's own that is trained for it: give --model.")
        if self.stream is not None and "shift" in self.worlds:
            raise MemfitError(
                "the world 'shift' is made of images; a stream of one's own brings its own: leave it out."
            )
        technology(self.memory)
        for scheme in self.schemes:
            self.rates(scheme)

    @property
    def own(self) -> str:
        """The user's own code, as it was named."""
        return " with ".join(each for each in (self.model, self.stream) if each) or "the simulation"

    def writes(self, scheme: Scheme) -> Writes | None:
        """When a scheme writes, of those that choose it."""
        own = WRITES.get(scheme)
        return own if own is None or self.period is None else own._replace(period=self.period)

    def rates(self, scheme: Scheme) -> Rates:
        """The learning rates that a scheme is given."""
        own = RATES[scheme]
        return Rates(own.weights if self.lr is None else self.lr, own.biases if self.bias_lr is None else self.bias_lr)
