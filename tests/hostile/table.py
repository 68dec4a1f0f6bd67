"""What came of all cases: a line for each group."""

from __future__ import annotations

import platform
from collections import Counter, defaultdict

import hypothesis
import numpy as np
import onnxruntime

from tests.hostile.cases import BAD, CLEAN, GOOD, OUTCOMES, RIGHT, Case, Verdict

_HEAD = """# What hostile files and calls came to

Damaged, altered and hostile model folders, edits, hooks, arguments, texts and saved sweeps, each in a process of its own
with limits of memory (512 MiB beyond what the process held) and time (10 s of processor time). A case ends in a *clean
error* of graphlens or with the *right* number, which plain ONNX Runtime and NumPy compute from the untouched file. A
changed byte of a graph or of weights must be refused.

{what}. Every case has a name: `python -m tests.hostile --case NAME` plays it again.

![How the cases of each group ended: errors that name what is wrong, and right numbers](pictures/hostile.svg)

"""


def one_line(text: str) -> str:
    """A message as one line, not too long."""
    whole = " | ".join(part.strip() for part in text.strip().splitlines() if set(part.strip()) - set("^~│╭╮╰╯─ "))
    return whole if len(whole) <= 500 else f"{whole[:150]} ... {whole[-350:]}"  # a traceback ends in what it is about


class Table:
    """Counts outcomes by group."""

    def __init__(self) -> None:
        self._counts: dict[str, Counter[str]] = defaultdict(Counter)
        self._order: list[str] = []
        self.first = ""

    def add(self, case: Case, verdict: Verdict) -> None:
        """Counts a case."""
        self._counts[case.group][verdict.outcome] += 1
        if not verdict.good and not self.first:
            self.first = case.id

    @property
    def faults(self) -> int:
        """How many cases came to a fault."""
        return sum(count[bad] for count in self._counts.values() for bad in BAD)

    def _rows(self) -> list[tuple[str, ...]]:
        rows = [
            (group, str(sum(count.values())), *(str(count[outcome]) for outcome in OUTCOMES))
            for group, count in sorted(self._counts.items())
        ]
        sums = Counter[str]()
        for count in self._counts.values():
            sums += count
        return [*rows, ("all", str(sum(sums.values())), *(str(sums[outcome]) for outcome in OUTCOMES))]

    def text(self, seconds: float) -> str:
        """The table for a terminal, one line a group."""
        head = ("group", "cases", *OUTCOMES)
        rows = [head, *self._rows()]
        widths = [max(len(row[at]) for row in rows) for at in range(len(head))]

        def line(row: tuple[str, ...]) -> str:
            rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
            return "  ".join([row[0].ljust(widths[0]), *rest])

        lines = [line(row) for row in rows]
        return "\n".join([*lines, f"{seconds:.0f} s"])

    def page(self, seconds: float, everything: bool) -> str:
        """The table as a page of the documentation."""
        command = f"python -m tests.hostile{' --all' if everything else ''} --table docs/hostile.md"
        count = sum(sum(count.values()) for count in self._counts.values())
        what = (
            f"`{command}` wrote this page: {count:,} cases in {seconds:.0f} s, with Python {platform.python_version()}, NumPy "
            f"{np.__version__}, ONNX Runtime {onnxruntime.__version__} and Hypothesis {hypothesis.__version__}"
        )
        head = ("group", "cases", *GOOD, *BAD)
        assert head[2:] == (CLEAN, RIGHT, *BAD)
        lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
        return _HEAD.format(what=what) + "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in self._rows())]) + "\n"
