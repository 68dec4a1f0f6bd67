"""A run of an adopted file, float32 and int8, against the original in a bare session: no hook point fetched, and all."""

from __future__ import annotations

from functools import partial

from tools.bench.cases.adopting import foreign_files
from tools.bench.harness import Case, Findings, Row, Setup, against_floor, prompts, rounds, timed

ALL_LIMIT, NONE_LIMIT = 1.15, 1.03


def _adopted(hooked: str, folder: str, original: str) -> None:
    """Adopts a file."""
    import graphlens

    graphlens.adopt(original, folder, announce=lambda _: None)


def run(setup: Setup) -> Findings:
    """Milliseconds a call, at each size: forward, and run_with_cache of every hook point."""
    import numpy as np
    import onnxruntime

    from graphlens import HookedTransformer

    folder = setup.model.made("foreign", foreign_files, str(setup.model.checkpoint))
    rows: list[Row] = []
    notes = []
    for kind, name in (("float32", "model.onnx"), ("int8", "int8.onnx")):
        hooked = setup.model.made(f"adopted-{kind}", _adopted, str(folder / name))
        model = HookedTransformer.from_onnx(hooked, "cpu")
        original = onnxruntime.InferenceSession(folder / name)
        largest, fetched = 0.0, 0
        for size, ids in prompts(setup.model).items():
            bare = partial(original.run, ["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids)})
            contenders = {
                "floor": timed(bare),
                "none": timed(partial(model, ids)),
                "all": timed(partial(model.run_with_cache, ids)),
            }
            found = rounds(contenders, setup.repeats, warmup=3)
            rows.append(against_floor(f"{kind}, {size}, no hook point", found["none"], found["floor"], NONE_LIMIT))
            rows.append(against_floor(f"{kind}, {size}, every one", found["all"], found["floor"], ALL_LIMIT))
            logits, cache = model.run_with_cache(ids)
            expected = bare()[0]
            largest = max(largest, float(np.abs(np.asarray(logits) - expected).max() / np.abs(expected).max()))
            fetched = len(cache)
        # Rounding to int8 makes much of the last bit of a float: the original itself is no nearer to itself.
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        as_written = onnxruntime.InferenceSession(folder / name, options)
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        own = float(np.abs(as_written.run(["logits"], feeds)[0] - expected).max() / np.abs(expected).max())
        notes.append(
            f"{kind}: {fetched} hook points; logits differ from the original's by at most {largest:.0e} of the largest, the "
            f"original's own without optimisation by {own:.0e}."
        )
    return Findings(rows, "the original in a bare InferenceSession, logits fetched", tuple(notes))


CASE = Case(run, repeats=15, model="llama-135m")
