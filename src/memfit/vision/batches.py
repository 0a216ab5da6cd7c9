"""What a training step of a classifier sees: normalised images in a new order at each pass, and the loss on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memfit.run.modes import evaluating
from memfit.vision.data import Images

# Of ImageNet's images, by colour; torchvision's weights were trained with these.
MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Batch:
    """Images side by side.

    Attributes:
        images: ``(batch, 3, size, size)`` float32, normalised, in channels-last layout.
        labels: ``(batch,)`` int64 class numbers.
    """

    images: Tensor
    labels: Tensor


class Batches:
    """Batches of images in a new order at each pass.

    Each ``iter()`` draws one number from torch's global generator and derives everything from it: the same state of
    that generator gives the same batches, however much of it the model uses in between.

    Args:
        images: what to train on.
        batch_size: images per batch; the last batch of a pass may be smaller.
        flip: mirror each image with a probability of one half.
        fewest: a last batch of fewer images than this is left out.

    Raises:
        ValueError: ``batch_size`` is below 1, or no batch would have ``fewest`` images.
    """

    def __init__(self, images: Images, batch_size: int, *, flip: bool = False, fewest: int = 1) -> None:
        if not 1 <= fewest <= min(batch_size, len(images)):
            raise ValueError(
                f"no batch of at least {fewest} images can be made of {len(images)}, {batch_size} at a time"
            )
        self._images, self._batch_size, self._flip = images, batch_size, flip
        self._starts = [start for start in range(0, len(images), batch_size) if len(images) - start >= fewest]

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[Batch]:
        # The draw happens here and not at the first batch: a generator function would postpone it.
        seed = int(torch.randint(2**62, ()))
        return self._one_pass(torch.Generator().manual_seed(seed))

    def _one_pass(self, generator: torch.Generator) -> Iterator[Batch]:
        order = torch.randperm(len(self._images), generator=generator).tolist()
        for start in self._starts:
            chosen = order[start : start + self._batch_size]
            pixels = self._images.pixels(chosen)
            if self._flip:
                mirrored = torch.rand(len(chosen), generator=generator) < 0.5
                pixels = torch.where(mirrored[:, None, None, None], pixels.flip(2), pixels)
            yield Batch(normalized(pixels), self._images.labels[chosen])


def normalized(pixels: Tensor) -> Tensor:
    """Images as a net takes them.

    Args:
        pixels: ``(batch, height, width, 3)`` uint8.

    Returns:
        ``(batch, 3, height, width)`` float32 in channels-last layout, each colour of mean 0 and deviation 1 over the
        images of ImageNet.
    """
    mean, deviation = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (MEAN, DEVIATION))
    return pixels.permute(0, 3, 1, 2).float().sub_(255 * mean).div_(255 * deviation)


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Mean over the batch of each image's negative log-probability of its class, in nats; a scalar."""
    return nn.functional.cross_entropy(model(batch.images).float(), batch.labels)


def predict(model: nn.Module, images: Images, chosen: Sequence[int] | None = None, batch_size: int = 32) -> Tensor:
    """The most probable class of each image: int64 of shape ``(images,)``.

    Args:
        model: a classifier, converted or not; each of its parts is left in the mode in which it came.
        images: what to look at; the labels are not.
        chosen: the places of those to look at; all when left out.
        batch_size: images at a time.
    """
    places = range(len(images)) if chosen is None else chosen
    with evaluating(model):
        found = [
            model(normalized(images.pixels(places[start : start + batch_size]))).argmax(1)
            for start in range(0, len(places), batch_size)
        ]
    return torch.cat(found)
