"""Importing graphlens, as a whole process, against an interpreter that does nothing."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from tools.bench.children import ChildRun
from tools.bench.harness import Case, Figure, Findings, Row, Setup, Target, rounds

LIMIT = 0.3  # seconds
IMPORTS = {"import graphlens": LIMIT, "from graphlens import HookedTransformer": None}


def _process(code: str) -> Callable[[], float]:
    def measure() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return time.perf_counter() - start

    return measure


def _import_package() -> None:
    import graphlens  # noqa: F401


def _import_model() -> None:
    from graphlens import HookedTransformer  # noqa: F401


def figures(child: Callable[..., ChildRun], setup: Setup) -> list[Figure]:
    """Of a process for each import: seconds of the whole process up to there, and of the import alone."""
    found = []
    for code, function in zip(IMPORTS, (_import_package, _import_model), strict=True):
        done = child(function)
        found.append(Figure(code, "s", done.seconds))
        found.append(Figure(f"{code}, without the interpreter's start", "s", done.seconds - done.boot_seconds))
    return found


def run(setup: Setup) -> Findings:
    """Seconds a process; the target is held against the median of the rounds' differences."""
    found = rounds({code: _process(code) for code in ("pass", *IMPORTS)}, setup.repeats)
    rows = []
    for code, limit in IMPORTS.items():
        difference = statistics.median(a - b for a, b in zip(found[code], found["pass"], strict=True))
        target = None if limit is None else Target(difference, limit, "s", "over the floor")
        rows.append(Row(code, "s", found[code], found["pass"], target))
    return Findings(rows, "python -c pass")


CASE = Case(run, repeats=15, model="tiny", figures=figures)
