"""Decoding against brute force: the sum over every alignment of every text."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memfit.speech.decode import greedy, prefix_beam

ALPHABET = ("<blank>", "a", "b", "c")


def _collapse(path: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(label for label, _ in itertools.groupby(path) if label)


def _brute_force(scores: torch.Tensor) -> dict[tuple[int, ...], float]:
    """Probability of each label sequence, summed over all of its alignments."""
    frames, classes = scores.shape
    probabilities: dict[tuple[int, ...], float] = {}
    for path in itertools.product(range(classes), repeat=frames):
        probability = math.exp(sum(float(scores[t, label]) for t, label in enumerate(path)))
        labels = _collapse(path)
        probabilities[labels] = probabilities.get(labels, 0.0) + probability
    return probabilities


def _text(labels: tuple[int, ...]) -> str:
    return "".join(ALPHABET[label] for label in labels)


def _random_scores(seed: int, frames: int, classes: int, sharpness: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(frames, classes, generator=generator, dtype=torch.float64)).log_softmax(dim=-1)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**31), frames=st.integers(1, 5), classes=st.integers(2, 4), sharpness=st.floats(0.1, 4.0))
def test_prefix_beam_finds_the_text_that_brute_force_finds(
    seed: int, frames: int, classes: int, sharpness: float
) -> None:
    scores = _random_scores(seed, frames, classes, sharpness)
    (found,) = prefix_beam(scores[:, None], torch.tensor([frames]), ALPHABET, beam=10_000)
    probabilities = _brute_force(scores)
    best = max(probabilities.values())
    # Two texts may tie to within rounding, so the found one must be as likely as the best one.
    by_text = {_text(labels): probability for labels, probability in probabilities.items()}
    assert by_text[found] == pytest.approx(best, rel=1e-9)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), frames=st.integers(1, 6))
def test_greedy_collapses_the_likeliest_path(seed: int, frames: int) -> None:
    scores = _random_scores(seed, frames, 4, 2.0)
    path = max(
        itertools.product(range(4), repeat=frames), key=lambda p: sum(float(scores[t, c]) for t, c in enumerate(p))
    )
    assert greedy(scores[:, None], torch.tensor([frames]), ALPHABET) == [_text(_collapse(path))]


def test_a_doubled_character_needs_a_blank_between() -> None:
    def sure(*labels: int) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor(labels), 4).double().mul(20).log_softmax(dim=-1)[:, None]

    for decoder in (greedy, prefix_beam):
        assert decoder(sure(1, 1, 0, 1, 2, 2), torch.tensor([6]), ALPHABET) == ["aab"]
        assert decoder(sure(1, 1, 1, 2), torch.tensor([4]), ALPHABET) == ["ab"]
        assert decoder(sure(0, 0), torch.tensor([2]), ALPHABET) == [""]


def test_summing_alignments_can_beat_the_likeliest_path() -> None:
    scores = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.5, 0.3, 0.2, 0.0]]).log()[:, None]
    assert greedy(scores, torch.tensor([2]), ALPHABET) == [""]
    assert prefix_beam(scores, torch.tensor([2]), ALPHABET) == ["a"]  # 0.09 + 0.15 + 0.15 against 0.25


def test_frames_beyond_an_utterances_length_are_ignored_and_ends_are_stripped() -> None:
    alphabet = ("<blank>", " ", "x")
    labels = torch.tensor([[1, 2, 1, 2, 2], [2, 0, 2, 2, 2]]).T
    scores = torch.nn.functional.one_hot(labels, 3).float().mul(20).log_softmax(dim=-1)
    for decoder in (greedy, prefix_beam):
        assert decoder(scores, torch.tensor([3, 1]), alphabet) == ["x", "x"]


def test_a_narrow_beam_still_gives_a_text_and_no_beam_is_refused() -> None:
    scores = _random_scores(0, 50, 4, 1.0)[:, None]
    assert isinstance(prefix_beam(scores, torch.tensor([50]), ALPHABET, beam=1)[0], str)
    with pytest.raises(ValueError, match="beam must be at least 1"):
        prefix_beam(scores, torch.tensor([50]), ALPHABET, beam=0)
