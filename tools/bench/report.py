"""Findings as a rich table, as JSON and as Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from rich.console import Console
from rich.table import Table

from tools.bench.harness import Findings, Row, Target, spread

_COLUMNS = ("", "graphlens", "floor", "ratio", "paired", "target", "")
_ABOUT = """\
# Benchmarks

Written by `python -m tools.bench`: `all --markdown PAGE`, or one case after the other with `--json FILE`, then
`page --from FILE ... --markdown PAGE`. Weights are random, token ids are seeded. Contenders
run in one process (or in alternating fresh processes; beside other libraries, each in a process of its own that waits for
its turn), interleaved, who goes first rotating, after a warm-up; all use their default threads, and the weights are in the
page cache. A figure is a median with its 10th to 90th
percentile; *ratio* is that of the medians, *paired* the median of the rounds' own ratios, and a target (meant for the
small model) is held against the larger of the two.
"""


@dataclass(frozen=True)
class Report:
    """One case's findings and the circumstances they were made in."""

    case: str
    summary: str
    model: str
    repeats: int
    machine: Mapping[str, str]
    findings: Findings

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the derived figures beside the samples."""
        data = asdict(self)
        for row, plain in zip(self.findings.rows, data["findings"]["rows"], strict=True):
            plain |= {"ratio": row.ratio, "paired_ratio": row.paired_ratio, "median": spread(row.ours)[0]}
            plain |= {"floor_median": spread(row.floor)[0] if row.floor else None}
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The report that ``to_dict`` gave."""
        found = data["findings"]
        rows = [
            Row(r["label"], r["unit"], r["ours"], r["floor"], Target(**r["target"]) if r["target"] else None)
            for r in found["rows"]
        ]
        return cls(**{**data, "findings": Findings(rows, found["floor"], found["notes"])})


def number(value: float) -> str:
    """Three or so significant digits."""
    decimals = sum(abs(value) < bound for bound in (100, 10, 1))
    return f"{value:,.{decimals}f}"


def _cells(row: Row) -> Iterator[str]:
    yield row.label
    for samples in (row.ours, row.floor):
        if not samples:
            yield ""
            continue
        median, low, high = spread(samples)
        yield f"{number(median)} {row.unit} ({number(low)}-{number(high)})"
    for ratio in (row.ratio, row.paired_ratio):
        yield "" if ratio is None else f"{ratio:.2f}x"
    target = row.target
    if target is None:
        yield from ("", "")
        return
    gap = "" if target.unit in ("x", "%") else " "
    of = f" {target.of}" if target.of else ""
    yield f"{number(target.value)}{gap}{target.unit} <= {number(target.limit)}{gap}{target.unit}{of}"
    yield "ok" if target.met else "over"


def show(report: Report, console: Console) -> None:
    """Prints one report."""
    title = f"{report.case}: {report.summary} Model: {report.model}, {report.repeats} rounds."
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(_COLUMNS):
        table.add_column(column, justify="left" if index in (0, len(_COLUMNS) - 1) else "right")
    for row in report.findings.rows:
        *cells, mark = _cells(row)
        table.add_row(*cells, {"ok": "[green]ok[/]", "over": "[red]over[/]"}.get(mark, mark))
    console.print(table)
    for note in _notes(report):
        console.print(f"  {note}", highlight=False, markup=False)


def show_machine(machine: Mapping[str, str], console: Console) -> None:
    """Prints the machine."""
    console.print("; ".join(f"{key} {value}" for key, value in machine.items()), highlight=False, style="dim")


def _notes(report: Report) -> list[str]:
    floor = report.findings.floor
    return [*([f"Floor: {floor}."] if floor else []), *report.findings.notes]


def machine_table(machine: Mapping[str, str]) -> str:
    """The machine as a Markdown table."""
    return "| machine | |\n|---|---|\n" + "".join(f"| {key} | {value} |\n" for key, value in machine.items())


def to_markdown(reports: Iterable[Report], failures: Mapping[str, str], machine: Mapping[str, str]) -> str:
    """The Markdown page of several reports; ``failures`` maps a case to why it gave none."""
    parts = [_ABOUT, machine_table(machine)]
    for report in reports:
        lines = [f"| {' | '.join(_COLUMNS)} |", f"|---|{'---:|' * (len(_COLUMNS) - 2)}---|"]
        lines += [f"| {' | '.join(_cells(row))} |" for row in report.findings.rows]
        version = report.machine.get("graphlens", "")
        heading = f"## {report.case}\n\n{report.summary} Model: {report.model}, {report.repeats} rounds, {version}.\n\n"
        notes = "".join(f"\n- {note}" for note in _notes(report))
        parts.append(heading + "\n".join(lines) + "\n" + (notes + "\n" if notes else ""))
    parts += [f"## {case}\n\nGave no figures: {reason}\n" for case, reason in failures.items()]
    return "\n".join(parts)


def to_json(reports: Iterable[Report]) -> str:
    """All samples and derived figures."""
    return json.dumps([report.to_dict() for report in reports], indent=1)
