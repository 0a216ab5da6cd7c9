"""Two processes on one machine: DistributedDataParallel reduces the factors' gradients and keeps replicas equal."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest
import torch.distributed

_WORKER = """
import sys
import torch
from torch import nn
import torch.distributed as dist
import memfit

rank, port = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
torch.set_num_threads(1)

def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    return memfit.convert_(model, memfit.LowRankGradient(rank=2, refresh=4))

def train(model, inner, x, y):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(10):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    return memfit.state_dict(inner)

data = torch.Generator().manual_seed(1)
x, y = torch.randn(16, 6, generator=data).double(), torch.randn(16, 4, generator=data).double()
replica = build()
found = train(nn.parallel.DistributedDataParallel(replica), replica, x.chunk(2)[rank], y.chunk(2)[rank])
alone = build()
expected = train(alone, alone, x, y)
for name in expected:
    torch.testing.assert_close(found[name], expected[name])
print("equal")
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_two_processes_train_like_one_on_the_joined_batch() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    workers = [
        subprocess.Popen([sys.executable, "-c", _WORKER, rank, port], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for rank in "01"
    ]
    for worker in workers:
        out, err = worker.communicate(timeout=300)
        assert (worker.returncode, out) == (0, b"equal\n"), err.decode()
