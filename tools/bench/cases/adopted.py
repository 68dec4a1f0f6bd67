"""A run of an adopted file, float32, int8 and QDQ, against the original in a bare session: no hook point fetched, and all."""

from __future__ import annotations

from functools import partial

from tools.bench.cases.adopting import foreign_files
from tools.bench.harness import Case, Findings, Row, Setup, against_floor, prompts, rounds, timed

ALL_LIMIT, NONE_LIMIT = 1.15, 1.03


def _adopted(hooked: str, folder: str, original: str) -> None:
    """Adopts a file."""
    import graphlens

    graphlens.adopt(original, folder, announce=lambda _: None)


def _qdq(hooked: str, folder: str, original: str) -> None:
    """Writes model.onnx as onnxruntime quantises a file statically, in QDQ form, calibrated on tokens at random."""
    import logging
    from collections.abc import Iterator
    from pathlib import Path
    from typing import Any

    import numpy as np
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Tokens(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            random = np.random.default_rng(1)
            ids = (random.integers(0, 500, (1, 16)) for _ in range(3))
            self.feeds: Iterator[Any] = iter(
                [{"input_ids": each, "attention_mask": np.ones_like(each)} for each in ids]
            )

        def get_next(self) -> Any:
            return next(self.feeds, None)

    out = Path(folder).with_suffix(".partial")
    out.mkdir(parents=True, exist_ok=True)
    logging.disable(logging.WARNING)
    quantize_static(
        original,
        str(out / "model.onnx"),
        Tokens(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["MatMul"],
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    out.rename(folder)


def run(setup: Setup) -> Findings:
    """Milliseconds a call, at each size: forward, and run_with_cache of every hook point."""
    import numpy as np
    import onnxruntime

    from graphlens import HookedTransformer

    folder = setup.model.made("foreign", foreign_files, str(setup.model.checkpoint))
    rows: list[Row] = []
    notes = []
    qdq = setup.model.made("qdq", _qdq, str(folder / "model.onnx"))
    files = {"float32": folder / "model.onnx", "int8": folder / "int8.onnx", "QDQ": qdq / "model.onnx"}
    for kind, file in files.items():
        hooked = setup.model.made(f"adopted-{kind}", _adopted, str(file))
        model = HookedTransformer.from_onnx(hooked, "cpu")
        original = onnxruntime.InferenceSession(file)
        # Sessions of ours leave QDQ as it is written: what that alone costs.
        apart = onnxruntime.SessionOptions()
        apart.add_session_config_entry("session.disable_quant_qdq", "1")
        unfused = onnxruntime.InferenceSession(file, apart) if kind == "QDQ" else None
        largest, fetched = 0.0, 0
        for size, ids in prompts(setup.model).items():
            feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
            bare = partial(original.run, ["logits"], feeds)
            contenders = {
                "floor": timed(bare),
                "none": timed(partial(model, ids)),
                "all": timed(partial(model.run_with_cache, ids)),
            }
            if unfused is not None:
                contenders["unfused"] = timed(partial(unfused.run, ["logits"], feeds))
            found = rounds(contenders, setup.repeats, warmup=3)
            if unfused is not None:
                label = f"{kind}, {size}, the original with session.disable_quant_qdq"
                rows.append(against_floor(label, found["unfused"], found["floor"]))
            rows.append(against_floor(f"{kind}, {size}, no hook point", found["none"], found["floor"], NONE_LIMIT))
            rows.append(against_floor(f"{kind}, {size}, every one", found["all"], found["floor"], ALL_LIMIT))
            logits, cache = model.run_with_cache(ids)
            expected = bare()[0]
            largest = max(largest, float(np.abs(np.asarray(logits) - expected).max() / np.abs(expected).max()))
            fetched = len(cache)
        # Rounding to int8 makes much of the last bit of a float: the original itself is no nearer to itself.
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        as_written = onnxruntime.InferenceSession(file, options)
        own = float(np.abs(as_written.run(["logits"], feeds)[0] - expected).max() / np.abs(expected).max())
        notes.append(
            f"{kind}: {fetched} hook points; logits differ from the original's by at most {largest:.0e} of the largest, the "
            f"original's own without optimisation by {own:.0e}."
        )
    return Findings(rows, "the original in a bare InferenceSession, logits fetched", tuple(notes))


CASE = Case(run, repeats=15, model="llama-135m")
