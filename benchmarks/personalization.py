"""Word error rate of a recognizer on voices that it never heard, before and after personalization, by method.

Speakers of the Free Spoken Digit Dataset, each with a base recognizer that was trained on the other four: theo with the
one that is shipped, others with what `python -m memfit.speech.pretrain --held-out NAME --out BASES/NAME.safetensors`
makes. 20 training utterances, 60 steps of 5, seeds 0 to 4 (each with other utterances, another order, another random
basis); the 60 test utterances are built from held-out recordings and are the same for all. Every method runs on one
grid of learning rates with the same schedule and clipping, and is quoted at the best of its own mean word error rates.
The training is what `memfit personalize` does. A finished run is written at once and not run again.

Goals: for theo, low-rank at most 0.60 of before, and not worse than dense momentum; over three speakers, low-rank at
least 4.5 % relative below dense momentum, and not above dense Adam.

    python benchmarks/personalization.py --recordings FSDD [--speakers theo lucas george --bases BASES] [--jobs 2]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from memfit.errors import require
from memfit.speech import personalize as task
from memfit.speech.batches import Batches
from memfit.speech.metrics import transcribe, word_error_rate

RESULTS = Path(__file__).parent / "results" / "personalization.json"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "personalization.svg"
SEEDS = range(5)
LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
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
    model, recordings = task.load(config)
    return word_error_rate([utterance.text for utterance in recordings.test], transcribe(model, recordings.test))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recordings", type=Path, required=True, help="the Free Spoken Digit Dataset's folder")
    parser.add_argument("--speakers", nargs="+", default=["theo"], help="voices to adapt to (default theo)")
    parser.add_argument("--bases", type=Path, help="folder of NAME.safetensors, for all speakers but theo")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each (default 2)")
    options = parser.parse_args()
    if options.bases is None and options.speakers != ["theo"]:
        parser.error("the shipped base has heard all speakers but theo: give --bases for the others")

    wanted: dict[str, task.PersonalizeConfig] = {}
    for speaker in options.speakers:
        base = None if speaker == "theo" else options.bases / f"{speaker}.safetensors"
        start = task.PersonalizeConfig(
            recordings=options.recordings, speaker=speaker, base=base, utterances=20, steps=60, batch_size=5
        )
        wanted[f"{speaker}/before"] = start
        for (name, method), lr, seed in product(METHODS.items(), LEARNING_RATES, SEEDS):
            wanted[f"{speaker}/{name}/{lr:g}/{seed}"] = replace(start, lr=lr, seed=seed, **method)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    runs: dict[str, float] = results.get("runs", {})
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        pending = {
            pool.submit(untrained_error_rate if key.endswith("before") else error_rate, config): key
            for key, config in wanted.items()
            if key not in runs
        }
        for run in as_completed(pending):
            runs[pending[run]] = run.result()
            write(runs, options.speakers)
    write(runs, options.speakers)
    found = summary(runs, options.speakers)
    show(found)
    draw(found)


def summary(runs: dict[str, float], speakers: list[str]) -> dict[str, Any]:
    """Of each speaker the rate before, and of each method the best learning rate's mean and spread over the seeds."""
    found: dict[str, Any] = {}
    for speaker in speakers:
        before = runs[f"{speaker}/before"]
        found[speaker] = {"before": before}
        for name in METHODS:
            by_lr = {lr: [runs[f"{speaker}/{name}/{lr:g}/{seed}"] for seed in SEEDS] for lr in LEARNING_RATES}
            best = min(by_lr, key=lambda lr: statistics.fmean(by_lr[lr]))
            found[speaker][name] = {
                "best_lr": best,
                "wer": statistics.fmean(by_lr[best]),
                "of_before": statistics.fmean(by_lr[best]) / before,
                "wer_by_seed": by_lr[best],
                "wer_by_lr": {f"{lr:g}": statistics.fmean(rates) for lr, rates in by_lr.items()},
            }
    mean = {name: statistics.fmean(found[speaker][name]["wer"] for speaker in speakers) for name in METHODS}
    found["mean"] = {"before": statistics.fmean(runs[f"{speaker}/before"] for speaker in speakers), **mean}
    return found


def write(runs: dict[str, float], speakers: list[str]) -> None:
    about = {"utterances": 20, "steps": 60, "batch_size": 5, "seeds": len(SEEDS), "torch": torch.__version__}
    trained = product(speakers, METHODS, LEARNING_RATES, SEEDS)
    wanted = [f"{speaker}/{name}/{lr:g}/{seed}" for speaker, name, lr, seed in trained]
    complete = all(key in runs for key in (*wanted, *(f"{speaker}/before" for speaker in speakers)))
    content = {
        "about": about,
        "summary": summary(runs, speakers) if complete else None,
        "runs": dict(sorted(runs.items())),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")


def show(found: dict[str, Any]) -> None:
    for speaker, row in found.items():
        if speaker == "mean":
            continue
        print(f"\n{speaker}, before: {row['before']:.1%}")
        print(f"{'':18}" + "".join(f"{lr:>9.0e}" for lr in LEARNING_RATES) + f"{'best':>9}{'of before':>11}")
        for name in METHODS:
            means = "".join(f"{rate:>9.1%}" for rate in row[name]["wer_by_lr"].values())
            print(f"{name:18}{means}{row[name]['wer']:>9.1%}{row[name]['of_before']:>11.2f}")
    print("\nmean over the speakers: " + ", ".join(f"{name} {rate:.1%}" for name, rate in found["mean"].items()))


def draw(found: dict[str, Any]) -> None:
    """Word error rates over the learning rates, a panel per speaker."""
    pyplot = require("matplotlib.pyplot", extra="bench")
    speakers = [speaker for speaker in found if speaker != "mean"]
    figure, panels = pyplot.subplots(
        1, len(speakers), figsize=(2.8 * len(speakers) + 0.6, 3.2), layout="constrained", sharey=True, squeeze=False
    )
    for axes, speaker in zip(panels[0], speakers, strict=True):
        row = found[speaker]
        axes.axhline(100 * row["before"], color="grey", linestyle=":", label="before")
        for name in METHODS:
            rates = [100 * rate for rate in row[name]["wer_by_lr"].values()]
            axes.plot(LEARNING_RATES, rates, marker="o", markersize=3, label=name)
        axes.set(xscale="log", xlabel="learning rate", title=speaker, ylim=(0, 35))
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("word error rate, %")
    panels[0][-1].legend(frameon=False, fontsize="small")
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, metadata={"Date": None})


if __name__ == "__main__":
    main()
