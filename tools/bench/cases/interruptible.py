"""What it costs that Ctrl-C can end a run with Python hooks: the main thread has it made by another, which others need not."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tools.bench.harness import Case, Findings, Row, Setup, Target, rounds, token_ids, wait_quiet

LIMIT = 50.0  # microseconds
RUNS = 60  # in a sample, whose median counts


def median_of(work: Callable[[], Any]) -> float:
    """Microseconds of one call: the median of some in a row."""
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        work()
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)


def run(setup: Setup) -> Findings:
    """Microseconds that a run takes longer in the main thread: one of nothing, one hook, a hook in every block, no hook."""
    from graphlens import HookedTransformer
    from graphlens.runtime import PythonCalls

    model = HookedTransformer.from_onnx(setup.model.hooked, "cpu")
    ids = token_ids(setup.model, 1, 16)

    def look(activation: Any, hook: Any) -> None:
        pass

    z = [f"blocks.{layer}.attn.hook_z" for layer in range(model.cfg.n_layers)]
    works: dict[str, Callable[[], Any]] = {
        "a run that does nothing": lambda: PythonCalls({}).run(lambda: None),
        "one hook": lambda: model.run_with_hooks(ids, fwd_hooks=[(z[0], look)]),
        f"all {len(z)} hook_z": lambda: model.run_with_hooks(ids, fwd_hooks=[(name, look) for name in z]),
        "no hook": lambda: model(ids),
    }
    rows = []
    with ThreadPoolExecutor(1) as other:

        def more(work: Callable[[], Any]) -> Callable[[], float]:
            def measure() -> float:
                wait_quiet()
                here = median_of(work)
                wait_quiet()
                return here - other.submit(median_of, work).result()

            return measure

        def measured(said: str) -> None:
            found = rounds({name: more(work) for name, work in works.items()}, setup.repeats, warmup=1)
            for name, more_ in found.items():
                rows.append(Row(f"{name}{said}", "us", more_, target=Target(statistics.median(more_), LIMIT, "us")))

        measured("")
        try:
            import torch  # noqa: F401 - where it is loaded its settings are carried along
        except ImportError:
            return Findings(rows, notes=("torch is not installed: what its settings cost was not measured.",))
        measured(", torch loaded")
    return Findings(rows)


CASE = Case(run, repeats=21)
