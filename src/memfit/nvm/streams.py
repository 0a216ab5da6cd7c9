"""A stream of the user's own, in the chunks in which the simulation takes samples."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from memfit.errors import DataError
from memfit.nvm.worlds import CHUNK

Sample = tuple[Tensor, "int | Tensor"]


class Stream(Protocol):
    """Samples in the order in which the device meets them."""

    def chunk(self, number: int) -> tuple[Tensor, Tensor]:
        """Samples ``number * CHUNK`` on: inputs (CHUNK, ...), labels (CHUNK,) int64; at the end it may be fewer."""


class UserStream:
    """What a function of the user's gives, sample by sample.

    Args:
        make: returns an iterable of (input without batch axis, label); at every call the same samples in the same
            order, so that a run can be resumed.
        name: what to call it in messages.
    """

    def __init__(self, make: Callable[[], Iterable[Sample]], name: str) -> None:
        self._make, self._name = make, name
        self._made: Iterable[Sample] | None = None
        self._iterator: Iterator[Sample] | None = None
        self._next = 0
        self._expected: tuple[tuple[int, ...], int] | None = None

    def expect(self, shape: tuple[int, ...], classes: int) -> None:
        """From now on refuse samples of another shape, and labels outside of so many classes."""
        self._expected = shape, classes

    def chunk(self, number: int) -> tuple[Tensor, Tensor]:
        """As :class:`Stream` says.

        Raises:
            DataError: a sample is no (tensor, label), of another shape than the others, or a label is no class.
        """
        if self._iterator is None or number != self._next:
            made = self._make()
            if not isinstance(made, Iterable):
                raise DataError(f"{self._name} must return an iterable of (input, label), not {type(made).__name__}.")
            if isinstance(made, Iterator) and made is self._made:
                raise DataError(
                    f"{self._name} returns the same iterator again, which goes on where it was: make a new one at "
                    "every call, as all devices are to see the same samples."
                )
            self._made = made
            self._iterator = itertools.islice(made, number * CHUNK, None)
        self._next = number + 1
        samples = list(itertools.islice(self._iterator, CHUNK))
        for sample in samples:
            if not (isinstance(sample, tuple | list) and len(sample) == 2 and isinstance(sample[0], Tensor)):
                raise DataError(f"{self._name} must give pairs of a tensor and a label, not {type(sample).__name__}.")
        words = [sample[1] for sample in samples if isinstance(sample[1], str)]
        if words:
            raise DataError(f"{self._name}: {words[0]!r} is no label: labels are whole numbers from 0, not words.")
        try:
            inputs = torch.stack([sample[0] for sample in samples]) if samples else torch.empty(0)
            numbers = [float(sample[1]) for sample in samples]
        except (RuntimeError, ValueError, TypeError) as problem:
            raise DataError(f"{self._name}: its samples can't be put together: {problem}.") from problem
        shape, classes = self._expected or (tuple(inputs.shape[1:]), math.inf)
        if samples and tuple(inputs.shape[1:]) != shape:
            raise DataError(
                f"{self._name}: a sample of shape {tuple(inputs.shape[1:])} follows samples of shape {shape}."
            )
        bad = [label for label in numbers if not (0 <= label < classes and label.is_integer())]
        if bad:
            raise DataError(
                f"{self._name}: {bad[0]:g} is no label: labels are whole numbers from 0, one for each class."
            )
        return inputs, torch.tensor(numbers, dtype=torch.int64)
