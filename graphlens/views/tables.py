"""Tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table


def hook_table(entries: Mapping[str, tuple[str, str]], title: str) -> Table:
    """A rich table of hook points: name, shape, dtype."""
    table = Table(title=title, title_justify="left")
    table.add_column("hook point", style="cyan", no_wrap=True)
    table.add_column("shape")
    table.add_column("dtype")
    for name, (shape, dtype) in entries.items():
        table.add_row(name, shape.replace("[", r"\["), dtype)
    return table
