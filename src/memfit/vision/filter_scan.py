"""Where to filter gradients: what ``memfit.GradientFilter`` gains and gives up, layer by layer, on a batch.

Each convolution is looked at on what it really reads and on the real gradient of what it gives, exact and with patches
of each size: the time of its backward, what it keeps for that, and the angle between filtered and exact gradients.
Then all of them are filtered at once, and whole steps are timed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from memfit.activations.gradient_filter import GradientFilter
from memfit.activations.plan import Taps
from memfit.choose import Where, choose
from memfit.convert import ConvertedLayer, convert_
from memfit.errors import MemfitError, TrainingError
from memfit.ledger.target import Task
from memfit.run.counts import check_count
from memfit.vision.scan_figures import LEAST_COSINE, Filtered, FilterScan, ScannedLayer, Together, with_advice
from memfit.vision.scan_kept import Kept, kept_by
from memfit.vision.scan_layer import Agreement, Backward, agreement, backwards, now
from memfit.vision.scan_step import Call, Steps, calls_of

PATCHES = (2, 4, 7)
"""The patches that are tried when nothing else is said: those of the paper's experiments."""

_Ways = Mapping[GradientFilter, Sequence[str]]
"""Names of layers by what they are filtered with."""


def filter_scan(
    model: nn.Module,
    batch: Any,
    loss: Callable[[nn.Module, Any], Tensor],
    patches: Sequence[int] = PATCHES,
    where: Where = "*",
    rounds: int = 5,
    *,
    least_cosine: float = LEAST_COSINE,
    taps: Taps = "summed",
    native: bool = False,
    notify: Callable[[str], None] | None = None,
) -> FilterScan:
    """Measure what a gradient filter does to each convolution of a model.

    The model is left exactly as it was, whatever happens: weights, buffers, gradients, modes, hooks and random state.
    Take weights from which the training would start, a batch of its size, and freeze what it freezes: gradients of
    fresh weights, or of other layers, are other gradients. It takes the memory of an exact training step and that of
    the output gradients of all scanned layers, and the time of some ``8 * rounds`` steps.

    Args:
        model: in the mode and the memory format in which it trains.
        batch: anything that ``loss`` takes.
        loss: ``(model, batch) -> scalar tensor``.
        patches: sizes of patches to try, each at least 1.
        where: which layers, as :func:`memfit.convert_` takes it.
        rounds: how often each way is timed, in turn with the others.
        least_cosine: from where on the advice takes a gradient to be good.
        taps, native: scan ``GradientFilter(patch, taps, native)``.
        notify: is told, in a sentence each, what happens next.

    Raises:
        ConversionError: ``where`` matches no convolution that trains, or a patch is not possible.
        TrainingError: the loss or a gradient is not finite, or the loss depends on no chosen layer.
        MemfitError: another argument is not possible, or the loss is no scalar tensor.

    Example:
        >>> scan = filter_scan(model, batch, loss, where="layer4.*")
        >>> for patch, names in scan.chosen.items():
        ...     memfit.convert_(model, memfit.GradientFilter(patch), where=names)
    """
    say = notify or (lambda sentence: None)
    if not patches:
        raise MemfitError("no size of patches was given: name one or more.")
    check_count("number of rounds", rounds)
    if not 0 <= least_cosine <= 1:
        raise MemfitError(f"the least cosine is from 0 to 1, not {least_cosine}.")
    techniques = {GradientFilter(patch, taps, native) for patch in patches}
    filters = {technique.patch: technique for technique in sorted(techniques, key=lambda each: each.patch)}
    chosen, ties = choose(model, next(iter(filters.values())), where)
    layers = {name: choice.layer for name, choice in chosen.items()}
    steps = Steps(Task(model, batch, loss))

    say("looking at what is kept for backward")
    kept, total = kept_by(layers, steps)
    kept_filtered = {
        patch: _kept_filtered(model, layers, steps, {technique: list(layers)}) for patch, technique in filters.items()
    }

    say("taking the inputs and gradients of each layer")
    calls = calls_of(layers, steps)
    if not calls:
        raise TrainingError(f"the loss depends on none of the layers that where={where!r} has chosen.")

    scanned = []
    for number, name in enumerate(list(calls), start=1):
        say(f"layer {number} of {len(calls) + number - 1}: {name or 'the model itself'}")
        own = calls.pop(name)
        found = backwards(layers[name], own, list(filters.values()), rounds)
        of_patches = {patch: kept_of_patch[name] for patch, (kept_of_patch, _) in kept_filtered.items()}
        scanned.append(_scanned(name, describe(layers[name], own), kept[name], found, of_patches))
    scanned = with_advice(scanned, least_cosine, ties)

    say("timing whole steps")
    ways: dict[int | None, _Ways] = {patch: {technique: list(layers)} for patch, technique in filters.items()}
    totals: dict[int | None, int] = {patch: total_of_patch for patch, (_, total_of_patch) in kept_filtered.items()}
    scan = FilterScan(
        layers=tuple(scanned),
        ms=0.0,
        nbytes=total,
        together=(),
        unused=tuple(name for name in layers if name not in {layer.name for layer in scanned}),
        least_cosine=least_cosine,
        threads=torch.get_num_threads(),
    )
    if scan.chosen:
        ways[None] = {filters[patch]: names for patch, names in scan.chosen.items()}
        totals[None] = _kept_filtered(model, layers, steps, ways[None])[1]
    ms, found_together = _together(model, layers, ways, steps, rounds)
    together = [
        Together(key, ms_of_way, total - totals[key], found) for key, (ms_of_way, found) in found_together.items()
    ]
    return replace(scan, ms=ms, together=tuple(together))


def describe(layer: nn.Module, calls: Sequence[Call]) -> str:
    """``"64 to 128, 3 x 3, stride 2, on 56 x 56"``: channels, kernel, what is not as usual, and the input's size."""
    conv = cast(nn.Conv2d, layer)
    depthwise = conv.groups > 1 and conv.groups == conv.in_channels == conv.out_channels
    channels = f"{conv.in_channels} depthwise" if depthwise else f"{conv.in_channels} to {conv.out_channels}"
    parts = [channels, _sizes(conv.kernel_size)]
    if conv.groups > 1 and not depthwise:
        parts.append(f"{conv.groups} groups")
    parts += [
        f"{what} {_sizes(values) if len(set(values)) > 1 else values[0]}"
        for what, values in (("stride", conv.stride), ("dilation", conv.dilation))
        if set(values) != {1}
    ]
    parts.append(f"on {_sizes(calls[0].x.shape[-len(conv.kernel_size) :])}")
    return ", ".join(parts) + (f", {len(calls)} times" if len(calls) > 1 else "")


def _scanned(
    name: str, shape: str, kept: Kept, found: dict[int, Backward], of_patches: dict[int, Kept]
) -> ScannedLayer:
    filtered = tuple(
        Filtered(
            patch,
            1e3 * found[patch].seconds,
            of_patch.nbytes,
            kept.own - of_patch.own,
            found[patch].weight,
            found[patch].input,
        )
        for patch, of_patch in of_patches.items()
    )
    return ScannedLayer(name, shape, 1e3 * found[0].seconds, kept.nbytes, kept.by, filtered)


def _kept_filtered(
    model: nn.Module, layers: Mapping[str, nn.Module], steps: Steps, ways: _Ways
) -> tuple[dict[str, Kept], int]:
    with _converted(model, layers, ways):
        return kept_by(layers, steps)


def _together(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    ways: Mapping[int | None, _Ways],
    steps: Steps,
    rounds: int,
) -> tuple[float, dict[int | None, tuple[float, Agreement | None]]]:
    """Milliseconds of an exact step; those of each way to filter, and how good its gradient is."""
    weights = {id(layer.weight) for layer in layers.values()}
    places = [place for place, parameter in enumerate(steps.trained) if id(parameter) in weights]
    device = steps.trained[0].device
    exact: list[Tensor] = []
    exact_seconds: list[float] = []
    seconds: dict[int | None, list[float]] = {key: [] for key in ways}
    agreements: dict[int | None, Agreement | None] = {}

    def one(way: _Ways) -> tuple[float, list[Tensor]]:
        with _converted(model, layers, way), steps.one():
            started = now(device)
            gradients = steps.gradients(steps.loss())
            passed = now(device) - started
        return passed, [gradient for place in places if (gradient := gradients[place]) is not None]

    for turn in range(rounds):
        passed, gradients = one({})
        exact_seconds.append(passed)
        exact = gradients if turn == 0 else []
        for key, way in ways.items():
            passed, gradients = one(way)
            seconds[key].append(passed)
            if turn == 0:
                agreements[key] = agreement(exact, gradients)
    found = {key: (1e3 * statistics.median(values), agreements[key]) for key, values in seconds.items()}
    return 1e3 * statistics.median(exact_seconds), found


@contextmanager
def _converted(model: nn.Module, layers: Mapping[str, nn.Module], ways: _Ways) -> Iterator[None]:
    """The layers are filtered; afterwards they are plain again."""
    try:
        for technique, names in ways.items():
            convert_(model, technique, where=names)
        yield
    finally:
        for layer in layers.values():
            if isinstance(layer, ConvertedLayer):
                layer.restore_()


def _sizes(values: Sequence[int]) -> str:
    return " x ".join(map(str, values))
