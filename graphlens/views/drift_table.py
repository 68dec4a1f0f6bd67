"""The table of a drift: the sites with the most error, for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from graphlens.views.wording import NOT_COMPUTED


class Row(Protocol):
    """One site; see analysis/drift_result.py for what its figures mean."""

    @property
    def hook(self) -> str:
        """The hook point."""

    @property
    def fresh(self) -> float:
        """The relative error that the step adds."""

    @property
    def relative(self) -> float:
        """All relative error so far."""

    @property
    def cosine(self) -> float:
        """The cosine with the reference."""

    @property
    def snr(self) -> float:
        """The signal-to-noise ratio in decibels."""

    @property
    def recovered(self) -> float | None:
        """The share of the logits' error that a patch there takes away."""

    @property
    def metric(self) -> float | None:
        """The share of the metric's error that it takes away."""


def drift_table(rows: Sequence[Row], total: int, metric: str | None = None) -> Table:
    """A table of sites, in the order given.

    Args:
        rows: The sites.
        total: How many there are in all.
        metric: The metric's name, where there is one.
    """
    note = f"{len(rows)} of {total} hook points" if len(rows) < total else None
    table = Table(box=SIMPLE_HEAD, pad_edge=False, caption=note, caption_justify="left")
    table.add_column("hook point", no_wrap=True, overflow="ellipsis")
    patched = any(row.recovered is not None for row in rows)
    shares = [*(["recovered"] if patched else []), *([metric] if metric and patched else [])]
    # What a patch recovers says more than the cosine, and a terminal is narrow.
    for name in (*shares, "fresh", "relative", *([] if patched else ["cosine", "SNR dB"])):
        table.add_column(Text(name), justify="right")
    for row in rows:
        given = [row.recovered] * patched + [row.metric] * bool(metric and patched)
        cells = [*map(_share, given), _error(row.fresh), _error(row.relative)]
        cells += [] if patched else [_cosine(row.cosine), _decibels(row.snr)]
        table.add_row(Text(row.hook), *map(Text, cells))
    return table


def _share(value: float | None) -> str:
    """A share as percent."""
    return NOT_COMPUTED if value is None or math.isnan(value) else f"{100 * value:.1f} %"


def _error(value: float) -> str:
    """A relative error."""
    return f"{value:.2g}"


def _cosine(value: float) -> str:
    """A cosine, with as many digits as it differs from 1 in."""
    return NOT_COMPUTED if math.isnan(value) else f"{value:.6f}"


def _decibels(value: float) -> str:
    """Decibels, to one digit."""
    return f"{value:.1f}" if math.isfinite(value) else f"{value}"
