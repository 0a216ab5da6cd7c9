"""``memfit profile``: where does the memory of a training step go?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from memfit.cli.console import say, show, show_table
from memfit.cli.outputs import check_outputs, write_output
from memfit.errors import MemfitError
from memfit.ledger.account import LINES, LiveTensor, Peak
from memfit.ledger.page import render
from memfit.ledger.picture import check_can_draw, draw_png
from memfit.ledger.profile import Profile
from memfit.ledger.profile import profile as measure
from memfit.ledger.report import describe, format_bytes
from memfit.ledger.target import ProfileConfig

_MODULES = 10


def profile(
    target: Annotated[
        str,
        typer.Argument(
            help="A function that returns (model, batch, loss): package.module:function or file.py:function. "
            "loss(model, batch) returns a scalar tensor."
        ),
    ],
    optimizer: Annotated[
        str, typer.Option(help="Of torch.optim, with arguments where wanted: SGD(lr=0.1, momentum=0.9).")
    ] = "AdamW",
    convert: Annotated[
        list[str] | None,
        typer.Option(help="A technique and its layers: LowRankGradient(rank=16)@encoder.*  May be repeated."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Training steps for the process's peak.")] = 3,
    compare: Annotated[bool, typer.Option("--compare", help="Also without the conversions, side by side.")] = False,
    html: Annotated[
        Path | None, typer.Option(help="Write a page to this file: the step as a picture, and all that is printed.")
    ] = None,
    png: Annotated[
        Path | None, typer.Option(help="Write the step and the peak as a picture to this file (needs matplotlib).")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
) -> None:
    """Show where the memory of a training step goes: by line, by module, by tensor, and what would take less."""
    config = ProfileConfig(target, optimizer, tuple(convert or ()), steps)
    if compare and not config.conversions:
        raise MemfitError("--compare needs a conversion to compare with: give --convert.")
    if png is not None:
        check_can_draw()
    check_outputs({"page": html, "picture": png, "profile": json_file}, target)
    profiles: dict[str, Profile] = {}
    if compare:
        say("profiling it as it is")
        profiles["as it is"] = measure(replace(config, conversions=()))
    say("profiling it" + (" converted" if config.conversions else ""))
    profiles["converted" if config.conversions else "as it is"] = measure(config)

    figures = {name: found.to_dict() for name, found in profiles.items()}
    outputs = (
        (html, "page", lambda: render(profiles).encode()),
        (png, "picture", lambda: draw_png(profiles)),
        (json_file, "profile", lambda: json.dumps(figures).encode() + b"\n"),
    )
    failures = [failure for file, what, make in outputs if file and (failure := write_output(file, what, make()))]

    *_, last = profiles.values()
    show_lines(profiles)
    show("")
    show_modules(last)
    show("")
    show_tensors(last.tensors)
    show("")
    for sentence in in_words(last):
        show(sentence)
    if failures:  # a full disk does not take away what was found
        raise failures[0]


def show_lines(profiles: dict[str, Profile]) -> None:
    """The five lines of each profile, their shares, and the process."""
    rows = []
    for line in (*LINES, "total"):
        row = [line]
        for found in profiles.values():
            value, total = found.peak.to_dict()[line], found.peak.total
            row += [format_bytes(value), f"{value / total:.1%}" if total else ""]
        rows.append(row)
    rows.append(["the process", *(cell for found in profiles.values() for cell in (format_bytes(found.growth), ""))])
    show_table(["", *(cell for name in profiles for cell in (name, ""))], rows)


def show_modules(found: Profile) -> None:
    """The modules that hold most at the peak."""
    rows = [
        [name or "(outside of modules)", format_bytes(lines.total), _largest_line(lines)]
        for name, lines in list(found.modules.items())[:_MODULES]
    ]
    if len(found.modules) > _MODULES:
        rest = sum(lines.total for lines in list(found.modules.values())[_MODULES:])
        rows.append([f"{len(found.modules) - _MODULES} others", format_bytes(rest), ""])
    show_table(["module", "at the peak", "most of it"], rows)


def show_tensors(tensors: Sequence[LiveTensor]) -> None:
    """The largest tensors of the peak, and the line of code that made each."""
    rows = [
        [
            tensor.title,
            format_bytes(tensor.nbytes),
            tensor.line,
            tensor.module or "-",
            tensor.source or "-",
        ]
        for tensor in tensors
    ]
    show_table(["largest tensors", "memory", "line", "module", "made at"], rows)


def in_words(found: Profile) -> list[str]:
    """When the peak was, what no tensor holds, and what would take less."""
    sentences = [f"The peak is {describe(found.instant)}."]
    if found.unseen > 0:
        sentences.append(
            f"The process took {format_bytes(found.unseen)} more than its tensors: temporaries inside of operators, "
            "code, and small holes that the allocator keeps."
        )
    elif found.unseen < 0:
        sentences.append(
            f"The process took {format_bytes(-found.unseen)} less than its tensors, which were not all written to."
        )
    sentences += found.notes
    sentences += [f"{advice}: {format_bytes(advice.after.total)}." for advice in found.advice]
    if not found.advice and not found.no_advice:
        sentences.append("No conversion or optimizer that was tried takes clearly less, by an estimate of each.")
    if found.no_advice:
        sentences.append(f"No advice: {found.no_advice}")
    return sentences


def _largest_line(lines: Peak) -> str:
    return max(LINES, key=lambda line: lines.to_dict()[line])
