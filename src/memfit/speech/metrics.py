"""How good a recognizer is: the words that it gets wrong."""

from __future__ import annotations

from collections.abc import Sequence

from memfit.errors import require
from memfit.run.modes import evaluating
from memfit.speech import decode
from memfit.speech.audio import Utterance
from memfit.speech.features import LogMel
from memfit.speech.model import Recognizer


def word_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Substituted, deleted and inserted words over all texts, relative to the number of words in the references.

    Args:
        references: what was said.
        hypotheses: what was recognized, in the same order.

    Returns:
        0 for no error. It exceeds 1 when there are more errors than words. Words recognized where nothing was said are
        insertions too; without a single word in the references the rate is 0 or infinite.

    Raises:
        ValueError: the two differ in number.
        MissingExtraError: ``jiwer`` is not installed.
    """
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references but {len(hypotheses)} hypotheses")
    jiwer = require("jiwer", extra="speech")
    # jiwer refuses empty references, and whatever is heard there is an insertion.
    silent = [reference.split() == [] for reference in references]
    spoken = [pair for pair, empty in zip(zip(references, hypotheses, strict=True), silent, strict=True) if not empty]
    errors = sum(len(text.split()) for text, empty in zip(hypotheses, silent, strict=True) if empty)
    if not spoken:
        return float("inf") if errors else 0.0
    result = jiwer.process_words([reference for reference, _ in spoken], [hypothesis for _, hypothesis in spoken])
    errors += result.substitutions + result.deletions + result.insertions
    return errors / sum(len(reference.split()) for reference, _ in spoken)


def transcribe(
    model: Recognizer, utterances: Sequence[Utterance], beam: int | None = None, batch_size: int = 16
) -> list[str]:
    """Recognize utterances.

    Args:
        model: a recognizer, converted or not; left in the mode, training or evaluation, in which it came.
        utterances: what to listen to; their texts are not looked at.
        beam: width of a prefix beam search, or None for greedy decoding.
        batch_size: utterances at a time.

    Returns:
        one text per utterance.
    """
    config = model.config
    log_mel = LogMel(config.sample_rate, config.features)
    device = next(model.parameters()).device
    texts: list[str] = []
    with evaluating(model):
        for start in range(0, len(utterances), batch_size):
            chosen = utterances[start : start + batch_size]
            features, lengths = log_mel([utterance.audio for utterance in chosen])
            log_probs, out_lengths = model(features.to(device), lengths)
            if beam is None:
                texts += decode.greedy(log_probs, out_lengths, config.alphabet)
            else:
                texts += decode.prefix_beam(log_probs, out_lengths, config.alphabet, beam)
    return texts
