"""What tells two runs' inputs apart: a hash of their contents, wherever the files lie."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def digest(parts: Iterable[Tensor | str | bytes]) -> str:
    """SHA-256 of texts, bytes and tensors' elements in this order, as hexadecimal digits."""
    found = hashlib.sha256()
    for part in parts:
        data: bytes | memoryview
        if isinstance(part, Tensor):
            # A view, not a copy: arrays of images are large.
            data = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        else:
            data = part.encode(errors="surrogatepass") if isinstance(part, str) else part
        # The length goes in too: "ab", "c" must differ from "a", "bc".
        found.update(len(data).to_bytes(8, "little"))
        found.update(data)
    return found.hexdigest()
