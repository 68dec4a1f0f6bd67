"""Plain runs, full caches and runs with one Python hook against a graph without hooks that was written by hand."""

from __future__ import annotations

from functools import partial
from typing import Any

from tools.bench.harness import (
    Case,
    Findings,
    Setup,
    against_floor,
    bare_session,
    floor_session,
    prompts,
    rounds,
    timed,
)

STRIPPED, PLAIN, ALL, ONE = "the stripped file, bare", "plain", "all hooks fetched", "one Python hook"
FIRST = "one Python hook, first runs"  # in the graph that serves all hook points
LIMITS = {PLAIN: 1.02, ALL: 1.06, ONE: 1.07}
OFTEN = 300  # runs after which the hook point has a graph of its own: see graphlens/engine/callers.py
SIZES = ("b1 s16", "b8 s32")


def zero_z(z: Any, hook: Any) -> None:
    """Zeroes head 0 of z [b, p, head, d_head], in place."""
    z[:, :, 0] = 0


def run(setup: Setup) -> Findings:
    """Milliseconds a call at two sizes; the floor's norms and activations are single operators."""
    import numpy as np

    from graphlens import HookedTransformer

    model = HookedTransformer.from_onnx(setup.model.hooked, "cpu")
    other = HookedTransformer.from_onnx(setup.model.hooked, "cpu")
    hook = f"blocks.{min(5, model.cfg.n_layers - 1)}.attn.hook_z"
    for _ in range(OFTEN):
        model.run_with_hooks(np.zeros((1, 1), np.int64), fwd_hooks=[(hook, zero_z)])
    floor, stripped = bare_session(setup.model.by_hand), floor_session(setup.model)
    rows, apart = [], 0.0
    for size, ids in prompts(setup.model).items():
        if size not in SIZES:
            continue
        works = {
            "floor": partial(floor.run, ["logits"], {"input_ids": ids}),
            STRIPPED: partial(stripped.run, ["logits"], {"input_ids": ids}),
            PLAIN: partial(model, ids),
            ALL: partial(model.run_with_cache, ids),
            FIRST: partial(other.run_with_hooks, ids, fwd_hooks=[(hook, zero_z)]),
            ONE: partial(model.run_with_hooks, ids, fwd_hooks=[(hook, zero_z)]),
        }
        logits = works["floor"]()[0]
        apart = max(apart, float(np.abs(works[PLAIN]() - logits).max() / np.abs(logits).max()))
        found = rounds({name: timed(work) for name, work in works.items()}, setup.repeats, warmup=3)
        rows += [
            against_floor(f"{size}, {name}", found[name], found["floor"], LIMITS.get(name))
            for name in works
            if name != "floor"
        ]
    notes = (
        f"Plain logits differ from the floor's by at most {apart:.0e} of the largest.",
        f"The hook had run {OFTEN} times before; its first runs are a row of their own.",
    )
    return Findings(rows, "bare InferenceSession on a graph written by hand (tools/bench/by_hand.py)", notes)


CASE = Case(run, repeats=21)
