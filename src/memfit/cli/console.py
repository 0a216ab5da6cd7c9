"""What the commands share of the screen: sentences on standard error, tables on standard output."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table


def say(sentence: str) -> None:
    """Write a sentence to standard error; file names in it stay as they are, never wrapped or coloured."""
    print(sentence, file=sys.stderr, flush=True)


def show(line: str) -> None:
    """Write a line to standard output; what its encoding lacks, as a file's name may have, is escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    print(line.encode(encoding, errors="backslashreplace").decode(encoding), flush=True)


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write a table to standard output; the first column is text, the others are figures."""
    if not sys.stdout.isatty():
        widths = [max(len(row[index]) for row in (columns, *rows)) for index in range(len(columns))]
        for row in (columns, *rows):
            cells = [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
            ]
            show("  ".join(cells).rstrip())
        return
    table = Table(show_edge=False, header_style="bold", pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row, style="bold" if row is rows[-1] and row[0] == "total" else None)
    Console(highlight=False, markup=False).print(table)
