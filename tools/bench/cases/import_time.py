"""Importing graphlens, as a whole process, against an interpreter that does nothing."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from tools.bench.harness import Case, Findings, Row, Setup, Target, rounds

LIMIT = 0.3  # seconds


def _process(code: str) -> Callable[[], float]:
    def measure() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return time.perf_counter() - start

    return measure


def run(setup: Setup) -> Findings:
    """Seconds a process; the target is held against the median of the rounds' differences."""
    imports = {"import graphlens": LIMIT, "from graphlens import HookedTransformer": None}
    found = rounds({code: _process(code) for code in ("pass", *imports)}, setup.repeats)
    rows = []
    for code, limit in imports.items():
        difference = statistics.median(a - b for a, b in zip(found[code], found["pass"], strict=True))
        target = None if limit is None else Target(difference, limit, "s", "over the floor")
        rows.append(Row(code, "s", found[code], found["pass"], target))
    return Findings(rows, "python -c pass")


CASE = Case(run, repeats=15, model="tiny")
