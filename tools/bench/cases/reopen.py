"""What opening the same file a second time in one process adds to its memory."""

from __future__ import annotations

import statistics

from tools.bench.children import run_child
from tools.bench.harness import Case, Findings, Row, Setup, Target, rounds

LIMIT = 10.0  # per cent of the weights' bytes
_SIZE = (1, 16)


def _open_twice(folder: str, vocabulary: int, batch: int, length: int) -> list[int]:
    import gc
    from pathlib import Path

    import numpy

    from graphlens import HookedTransformer

    ids = numpy.arange(batch * length).reshape(batch, length) * 7919 % vocabulary
    models, resident = [], []
    for _ in range(2):
        models.append(HookedTransformer.from_onnx(folder, "cpu"))
        models[-1].run_with_cache(ids)
        gc.collect()
        status = Path("/proc/self/status").read_text().splitlines()
        resident += [int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS:")]
    return resident


def _two_sessions(path: str, vocabulary: int, batch: int, length: int) -> list[int]:
    import gc
    from pathlib import Path

    import numpy
    import onnxruntime

    ids = numpy.arange(batch * length).reshape(batch, length) * 7919 % vocabulary
    sessions, resident = [], []
    for _ in range(2):
        sessions.append(onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]))
        sessions[-1].run(["logits"], {"input_ids": ids})
        gc.collect()
        status = Path("/proc/self/status").read_text().splitlines()
        resident += [int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS:")]
    return resident


def run(setup: Setup) -> Findings:
    """MB resident after the first open and run, and what a second one adds. Linux only (VmRSS)."""
    model = setup.model
    found = rounds(
        {
            "floor": lambda: run_child(_two_sessions, str(model.stripped), model.d_vocab, *_SIZE).result,
            "ours": lambda: run_child(_open_twice, str(model.hooked), model.d_vocab, *_SIZE).result,
        },
        setup.repeats,
        warmup=0,
    )
    first = {name: [one / 1e6 for one, _ in pairs] for name, pairs in found.items()}
    growth = {name: [(two - one) / 1e6 for one, two in pairs] for name, pairs in found.items()}
    share = statistics.median(growth["ours"]) / (model.weights_bytes / 1e6) * 100
    target = Target(share, LIMIT, "%", "of the weights")
    return Findings(
        (
            Row("after the first", "MB", first["ours"], first["floor"]),
            Row("growth by the second", "MB", growth["ours"], growth["floor"], target),
        ),
        "two bare InferenceSessions on the stripped file, in a fresh process",
        (f"Weights {model.weights_bytes / 1e6:,.1f} MB; both models stay alive, caches are dropped.",),
    )


CASE = Case(run, repeats=5)
