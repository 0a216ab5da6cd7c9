"""The state of every random generator that training draws from, as plain values and tensors."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def capture() -> dict[str, Any]:
    """The states of torch's, Python's and, when they are in use, CUDA's and NumPy's global generators."""
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": (version, torch.tensor(words), gauss)}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if "numpy" in sys.modules:
        import numpy

        legacy = numpy.random.get_state(legacy=False)
        assert isinstance(legacy, dict)
        state["numpy"] = _plain(legacy)
    return state


def restore(state: dict[str, Any]) -> None:
    """Set every generator that ``state`` has to what it was at :func:`capture`.

    With fewer CUDA devices than at that time, those that exist are set.
    """
    torch.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    if "cuda" in state and torch.cuda.is_available():
        for device, generator in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
            torch.cuda.set_rng_state(generator, device)
    if "numpy" in state:
        import numpy

        numpy.random.set_state(_arrays(state["numpy"]))


@contextmanager
def undisturbed() -> Iterator[None]:
    """Whatever is drawn, seeded or restored inside, the generators go on afterwards as if it had not been."""
    state = capture()
    try:
        yield
    finally:
        restore(state)


def _plain(value: Any) -> Any:
    """NumPy's state with its arrays of unsigned integers as tensors."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return torch.from_numpy(value.astype("int64")) if hasattr(value, "astype") and value.ndim else value


def _arrays(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _arrays(item) for key, item in value.items()}
    return value.numpy().astype("uint32") if isinstance(value, torch.Tensor) else value
