"""The recognizer: a stack of LSTM layers over log-mel features, trained with connectionist temporal classification.

    features (batch, frames, bands) -> stack neighbouring frames -> nn.LSTM -> nn.Linear -> log-softmax over characters

A recognizer's file is one safetensors file; its header carries the configuration as JSON, so that loading a file never
executes code. CTC: Graves et al., "Connectionist Temporal Classification", 2006.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from memfit import model_file
from memfit.speech.text import ALPHABET

_HEADER_KEY = "memfit.speech.recognizer"


@dataclass(frozen=True)
class RecognizerConfig:
    """Everything that a recognizer's weights do not say.

    Attributes:
        sample_rate: samples per second of the audio that it hears.
        features: number of mel bands.
        stack: how many neighbouring feature frames (10 ms each) make one frame of the LSTM and of the output.
        layers: number of LSTM layers.
        hidden: width of each layer, per direction.
        bidirectional: whether each layer also runs backwards in time.
        dropout: share of the activations that is dropped between layers while training.
        alphabet: the characters; index 0 stands for the CTC blank.

    Raises:
        ValueError: a value that makes no recognizer.
    """

    sample_rate: int = 8000
    features: int = 40
    stack: int = 2
    layers: int = 3
    hidden: int = 120
    bidirectional: bool = True
    dropout: float = 0.0
    alphabet: tuple[str, ...] = ALPHABET

    def __post_init__(self) -> None:
        # The upper bounds keep a damaged or hostile file from asking for all of the machine's memory.
        limits = {
            "sample_rate": (1000, 192_000),
            "features": (1, 512),
            "stack": (1, 16),
            "layers": (1, 64),
            "hidden": (1, 65_536),
        }
        for name, (lowest, highest) in limits.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not lowest <= value <= highest:
                raise ValueError(f"{name} must be a whole number from {lowest} to {highest}, not {value!r}")
        if not isinstance(self.bidirectional, bool):
            raise ValueError(f"bidirectional must be true or false, not {self.bidirectional!r}")
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout!r}")
        characters = self.alphabet[1:]
        if (
            not isinstance(self.alphabet, tuple)
            or not characters
            or not all(isinstance(character, str) for character in self.alphabet)
            or any(len(character) != 1 for character in characters)
            or len(set(characters)) != len(characters)
        ):
            raise ValueError("alphabet must be a blank followed by single characters, each once")

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {**dataclasses.asdict(self), "alphabet": list(self.alphabet)}

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> RecognizerConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: an unknown name, or a value that makes no recognizer.
        """
        unknown = set(values) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"unknown setting {sorted(unknown)[0]!r}")
        alphabet = values.get("alphabet", ALPHABET)
        if not isinstance(alphabet, list | tuple):
            raise ValueError("alphabet must be a list of characters")
        return cls(**{**values, "alphabet": tuple(alphabet)})  # type: ignore[arg-type]  # __post_init__ checks them


class Recognizer(nn.Module):
    """LSTM-CTC recognizer.

    ``lstm`` is one :class:`torch.nn.LSTM` and ``output`` one :class:`torch.nn.Linear`, so that techniques that convert
    layers find both.

    Args:
        config: its shape.
    """

    def __init__(self, config: RecognizerConfig) -> None:
        super().__init__()
        self.config = config
        self.lstm = nn.LSTM(
            config.features * config.stack,
            config.hidden,
            num_layers=config.layers,
            bidirectional=config.bidirectional,
            dropout=config.dropout if config.layers > 1 else 0.0,
        )
        with torch.no_grad():
            for name, parameter in self.lstm.named_parameters():
                if name.startswith("bias_ih"):
                    # The forget gates start open: training sets off faster (Jozefowicz et al., 2015).
                    parameter[config.hidden : 2 * config.hidden] += 1.0
        self.output = nn.Linear(config.hidden * (2 if config.bidirectional else 1), len(config.alphabet))

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """Output frames for ``lengths`` feature frames: one per started stack."""
        return (lengths + self.config.stack - 1) // self.config.stack

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Score characters.

        Args:
            features: ``(batch, frames, features)`` float; what lies beyond an utterance's length has no effect.
            lengths: ``(batch,)`` integers from 1 to ``frames``.

        Returns:
            ``log_probs`` of shape ``(frames', batch, classes)``, natural logarithms, and ``out_lengths`` of shape
            ``(batch,)``. This is the order of axes that :func:`torch.nn.functional.ctc_loss` takes.
        """
        batch, frames, bands = features.shape
        stack = self.config.stack
        beyond = torch.arange(frames, device=features.device) >= lengths.to(features.device)[:, None]
        features = features.masked_fill(beyond[:, :, None], 0.0)
        features = nn.functional.pad(features, (0, 0, 0, -frames % stack))
        stacked = features.reshape(batch, -1, stack * bands).transpose(0, 1)

        out_lengths = self.output_lengths(lengths)
        if bool((out_lengths == stacked.shape[0]).all()):
            hidden, _ = self.lstm(stacked)  # nothing is padding: packing would only cost time
        else:
            packed = pack_padded_sequence(stacked, out_lengths.cpu(), enforce_sorted=False)
            hidden, _ = pad_packed_sequence(self.lstm(packed)[0], total_length=stacked.shape[0])
        return self.output(hidden).log_softmax(dim=-1), out_lengths


def save(model: nn.Module | Mapping[str, Tensor], config: RecognizerConfig, path: str | Path) -> None:
    """Write a recognizer's file: beside its target first, then renamed, so that an earlier file stays until the end.

    Args:
        model: a :class:`Recognizer`, or its state dict (for a converted model: what ``memfit.state_dict`` returns).
        config: the recognizer's configuration.
        path: the file, usually ``model.safetensors``.

    Raises:
        DataError: the file cannot be written.
    """
    state = model.state_dict() if isinstance(model, nn.Module) else model
    model_file.write(path, state, _HEADER_KEY, config.to_dict())


def load(path: str | Path) -> Recognizer:
    """Read a recognizer's file.

    Raises:
        DataError: the file is missing, cannot be read, is damaged, or holds something else than a recognizer of memfit.
    """
    tensors, metadata = model_file.read(path)
    config = model_file.read_config(path, metadata, _HEADER_KEY, "recognizer", RecognizerConfig.from_dict)
    with torch.device("meta"):
        model = Recognizer(config)
    model.load_state_dict(model_file.checked_tensors(path, tensors, model.state_dict(), "recognizer"), assign=True)
    model.requires_grad_(True)
    return model


def load_base() -> Recognizer:
    """The recognizer that the package ships; docs/model-card.md says how it was trained and how good it is."""
    with importlib.resources.as_file(importlib.resources.files("memfit.speech") / "base" / "model.safetensors") as path:
        return load(path)
