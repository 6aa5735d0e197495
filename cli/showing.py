"""What is printed: results on stdout, progress and errors on stderr. Names and texts of the server are never read as markup."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

OUT = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
ERR = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)


def as_json(value: Any) -> None:
    OUT.print(json.dumps(value, indent=2, ensure_ascii=False))


def table(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    shown = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        shown.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
    OUT.print(shown, soft_wrap=False)


def bar(*columns: ProgressColumn) -> Progress:
    """A progress bar, where stderr is a terminal; it goes when it is done."""
    return Progress(TextColumn("{task.description}", markup=False), BarColumn(), *columns, TimeElapsedColumn(), console=ERR, transient=True, disable=not ERR.is_terminal)


def size(count: float | None) -> str:
    return f"{count / 2**20:.0f} MiB" if count else "0"
