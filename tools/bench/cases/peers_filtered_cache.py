"""A cache of every layer's residual stream (hook_resid_pre), side by side with every peer.

transformers gives the same as hidden_states; plain ONNX Runtime has the values as outputs of its file.
"""

from __future__ import annotations

from tools.bench.harness import Case, Findings, Setup
from tools.bench.side import run_work


def run(setup: Setup) -> Findings:
    """Milliseconds a run, and peak memory of each process."""
    return run_work(setup, "filtered_cache", setup.sizes())


CASE = Case(run, repeats=11)
