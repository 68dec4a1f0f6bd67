"""Every hook point fetched (run_with_cache) against a run of the stripped file."""

from __future__ import annotations

from functools import partial

from tools.bench.harness import Case, Findings, Setup, against_floor, floor_session, prompts, rounds, timed
from tools.bench.workers.protocol import Work, logits_check

LIMIT = 1.10


def works(hooked: str) -> dict[str, Work]:
    """A call at each size."""
    from graphlens import HookedTransformer

    model = HookedTransformer.from_onnx(hooked, "cpu")
    return {
        size: Work(partial(model.run_with_cache, ids), lambda r: logits_check(r[0]), lambda r: {"cached": len(r[1])})
        for size, ids in prompts(model.cfg).items()
    }


def run(setup: Setup) -> Findings:
    """Milliseconds a call, at each size."""
    import numpy as np

    ours, floor = works(str(setup.model.hooked)), floor_session(setup.model)
    rows, largest, fetched = [], 0.0, 0
    for size, ids in prompts(setup.model).items():
        bare = partial(floor.run, ["logits"], {"input_ids": ids})
        found = rounds({"floor": timed(bare), "ours": timed(ours[size].run)}, setup.repeats, warmup=3)
        rows.append(against_floor(size, found["ours"], found["floor"], LIMIT))
        logits, cache = ours[size].run()
        largest, fetched = max(largest, float(np.abs(logits - bare()[0]).max())), len(cache)
    return Findings(
        rows,
        "bare InferenceSession on the stripped file, logits fetched",
        (f"{fetched} hook points fetched; logits differ from the floor's by at most {largest:.0e}.",),
    )


CASE = Case(run, repeats=21, works=works)
