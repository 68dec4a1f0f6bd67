"""A fresh process that opens the hooked file and fetches a first full cache, against one with bare ONNX Runtime."""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from tools.bench.children import ChildRun, run_child
from tools.bench.harness import Case, Figure, Findings, Row, Setup, Target, rounds

SECONDS_LIMIT = 1.5
MEMORY_LIMIT = 2.2  # times the weights' bytes
_SIZE = (1, 16)


def _first_cache(folder: str, vocabulary: int, batch: int, length: int) -> dict[str, Any]:
    import sys
    import time

    marks = [("", time.monotonic())]
    import numpy

    from graphlens import HookedTransformer

    marks.append(("import", time.monotonic()))
    model = HookedTransformer.from_onnx(folder, "cpu")
    marks.append(("open and check", time.monotonic()))
    _ = model.providers  # starts the session, as the first run would
    marks.append(("session", time.monotonic()))
    ids = numpy.arange(batch * length).reshape(batch, length) * 7919 % vocabulary
    model.run_with_cache(ids)
    marks.append(("first run", time.monotonic()))
    return {"marks": marks, "torch": "torch" in sys.modules}


def _first_run(path: str, vocabulary: int, batch: int, length: int) -> dict[str, Any]:
    import time

    marks = [("", time.monotonic())]
    import numpy
    import onnxruntime

    marks.append(("import", time.monotonic()))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    marks.append(("session", time.monotonic()))
    ids = numpy.arange(batch * length).reshape(batch, length) * 7919 % vocabulary
    session.run(["logits"], {"input_ids": ids})
    marks.append(("first run", time.monotonic()))
    return {"marks": marks}


def _seconds_of(stage: str, child: ChildRun) -> float:
    """How long a stage of a process took."""
    times = {name: now - before for (_, before), (name, now) in pairwise(child.result["marks"])}
    return float(times[stage])


def _first_on_this_machine(hooked: str, vocabulary: int) -> ChildRun:
    """A process whose cache folder is empty: no digest is remembered, so that every byte of the weights is read."""
    with tempfile.TemporaryDirectory() as cache:
        return run_child(_first_cache, hooked, vocabulary, *_SIZE, variables={**os.environ, "GRAPHLENS_CACHE": cache})


def _stages(runs: Sequence[ChildRun]) -> str:
    """Median seconds of each stage, in order."""
    seconds: dict[str, list[float]] = {"interpreter": [run.boot_seconds for run in runs]}
    for child in runs:
        for (_, before), (stage, now) in pairwise(child.result["marks"]):
            seconds.setdefault(stage, []).append(now - before)
    return ", ".join(f"{stage} {statistics.median(values):.3f}" for stage, values in seconds.items())


def _size() -> str:
    return f"b{_SIZE[0]} s{_SIZE[1]}"


def figures(child: Callable[..., ChildRun], setup: Setup) -> list[Figure]:
    """Of one process: seconds from starting it to the first result, and its peak memory."""
    done = child(_first_cache, str(setup.model.hooked), setup.model.d_vocab, *_SIZE)
    return [
        Figure(f"{_size()}, wall", "s", done.seconds),
        Figure("open and check", "s", _seconds_of("open and check", done)),
        Figure(f"{_size()}, peak memory", "MB", done.peak_bytes / 1e6),
    ]


def run(setup: Setup) -> Findings:
    """Seconds from starting the process to the first result, and its peak resident memory, weights in the page cache."""
    model = setup.model
    found = rounds(
        {
            "floor": lambda: run_child(_first_run, str(model.stripped), model.d_vocab, *_SIZE),
            "ours": lambda: run_child(_first_cache, str(model.hooked), model.d_vocab, *_SIZE),
            "first": lambda: _first_on_this_machine(str(model.hooked), model.d_vocab),
        },
        setup.repeats,
    )
    seconds = {name: [child.seconds for child in children] for name, children in found.items()}
    memory = {name: [child.peak_bytes / 1e6 for child in children] for name, children in found.items()}
    weights = model.weights_bytes / 1e6
    wall = Target(statistics.median(seconds["ours"]), SECONDS_LIMIT, "s")
    peak = Target(statistics.median(memory["ours"]) / weights, MEMORY_LIMIT, "x", "the weights")
    rows = (
        Row(f"{_size()}, wall", "s", seconds["ours"], seconds["floor"], wall),
        Row(f"{_size()}, peak memory", "MB", memory["ours"], memory["floor"], peak),
        *(
            Row(label, "s", [_seconds_of("open and check", child) for child in found[name]])
            for name, label in (
                ("ours", "open and check, nothing moved"),
                ("first", "open and check, every byte read and hashed"),
            )
        ),
    )
    notes = (
        f"graphlens, seconds: {_stages(found['ours'])}.",
        f"Floor, seconds: {_stages(found['floor'])}.",
        f"Weights {weights:,.1f} MB. torch imported: {any(child.result['torch'] for child in found['ours'])}.",
    )
    return Findings(rows, "bare InferenceSession on the stripped file and one run, in a fresh process", notes)


CASE = Case(run, repeats=7, figures=figures)
