"""Exporting a checkpoint of gpt2-large's shape in a fresh process, without verification."""

from __future__ import annotations

import statistics

from tools.bench.cases.export import describe, export_once
from tools.bench.harness import Case, Findings, Row, Setup, Target, rounds

MEMORY_LIMIT = 1500.0  # MB


def run(setup: Setup) -> Findings:
    """Seconds from starting the process to the finished export, imports included, and peak resident memory."""
    children = rounds({"ours": lambda: export_once(setup, verify=False)}, setup.repeats, warmup=0)["ours"]
    memory = [child.peak_bytes / 1e6 for child in children]
    rows = (
        Row("not verified, peak memory", "MB", memory, target=Target(statistics.median(memory), MEMORY_LIMIT, "MB")),
        Row("not verified, wall", "s", [child.seconds for child in children]),
    )
    weights = f"Weights {setup.model.weights_bytes / 1e6:,.1f} MB."
    return Findings(rows, notes=(weights, f"The last one: {describe(children[-1])}."))


CASE = Case(run, repeats=1, model="large")
