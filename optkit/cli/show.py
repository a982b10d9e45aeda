"""Where output goes in a terminal: results on stdout, the log and progress on stderr, tables, JSON."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

from optkit.report.contents import dump_json
from optkit.report.contents import plain as plain

T = TypeVar("T")

WIDTH = 140  # of what is piped into a file or another program
NARROWEST = 100  # in a narrower terminal its own line breaks are easier to read than columns of two characters
console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
console.width = max(console.width, NARROWEST)
log = Console(stderr=True, highlight=False)


def print_json(value: Any) -> None:
    """Print the result as JSON on stdout."""
    sys.stdout.write(dump_json(value).decode())


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: Iterable[int] = ()) -> Table:
    """Return a table; the columns numbered in ``right`` hold numbers and are aligned so."""
    numbers = set(right)
    made = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim")
    for index, column in enumerate(columns):
        number = index in numbers
        made.add_column(column, justify="right" if number else "left", overflow="fold", no_wrap=number)
    for row in rows:
        made.add_row(*(str(cell) for cell in row))
    return made


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield the items with a progress bar on stderr, where that is a terminal and nobody asked for quiet."""
    if not sys.stderr.isatty() or os.environ.get("CI"):
        yield from items
        return
    from rich.progress import Progress

    with Progress(console=log, transient=True) as progress:
        task = progress.add_task(description, total=total)
        for item in items:
            yield item
            progress.advance(task)
