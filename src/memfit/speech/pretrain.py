"""Train the base recognizer that the package ships: ``python -m memfit.speech.pretrain --recordings FSDD --out FILE``.

It learns from four speakers of the Free Spoken Digit Dataset, their held-out recordings excepted. The fifth, theo, is
the voice that personalization is judged by and is never trained on. Each epoch joins new utterances and varies them;
the number of epochs is fixed and everything is seeded, so that a run can be repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from memfit.errors import DataError, MemfitError
from memfit.files import atomic_write, check_writable
from memfit.fit import StepRecord, fit
from memfit.speech import digits
from memfit.speech.audio import Utterance
from memfit.speech.augment import Augmentation
from memfit.speech.batches import Batch, Batches, ctc_loss
from memfit.speech.data import load_recordings
from memfit.speech.metrics import transcribe, word_error_rate
from memfit.speech.model import Recognizer, RecognizerConfig, save

SPEAKERS = ("george", "jackson", "lucas", "theo", "yweweler")
TEST_SPEAKER = "theo"  # of the base recognizer that is shipped


@dataclass(frozen=True)
class PretrainConfig:
    """How the base recognizer is trained.

    Attributes:
        seed: decides the initial weights, the utterances and their variations.
        epochs: passes, each over new utterances.
        curriculum: shares of the epochs, each with the fewest and most digits of its utterances. Alignments are learned
            from single words first; on whole utterances alone CTC needs several times as many steps.
        utterances: utterances per speaker and epoch.
        batch_size: utterances per step.
        lr: highest learning rate of AdamW; it rises over the first twentieth and falls to zero along a cosine.
        weight_decay: of AdamW.
        dropout: between the layers while training.
        max_grad_norm: gradients are clipped to this norm.
        augmentation: how the recordings are varied.
        held_out: the test speaker, who is never trained on.
    """

    seed: int = 0
    epochs: int = 180
    curriculum: tuple[tuple[float, int, int], ...] = ((0.35, 1, 1), (0.30, 1, 3), (0.35, 2, 6))
    utterances: int = 120
    batch_size: int = 16
    lr: float = 3e-3
    weight_decay: float = 1e-2
    dropout: float = 0.1
    max_grad_norm: float = 1.0
    augmentation: Augmentation = dataclasses.field(default_factory=Augmentation)
    held_out: str = TEST_SPEAKER

    @property
    def speakers(self) -> tuple[str, ...]:
        """Who is trained on."""
        return tuple(speaker for speaker in SPEAKERS if speaker != self.held_out)

    def digits(self, epoch: int) -> tuple[int, int]:
        """Fewest and most digits of an utterance in an epoch, counted from 0."""
        ends = itertools.accumulate(share for share, _, _ in self.curriculum)
        for end, (_, fewest, most) in zip(ends, self.curriculum, strict=True):
            if epoch < round(end * self.epochs):
                return fewest, most
        return self.curriculum[-1][1:]


class FreshUtterances:
    """Batches of newly joined utterances at each pass, longer ones as the curriculum has it.

    Each ``iter()`` is the next epoch. What it gives is drawn from torch's global generator, as ``Batches`` does.

    Args:
        voices: the single-word recordings of each speaker.
        config: the recognizer's configuration.
        pretraining: number of utterances, batch size, augmentation.
    """

    def __init__(
        self, voices: Sequence[Sequence[Utterance]], config: RecognizerConfig, pretraining: PretrainConfig
    ) -> None:
        self._voices = voices
        self._config = config
        self._pretraining = pretraining
        self._epoch = 0

    def __len__(self) -> int:
        return -(-len(self._voices) * self._pretraining.utterances // self._pretraining.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        rate, settings = self._config.sample_rate, self._pretraining
        sizes = settings.digits(self._epoch)
        self._epoch += 1
        utterances = [
            utterance
            for words in self._voices
            for utterance in digits.build(words, settings.utterances, rate, generator, sizes)
        ]
        return iter(Batches(utterances, self._config, settings.batch_size, settings.augmentation, equal_lengths=True))


def pretrain(
    recordings: Path,
    config: RecognizerConfig,
    pretraining: PretrainConfig,
    say: Callable[[str], None] = lambda line: None,
) -> Recognizer:
    """Train a recognizer on the training speakers.

    Args:
        recordings: the Free Spoken Digit Dataset's folder.
        config: the recognizer to train.
        pretraining: how to train it.
        say: called with a line of progress after each epoch.

    Returns:
        the recognizer, in evaluation mode.

    Raises:
        DataError: a speaker or a recording is missing or cannot be used.
    """
    voices = [training_words(recordings, speaker, config.sample_rate) for speaker in pretraining.speakers]
    torch.manual_seed(pretraining.seed)
    model = Recognizer(dataclasses.replace(config, dropout=pretraining.dropout))
    batches = FreshUtterances(voices, config, pretraining)
    steps = pretraining.epochs * len(batches)
    optimizer = torch.optim.AdamW(model.parameters(), lr=pretraining.lr, weight_decay=pretraining.weight_decay)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, pretraining.lr, total_steps=steps, pct_start=0.05, cycle_momentum=False
    )
    started = time.perf_counter()
    losses: list[float] = []

    def watch(record: StepRecord) -> None:
        losses.append(record.loss)
        epoch, steps_into = divmod(record.step, len(batches))
        if steps_into == 0:
            mean = statistics.fmean(losses[-len(batches) :])
            say(f"epoch {epoch}/{pretraining.epochs}: loss {mean:.3f}, {time.perf_counter() - started:.0f} s")

    fit(
        model,
        ctc_loss,
        batches,
        optimizer,
        steps=steps,
        scheduler=scheduler,
        max_grad_norm=pretraining.max_grad_norm,
        on_step=watch,
        measure=False,
    )
    trained = Recognizer(config)
    trained.load_state_dict(model.state_dict())
    return trained.eval()


def training_words(recordings: Path, speaker: str, sample_rate: int) -> list[Utterance]:
    """The recordings of one training speaker that may be trained on: not the held-out ones.

    Raises:
        DataError: the folder has too few of them.
    """
    if not os.path.isdir(recordings):
        raise DataError(f"{recordings}: there is no such folder; give the Free Spoken Digit Dataset's.")
    files = [file for file in digits.find(recordings) if file.speaker == speaker and not file.held_out]
    if len(files) < digits.FEWEST_DIGITS:
        raise DataError(f"{recordings}: has {len(files)} training recordings of {speaker}, which is too few.")
    return digits.load(files, sample_rate)


def error_rates(model: Recognizer, recordings: Path) -> dict[str, float]:
    """Word error rate on the test utterances of each speaker, decoded greedily."""
    rates = {}
    for speaker in SPEAKERS:
        config = model.config
        test = load_recordings(
            recordings, sample_rate=config.sample_rate, alphabet=config.alphabet, speaker=speaker, utterances=1
        ).test
        rates[speaker] = word_error_rate([utterance.text for utterance in test], transcribe(model, test))
    return rates


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, write the model and, beside it or where asked, a JSON of its word error rates."""
    defaults = PretrainConfig()
    parser = argparse.ArgumentParser(prog="python -m memfit.speech.pretrain", description="Train the base recognizer.")
    parser.add_argument("--recordings", type=Path, required=True, help="the Free Spoken Digit Dataset's folder")
    parser.add_argument("--out", type=Path, required=True, help="the model file to write")
    parser.add_argument("--report", type=Path, help="the JSON file to write (default: OUT with .json as its ending)")
    parser.add_argument(
        "--held-out", choices=SPEAKERS, default=defaults.held_out, help="who is never trained on (default theo)"
    )
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--epochs", type=_positive, default=defaults.epochs)
    parser.add_argument(
        "--threads", type=_positive, default=2, help="CPU threads; results are repeatable for the same number"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    target = options.report or options.out.with_suffix(".json")
    config = RecognizerConfig()
    pretraining = dataclasses.replace(defaults, seed=options.seed, epochs=options.epochs, held_out=options.held_out)
    try:
        started, cpu_started = time.perf_counter(), time.process_time()
        check_writable(options.out, "model", DataError)
        check_writable(target, "report", DataError)
        model = pretrain(options.recordings, config, pretraining, say=lambda line: print(line, flush=True))
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
        save(model, config, options.out)
        rates = error_rates(model, options.recordings)
        report = {
            "config": config.to_dict(),
            "pretraining": dataclasses.asdict(pretraining),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "wer": rates,
            "seconds": round(seconds, 1),
            "cpu_seconds": round(cpu_seconds, 1),
            "threads": options.threads,
            "torch": torch.__version__,
        }
        with atomic_write(target, "report", DataError) as file:
            file.write(f"{json.dumps(report, indent=2)}\n".encode())
    except MemfitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for speaker, rate in rates.items():
        print(f"{speaker}: WER {rate:.1%}" + (" (never trained on)" if speaker == options.held_out else ""))
    return 0


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
