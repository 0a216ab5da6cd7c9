"""From a recognizer's scores to text.

CTC sums over alignments: a text's probability is that of all frame-by-frame paths that become the text when repeated
characters are merged and blanks dropped (Graves et al., "Connectionist Temporal Classification", 2006).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

_Scores = npt.NDArray[np.float64]


def greedy(log_probs: Tensor, lengths: Tensor, alphabet: Sequence[str]) -> list[str]:
    """The text of the single most likely path of each utterance.

    Args:
        log_probs: ``(frames, batch, classes)``, natural logarithms; class 0 is the blank.
        lengths: ``(batch,)`` in frames; what lies beyond is ignored.
        alphabet: the text of each class.

    Returns:
        one text per utterance, without spaces at its ends.
    """
    best = log_probs.argmax(dim=-1).T.cpu()
    texts = []
    for path, length in zip(best, lengths.tolist(), strict=True):
        merged = path[:length].unique_consecutive().tolist()
        texts.append("".join(alphabet[label] for label in merged if label).strip())
    return texts


def prefix_beam(log_probs: Tensor, lengths: Tensor, alphabet: Sequence[str], beam: int = 16) -> list[str]:
    """The most likely text of each utterance by prefix beam search.

    Keeps the ``beam`` likeliest prefixes; each with two probabilities, of its paths that end in a blank and of those
    that end in its last character, since only the former can repeat that character. Exact when the beam is never full.
    Hannun et al., "First-Pass Large Vocabulary Continuous Speech Recognition using Bi-Directional Recurrent DNNs",
    2014.

    Args:
        log_probs: ``(frames, batch, classes)``, natural logarithms; class 0 is the blank.
        lengths: ``(batch,)`` in frames; what lies beyond is ignored.
        alphabet: the text of each class.
        beam: number of prefixes that are kept.

    Returns:
        one text per utterance, without spaces at its ends.

    Raises:
        ValueError: ``beam`` is below 1.
    """
    if beam < 1:
        raise ValueError(f"beam must be at least 1, not {beam}")
    scores = log_probs.detach().double().cpu().numpy()
    texts = []
    for index, length in enumerate(lengths.tolist()):
        labels = _best_prefix(scores[:length, index], beam)
        texts.append("".join(alphabet[label] for label in labels).strip())
    return texts


def _best_prefix(scores: _Scores, beam: int) -> tuple[int, ...]:
    """Labels of the likeliest prefix for ``(frames, classes)`` log probabilities."""
    classes = scores.shape[1]
    prefixes: list[tuple[int, ...]] = [()]
    blank = np.zeros(1)  # log probability of the prefix by paths that end in a blank
    label = np.full(1, -np.inf)  # ... and by paths that end in its last character
    for frame in scores:
        last = np.array([prefix[-1] if prefix else 0 for prefix in prefixes])
        total = np.logaddexp(blank, label)
        stay_blank = total + frame[0]
        stay_label = np.where(last > 0, label + frame[last], -np.inf)
        grow = total[:, None] + frame[None, :]
        repeats = last > 0
        grow[repeats, last[repeats]] = blank[repeats] + frame[last[repeats]]
        grow[:, 0] = -np.inf
        # A prefix that is in the beam may also be reached by growing its parent: the two are one.
        position = {prefix: row for row, prefix in enumerate(prefixes)}
        for row, prefix in enumerate(prefixes):
            parent = position.get(prefix[:-1]) if prefix else None
            if parent is not None:
                stay_label[row] = np.logaddexp(stay_label[row], grow[parent, prefix[-1]])
                grow[parent, prefix[-1]] = -np.inf
        candidates = np.concatenate([np.logaddexp(stay_blank, stay_label), grow.ravel()])
        kept = np.argsort(-candidates, kind="stable")[:beam]
        kept = kept[candidates[kept] > -np.inf]
        grown = kept >= len(prefixes)
        rows, characters = np.divmod(kept - len(prefixes), classes)
        blank = np.where(grown, -np.inf, stay_blank[np.where(grown, 0, kept)])
        label = np.where(grown, candidates[kept], stay_label[np.where(grown, 0, kept)])
        prefixes = [
            (*prefixes[row], int(character)) if new else prefixes[choice]
            for new, row, character, choice in zip(grown, rows, characters, kept, strict=True)
        ]
    return prefixes[int(np.argmax(np.logaddexp(blank, label)))]
