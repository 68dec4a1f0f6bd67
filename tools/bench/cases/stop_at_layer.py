"""A run that stops after the first block against a full run: skipped blocks are not in the graph that runs."""

from __future__ import annotations

from functools import partial

from tools.bench.harness import Case, Findings, Setup, against_floor, rounds, timed, token_ids

LIMIT = 0.25


def run(setup: Setup) -> Findings:
    """Milliseconds a call, at each size."""
    from graphlens import HookedTransformer

    model = HookedTransformer.from_onnx(setup.model.hooked, "cpu")
    rows = []
    for batch, length in setup.sizes():
        ids = token_ids(setup.model, batch, length)
        found = rounds(
            {"full": timed(partial(model, ids)), "stopped": timed(partial(model, ids, stop_at_layer=1))},
            setup.repeats,
            warmup=3,
        )
        label = f"b{batch} s{length}, stop_at_layer=1 of {model.cfg.n_layers}"
        rows.append(against_floor(label, found["stopped"], found["full"], LIMIT))
    return Findings(rows, "the same model's full run, logits returned")


CASE = Case(run, repeats=15)
