"""A file with a head ablation baked into it against the stripped file, both in bare ONNX Runtime."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

from tools.bench.harness import Case, Findings, Setup, against_floor, floor_session, rounds, timed, token_ids

LIMIT = 1.0


def run(setup: Setup) -> Findings:
    """Milliseconds a run, head 0 of one block ablated everywhere."""
    import numpy as np
    import onnxruntime

    from graphlens import Ablate, bake_model

    layer = min(5, setup.model.n_layers - 1)
    floor = floor_session(setup.model)
    rows, effects = [], []
    with tempfile.TemporaryDirectory(dir=setup.model.workdir) as folder:
        out = bake_model(setup.model.hooked, Ablate(f"blocks.{layer}.attn.hook_z", heads=0), Path(folder) / "baked")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        baked = onnxruntime.InferenceSession(str(out / "model.onnx"), options, providers=["CPUExecutionProvider"])
        for batch, length in setup.sizes():
            ids = token_ids(setup.model, batch, length)
            work = {
                name: partial(session.run, ["logits"], {"input_ids": ids})
                for name, session in (("floor", floor), ("baked", baked))
            }
            found = rounds({name: timed(call) for name, call in work.items()}, setup.repeats, warmup=3)
            rows.append(against_floor(f"b{batch} s{length}", found["baked"], found["floor"], LIMIT))
            effects.append(float(np.abs(work["baked"]()[0] - work["floor"]()[0]).max()))
    note = f"The ablation moves a logit by up to {min(effects):.2g} to {max(effects):.2g}."
    return Findings(rows, "bare InferenceSession on the stripped file", (note,))


CASE = Case(run, repeats=31)
