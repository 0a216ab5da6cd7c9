"""What tells two runs' inputs apart: a hash of their contents, wherever the files lie."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from torch import Tensor


def digest(parts: Iterable[Tensor | str | bytes]) -> str:
    """SHA-256 of texts, bytes and tensors' elements in this order, as hexadecimal digits."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            data = part.detach().cpu().contiguous().numpy().tobytes()
        else:
            data = part.encode(errors="surrogatepass") if isinstance(part, str) else part
        # The length goes in too: "ab", "c" must differ from "a", "bc".
        found.update(len(data).to_bytes(8, "little") + data)
    return found.hexdigest()
