"""Word error rates, and that transcribing leaves the model as it was."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memfit.speech.audio import Utterance
from memfit.speech.metrics import transcribe, word_error_rate
from memfit.speech.model import Recognizer, RecognizerConfig

_TEXTS = st.lists(st.sampled_from(["one", "two", "three"]), max_size=5).map(" ".join)


def _edit_distance(reference: list[str], hypothesis: list[str]) -> int:
    row = list(range(len(hypothesis) + 1))
    for i, word in enumerate(reference, start=1):
        previous, row[0] = row[0], i
        for j, other in enumerate(hypothesis, start=1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (word != other))
    return row[-1]


@settings(max_examples=100, deadline=None)
@given(pairs=st.lists(st.tuples(_TEXTS, _TEXTS), max_size=5))
def test_word_error_rate_is_the_edit_distance_over_the_number_of_words(pairs: list[tuple[str, str]]) -> None:
    errors = sum(_edit_distance(reference.split(), hypothesis.split()) for reference, hypothesis in pairs)
    words = sum(len(reference.split()) for reference, _ in pairs)
    expected = errors / words if words else (float("inf") if errors else 0.0)
    assert word_error_rate([r for r, _ in pairs], [h for _, h in pairs]) == pytest.approx(expected)


def test_lists_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="1 references but 2 hypotheses"):
        word_error_rate(["one"], ["one", "two"])


@pytest.mark.parametrize("beam", [None, 4])
def test_transcribing_does_not_depend_on_batches_and_keeps_the_models_mode(beam: int | None) -> None:
    torch.manual_seed(0)
    model = Recognizer(RecognizerConfig(features=10, layers=2, hidden=16, dropout=0.5)).train()
    with torch.no_grad():
        model.output.weight.mul_(20)  # an untrained recognizer would say nothing
    utterances = [Utterance(torch.randn(2000 + 700 * i), "one", str(i)) for i in range(5)]
    one_by_one = transcribe(model, utterances, beam=beam, batch_size=1)
    assert transcribe(model, utterances, beam=beam, batch_size=3) == one_by_one
    assert any(one_by_one)
    assert model.training
    assert transcribe(model, [], beam=beam) == []
