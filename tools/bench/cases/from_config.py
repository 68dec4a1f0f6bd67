"""A model of two layers from a config: the first time, again, and loading another state dict into it."""

from __future__ import annotations

import statistics
import tempfile

from tools.bench.children import run_child
from tools.bench.harness import Case, Findings, Row, Setup, Target

FIRST, AGAIN = 5.0, 0.5  # seconds
NOTE = "2 layers, d_model 512, 8 heads, d_mlp 2,048, d_vocab 10,000: 16.9 million parameters, drawn by torch."
STEPS = ("first time", "again, another seed", "again, in a new process", "load_state_dict", "its first run")


def _built(cache: str) -> list[list[float]]:
    """(wall, processor time) of each step in seconds, in a process that has imported what it needs."""
    import os
    import time

    os.environ["GRAPHLENS_CACHE"] = cache
    import onnx_ir  # noqa: F401
    import onnxruntime  # noqa: F401
    import torch

    from graphlens.torch import HookedTransformer, HookedTransformerConfig

    sizes = {
        "n_layers": 2,
        "n_heads": 8,
        "d_model": 512,
        "d_head": 64,
        "n_ctx": 1024,
        "d_vocab": 10_000,
        "act_fn": "gelu",
    }
    seconds, tokens = [], torch.arange(64)[None]

    def timed(work: object) -> object:
        start, busy = time.perf_counter(), time.process_time()
        done = work()  # type: ignore[operator]
        seconds.append([time.perf_counter() - start, time.process_time() - busy])
        return done

    model = timed(lambda: HookedTransformer(HookedTransformerConfig(**sizes, seed=0)))
    other = timed(lambda: HookedTransformer(HookedTransformerConfig(**sizes, seed=1)))
    state = other.state_dict()  # type: ignore[attr-defined]
    timed(lambda: model.load_state_dict(state))  # type: ignore[attr-defined]
    timed(lambda: model(tokens))  # type: ignore[operator]
    return seconds


def run(setup: Setup) -> Findings:
    """Seconds of each step; the imports of torch, ONNX Runtime and onnx-ir are not counted."""
    found: dict[str, list[list[float]]] = {step: [] for step in STEPS}
    for _ in range(setup.repeats):
        with tempfile.TemporaryDirectory(dir=setup.workdir) as cache:
            first = run_child(_built, cache).result
            second = run_child(_built, cache).result
        for step, pair in zip(STEPS, (first[0], first[1], second[0], first[2], first[3]), strict=True):
            found[step].append(pair)
    limits = {"first time": FIRST, "again, another seed": AGAIN, "again, in a new process": AGAIN}
    rows = []
    for step, pairs in found.items():
        wall, busy = ([pair[which] for pair in pairs] for which in (0, 1))
        target = Target(statistics.median(wall), limits[step], "s") if step in limits else None
        rows += [Row(step, "s", wall, (), target), Row(f"{step}, processor time", "s", busy)]
    return Findings(rows, "", (NOTE, "The first time makes the graph, and verifies it."))


CASE = Case(run, repeats=3, model="tiny")
