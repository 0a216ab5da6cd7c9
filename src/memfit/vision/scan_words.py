"""A scan's figures for people: what page, picture and command line say in the same words."""

from __future__ import annotations

from memfit.ledger.report import format_bytes
from memfit.vision.scan_figures import FilterScan, ScannedLayer
from memfit.vision.scan_layer import Agreement

FACTS = "times are medians, backward alone; cosines are to the exact gradients of the batch"


def times(factor: float) -> str:
    """``"0.84x"``, ``"12x"``: a factor at the precision that a timing deserves."""
    return f"{factor:.2g}x" if factor < 10 else f"{factor:.0f}x"


def agreement_in_words(found: Agreement | None) -> str:
    """The cosine, and the length in lengths of the exact gradient; a dash where there is none."""
    return "-" if found is None else f"{found.cosine:.2f} ({found.norm:.2f})"


def spared_in_words(nbytes: int) -> str:
    """Bytes that are not kept any more; with a minus where it takes more."""
    return f"{'-' if nbytes < 0 else ''}{format_bytes(abs(nbytes))}"


def keepers_in_words(layer: ScannedLayer) -> str:
    """Who else keeps the layer's input."""
    return ", ".join(name or "the model or the loss" for name in layer.kept_by) or "-"


def together_rows(scan: FilterScan) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table of whole steps."""
    exact = ["exact", f"{scan.ms:.1f} ms", "", format_bytes(scan.nbytes), "", ""]
    rows = [
        [
            "as advised" if each.patch is None else f"all with patch={each.patch}",
            f"{each.ms:.1f} ms",
            times(scan.ms / each.ms),
            format_bytes(scan.nbytes - each.spared),
            spared_in_words(each.spared),
            agreement_in_words(each.weight),
        ]
        for each in scan.together
    ]
    return ["whole steps", "time", "faster", "kept for backward", "spared", "gradient"], [exact, *rows]
