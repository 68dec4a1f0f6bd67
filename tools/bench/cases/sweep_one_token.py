"""The sweep of the residual stream, batch 8, over prompts that differ in one token: what most patching is done on.

A patch where both prompts are the same changes nothing, and is not computed. TransformerLens sweeps three layers, evenly
spaced; its time is scaled.
"""

from __future__ import annotations

from tools.bench.harness import Case, Findings, Setup
from tools.bench.peers import FLOOR, LENS_4
from tools.bench.sweep_rows import SweepPlan, run_sweeps


def run(setup: Setup) -> Findings:
    """Milliseconds a sweep, how far its values lie from the loop's, and peak memory."""
    limits = {FLOOR: 3.5, LENS_4: 15.0}
    return run_sweeps(setup, SweepPlan("resid_pre", 8, limits, layers=3, slow=(LENS_4,), one_token=True))


CASE = Case(run, repeats=3)
