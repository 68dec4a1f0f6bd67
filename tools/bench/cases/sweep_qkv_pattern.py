"""The sweeps of queries, keys, values and patterns (layer x head, all positions), batch 8, against one forward per patch.

TransformerLens sweeps three layers, evenly spaced; its time is scaled.
"""

from __future__ import annotations

from tools.bench.harness import Case, Findings, Setup
from tools.bench.peers import FLOOR, LENS_4
from tools.bench.sweep_rows import SweepPlan, run_sweeps


def run(setup: Setup) -> Findings:
    """Milliseconds a sweep, how far its values lie from the loop's, and peak memory."""
    faster = {FLOOR: 2.5, LENS_4: 8.0}
    kinds = [f"attn_head_{name}_all_pos" for name in ("q", "k", "v", "pattern")]
    return run_sweeps(setup, *(SweepPlan(kind, 8, faster, layers=3, slow=(LENS_4,)) for kind in kinds))


CASE = Case(run, repeats=3)
