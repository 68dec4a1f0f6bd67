"""What an open spends on checking that the weights are the graph's own, and on the rest of loading."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from tools.bench.harness import Case, Findings, Row, Setup, Target, rounds, timed

LIMIT = 50.0  # milliseconds


def run(setup: Setup) -> Findings:
    """Milliseconds a call, weights in the page cache."""
    from graphlens import surgery
    from graphlens.surgery.fingerprint import verify_weights

    folder = setup.model.hooked
    model = surgery.load(folder)
    files = surgery.read_manifest(model).files
    judged: dict[str, Callable[[], Any]] = {
        "verify_weights, nothing moved": lambda: verify_weights(folder, files),
    }
    rest: dict[str, Callable[[], Any]] = {
        "verify_weights, every byte read again": lambda: verify_weights(folder, files, whole=True),
        "check_graph": lambda: surgery.check_graph(model, folder / "model.onnx"),
        "surgery.load, all of it": lambda: surgery.load(folder),
    }
    found = rounds({name: timed(work) for name, work in (judged | rest).items()}, setup.repeats, warmup=2)
    return Findings(
        [
            Row(name, "ms", times, target=Target(statistics.median(times), LIMIT, "ms") if name in judged else None)
            for name, times in found.items()
        ]
    )


CASE = Case(run, repeats=15)
