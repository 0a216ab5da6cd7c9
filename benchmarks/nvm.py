"""Online learning in non-volatile memory: five schemes in four worlds, as in the method's paper, on MNIST.

A network that was trained offline sees so many images, one at a time, and learns from each after it has predicted it.
Every scheme first runs a sweep with a seed of its own: one grid of learning rates for the biases (by the scheme that
learns nothing else; the others then use the best, but for max-norm, which is for biases too), one grid each for the
weights, and for the low-rank schemes the samples between writes, and the share of a weight's cells below which nothing
is written. With max-norm there is a second grid, of biased sums that are written where their samples agree. What is
best is decided by the mean over the four worlds of the moving average of accuracy at the sweep's end, and is the same
in all worlds and for all seeds; with max-norm, of what writes its worst cell at most a thousandth as often as SGD does
pixel by pixel in each world of the sweep. Low rank with max-norm runs at another setting too, the best without
agreement, whatever it writes. Seeds differ in the offline training, the images, the drift, and the random signs. A
finished run is written at once and not run again. Low rank is by its C++ operator.

SGD's writes are counted in two ways: once per sample, with a buffer as large as the weight in which a convolution's
gradient adds up; and, as the paper does, once per pixel, without it. Low rank needs no such buffer.

Goals: low rank with max-norm at least as accurate at the end as SGD in every world and clearly more in the two worlds
that drift, with at most a thousandth of the writes of SGD's worst cell.

    python benchmarks/nvm.py --data MNIST [--samples 20000] [--jobs 2]
    python benchmarks/nvm.py --data MNIST --speed
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean, median
from time import perf_counter
from typing import Any

import torch

from memfit import checkpoint
from memfit.nvm.data import load_images
from memfit.nvm.figure import draw
from memfit.nvm.model import LIMIT, CharacterNet
from memfit.nvm.online import learn_online
from memfit.nvm.pretrain import pretrain
from memfit.nvm.run_report import SchemeResult, result_of
from memfit.nvm.schemes import RANK, RATES, SCHEMES, Learner, Rates, Scheme, Writes
from memfit.nvm.worlds import CHUNK, WORLDS, ImageStream, World, drift_
from memfit.weights.cell_report import CellReport
from memfit.weights.technology import TECHNOLOGIES

RESULTS = Path(__file__).parent / "results" / "nvm.json"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "nvm.svg"
SEEDS = range(3)
SWEEP_SEED = 100
SWEEP_SAMPLES = 5_000
BIAS_RATES = (0.001, 0.003, 0.01, 0.03)
WEIGHT_RATES: dict[Scheme, tuple[float, ...]] = {
    "sgd": (0.003, 0.01, 0.03, 0.1, 0.3),
    "low-rank": (0.1, 0.3),
    "low-rank-max-norm": (0.01, 0.02),
}
MAX_NORM_BIAS_RATE = 0.01  # where biases' gradients are divided by their largest element too; the paper's
PERIODS: dict[Scheme, tuple[int, ...]] = {"low-rank": (10, 13, 20), "low-rank-max-norm": (10, 20)}
DENSITIES: dict[Scheme, tuple[float, ...]] = {"low-rank": (0.01, 0.03), "low-rank-max-norm": (0.03, 0.1, 0.2)}
# With max-norm: rate, samples between writes, share of cells, agreement, and whether sums are unbiased. The last two
# are agreement without bias, and bias without agreement.
OTHER_SUMS = [
    *product((0.03, 0.05), (5, 8), (0.1, 0.2), (0.0,), (False,)),
    (0.03, 5, 0.1, 0.0, True),
    (0.05, 15, 0.1, None, False),
]
SHARE = 1 / 1000  # of SGD's writes pixel by pixel: what low rank with max-norm may write
KINDS = 4  # of shifts: each run sees all of them


Settings = tuple[float, float, int, float, float | None, bool]
"""As in :class:`Setting`, from ``lr`` on."""


@dataclass(frozen=True)
class Setting:
    """One run.

    Attributes:
        folder: where networks that were trained offline are kept.
        period: and what follows: see :class:`memfit.nvm.schemes.Writes`.
    """

    data: Path
    folder: Path
    world: World
    scheme: Scheme
    seed: int
    samples: int
    lr: float = 0.0
    bias_lr: float = 0.0
    period: int = 0
    density: float = 0.0
    agreement: float | None = None
    unbiased: bool = True

    @property
    def key(self) -> str:
        rates = f"{self.lr:g}/{self.bias_lr:g}/{self.period}/{self.density:g}"
        if self.agreement is not None:
            rates += f"/agreement {self.agreement:g}"
        if not self.unbiased:
            rates += "/biased"
        return f"{self.world}/{self.scheme}/{rates}/{self.samples}/{self.seed}"

    @property
    def writes(self) -> Writes | None:
        return Writes(self.period, self.density, self.agreement, self.unbiased) if self.period else None


def offline(setting: Setting) -> None:
    """Train the network of a seed, once."""
    torch.set_num_threads(1)
    path = setting.folder / f"{setting.seed}.safetensors"
    if not path.exists():
        model, _ = pretrain(load_images(setting.data), seed=setting.seed)
        checkpoint.save(path, model.state_dict())


def online(setting: Setting) -> dict[str, Any]:
    """One device in one world."""
    torch.set_num_threads(1)
    images = load_images(setting.data)
    model = CharacterNet(images.size, images.classes)
    model.load_state_dict(checkpoint.load(setting.folder / f"{setting.seed}.safetensors"))  # type: ignore[arg-type]
    rates = Rates(setting.lr, setting.bias_lr)
    learner = Learner(
        model,
        setting.scheme,
        rates,
        limit=LIMIT,
        seed=setting.seed,
        writes=setting.writes,
        native=True,
    )
    stream = ImageStream(images, setting.world, setting.seed, setting.samples // KINDS // 100 * 100)
    record = learn_online(learner, stream, world=setting.world, seed=setting.seed, samples=setting.samples)
    result = result_of(
        learner, record, world=setting.world, seed=setting.seed, rates=rates, technology=TECHNOLOGIES["rram"]
    )
    how = setting.writes._asdict() if setting.writes else {}
    return {**result.to_dict(samples_per_second=1.0), **how, "native": setting.writes is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="MNIST: an .npz file or a folder of IDX files")
    parser.add_argument("--samples", type=int, default=20_000, help="of each run (default 20,000)")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each (default 2)")
    parser.add_argument("--work", type=Path, default=Path("build/nvm"), help="folder of the trained networks")
    parser.add_argument("--speed", action="store_true", help="time a sample of each scheme, in turn, and nothing else")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if options.speed:
        found["milliseconds_per_sample"] = speed(options.data, options.work)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        return
    runs: dict[str, dict[str, Any]] = {**found.get("runs", {}), **(found.get("without_agreement") or {})}
    sweep: dict[str, dict[str, float]] = found.get("sweep", {})

    def make(world: World, scheme: Scheme, seed: int, samples: int, *rates: Any) -> Setting:
        return Setting(options.data, options.work, world, scheme, seed, samples, *rates)

    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:

        def all_of(work: Callable[[Setting], Any], settings: Iterable[Setting], keep: Callable[[Setting, Any], None]):
            pending = {pool.submit(work, setting): setting for setting in settings}
            for run in as_completed(pending):
                keep(pending[run], run.result())

        def swept(
            candidates: list[tuple[Scheme, Settings]], limits: dict[World, float] | None = None
        ) -> dict[Scheme, Settings]:
            """The best candidate of each scheme; with max-norm, of those that keep within the limits of writes."""
            of = {
                (scheme, rates): {world: make(world, scheme, SWEEP_SEED, SWEEP_SAMPLES, *rates) for world in WORLDS}
                for scheme, rates in candidates
            }

            def keep(setting: Setting, result: dict[str, Any]) -> None:
                kept = ("final_accuracy", "worst_cell_writes", "worst_cell_writes_by_pixel")
                sweep[setting.key] = {name: result[name] for name in kept}
                write(runs, sweep, options.samples)

            settings = [setting for by_world in of.values() for setting in by_world.values()]
            all_of(online, (setting for setting in settings if setting.key not in sweep), keep)
            means: dict[Scheme, dict[Settings, float]] = {}
            for (scheme, rates), by_world in of.items():
                results = {world: sweep[setting.key] for world, setting in by_world.items()}
                if (
                    limits
                    and scheme == "low-rank-max-norm"
                    and any(each["worst_cell_writes"] > limits[world] for world, each in results.items())
                ):
                    continue
                means.setdefault(scheme, {})[rates] = fmean(each["final_accuracy"] for each in results.values())
            return {scheme: max(of, key=of.__getitem__) for scheme, of in means.items()}

        all_of(
            offline,
            [make("control", "inference", seed, 0) for seed in (SWEEP_SEED, *SEEDS)],
            lambda setting, nothing: None,
        )
        best = swept([("bias", (0.0, rate, 0, 0.0, None, True)) for rate in BIAS_RATES])
        bias_rate = best["bias"][1]
        best |= swept([("sgd", (rate, bias_rate, 0, 0.0, None, True)) for rate in WEIGHT_RATES["sgd"]])
        sgd = {world: sweep[make(world, "sgd", SWEEP_SEED, SWEEP_SAMPLES, *best["sgd"]).key] for world in WORLDS}
        limits = {world: SHARE * result["worst_cell_writes_by_pixel"] for world, result in sgd.items()}
        low_rank: list[tuple[Scheme, Settings]] = [
            (scheme, (rate, of_biases, period, density, None, True))
            for scheme, of_biases in (("low-rank", bias_rate), ("low-rank-max-norm", MAX_NORM_BIAS_RATE))
            for rate in WEIGHT_RATES[scheme]
            for period in PERIODS[scheme]
            for density in DENSITIES[scheme]
        ]
        without_agreement = swept(low_rank)["low-rank-max-norm"]
        low_rank += [("low-rank-max-norm", (rate, MAX_NORM_BIAS_RATE, *rest)) for rate, *rest in OTHER_SUMS]
        best |= swept(low_rank, limits)
        best["inference"] = (0.0, 0.0, 0, 0.0, None, True)
        show_sweep(sweep)

        def keep(setting: Setting, result: dict[str, Any]) -> None:
            runs[setting.key] = result
            write(runs, sweep, options.samples)
            print(f"{setting.key}: {result['final_accuracy']:.1%} at the end, {result['seconds']:.0f} s", flush=True)

        settings = [
            make(world, scheme, seed, options.samples, *best[scheme])
            for scheme in ("low-rank-max-norm", "sgd", "bias", "low-rank", "inference")
            for seed in SEEDS
            for world in WORLDS
        ]
        compared = [
            make(world, "low-rank-max-norm", seed, options.samples, *without_agreement)
            for seed in SEEDS
            for world in WORLDS
        ]
        all_of(online, (setting for setting in [*settings, *compared] if setting.key not in runs), keep)
    chosen = {setting.key: runs[setting.key] for setting in settings}
    beside = {setting.key: runs[setting.key] for setting in compared}
    write(chosen, sweep, options.samples, {scheme: best[scheme] for scheme in SCHEMES}, beside)
    show(list(chosen.values()))
    print("\nlow rank with max-norm, without agreement:")
    show([*(run for run in chosen.values() if run["scheme"] != "low-rank-max-norm"), *beside.values()])
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(draw([as_result(run) for run in chosen.values()]))


def speed(data: Path, work: Path, chunks: int = 10) -> dict[str, dict[str, float]]:
    """Median milliseconds of a sample, of blocks of 100: each scheme in turn in one process, at its own rates.

    The low-rank schemes also with their C++ operator, which the runs of the four worlds all use.
    """
    torch.set_num_threads(1)
    setting = Setting(data, work, "control", "inference", 0, 0)
    offline(setting)
    images, medians = load_images(data), {}
    for world in WORLDS:
        learners = {}
        for scheme in SCHEMES:
            for native in (False, True) if scheme.startswith("low-rank") else (False,):
                model = CharacterNet(images.size, images.classes)
                model.load_state_dict(checkpoint.load(work / "0.safetensors"))  # type: ignore[arg-type]
                learner = Learner(model, scheme, RATES[scheme], limit=LIMIT, seed=0, native=native)
                learners[f"{scheme}, native" if native else scheme] = learner
        stream, taken = ImageStream(images, world, 0, CHUNK), {name: [] for name in learners}  # type: ignore[var-annotated]
        for number in range(chunks):
            inputs, labels = stream.chunk(number)
            for name, learner in learners.items():
                started = perf_counter()
                for index in range(CHUNK):
                    learner.learn(inputs[index : index + 1], labels[index : index + 1])
                    drift_(learner.arrays, world, 0, number * CHUNK + index + 1)
                taken[name].append((perf_counter() - started) / CHUNK * 1e3)
        medians[world] = {name: median(each) for name, each in taken.items()}
        print(world, {name: round(each, 2) for name, each in medians[world].items()}, flush=True)
    return medians


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each world and scheme the means over the seeds, and writes as shares of SGD's."""
    found: dict[str, Any] = {}
    for world in WORLDS:
        of = {scheme: [run for run in runs if (run["world"], run["scheme"]) == (world, scheme)] for scheme in SCHEMES}
        found[world] = {
            scheme: {
                "final_accuracy": fmean(run["final_accuracy"] for run in some),
                "final_accuracy_by_seed": [run["final_accuracy"] for run in some],
                "accuracy": fmean(run["accuracy"] for run in some),
                "worst_cell_writes": fmean(run["worst_cell_writes"] for run in some),
                "worst_cell_writes_by_pixel": fmean(
                    run["worst_cell_writes_by_pixel"] or run["worst_cell_writes"] for run in some
                ),
                "writes_per_cell": fmean(run["writes"] / run["cells"] for run in some),
                "seconds_per_100000_samples": fmean(run["seconds"] / run["samples"] for run in some) * 1e5,
            }
            for scheme, some in of.items()
        }
        for row in found[world].values():
            row["worst_cell_of_sgd"] = row["worst_cell_writes"] / found[world]["sgd"]["worst_cell_writes"]
            by_pixel = found[world]["sgd"]["worst_cell_writes_by_pixel"]
            row["worst_cell_of_sgd_by_pixel"] = row["worst_cell_writes_by_pixel"] / by_pixel
            row["writes_of_sgd"] = row["writes_per_cell"] / found[world]["sgd"]["writes_per_cell"]
    return found


def write(
    runs: dict[str, dict[str, Any]],
    sweep: dict[str, dict[str, float]],
    samples: int,
    best: dict[Scheme, Any] | None = None,
    without_agreement: dict[str, dict[str, Any]] | None = None,
) -> None:
    about = {
        "samples": samples,
        "seeds": len(SEEDS),
        "rank": RANK,
        "shift_every": samples // KINDS // 100 * 100,
        "sweep": {"seed": SWEEP_SEED, "samples": SWEEP_SAMPLES},
        "torch": torch.__version__,
    }
    settings = best and {
        scheme: dict(zip(("lr", "bias_lr", *Writes._fields), of, strict=True)) for scheme, of in best.items()
    }
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    content = {
        "about": about,
        "settings": settings,
        "summary": summary(list(runs.values())) if best else None,
        "without_agreement": without_agreement,
        "milliseconds_per_sample": before.get("milliseconds_per_sample"),
        "sweep": dict(sorted(sweep.items())),
        "runs": dict(sorted(runs.items())),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")


def show_sweep(sweep: dict[str, dict[str, float]]) -> None:
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for key, result in sweep.items():
        world, rest = key.split("/", 1)
        rows.setdefault(rest, {})[world] = result
    print(
        f"{'scheme/lr/bias lr/period/density/samples/seed':64}" + "".join(f"{world:>16}" for world in (*WORLDS, "mean"))
    )
    for rest, of in sorted(rows.items()):
        if len(of) < len(WORLDS):  # of a sweep that was stopped
            continue
        cells = [f"{of[world]['final_accuracy']:.1%} {of[world]['worst_cell_writes']:6,.0f}" for world in WORLDS]
        mean = fmean(result["final_accuracy"] for result in of.values())
        print(f"{rest:64}" + "".join(f"{cell:>16}" for cell in cells) + f"{mean:>16.1%}")


def show(runs: list[dict[str, Any]]) -> None:
    for world, rows in summary(runs).items():
        print(
            f"\n{world:18}{'at the end':>12}{'over all':>10}{'worst cell':>12}{'of SGD':>9}"
            f"{'by pixel':>10}{'100,000 in':>12}"
        )
        for scheme, row in rows.items():
            print(
                f"{scheme:18}{row['final_accuracy']:>12.1%}{row['accuracy']:>10.1%}{row['worst_cell_writes']:>12,.0f}"
                f"{row['worst_cell_of_sgd']:>9.4f}{row['worst_cell_of_sgd_by_pixel']:>10.6f}"
                f"{row['seconds_per_100000_samples']:>10.0f} s"
            )


def as_result(run: dict[str, Any]) -> SchemeResult:
    """A run as the figure takes it."""
    cells = CellReport(
        cells=run["cells"],
        writes=run["writes"],
        worst_cell=run["worst_cell_writes"],
        histogram=tuple((least, count) for least, count in run["writes_per_cell_histogram"]),
        bits_written=0,
        bits_read=0,
        technology=TECHNOLOGIES["rram"],
    )
    return SchemeResult(
        world=run["world"],
        scheme=run["scheme"],
        seed=run["seed"],
        rates=Rates(run["lr"], run["bias_lr"]),
        samples=run["samples"],
        accuracy=run["accuracy"],
        final_accuracy=run["final_accuracy"],
        curve=tuple((samples, accuracy, worst) for samples, accuracy, worst in run["curve"]),
        cells=cells,
        worst_cell_by_pixel=run["worst_cell_writes_by_pixel"],
        seconds=run["seconds"],
    )


if __name__ == "__main__":
    main()
