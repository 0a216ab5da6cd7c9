"""Which part of the data a run does not train on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

_SHARE = 0.2


def hold_out(items: Sequence[T], names: Sequence[str]) -> tuple[list[T], list[T]]:
    """Divide into what to train on, and a fifth (at least one) to test with, each in its order.

    Which ones is decided by a hash of the names alone: it is the same for every seed, and hardly moves when items are
    added.

    Args:
        items: what is divided.
        names: of each item, all different.
    """
    hashes = [hashlib.sha256(name.encode(errors="surrogatepass")).digest() for name in names]
    order = sorted(range(len(items)), key=hashes.__getitem__)
    test = set(order[: max(1, round(_SHARE * len(items)))])
    return [item for i, item in enumerate(items) if i not in test], [items[i] for i in sorted(test)]
