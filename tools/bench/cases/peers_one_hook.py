"""One Python hook that halves the middle layer's head outputs (hook_z), side by side with every peer.

transformers: a forward pre-hook of the module that reads them. Plain ONNX Runtime runs no Python: its file has a factor
as an input there.
"""

from __future__ import annotations

from tools.bench.harness import Case, Findings, Setup
from tools.bench.side import run_work


def run(setup: Setup) -> Findings:
    """Milliseconds a run, and peak memory of each process."""
    return run_work(setup, "one_hook", setup.sizes())


CASE = Case(run, repeats=11)
