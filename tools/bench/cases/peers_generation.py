"""Greedy decoding of 20 new tokens with a KV cache, side by side with every peer; all must give the same tokens."""

from __future__ import annotations

from tools.bench.harness import Case, Findings, Setup
from tools.bench.peers import LENS_4
from tools.bench.side import run_work


def run(setup: Setup) -> Findings:
    """Milliseconds for a prompt of 16 tokens and 20 new ones, and peak memory of each process."""
    return run_work(setup, "generation", setup.sizes()[:1], memory_limits={LENS_4.name: 1.0})


CASE = Case(run, repeats=7)
