"""A plain and an edited run in turns, straight after one another, against the same two models in bare ONNX Runtime.

Each session has threads of its own, which wait for more work after a run: the next session finds a core taken.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.bench.harness import Case, Findings, Setup, against_floor, floor_session, rounds, timed, token_ids

PAIRS = 4


def run(setup: Setup) -> Findings:
    """Milliseconds of four plain and four edited runs, in turns and one kind after the other."""
    import onnxruntime

    from graphlens import Ablate, HookedTransformer, bake_model

    model, floor = HookedTransformer.from_onnx(setup.model.hooked, "cpu"), floor_session(setup.model)
    edit = Ablate(f"blocks.{min(5, setup.model.n_layers - 1)}.attn.hook_z", heads=0)
    rows = []
    with tempfile.TemporaryDirectory(dir=setup.model.workdir) as folder:
        out = bake_model(setup.model.hooked, edit, Path(folder) / "baked")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        baked = onnxruntime.InferenceSession(str(out / "model.onnx"), options, providers=["CPUExecutionProvider"])
        for batch, length in setup.sizes()[:2]:
            ids = token_ids(setup.model, batch, length)
            bare = [lambda s=session, i=ids: s.run(["logits"], {"input_ids": i}) for session in (floor, baked)]
            ours = [lambda i=ids: model(i), lambda i=ids: model.run_with_interventions(i, edit)]
            work = {"bare": _turns(bare), "ours": _turns(ours), "bare apart": _apart(bare), "ours apart": _apart(ours)}
            found = rounds({name: timed(call) for name, call in work.items()}, setup.repeats)
            size = f"b{batch} s{length}, {PAIRS} plain and {PAIRS} edited runs"
            rows.append(against_floor(f"{size}, in turns", found["ours"], found["bare"]))
            rows.append(against_floor(f"{size}, one kind after the other", found["ours apart"], found["bare apart"]))
    return Findings(rows, "bare InferenceSessions on the stripped file and on one with the edit baked in")


def _turns(kinds: list[Callable[[], Any]]) -> Callable[[], None]:
    def work() -> None:
        for _ in range(PAIRS):
            for call in kinds:
                call()

    return work


def _apart(kinds: list[Callable[[], Any]]) -> Callable[[], None]:
    def work() -> None:
        for call in kinds:
            for _ in range(PAIRS):
                call()

    return work


CASE = Case(run, repeats=11)
