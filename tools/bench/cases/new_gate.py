"""What a session for a new kind of gate costs, in a fresh process: seconds and memory beside the first session's."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from tools.bench.children import ChildRun, run_child
from tools.bench.harness import Case, Figure, Findings, Row, Setup, Target

SECONDS, MEGABYTES = 0.35, 60.0
KINDS = (
    "a head of hook_z ablated",
    "hook_resid_post steered",
    "a dim of hook_post ablated",
    "a head of hook_pattern ablated",
)


def _open_gates(folder: str, vocabulary: int) -> dict[str, Any]:
    import gc
    import time
    from pathlib import Path

    import numpy

    from graphlens import Ablate, HookedTransformer, Steer

    def resident() -> int:
        # Proportional: several mappings of one file count once.
        gc.collect()
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))

    ids = numpy.arange(16).reshape(1, 16) * 7919 % vocabulary
    started = time.perf_counter()
    model = HookedTransformer.from_onnx(folder, "cpu")
    model(ids)
    found = {"seconds": [time.perf_counter() - started], "bytes": [resident()]}
    width = model.cfg.d_model
    kinds = [
        Ablate("blocks.0.attn.hook_z", heads=0),
        Steer("blocks.0.hook_resid_post", numpy.ones(width)),
        Ablate("blocks.0.mlp.hook_post", dims=3),
        Ablate("blocks.0.attn.hook_pattern", heads=1),
    ]
    for kind in kinds:
        started = time.perf_counter()
        model.run_with_interventions(ids, kind)
        first = time.perf_counter() - started
        started = time.perf_counter()
        model.run_with_interventions(ids, kind)
        found["seconds"].append(first - (time.perf_counter() - started))  # the session, without the run
        found["bytes"].append(resident())
    found["sessions"] = len(model.sessions)
    return found


def figures(child: Callable[..., ChildRun], setup: Setup) -> list[Figure]:
    """Of one process: seconds of the first run and of each further session, and memory. Linux only."""
    found = child(_open_gates, str(setup.model.hooked), setup.model.d_vocab).result
    first, *further = found["seconds"]
    return [
        Figure("open, first session and run", "s", first),
        *(Figure(f"session: {kind}", "s", seconds) for kind, seconds in zip(KINDS, further, strict=True)),
        Figure("memory after the first session", "MB", found["bytes"][0] / 1e6),
        Figure("memory after the last session", "MB", found["bytes"][-1] / 1e6),
    ]


def run(setup: Setup) -> Findings:
    """Seconds and MB of the sessions for four kinds of gate, after the first session. Linux only."""
    model = setup.model
    once = run_child(_open_gates, str(model.hooked), model.d_vocab)  # packs the weights, where nobody did before
    runs = [run_child(_open_gates, str(model.hooked), model.d_vocab).result for _ in range(setup.repeats)]
    seconds = [value for found in runs for value in found["seconds"][1:]]
    growth = [(b - a) / 1e6 for found in runs for a, b in zip(found["bytes"], found["bytes"][1:], strict=False)]
    first = [found["bytes"][0] / 1e6 for found in runs]
    return Findings(
        (
            Row("session for a new kind of gate", "s", seconds, (), Target(statistics.median(seconds), SECONDS, "s")),
            Row("memory it adds", "MB", growth, (), Target(statistics.median(growth), MEGABYTES, "MB")),
            Row("memory after the first session", "MB", first),
        ),
        "",
        (
            f"Packed weights lie in the cache; the first process {'made them' if once.seconds > 4 else 'found them'} "
            f"({once.seconds:.1f} s in all). Memory is proportional set size: pages of one file count once.",
            f"The largest: {max(seconds):.2f} s, {max(growth):.0f} MB; {runs[0]['sessions']} sessions open at the end.",
        ),
    )


CASE = Case(run, repeats=5, figures=figures)
