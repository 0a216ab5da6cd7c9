"""A classifier's file: one safetensors file whose header carries what the weights do not say."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from memfit import model_file
from memfit.errors import DataError, MemfitError
from memfit.ledger.target import load_model
from memfit.vision.models import ZOO
from memfit.vision.training import check_scores

HEADER_KEY = "memfit.vision.classifier"

LARGEST_SIZE = 4096
_MOST_CLASSES = 100_000


@dataclass(frozen=True)
class ClassifierConfig:
    """Everything that a classifier's weights do not say.

    Attributes:
        model: a name in :data:`memfit.vision.models.ZOO`, or a function of one's own as :func:`build` takes it.
        classes: their names by class number.
        size: pixels of the side of the square that it sees.
        width: multiplies the channels of a net of the zoo.

    Raises:
        ValueError: a value that makes no classifier.
    """

    model: str
    classes: tuple[str, ...]
    size: int
    width: float = 1.0

    def __post_init__(self) -> None:
        # The upper bounds keep a damaged or hostile file from asking for all of the machine's memory.
        if not isinstance(self.model, str) or not self.model:
            raise ValueError(f"model must be a name, not {self.model!r}")
        if not isinstance(self.size, int) or isinstance(self.size, bool) or not 1 <= self.size <= LARGEST_SIZE:
            raise ValueError(f"size must be a whole number from 1 to {LARGEST_SIZE}, not {self.size!r}")
        if not isinstance(self.width, int | float) or not 0 < self.width <= 16:
            raise ValueError(f"width must be above 0 and at most 16, not {self.width!r}")
        if (
            not isinstance(self.classes, tuple)
            or not 2 <= len(self.classes) <= _MOST_CLASSES
            or not all(isinstance(name, str) for name in self.classes)
            or len(set(self.classes)) != len(self.classes)
        ):
            raise ValueError(f"classes must be from 2 to {_MOST_CLASSES} different names")

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {**dataclasses.asdict(self), "classes": list(self.classes)}

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> ClassifierConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: a name that is unknown or missing, or a value that makes no classifier.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if wrong := sorted(set(values) ^ names):
            raise ValueError(f"the setting {wrong[0]!r} is {'missing' if wrong[0] in names else 'unknown'}")
        classes = values["classes"]
        if not isinstance(classes, list):
            raise ValueError("classes must be a list of names")
        return cls(**{**values, "classes": tuple(classes)})  # type: ignore[arg-type]  # __post_init__ checks them


def build(model: str, classes: int, width: float = 1.0) -> nn.Module:
    """A net with fresh weights.

    Args:
        model: a name in the zoo, or ``package.module:function`` or ``file.py:function``, of a function that is given
            the number of classes and returns a :class:`torch.nn.Module`, from ``(batch, 3, size, size)`` images to
            ``(batch, classes)`` scores.
        classes: outputs.
        width: multiplies the channels of a net of the zoo.

    Raises:
        MemfitError: there is no such net or function, or it returns something else.
    """
    if model in ZOO:
        return ZOO[model].build(classes, width=width)
    if ":" not in model:
        raise MemfitError(
            f"there is no model {model!r}: choose from {', '.join(ZOO)}, or write package.module:function or "
            "file.py:function."
        )
    if width != 1.0:
        raise MemfitError(f"the width is for {', '.join(ZOO)}: set that of {model} in its own code.")
    return load_model(model, {"the number of classes": classes})


def save(state: Mapping[str, Tensor], config: ClassifierConfig, path: str | Path) -> None:
    """Write a classifier's file.

    Args:
        state: what ``memfit.state_dict`` returns.
        config: the classifier's configuration.
        path: the file, usually ``model.safetensors``.

    Raises:
        DataError: the file cannot be written.
    """
    model_file.write(path, state, HEADER_KEY, config.to_dict())


def load(path: str | Path, network: str | None = None) -> tuple[nn.Module, ClassifierConfig]:
    """Read a classifier's file; the net is in eval mode, in its own dtypes. Of the file itself no code is run.

    Args:
        path: the file.
        network: the function that makes the net, as :func:`build` takes it, where it is none of the zoo.

    Raises:
        DataError: the file is missing, cannot be read, is damaged, or holds something else than a classifier of memfit.
        MemfitError: the net is one's own, and ``network`` is missing, or makes none that tells these classes apart.
    """
    tensors, metadata = model_file.read(path)
    config = model_file.read_config(path, metadata, HEADER_KEY, "classifier", ClassifierConfig.from_dict)
    if network is None and config.model not in ZOO:
        raise DataError(
            f"{path}: its net was made by {config.model!r}, which a file does not hold: name the function by --network."
        )
    if network is None:
        with torch.device("meta"):  # nothing is allocated for what the file does not have
            net = build(config.model, len(config.classes), config.width)
    else:
        net = build(network, len(config.classes))
    net.load_state_dict(
        model_file.checked_tensors(path, tensors, net.state_dict(), "classifier"), assign=network is None
    )
    if network is not None:
        check_scores(net, network, len(config.classes), config.size)
    return net.eval(), config
