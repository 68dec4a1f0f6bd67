"""Tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from graphlens.views.labelled import Labelled
from graphlens.views.wording import NOT_COMPUTED, number, shown


def hook_table(entries: Mapping[str, tuple[str, str]], title: str) -> Table:
    """A table of hook points.

    Args:
        entries: (shape, dtype) by hook name.
        title: The text above it.
    """
    table = Table(title=Text(title), title_justify="left")
    table.add_column("hook point", style="cyan", no_wrap=True)
    table.add_column("shape")
    table.add_column("dtype")
    for name, (shape, dtype) in entries.items():
        table.add_row(Text(name), Text(shape), Text(dtype))
    return table


def result_table(result: Labelled, most_rows: int, most_columns: int) -> Table:
    """A table of a result: rows by columns for two axes; more are flattened, with the last one across.

    Args:
        result: What to show.
        most_rows: How many rows to show; the caption says how many more there are.
        most_columns: How many columns of values, likewise.
    """
    across = result.axes[-1] if len(result.axes) > 1 else None
    names = [shown(name) for name in result.labels[across]] if across else ["value"]
    leading = result.axes[:-1] if across else result.axes
    rows = result.values.reshape(-1, len(names))
    left_out = [
        f"{size - most} more {what}"
        for what, size, most in (("rows", len(rows), most_rows), ("columns", len(names), most_columns))
        if size > most
    ]
    notes = [f"across: {across}"] if across else []
    notes += [f"{name} {number(value)}" for name, value in result.baselines.items() if isinstance(value, float)]
    notes += [f"not shown: {' and '.join(left_out)} (all are in values)"] if left_out else []
    notes += [f"{NOT_COMPUTED} not computed yet"] if np.isnan(result.values).any() else []
    table = Table(box=SIMPLE_HEAD, pad_edge=False, caption=Text("; ".join(notes)) if notes else None)
    for axis in leading:
        table.add_column(Text(axis), overflow="ellipsis", no_wrap=True)
    for name in names[:most_columns]:
        table.add_column(Text(name), justify="right", overflow="ellipsis", no_wrap=True)
    indices = np.ndindex(*result.shape[: len(leading)])
    for at, row, _ in zip(indices, rows, range(most_rows), strict=False):
        cells = [shown(result.labels[axis][i]) for axis, i in zip(leading, at, strict=True)]
        table.add_row(*map(Text, cells), *(Text(number(value)) for value in row[:most_columns]))
    return table


def plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str | float]]) -> Table:
    """A table of names and numbers.

    Args:
        title: What it is headed by.
        columns: The names of the columns.
        rows: A row each.
    """
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=Text(title), title_justify="left")
    for place, name in enumerate(columns):
        table.add_column(Text(name), justify="right" if place else "left", overflow="ellipsis", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(shown(value) if isinstance(value, str) else number(value)) for value in row))
    return table


def effects_table(
    title: str, axes: Sequence[str], effects: Sequence[tuple[Mapping[str, str], Mapping[str, float]]]
) -> Table:
    """A table of mean effects with their intervals.

    Args:
        title: What it is headed by.
        axes: The axes of the places.
        effects: ({axis: label}, {"mean", "low", "high", "p_value"}) of each place.
    """
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=Text(title), title_justify="left")
    for axis in axes:
        table.add_column(Text(axis), overflow="ellipsis", no_wrap=True)
    for name in ("mean", "interval", "p"):
        table.add_column(name, justify="right", no_wrap=True)
    for labels, figures in effects:
        interval = f"{number(figures['low'])} to {number(figures['high'])}"
        cells = [number(figures["mean"]), interval, number(figures["p_value"])]
        table.add_row(*(Text(shown(labels[axis])) for axis in axes), *map(Text, cells))
    return table


class Scored(Protocol):
    """How well a probe tells some tokens; a ProbeScore is one."""

    @property
    def accuracy(self) -> float:
        """The share of tokens it is right about."""

    @property
    def accuracy_interval(self) -> tuple[float, float]:
        """(low, high)."""

    @property
    def auc(self) -> float:
        """The area under the ROC curve."""

    @property
    def auc_interval(self) -> tuple[float, float]:
        """(low, high)."""

    @property
    def majority(self) -> float:
        """The accuracy of always answering what is more frequent."""

    @property
    def tokens(self) -> int:
        """How many tokens it was asked about."""

    @property
    def documents(self) -> int:
        """How many documents they are of."""


def probe_table(title: str, parts: Mapping[str, Scored]) -> Table:
    """A table of how well a probe does.

    Args:
        title: What it is headed by.
        parts: The scores by the name of the part of the data.
    """
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=Text(title), title_justify="left")
    table.add_column("")
    for name in parts:
        table.add_column(name, justify="right")
    scores = list(parts.values())
    rows = {
        "accuracy": [number(one.accuracy) for one in scores],
        "  interval": [" to ".join(map(number, one.accuracy_interval)) for one in scores],
        "  of the commoner label": [number(one.majority) for one in scores],
        "area under the curve": [number(one.auc) for one in scores],
        "  interval ": [" to ".join(map(number, one.auc_interval)) for one in scores],
        "tokens": [f"{one.tokens:,}" for one in scores],
        "documents": [f"{one.documents:,}" for one in scores],
    }
    for name, cells in rows.items():
        table.add_row(Text(name), *map(Text, cells))
    return table
