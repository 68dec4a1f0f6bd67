"""Interventions by data (run_with_interventions) against a run of the stripped file."""

from __future__ import annotations

from functools import partial
from typing import Any

from tools.bench.harness import Case, Findings, Setup, against_floor, floor_session, rounds, timed, token_ids

LIMIT, LAYERS_LIMIT = 1.05, 1.08


def run(setup: Setup) -> Findings:
    """Milliseconds a call: one head ablated, one vector added, and a head ablated in every block."""
    import numpy as np

    from graphlens import Ablate, HookedTransformer, Steer

    model, floor = HookedTransformer.from_onnx(setup.model.hooked, "cpu"), floor_session(setup.model)
    layers = range(setup.model.n_layers)
    layer = min(5, layers[-1])
    vector = np.random.default_rng(0).standard_normal(model.cfg.d_model).astype(np.float32)
    edits: dict[str, tuple[Any, float]] = {
        "one head ablated": ([Ablate(f"blocks.{layer}.attn.hook_z", heads=0)], LIMIT),
        "one vector added": ([Steer(f"blocks.{layer}.hook_resid_post", vector)], LIMIT),
        f"a head ablated in {len(layers)} blocks": (
            [Ablate(f"blocks.{i}.attn.hook_z", heads=0) for i in layers],
            LAYERS_LIMIT,
        ),
    }
    rows, unchanged = [], []
    for batch, length in setup.sizes():
        ids = token_ids(setup.model, batch, length)
        bare = partial(floor.run, ["logits"], {"input_ids": ids})
        edited = {name: partial(model.run_with_interventions, ids, items) for name, (items, _) in edits.items()}
        contenders = {"floor": timed(bare), **{name: timed(work) for name, work in edited.items()}}
        found = rounds(contenders, setup.repeats, warmup=3)
        size = f"b{batch} s{length}"
        rows += [
            against_floor(f"{size}, {name}", found[name], found["floor"], limit) for name, (_, limit) in edits.items()
        ]
        logits = bare()[0]
        unchanged += [f"{size}, {name}" for name, work in edited.items() if np.abs(work() - logits).max() < 1e-5]
    built = model.runner.engine.sessions_built
    for head in range(3):
        for item in (
            Ablate(f"blocks.{layer}.attn.hook_z", float(head), heads=head),
            Steer(f"blocks.{layer}.hook_resid_post", vector, head),
        ):
            model.run_with_interventions(token_ids(setup.model, 1, 16), item)
    notes = (
        f"Edits without an effect on the logits: {', '.join(unchanged) or 'none'}.",
        f"Sessions built for other values, heads and coefficients afterwards: {model.runner.engine.sessions_built - built}.",
    )
    return Findings(rows, "bare InferenceSession on the stripped file, logits fetched", notes)


CASE = Case(run, repeats=21)
