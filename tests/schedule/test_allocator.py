"""Freed tensors must leave the process, also after the allocator has seen large blocks come and go."""

import subprocess
import sys

import pytest

from memfit.schedule.allocator import release_freed_memory

_HOLES = """
import sys
import torch
from memfit.schedule.allocator import release_freed_memory

def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096

assert sys.argv[1] == "leave" or release_freed_memory()
del_me = torch.ones(8 << 20 >> 2); del del_me        # the first free of a large block is what changes malloc's mind
before = resident()
kept = []
for _ in range(20):
    hole = torch.ones(4 << 20 >> 2)
    kept.append(torch.ones(2 << 20 >> 2))
    del hole
kept = kept[-1:]                                      # one block at the end of the heap holds all that was freed
print(resident() - before)
"""


def growth(how: str) -> int:
    run = subprocess.run([sys.executable, "-c", _HOLES, how], capture_output=True, text=True, check=True)
    return int(run.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_blocks_leave_no_holes() -> None:
    assert growth("release") < 6 << 20 < 20 << 20 < growth("leave")


def test_a_tiny_threshold_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 4096"):
        release_freed_memory(100)
