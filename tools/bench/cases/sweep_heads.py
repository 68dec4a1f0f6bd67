"""The activation-patching sweep of head outputs (layer x head, all positions), batch 8, against one forward per patch.

TransformerLens sweeps three layers, evenly spaced; its time is scaled.
"""

from __future__ import annotations

from tools.bench.harness import Case, Findings, Setup
from tools.bench.peers import FLOOR, LENS_4
from tools.bench.sweep_rows import SweepPlan, run_sweeps


def run(setup: Setup) -> Findings:
    """Milliseconds a sweep, how far its values lie from the loop's, and peak memory."""
    return run_sweeps(setup, SweepPlan("attn_head_out_all_pos", 8, {FLOOR: 2.7, LENS_4: 9}, layers=3))


CASE = Case(run, repeats=3)
