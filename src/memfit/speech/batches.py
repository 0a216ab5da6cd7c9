"""What a training step of a recognizer sees: padded features and characters, and the CTC loss on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from memfit.errors import DataError
from memfit.speech.audio import Utterance
from memfit.speech.augment import Augmentation
from memfit.speech.features import LogMel
from memfit.speech.model import RecognizerConfig
from memfit.speech.text import encode, frames_needed

_LENGTH_STEP_SECONDS = 0.2


@dataclass(frozen=True)
class Batch:
    """Utterances side by side.

    Attributes:
        features: ``(batch, frames, bands)`` float32, zero beyond each length.
        lengths: ``(batch,)`` int64, in feature frames.
        targets: ``(batch, characters)`` int64 class numbers, 0 beyond each length.
        target_lengths: ``(batch,)`` int64.
    """

    features: Tensor
    lengths: Tensor
    targets: Tensor
    target_lengths: Tensor


class Batches:
    """Batches of utterances in a new order at each pass.

    Each ``iter()`` draws one number from torch's global generator and derives everything from it: the same state of
    that generator gives the same batches, however much of it the model uses in between.

    Args:
        utterances: what to train on.
        config: the recognizer's configuration.
        batch_size: utterances per batch; the last batch of a pass may be smaller.
        augmentation: how to vary the recordings, or None to leave them as they are.
        equal_lengths: batch recordings of like length and let silence follow all but the longest, so that no frame of a
            batch is padding. LSTMs on the CPU are more than twice as fast without padding to step over.

    Raises:
        DataError: there are no utterances, or one is too short for its text.
        ValueError: ``batch_size`` is below 1.
    """

    def __init__(
        self,
        utterances: Sequence[Utterance],
        config: RecognizerConfig,
        batch_size: int,
        augmentation: Augmentation | None = None,
        equal_lengths: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        if not utterances:
            raise DataError("there are no utterances to train on.")
        self._utterances = list(utterances)
        self._batch_size = batch_size
        self._augmentation = augmentation
        self._equal_lengths = equal_lengths
        # Few different lengths: the CPU's LSTM kernels are prepared, and kept, for each length that occurs.
        self._length_step = round(_LENGTH_STEP_SECONDS * config.sample_rate)
        self._log_mel = LogMel(config.sample_rate, config.features)
        self._targets = [torch.tensor(encode(utterance.text, config.alphabet)) for utterance in utterances]
        for utterance, target in zip(self._utterances, self._targets, strict=True):
            self._check_length(utterance, target, config)
        self._features: list[Tensor] | None = None
        if augmentation is None and not equal_lengths:
            # These features never change, so they are computed once; they are smaller than the audio.
            self._features = [self._log_mel([utterance.audio])[0][0] for utterance in self._utterances]

    def __len__(self) -> int:
        return -(-len(self._utterances) // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        # The draw happens here and not at the first batch: a generator function would postpone it.
        seed = int(torch.randint(2**62, ()))
        return self._one_pass(torch.Generator().manual_seed(seed))

    def _one_pass(self, generator: torch.Generator) -> Iterator[Batch]:
        for chosen in self._grouped(generator):
            features, lengths = self._featurize(chosen, generator)
            targets = [self._targets[index] for index in chosen]
            yield Batch(
                features,
                lengths,
                pad_sequence(targets, batch_first=True),
                torch.tensor([len(target) for target in targets]),
            )

    def _grouped(self, generator: torch.Generator) -> list[list[int]]:
        count, size = len(self._utterances), self._batch_size
        order = torch.randperm(count, generator=generator).tolist()
        if self._equal_lengths:
            order.sort(key=lambda index: len(self._utterances[index].audio))
        groups = [order[start : start + size] for start in range(0, count, size)]
        if self._equal_lengths:
            groups = [groups[index] for index in torch.randperm(len(groups), generator=generator).tolist()]
        return groups

    def _featurize(self, chosen: list[int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        if self._features is not None:
            features = [self._features[index] for index in chosen]
            return pad_sequence(features, batch_first=True), torch.tensor([len(feature) for feature in features])
        waveforms = [self._utterances[index].audio for index in chosen]
        if self._augmentation:
            waveforms = self._augmentation.paced(waveforms, generator)
        if self._equal_lengths:
            padded_waves = pad_sequence(waveforms, batch_first=True)
            waveforms = list(nn.functional.pad(padded_waves, (0, -padded_waves.shape[1] % self._length_step)))
        if not self._augmentation:
            return self._log_mel(waveforms)
        waveforms = self._augmentation.noisy(waveforms, generator)
        padded, lengths = self._log_mel(waveforms, self._augmentation.warps(len(chosen), generator))
        return self._augmentation.masked(padded, lengths, generator), lengths

    def _check_length(self, utterance: Utterance, target: Tensor, config: RecognizerConfig) -> None:
        # Speeding up must not make a recording too short either.
        fastest = 1.0 + self._augmentation.speed if self._augmentation else 1.0
        frames = -(-self._log_mel.frames(int(len(utterance.audio) / fastest)) // config.stack)
        if frames < frames_needed(target.tolist()):
            seconds = len(utterance.audio) / config.sample_rate
            raise DataError(
                f"{utterance.name}: {seconds:.2f} s of audio are too short for the {len(target)} characters of its "
                f"transcript {utterance.text!r}; check that the two belong together."
            )


def ctc_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean over the batch of each utterance's CTC loss per character, in nats; a scalar to call ``backward`` on.

    Args:
        model: a recognizer, converted or not; the batch goes to the device of its parameters.
        batch: what to score.
    """
    device = next(model.parameters()).device
    log_probs, lengths = model(batch.features.to(device), batch.lengths)
    return nn.functional.ctc_loss(
        log_probs.float(), batch.targets.to(device), lengths, batch.target_lengths, blank=0, zero_infinity=True
    )
