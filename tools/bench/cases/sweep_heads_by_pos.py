"""The activation-patching sweep of head outputs (layer x position x head), batch 1, against one forward per patch.

TransformerLens sweeps two layers, its first and its last; its time is scaled.
"""

from __future__ import annotations

from tools.bench.harness import Case, Findings, Setup
from tools.bench.peers import FLOOR, LENS_4
from tools.bench.sweep_rows import SweepPlan, run_sweeps


def run(setup: Setup) -> Findings:
    """Milliseconds a sweep, how far its values lie from the loop's, and peak memory."""
    return run_sweeps(setup, SweepPlan("attn_head_out_by_pos", 1, {FLOOR: 8, LENS_4: 30}, layers=2, slow=(LENS_4,)))


CASE = Case(run, repeats=3)
