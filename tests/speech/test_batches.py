"""What a training step sees: the right labels, the same batches for the same random state, and a loss that learns."""

from __future__ import annotations

import pytest
import torch

from memfit.errors import DataError
from memfit.speech.audio import Utterance
from memfit.speech.augment import Augmentation, resample
from memfit.speech.batches import Batch, Batches, ctc_loss
from memfit.speech.features import LogMel
from memfit.speech.model import Recognizer, RecognizerConfig
from memfit.speech.text import frames_needed

CONFIG = RecognizerConfig(features=12, layers=1, hidden=16)
TEXTS = ("one", "three", "it's a test", "oh", "seven two")


def _utterances() -> list[Utterance]:
    generator = torch.Generator().manual_seed(1)
    return [
        Utterance(torch.randn(4000 + 900 * i, generator=generator), text, f"{i}.wav") for i, text in enumerate(TEXTS)
    ]


def _equal(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(getattr(a, name), getattr(b, name))
        for a, b in zip(first, second, strict=True)
        for name in ("features", "lengths", "targets", "target_lengths")
    )


def _texts(batches: Batches) -> list[str]:
    return [
        "".join(CONFIG.alphabet[label] for label in row[:length])
        for batch in batches
        for row, length in zip(batch.targets.tolist(), batch.target_lengths.tolist(), strict=True)
    ]


@pytest.mark.parametrize("augmentation", [None, Augmentation()])
@pytest.mark.parametrize("equal_lengths", [False, True])
def test_a_pass_has_each_utterance_once_and_follows_the_global_random_state(
    augmentation: Augmentation | None, equal_lengths: bool
) -> None:
    batches = Batches(_utterances(), CONFIG, 2, augmentation, equal_lengths=equal_lengths)
    assert len(batches) == 3
    assert sorted(_texts(batches)) == sorted(TEXTS)

    torch.manual_seed(5)
    first = list(batches)
    assert not _equal(first, list(batches))  # another pass, another order
    torch.manual_seed(5)
    iterator = iter(batches)
    torch.rand(7)  # what a model draws between batches (dropout) must not matter
    assert _equal(first, list(iterator))


def test_features_are_those_of_the_recordings() -> None:
    log_mel = LogMel(CONFIG.sample_rate, CONFIG.features)
    expected = {utterance.text: log_mel([utterance.audio])[0][0] for utterance in _utterances()}
    for batch in Batches(_utterances(), CONFIG, 3):
        for row, length, target, count in zip(
            batch.features, batch.lengths, batch.targets, batch.target_lengths, strict=True
        ):
            text = "".join(CONFIG.alphabet[label] for label in target[:count].tolist())
            assert torch.equal(row[:length], expected[text])
            assert not row[length:].any()


def test_equal_lengths_leave_no_padding() -> None:
    for batch in Batches(_utterances(), CONFIG, 2, Augmentation(), equal_lengths=True):
        assert bool((batch.lengths == batch.features.shape[1]).all())


def test_a_recording_too_short_for_its_text_is_refused_by_name() -> None:
    short = Utterance(torch.randn(1000), "a text that nobody says so fast", "fast.wav")
    with pytest.raises(DataError, match=r"fast\.wav: 0\.12 s of audio are too short for the 31 characters"):
        Batches([*_utterances(), short], CONFIG, 2)
    with pytest.raises(DataError, match="no utterances"):
        Batches([], CONFIG, 2)
    with pytest.raises(ValueError, match="batch_size"):
        Batches(_utterances(), CONFIG, 0)


def test_the_loss_of_the_shortest_recording_that_is_accepted_is_finite() -> None:
    labels = [1, 1, 2]
    assert frames_needed(labels) == 4
    samples = 200 + 80 * (4 * CONFIG.stack - CONFIG.stack)  # the fewest samples that give four output frames
    accepted = Utterance(torch.randn(samples), "eel", "eel.wav")
    (batch,) = Batches([accepted], CONFIG, 1)
    model = Recognizer(CONFIG)
    log_probs, lengths = model(batch.features, batch.lengths)
    assert lengths.tolist() == [4]
    loss = torch.nn.functional.ctc_loss(log_probs, batch.targets, lengths, batch.target_lengths, zero_infinity=False)
    assert bool(loss.isfinite())
    with pytest.raises(DataError, match=r"eel\.wav"):
        Batches([Utterance(accepted.audio[:-80], "eel", "eel.wav")], CONFIG, 1)


def test_the_loss_is_the_mean_over_utterances_of_ctc_per_character() -> None:
    torch.manual_seed(0)
    model = Recognizer(CONFIG)
    (batch,) = Batches(_utterances(), CONFIG, 5)
    log_probs, lengths = model(batch.features, batch.lengths)
    singly = [
        torch.nn.functional.ctc_loss(
            log_probs[: lengths[i], i], batch.targets[i, :count], lengths[i], count, reduction="sum"
        )
        / count
        for i, count in enumerate(batch.target_lengths)
    ]
    torch.testing.assert_close(ctc_loss(model, batch), torch.stack(singly).mean())


def test_a_few_steps_lower_the_loss() -> None:
    torch.manual_seed(0)
    model = Recognizer(CONFIG)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    (batch,) = Batches(_utterances(), CONFIG, 5)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = ctc_loss(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_a_faster_recording_is_shorter_and_higher() -> None:
    time = torch.arange(8000) / 8000
    faster = resample(torch.sin(2 * torch.pi * 400 * time), 1.25)
    assert len(faster) == pytest.approx(6400, abs=64)
    peak_hertz = int(torch.fft.rfft(faster).abs().argmax()) * 8000 / len(faster)
    assert peak_hertz == pytest.approx(500, abs=5)
    assert float(faster.abs().max()) == pytest.approx(1, abs=0.1)


def test_masks_blank_whole_stretches_within_the_utterance() -> None:
    augmentation = Augmentation(time_masks=1, time_mask_frames=10, band_masks=1, band_mask_width=3)
    features = torch.ones(64, 50, 12)
    lengths = torch.full((64,), 30)
    masked = augmentation.masked(features, lengths, torch.Generator().manual_seed(0))
    blank_frames = (masked == 0).all(dim=2)
    blank_bands = (masked == 0).all(dim=1)
    assert not blank_frames[:, 30:].any()
    assert 0 < int(blank_frames.sum(dim=1).max()) <= 10
    assert 0 < int(blank_bands.sum(dim=1).max()) <= 3
    assert torch.equal(masked != 0, ~blank_frames[:, :, None] & ~blank_bands[:, None, :])


def test_noise_has_the_ratio_that_was_asked_for() -> None:
    augmentation = Augmentation(noise=(20.0, 20.0))
    wave = torch.sin(torch.arange(8000) / 5)
    (noisy,) = augmentation.noisy([wave], torch.Generator().manual_seed(0))
    ratio = 10 * torch.log10(wave.square().mean() / (noisy - wave).square().mean())
    assert float(ratio) == pytest.approx(20, abs=0.5)
