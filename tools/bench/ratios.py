"""The pairwise ratios of two commits' figures: their median, their spread, and how they are shown."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from tools.bench.report import machine_table, number

LIMIT = 1.03
_RESAMPLES = 2000
_COLUMNS = ("", "old", "new", "new / old", "quartiles", "min-max", "95 % interval", "")
_ABOUT = """\
Both commits ran in one run, each in processes of its own, in turns. *new / old* is the median of the pairs' ratios, a pair
being two measurements that followed one another; the interval is that of this median (bootstrap over pairs).
"""


@dataclass(frozen=True)
class Spread:
    """Pairwise ratios in short: their median, quartiles and extremes, and a 95 % bootstrap interval of the median."""

    median: float
    quartiles: tuple[float, float]
    extremes: tuple[float, float]
    interval: tuple[float, float]

    @property
    def met(self) -> bool:
        """True if the median is at most LIMIT or its interval includes 1: no slowdown that can be told from noise."""
        return self.median <= LIMIT or self.interval[0] <= 1 <= self.interval[1]


@dataclass(frozen=True)
class Pairs:
    """A row: what both commits measured, in ``unit``; sample i of both followed one another."""

    label: str
    unit: str
    old: Sequence[float]
    new: Sequence[float]

    def spread(self) -> Spread | None:
        """The spread of new / old; None where no pair is positive (a difference of two times can be negative)."""
        ratios = [new / old for old, new in zip(self.old, self.new, strict=True) if old > 0 and new > 0]
        if not ratios:
            return None
        quarters = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        draw = random.Random(0)
        medians = [statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(_RESAMPLES)]
        cuts = statistics.quantiles(medians, n=40, method="inclusive")
        return Spread(
            statistics.median(ratios), (quarters[0], quarters[2]), (min(ratios), max(ratios)), (cuts[0], cuts[-1])
        )


@dataclass(frozen=True)
class Comparison:
    """A case on two commits. ``starts``: how often the processes were started anew, their pairs taken together."""

    case: str
    summary: str
    model: str
    repeats: int
    starts: int
    old: str
    new: str
    rows: Sequence[Pairs]
    machine: Mapping[str, str]
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def title(self) -> str:
        """What was measured, in one line."""
        times = f"{self.repeats} pairs, processes started {self.starts} times"
        return f"{self.case}: {self.old} (old) against {self.new} (new). {self.summary} Model: {self.model}, {times}."

    @property
    def verdict(self) -> str:
        """Which rows are over the limit, in one line."""
        spreads = {row.label: row.spread() for row in self.rows}
        over = [label for label, spread in spreads.items() if spread is not None and not spread.met]
        rule = f"ratio <= {LIMIT} or spread includes 1"
        return f"{self.case}: {rule}: " + (f"NOT in {'; '.join(over)}" if over else f"in all {len(spreads)} rows")


def _cells(row: Pairs) -> list[str]:
    values = [f"{number(statistics.median(side))} {row.unit}" for side in (row.old, row.new)]
    spread = row.spread()
    if spread is None:
        return [row.label, *values, "", "", "", "", ""]
    ranges = [f"{low:.3f}-{high:.3f}" for low, high in (spread.quartiles, spread.extremes, spread.interval)]
    return [row.label, *values, f"{spread.median:.3f}x", *ranges, "ok" if spread.met else "over"]


def show(comparison: Comparison, console: Console) -> None:
    """Prints one comparison and its verdict."""
    table = Table(title=comparison.title, title_justify="left")
    for index, column in enumerate(_COLUMNS):
        table.add_column(column, justify="left" if index in (0, len(_COLUMNS) - 1) else "right")
    for row in comparison.rows:
        *cells, mark = _cells(row)
        table.add_row(*cells, {"ok": "[green]ok[/]", "over": "[red]over[/]"}.get(mark, mark))
    console.print(table)
    for note in (*comparison.notes, comparison.verdict):
        console.print(f"  {note}", highlight=False, markup=False)


def to_markdown(comparisons: Sequence[Comparison]) -> str:
    """A Markdown page of comparisons that were made one after the other, and of the machine that they were made on."""
    parts = [machine_table(comparisons[0].machine), _ABOUT]
    for one in comparisons:
        lines = [f"| {' | '.join(_COLUMNS)} |", f"|---|{'---:|' * (len(_COLUMNS) - 2)}---|"]
        lines += [f"| {' | '.join(_cells(row))} |" for row in one.rows]
        notes = "".join(f"\n- {note}" for note in (*one.notes, one.verdict))
        parts.append(f"## {one.case}\n\n{one.title}\n\n" + "\n".join(lines) + "\n" + notes + "\n")
    return "\n".join(parts)


def to_json(comparisons: Iterable[Comparison]) -> str:
    """All samples, with the spreads."""
    found: list[dict[str, Any]] = []
    for one in comparisons:
        plain = asdict(one)
        for row, data in zip(one.rows, plain["rows"], strict=True):
            spread = row.spread()
            data["spread"] = None if spread is None else {**asdict(spread), "met": spread.met}
        found.append(plain)
    return json.dumps(found, indent=1)
