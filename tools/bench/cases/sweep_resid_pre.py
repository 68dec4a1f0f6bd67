"""The activation-patching sweep of the residual stream (layer x position), batch 8, against one forward per patch.

TransformerLens sweeps three layers, evenly spaced; its time is scaled.
"""

from __future__ import annotations

from tools.bench.harness import Case, Findings, Setup
from tools.bench.peers import FLOOR, LENS_4
from tools.bench.sweep_rows import SweepPlan, run_sweeps, sweep_works
from tools.bench.workers.protocol import Work

PLAN = SweepPlan("resid_pre", 8, {FLOOR: 3.5, LENS_4: 15}, layers=3)


def works(hooked: str) -> dict[str, Work]:
    """The sweep."""
    return sweep_works(hooked, PLAN)


def run(setup: Setup) -> Findings:
    """Milliseconds a sweep, how far its values lie from the loop's, and peak memory."""
    return run_sweeps(setup, PLAN)


CASE = Case(run, repeats=3, works=works)
