"""The whole simulation: a network learns offline, goes into memory cells, and learns online, by world and scheme."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from torch import nn

from memfit.errors import MemfitError
from memfit.files import check_writable
from memfit.ledger.target import load_model
from memfit.native import KRONECKER_SUM, operator
from memfit.nvm.config import NvmConfig
from memfit.nvm.data import Images, load_images
from memfit.nvm.devices import ONLINE, check_model, one_thread, run_at_once, run_device, streams_of
from memfit.nvm.figure import check_can_draw, draw
from memfit.nvm.online import RECENT
from memfit.nvm.page import render
from memfit.nvm.pretrain import pretrain
from memfit.nvm.run_report import NvmReport, SchemeResult
from memfit.run import results
from memfit.run.counts import check_count
from memfit.run.identity import digest
from memfit.run.interrupts import InterruptedRun
from memfit.run.progress import Meter
from memfit.run.random_state import undisturbed
from memfit.run.report import JSON, versions
from memfit.weights.technology import technology

FIGURE = "figure.svg"


def simulate(
    config: NvmConfig,
    out: str | Path,
    *,
    resume: bool = False,
    jobs: int = 1,
    notify: Callable[[str], None] | None = None,
    progress: bool = False,
) -> NvmReport:
    """Run every scheme in every world, and write a report into a folder.

    Args:
        config: what to simulate.
        out: folder for ``report.json``, ``report.html``, ``figure.svg``, ``checkpoint.safetensors`` (the offline
            training) and ``online/WORLD-SCHEME.safetensors`` (each device, as it is after the last sample).
        resume: go on from what is in ``out``; what is finished is not run again. The same command with more samples
            goes on from the earlier end.
        jobs: devices at once, from 2 on in processes of their own: a script needs ``if __name__ == "__main__":``, and a
            model of the user's is made in each, and gets the weights and buffers of this one. The results are the same.
        notify: is told, in a sentence each, what happens next.
        progress: show on stderr how far the runs are.

    Returns:
        what ``report.json`` says.

    Raises:
        DataError: the data or the stream cannot be used.
        CheckpointError: a checkpoint is damaged, or made with other settings.
        TrainingError: a weight would become no number.
        MissingExtraError: matplotlib is not installed, without data scikit-learn, or with ``native`` ninja.
        ConversionError: ``native``, and the operator can't be compiled.
        MemfitError: ``out`` holds another run's results or cannot be written; a model of the user's does not fit;
            jobs is below 1.
        InterruptedRun: Ctrl-C or SIGTERM came; ``resume`` goes on.
    """
    check_count("number of jobs", jobs)
    out = Path(out)
    say = notify or (lambda sentence: None)
    check_can_draw()
    if not resume:
        results.refuse_earlier_results(out)
        if os.path.isdir(out / ONLINE) and os.listdir(out / ONLINE):
            raise MemfitError(
                f"{out} holds an earlier run's {ONLINE}: give another --out, or --resume to go on with that run."
            )
    if config.native and any(scheme.startswith("low-rank") for scheme in config.schemes):
        say("native: the C++ operator is compiled on first use, which takes about a minute")
        operator(KRONECKER_SUM)
    images = load_images(config.data) if config.stream is None else None
    with one_thread(), undisturbed():
        own = None if config.model is None else load_model(config.model)
        streams, settings = streams_of(config, images), _settings(config, images)
        if own is not None:
            settings["first_samples_sha256"] = check_model(config, own, streams[config.worlds[0]])
        for folder in (out, out / ONLINE):
            results.prepare(folder)
        check_writable(out / FIGURE, "result", MemfitError)
        model = _trained_offline(config, out, images, resume, say, progress) if own is None else own
        settings["model_sha256"] = digest(tensor for _, tensor in sorted(model.state_dict().items()))
        devices = [(world, scheme) for world in config.worlds for scheme in config.schemes]
        if jobs > 1:
            run_at_once(config, out, model, devices, settings, resume, min(jobs, len(devices)), progress)
        found = []
        for world, scheme in devices:
            with Meter(f"{world}, {scheme}", config.samples, progress and jobs == 1) as meter:
                found.append(
                    run_device(
                        config,
                        out,
                        model,
                        streams[world],
                        (world, scheme),
                        settings,
                        resume or jobs > 1,  # what has run at once is there
                        lambda done, right, worst: meter.show(
                            done, f"{right:.1%} of the last {min(done, RECENT):,} right, worst cell {worst:,} writes"
                        ),
                    )
                )
            say(_in_words(found[-1]))
    report = NvmReport(
        config={**_origin(config), **settings},
        data=_describe(config, images),
        samples_per_second=config.samples_per_second,
        technology=technology(config.memory),
        results=tuple(found),
        versions=versions(),
    )
    picture = draw(report.results)
    results.write_text(out / FIGURE, picture)
    results.write_text(out / results.PAGE, render(report, picture))
    results.write_text(out / results.REPORT, report.to_json())
    return report


def _settings(config: NvmConfig, images: Images | None) -> dict[str, JSON]:
    """What identifies the runs of all devices, without the model."""
    settings: dict[str, JSON] = {
        "seed": config.seed,
        "shift_every": config.shift_every,
    }
    if images is not None:
        settings["data_sha256"] = digest([images.online, images.online_labels])
    if config.native:  # which makes other roundings
        settings["native"] = True
    return settings


def _trained_offline(
    config: NvmConfig, out: Path, images: Images | None, resume: bool, say: Callable[[str], None], progress: bool
) -> nn.Module:
    """The method's network as it leaves the factory."""
    assert images is not None, "a stream of one's own needs a model of one's own"
    say(f"offline: {images.description}")
    checkpoint = out / results.CHECKPOINT
    model, result = pretrain(
        images,
        seed=config.seed,
        steps=config.pretraining_steps,
        checkpoint=checkpoint,
        resume=resume,
        progress=progress,
    )
    if result.signal is not None:
        raise InterruptedRun(result.signal, len(result.records), config.pretraining_steps, checkpoint)
    say("online: each image is predicted first, then learned from")
    return model


def _describe(config: NvmConfig, images: Images | None) -> str:
    return f"Samples of {config.stream}." if images is None else images.description


def _origin(config: NvmConfig) -> dict[str, JSON]:
    return {
        "data": None if config.data is None else str(config.data),
        "model": config.model,
        "stream": config.stream,
        "samples": config.samples,
        "pretraining_steps": config.pretraining_steps if config.model is None else None,
        "writes": {scheme: own._asdict() for scheme in config.schemes if (own := config.writes(scheme))},
        "memory": config.memory,
    }


def _in_words(result: SchemeResult) -> str:
    return (
        f"{result.world}, {result.scheme}: {result.accuracy:.1%} right, {result.final_accuracy:.1%} at the end; "
        f"worst cell {result.cells.worst_cell:,} writes"
    )
