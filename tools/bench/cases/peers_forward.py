"""Logits alone: graphlens, plain ONNX Runtime, transformers, TransformerLens 3.9 and 4.3, nnsight, side by side."""

from __future__ import annotations

from tools.bench.harness import Case, Findings, Setup
from tools.bench.peers import FLOOR
from tools.bench.side import run_work


def run(setup: Setup) -> Findings:
    """Milliseconds a forward, and peak memory of each process."""
    return run_work(setup, "forward", setup.sizes(), memory_limits={FLOOR.name: 1.15})


CASE = Case(run, repeats=11)
