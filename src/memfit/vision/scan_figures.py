"""What a scan has found: figures of layers and of whole steps, and the advice that follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from memfit.choose import Owner
from memfit.vision.scan_layer import Agreement

LEAST_COSINE = 0.5
"""A filtered gradient is taken to be good from this cosine to the exact one on: an angle of 60 degrees."""

_ABOUT = 1.1
"""Times that differ by no more than this factor are taken to be the same."""


@dataclass(frozen=True)
class Filtered:
    """One layer with one size of patches.

    Attributes:
        patch: the size, in pixels of the layer's output.
        ms: of the layer's backward, and of what the filter does in forward; milliseconds, a median.
        nbytes: what autograd keeps for the layer; bytes, parameters not counted.
        spared: bytes that are not kept any more when this layer alone is filtered: memory that others keep is not
            counted. Below 0 where the filter needs more than it spares.
        weight: agreement of the weight's gradient with the exact one, None where that is zero.
        input: the same of the input's gradient; None also where none is asked for.
    """

    patch: int
    ms: float
    nbytes: int
    spared: int
    weight: Agreement | None
    input: Agreement | None

    @property
    def cosine(self) -> float | None:
        """The worse of the two cosines; None where there is no gradient."""
        return min((each.cosine for each in (self.weight, self.input) if each is not None), default=None)


@dataclass(frozen=True)
class ScannedLayer:
    """One convolution.

    Attributes:
        name: in the model.
        shape: channels, kernel, and the size of what it reads, in words.
        ms: of its exact backward; milliseconds, a median.
        nbytes: what autograd keeps for it; bytes, parameters not counted.
        kept_by: who keeps some of that memory as well, whatever becomes of this layer: names of modules (``""`` is the
            model itself), or "the program" for what is there after the step too, as the batch is.
        filtered: one for each size of patches.
        advised: the size of patches that is worth it, None where none is: faster than exact, with gradients of the
            least cosine that was asked for. Of sizes about as fast as the fastest it is the one with the best
            gradients.
        reason: why none is, in a few words; else empty.
    """

    name: str
    shape: str
    ms: float
    nbytes: int
    kept_by: tuple[str, ...]
    filtered: tuple[Filtered, ...]
    advised: int | None = None
    reason: str = ""

    def speedup(self, filtered: Filtered) -> float:
        """The time of the exact backward, in times of the filtered one."""
        return self.ms / filtered.ms


@dataclass(frozen=True)
class Together:
    """Several layers filtered at once.

    Attributes:
        patch: the size of the patches with which all scanned layers were filtered; None where it was done as advised.
        ms: of a forward and backward pass of the model; milliseconds, a median.
        spared: bytes by which less is kept for backward, of the whole model.
        weight: agreement of the gradient of all scanned layers' weights with the exact one, None where that is zero.
    """

    patch: int | None
    ms: float
    spared: int
    weight: Agreement | None


@dataclass(frozen=True)
class FilterScan:
    """What was found.

    Attributes:
        layers: in the order of the model.
        ms: of an exact forward and backward pass of the model; milliseconds, a median.
        nbytes: that the model keeps for backward, parameters and what is there after the step not counted.
        together: with all layers filtered, for each size of patches, and, where some are worth it, as advised.
        unused: layers that were chosen, and that the loss does not depend on.
        least_cosine: what the advice takes to be good.
        threads: with which torch computed.
    """

    layers: tuple[ScannedLayer, ...]
    ms: float
    nbytes: int
    together: tuple[Together, ...]
    unused: tuple[str, ...]
    least_cosine: float
    threads: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @property
    def chosen(self) -> dict[int, list[str]]:
        """The layers that are worth filtering, by the size of patches that is advised; the smallest first."""
        found: dict[int, list[str]] = {}
        for layer in self.layers:
            if layer.advised is not None:
                found.setdefault(layer.advised, []).append(layer.name)
        return dict(sorted(found.items()))

    @property
    def advice(self) -> list[str]:
        """What to filter and what not, in sentences."""
        sentences = [f"Filter with patch={patch}: {', '.join(names)}." for patch, names in self.chosen.items()]
        left = [f"{layer.name} ({layer.reason})" for layer in self.layers if layer.advised is None]
        if left:
            sentences.append(f"Leave: {', '.join(left)}.")
        if self.unused:
            sentences.append(f"The loss does not depend on {', '.join(self.unused)}.")
        scanned = {layer.name for layer in self.layers}
        kept_anyway = [layer for layer in self.layers if set(layer.kept_by) - scanned]
        if kept_anyway:
            sentences.append(
                f"Others keep the input of {len(kept_anyway)} of {len(self.layers)} layers as well: a filter makes "
                "those faster, not smaller."
            )
        groups = {
            tuple(each.name for each in self.layers if each.name in {layer.name, *layer.kept_by}): None
            for layer in self.layers
            if layer.kept_by and layer not in kept_anyway
        }
        sentences += [
            f"What {' and '.join(names)} keep is the same: it is spared if all are filtered." for names in groups
        ]
        return sentences


def with_advice(
    layers: Sequence[ScannedLayer], least_cosine: float, ties: Sequence[Sequence[Owner]]
) -> list[ScannedLayer]:
    """With the fields ``advised`` and ``reason``."""
    advised = [advise(layer, least_cosine) for layer in layers]
    patches = {layer.name: layer.advised for layer in advised}
    for tie in ties:  # layers that share a weight are converted together, or not at all
        names = [owner.name for owner in tie]
        if len({patches.get(name) for name in names}) > 1:
            advised = [
                replace(
                    layer, advised=None, reason=layer.reason or "shares its weight with a layer that is better left"
                )
                if layer.name in names
                else layer
                for layer in advised
            ]
    return advised


def advise(layer: ScannedLayer, least_cosine: float) -> ScannedLayer:
    """The layer with its fields ``advised`` and ``reason``, by its figures alone."""
    faster = {each: each.cosine for each in layer.filtered if each.ms < layer.ms}
    cosines = {each: cosine for each, cosine in faster.items() if cosine is not None}
    good = [each for each, cosine in cosines.items() if cosine >= least_cosine]
    if not faster:
        return replace(layer, reason="not faster")
    if not cosines:
        return replace(layer, reason="no gradient")
    if not good:
        return replace(layer, reason=f"cosine {max(cosines.values()):.2f}")
    fastest = min(each.ms for each in good)
    best = max((each for each in good if each.ms <= _ABOUT * fastest), key=lambda each: cosines[each])
    return replace(layer, advised=best.patch)  # of equals the smallest
