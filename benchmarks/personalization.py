"""Word error rate of a recognizer on a voice that it never heard, before and after personalization, by method.

The shipped base recognizer, the speaker theo of the Free Spoken Digit Dataset, 20 training utterances, 60 steps of 5,
seeds 0 to 4 (each with other utterances, another order, another random basis); the 60 test utterances are built from
held-out recordings and are the same for all. Every method runs on the same grid of learning rates with the same
schedule and clipping, and is quoted at the best of its own mean word error rates. The training is what
`memfit personalize` does.

Goals: low-rank at most 0.60 of before, and not worse than dense momentum.

    python benchmarks/personalization.py --recordings FSDD [--jobs 2]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from memfit.speech import personalize as task
from memfit.speech.batches import Batches
from memfit.speech.data import load_recordings
from memfit.speech.metrics import transcribe, word_error_rate
from memfit.speech.model import load_base

RESULTS = Path(__file__).parent / "results" / "personalization.json"
SPEAKER, SEEDS = "theo", range(5)
LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
METHODS: dict[str, dict[str, Any]] = {
    "low-rank": {"method": "low-rank"},
    "dense momentum": {"method": "momentum"},
    "dense adam": {"method": "adam"},
}


def error_rate(config: task.PersonalizeConfig) -> float:
    """The word error rate on the test utterances after the training of ``config``; before it, with no steps."""
    torch.set_num_threads(1)
    model, recordings = task.load(config)
    task.convert(config, model)
    task.train(config, model, Batches(recordings.train, model.config, config.batch_size), measure=False)
    model.eval()
    return word_error_rate([utterance.text for utterance in recordings.test], transcribe(model, recordings.test))


def untrained_error_rate(config: task.PersonalizeConfig) -> float:
    """The base's word error rate on the same test utterances."""
    torch.set_num_threads(1)
    model = load_base()
    test = load_recordings(
        config.recordings, sample_rate=model.config.sample_rate, alphabet=model.config.alphabet, speaker=config.speaker
    ).test
    return word_error_rate([utterance.text for utterance in test], transcribe(model, test))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recordings", type=Path, required=True, help="the Free Spoken Digit Dataset's folder")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each (default 2)")
    options = parser.parse_args()

    start = task.PersonalizeConfig(
        recordings=options.recordings, speaker=SPEAKER, utterances=20, steps=60, batch_size=5
    )
    grid = {(name, lr): replace(start, lr=lr, **METHODS[name]) for name in METHODS for lr in LEARNING_RATES}
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        before = pool.submit(untrained_error_rate, start)
        running = {
            point: [pool.submit(error_rate, replace(config, seed=seed)) for seed in SEEDS]
            for point, config in grid.items()
        }
        rates = {point: [run.result() for run in runs] for point, runs in running.items()}

    print(f"before: {before.result():.1%}")
    print(f"{'':18}" + "".join(f"{lr:>9.0e}" for lr in LEARNING_RATES) + f"{'best':>9}{'of before':>11}")
    summary: dict[str, Any] = {}
    for name in METHODS:
        means = {lr: statistics.fmean(rates[name, lr]) for lr in LEARNING_RATES}
        best = min(means, key=means.__getitem__)
        summary[name] = {
            "best_lr": best,
            "wer_mean": means[best],
            "wer_by_seed": rates[name, best],
            "of_before": means[best] / before.result(),
            "wer_by_lr": {f"{lr:g}": rates[name, lr] for lr in LEARNING_RATES},
            "default_lr": replace(start, **METHODS[name]).learning_rate,
        }
        print(
            f"{name:18}"
            + "".join(f"{mean:>9.1%}" for mean in means.values())
            + f"{means[best]:>9.1%}{means[best] / before.result():>11.2f}"
        )
    RESULTS.parent.mkdir(exist_ok=True)
    about = {
        "speaker": SPEAKER,
        "seeds": list(SEEDS),
        "utterances": start.utterances,
        "steps": start.steps,
        "batch_size": start.batch_size,
        "rank": start.rank,
        "torch": torch.__version__,
    }
    RESULTS.write_text(json.dumps({"about": about, "wer_before": before.result(), "methods": summary}, indent=1) + "\n")


if __name__ == "__main__":
    main()
