"""Sweeps of batch 8 over prompts that differ in one token: the pairs that most patching is done on.

Those of TransformerLens's own demonstration of its patching functions (Activation_Patching_in_TL_Demo) are of this shape: 8
prompts of 15 tokens, another name at position 10 and the rest the same. A patch where both prompts are the same changes
nothing, and is not computed. TransformerLens sweeps three layers, evenly spaced; its time is scaled.
"""

from __future__ import annotations

from tools.bench.harness import Case, Findings, Setup
from tools.bench.peers import FLOOR, LENS_4
from tools.bench.sweep_rows import SweepPlan, run_sweeps

FASTER = {
    "resid_pre": (3.5, 15.0),
    "attn_head_out_all_pos": (2.7, 9.0),
    **{f"attn_head_{name}_all_pos": (2.5, 8.0) for name in ("q", "k", "v", "pattern")},
}


def run(setup: Setup) -> Findings:
    """Milliseconds a sweep, how far its values lie from the loop's, and peak memory."""
    plans = [
        SweepPlan(kind, 8, {FLOOR: floor, LENS_4: lens}, layers=3, slow=(LENS_4,), one_token=True)
        for kind, (floor, lens) in FASTER.items()
    ]
    return run_sweeps(setup, *plans)


CASE = Case(run, repeats=3)
