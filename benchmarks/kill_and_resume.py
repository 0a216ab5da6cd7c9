"""Does a run that is killed at any instant and resumed end with the same bits as one that was never killed?

    python benchmarks/kill_and_resume.py

Trains a small recurrent network in a process of its own, undisturbed. Then, for each of 20 random instants that are
spread over the whole of that process, from the start of Python to its end: starts the same run anew, kills it with
SIGKILL at that instant, resumes it to its end, and compares its last checkpoint with the undisturbed run's, bit by bit:
weights, factors, optimizer, scheduler, random generators, the place in the data, and all losses. Writes
results/kill_and_resume.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "kill_and_resume.json"
EVERY = 2
# The clock is not the run's: times differ from one run to the next, and the memory at the measured step may.
NOT_COMPARED = ("/records/seconds", "/records/peaks", "/peak", "/measured_bytes")


def train(checkpoint: Path, steps: int, workers: int) -> int:
    """The run that is killed: all that makes exact resume hard at once, and a state of some megabytes."""
    import numpy
    import torch
    from torch import Tensor, nn
    from torch.utils.data import DataLoader, TensorDataset

    import memfit
    from memfit.fit import fit

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(32, 320, num_layers=2, dropout=0.3, batch_first=True)
            self.norm = nn.BatchNorm1d(320)
            self.head = nn.Linear(320, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.lstm(x)[0][:, -1]))

    def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    torch.set_num_threads(1)
    torch.manual_seed(0)
    numpy.random.seed(0)
    random.seed(0)
    data = TensorDataset(torch.randn(90, 8, 32), torch.randint(0, 8, (90,)))
    model = Network()
    memfit.convert_(model, memfit.LowRankGradient(rank=16, refresh=5), where="lstm")
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    try:
        result = fit(
            model,
            loss,
            DataLoader(data, batch_size=8, shuffle=True, num_workers=workers),
            adam,
            steps=steps,
            scheduler=torch.optim.lr_scheduler.OneCycleLR(adam, 1e-2, total_steps=steps),
            max_grad_norm=1.0,
            checkpoint=checkpoint,
            every=EVERY,
            resume=True,
            settings={"steps": steps},
        )
    except memfit.MemfitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 128 + result.signal if result.signal is not None else 0


def start(checkpoint: Path, steps: int, workers: int = 0) -> subprocess.Popen[bytes]:
    """Begin or resume the run in a process (and a process group) of its own."""
    command = [sys.executable, __file__, "train", str(checkpoint), "--steps", str(steps), "--workers", str(workers)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)


def finish(checkpoint: Path, steps: int) -> None:
    """Run or resume to the end."""
    process = start(checkpoint, steps)
    _, errors = process.communicate()
    if process.returncode != 0:
        raise RuntimeError(f"the run ended with {process.returncode}: {errors.decode()}")


def kill(process: subprocess.Popen[bytes], after: float) -> bool:
    """SIGKILL after so many seconds; False when the process has ended before."""
    try:
        process.communicate(timeout=after)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    return process.returncode == -signal.SIGKILL


def half_written(folder: Path) -> bool:
    """Whether a checkpoint is being written, or was at the process's end."""
    return any(entry.name.endswith(".partial") for entry in os.scandir(folder))


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """The places in two checkpoints' trees that are not the same bits."""
    import torch

    if where.startswith(NOT_COMPARED):
        return []
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [place for key in one for place in differences(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, list | tuple) and type(one) is type(other) and len(one) == len(other):
        return [place for i in range(len(one)) for place in differences(one[i], other[i], f"{where}/{i}")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape and one.stride() == other.stride()
        same = same and torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (one, other)))
        return [] if same else [where]
    return [] if type(one) is type(other) and one == other else [where]


def one_kill(instant: float, steps: int, reference: Any) -> dict[str, Any] | None:
    """Kill a run after ``instant`` seconds and resume it; None when it was over before."""
    from memfit import checkpoint

    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "run.safetensors"
        if not kill(start(path, steps), after=instant):
            return None
        saved = len(checkpoint.load(path)["records"]["loss"]) if path.exists() else 0
        saving = half_written(path.parent)
        finish(path, steps)
        different = differences(reference, checkpoint.load(path))
        return {
            "seconds": round(instant, 3),
            "resumed_from_step": saved,
            "while_saving": saving,
            "left_over": half_written(path.parent),
            "identical": not different,
            "different": different,
        }


def measure(kills: int, steps: int, seed: int) -> dict[str, Any]:
    """All kills; prints a line for each."""
    import safetensors
    import torch

    import memfit  # noqa: F401 - so that its compiled files are there for the runs that are timed
    from memfit import checkpoint

    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "run.safetensors"
        finish(path, 4)  # fills the caches of the file system
        path.unlink()
        begun = time.monotonic()
        finish(path, steps)
        whole = time.monotonic() - begun
        size = path.stat().st_size
        reference = checkpoint.load(path)
    print(f"undisturbed: {steps} steps, {whole:.1f} s, a checkpoint of {size / 2**20:.1f} MiB every {EVERY} steps")

    generator = random.Random(seed)
    runs: list[dict[str, Any]] = []
    while len(runs) < kills:
        instant = (len(runs) + generator.random()) / kills * whole
        begun = time.monotonic()
        run = one_kill(instant, steps, reference)
        if run is None:
            whole = time.monotonic() - begun  # the machine has become faster: other work on it has ended
            print(f"{instant:6.2f} s  the run was over after {whole:.1f} s; once more, at another instant")
            continue
        runs.append(run)
        saving = ", while a checkpoint was being written" if run["while_saving"] else ""
        verdict = "identical" if run["identical"] else f"DIFFERENT in {', '.join(run['different'][:5])}"
        print(
            f"{instant:6.2f} s  killed{saving}; resumed from step {run['resumed_from_step']:3}: {verdict}", flush=True
        )
    return {
        "kills": kills,
        "identical": sum(run["identical"] for run in runs),
        "while_saving": sum(run["while_saving"] for run in runs),
        "settings": {"steps": steps, "every": EVERY, "seed": seed},
        "undisturbed_seconds": round(whole, 3),
        "checkpoint_bytes": size,
        "runs": runs,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "safetensors": safetensors.__version__,
            "system": f"{platform.system()} {platform.machine()}",
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    commands = parser.add_subparsers(dest="command")
    run = commands.add_parser("train", help="the run that is killed")
    run.add_argument("checkpoint", type=Path)
    run.add_argument("--steps", type=int, required=True)
    run.add_argument("--workers", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.command == "train":
        return train(arguments.checkpoint, arguments.steps, arguments.workers)
    result = measure(arguments.kills, arguments.steps, arguments.seed)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{result['identical']} of {result['kills']} bit-identical; written to {arguments.out}")
    return 0 if result["identical"] == result["kills"] else 1


if __name__ == "__main__":
    sys.exit(main())
