"""Every hook point fetched (run_with_cache) against a run of the stripped file."""

from __future__ import annotations

from functools import partial

from tools.bench.harness import Case, Findings, Setup, against_floor, floor_session, rounds, timed, token_ids

LIMIT = 1.10


def run(setup: Setup) -> Findings:
    """Milliseconds a call, at each size."""
    import numpy as np

    from graphlens import HookedTransformer

    model, floor = HookedTransformer.from_onnx(setup.model.hooked, "cpu"), floor_session(setup.model)
    rows, largest, fetched = [], 0.0, 0
    for batch, length in setup.sizes():
        ids = token_ids(setup.model, batch, length)
        bare = partial(floor.run, ["logits"], {"input_ids": ids})
        found = rounds(
            {"floor": timed(bare), "ours": timed(partial(model.run_with_cache, ids))}, setup.repeats, warmup=3
        )
        rows.append(against_floor(f"b{batch} s{length}", found["ours"], found["floor"], LIMIT))
        logits, cache = model.run_with_cache(ids)
        largest, fetched = max(largest, float(np.abs(logits - bare()[0]).max())), len(cache)
    return Findings(
        rows,
        "bare InferenceSession on the stripped file, logits fetched",
        (f"{fetched} hook points fetched; logits differ from the floor's by at most {largest:.0e}.",),
    )


CASE = Case(run, repeats=21)
