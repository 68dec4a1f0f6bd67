"""One head of the middle layer ablated: an intervention by data, side by side with every peer's own way.

A hook in TransformerLens and transformers, a traced assignment in nnsight, a factor per head as an input of plain ONNX
Runtime's file.
"""

from __future__ import annotations

from tools.bench.harness import Case, Findings, Setup
from tools.bench.side import run_work


def run(setup: Setup) -> Findings:
    """Milliseconds a run, and peak memory of each process."""
    return run_work(setup, "edit", setup.sizes())


CASE = Case(run, repeats=11)
