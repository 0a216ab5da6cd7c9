"""What the device meets in the field: the four worlds of the method's paper.

``control`` is more of what it was trained on. In ``shift``, the images change their kind every 10,000 samples. In
``analog`` the weights drift as a Brownian motion, in ``digital`` bits of their codes flip. Sample and drift number n
depend on the seed and on n alone, so that a run resumes anywhere, and all schemes see the same.

Source: Gural et al., arXiv 2009.03887.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Generator, Tensor

from memfit.nvm.augment import background_gradient, elastic, spatial, white_noise
from memfit.nvm.data import Images
from memfit.weights.cell_array import CellArray

World = Literal["control", "shift", "analog", "digital"]
WORLDS: tuple[World, ...] = get_args(World)

CHUNK = 100  # samples that are made at once
SHIFT_EVERY = 10_000
DRIFT_EVERY = 10
# What drift adds up to in a million samples: the noise's standard deviation in units of the largest weight that a cell
# holds, and the flips of each bit.
_HORIZON = 1_000_000
SIGMA = 10.0
FLIPS = 10.0

_CLUSTER = 50  # samples in a row that are of
_CLUSTER_CLASSES = 2

Augmentation = Callable[[Tensor, Generator], Tensor]
SHIFTS: Mapping[str, Augmentation | None] = {
    "classes in clusters": None,
    "spatial transforms": spatial,
    "background gradients": background_gradient,
    "white noise": white_noise,
}


@dataclass(frozen=True)
class ImageStream:
    """Labelled images without end, in chunks of :data:`CHUNK`. Each is bent elastically, and none comes twice.

    Attributes:
        images: of which the online ones are drawn.
        world: only ``"shift"`` differs from the others.
        seed: decides which images are drawn and what becomes of them.
        shift_every: samples of one kind; the kinds follow each other in the order of :data:`SHIFTS`, round and round.
    """

    images: Images
    world: World
    seed: int
    shift_every: int = SHIFT_EVERY

    def chunk(self, number: int) -> tuple[Tensor, Tensor]:
        """Samples ``number * CHUNK`` to ``(number + 1) * CHUNK - 1``.

        Returns:
            Images (CHUNK, 1, size, size), float32 in [0, 1], and labels (CHUNK,), int64.
        """
        random = generator("stream", self.seed, number)
        shift = None
        if self.world == "shift":
            shift = list(SHIFTS)[number * CHUNK // self.shift_every % len(SHIFTS)]
        chosen = self._draw(random, clustered=shift == "classes in clusters")
        images = elastic(self.images.online[chosen] / 255, random)
        augmentation = None if shift is None else SHIFTS[shift]
        return images if augmentation is None else augmentation(images, random), self.images.online_labels[chosen]

    def _draw(self, random: Generator, clustered: bool) -> Tensor:
        labels = self.images.online_labels
        if not clustered:
            return torch.randint(len(labels), (CHUNK,), generator=random)
        chosen = []
        for _ in range(CHUNK // _CLUSTER):
            classes = labels.unique()
            few = classes[torch.randperm(len(classes), generator=random)[:_CLUSTER_CLASSES]]
            candidates = torch.isin(labels, few).nonzero().flatten()
            chosen.append(candidates[torch.randint(len(candidates), (_CLUSTER,), generator=random)])
        return torch.cat(chosen)


def drift_(arrays: Iterable[CellArray], world: World, seed: int, sample: int) -> None:
    """What time does to the cells after so many samples; nothing in most worlds, and at most of the samples."""
    if world not in ("analog", "digital") or sample % DRIFT_EVERY:
        return
    random = generator(world, seed, sample)
    events = _HORIZON / DRIFT_EVERY
    for array in arrays:
        if world == "analog":
            array.drift_analog_(SIGMA * array.high / math.sqrt(events), random)
        else:
            array.drift_digital_(FLIPS / events, random)


def generator(what: str, seed: int, number: int) -> Generator:
    """Random numbers that are the same whenever they are asked for, and independent for other arguments."""
    digest = hashlib.blake2b(f"{what}/{seed}/{number}".encode(), digest_size=8).digest()
    return Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
