"""Where a run is in its data, so that it goes on with the very next batch after a resume.

Batches that have ``state_dict`` and ``load_state_dict`` know it themselves. For any others the place is the random
state before the epoch and the number of batches taken since: the epoch is iterated again from that state, and the
batches that were taken are skipped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch

from memfit.errors import CheckpointError, DataError
from memfit.run import random_state

B = TypeVar("B")


@runtime_checkable
class Stateful(Protocol):
    """Batches that know their own place, such as torchdata's StatefulDataLoader."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class Position(Generic[B]):
    """Iterates ``batches`` epoch after epoch, and tells and restores the place.

    Args:
        batches: iterated anew for each epoch.
        tracked: whether the place will be asked for; otherwise no random state is remembered.
    """

    def __init__(self, batches: Iterable[B], tracked: bool) -> None:
        self._batches = batches
        self._tracked = tracked
        self._iterator: Iterator[B] | None = None
        self._index = 0
        self._start: dict[str, Any] | None = None

    def next(self) -> B:
        """The next batch.

        Raises:
            DataError: an epoch has no batch at all.
        """
        while True:
            if self._iterator is None:
                self._index = 0
                self._start = self._random() if self._tracked else None
                self._iterator = iter(self._batches)
            try:
                batch = next(self._iterator)
            except StopIteration:
                self._iterator = None
            else:
                self._index += 1
                return batch
            if self._index == 0:
                raise DataError(
                    f"the batches ({type(self._batches).__name__}) gave no batch in a whole epoch: they must "
                    "not be empty, and each iteration must start anew (a list, a DataLoader, a class with __iter__; no "
                    "generator)."
                )

    def state(self) -> dict[str, Any]:
        """The place after the last batch, as a tree for a checkpoint."""
        own = self._batches.state_dict() if isinstance(self._batches, Stateful) else None
        return {"index": self._index, "start": self._start if own is None else None, "own": own, "now": self._random()}

    def restore(self, state: dict[str, Any], path: object, stop: Callable[[], bool]) -> None:
        """Go to the place of ``state``, and set all random generators to what they were there.

        Args:
            state: from :meth:`state`.
            path: the checkpoint, for messages.
            stop: asked before each batch that is skipped; when it says yes, the rest stays undone.

        Raises:
            CheckpointError: the data are not those of the checkpoint.
        """
        stateful = isinstance(self._batches, Stateful)
        if stateful != (state["own"] is not None) or len(self._generators()) != len(state["now"]["generators"]):
            raise CheckpointError(
                f"{path}: the checkpoint was made with another kind of batches than {type(self._batches).__name__}: "
                "resume with the same."
            )
        self._index, self._start = state["index"], state["start"]
        if isinstance(self._batches, Stateful):
            self._batches.load_state_dict(state["own"])
            self._iterator = iter(self._batches)
        else:
            self._set_random(state["start"])
            self._iterator = iter(self._batches)
            for taken in range(self._index):
                if stop():
                    return
                try:
                    next(self._iterator)
                except StopIteration:
                    raise CheckpointError(
                        f"{path}: the checkpoint was made after batch {self._index} of an epoch, and an epoch now has "
                        f"{taken}: resume with the same data."
                    ) from None
        self._set_random(state["now"])

    def close(self) -> None:
        """Let go of the epoch, and with it of the worker processes that a DataLoader has for it."""
        self._iterator = None

    def _random(self) -> dict[str, Any]:
        return {
            "global": random_state.capture(),
            "generators": [generator.get_state() for generator in self._generators()],
        }

    def _set_random(self, state: dict[str, Any]) -> None:
        random_state.restore(state["global"])
        for generator, saved in zip(self._generators(), state["generators"], strict=True):
            generator.set_state(saved)

    def _generators(self) -> list[torch.Generator]:
        """The generators that a DataLoader and its samplers have of their own."""
        batch_sampler = getattr(self._batches, "batch_sampler", None)
        samplers = (getattr(self._batches, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
        found = [getattr(owner, "generator", None) for owner in (self._batches, *samplers)]
        own = {id(generator): generator for generator in found if isinstance(generator, torch.Generator)}
        return list(own.values())


def batch_bytes(batch: object) -> int:
    """Bytes of the tensors in a batch: a tensor, or lists, tuples, mappings and dataclasses of them."""
    if isinstance(batch, torch.Tensor):
        return batch.nbytes
    if isinstance(batch, Mapping):
        return sum(batch_bytes(item) for item in batch.values())
    if isinstance(batch, list | tuple):
        return sum(batch_bytes(item) for item in batch)
    if dataclasses.is_dataclass(batch):
        return sum(batch_bytes(getattr(batch, field.name)) for field in dataclasses.fields(batch))
    return 0
