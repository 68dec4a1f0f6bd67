"""What a process holds after runs of long prompts that read no hook point: plain, edited, with a Python hook."""

from __future__ import annotations

from functools import partial
from typing import Any

from tools.bench.children import run_child
from tools.bench.harness import Case, Findings, Row, Setup, rounds

KINDS = ("plain", "one head ablated", "a Python hook")


def _ours(folder: str, ids: list[list[int]], kind: str) -> dict[str, int]:
    import gc
    from pathlib import Path

    import numpy

    from graphlens import Ablate, HookedTransformer

    model, tokens = HookedTransformer.from_onnx(folder, "cpu"), numpy.asarray(ids)
    site = f"blocks.{model.cfg.n_layers // 2}.attn.hook_z"
    for _ in range(2):
        if kind == "plain":
            model(tokens)
        elif kind == "a Python hook":
            model.run_with_hooks(tokens, fwd_hooks=[(site, lambda z, hook: z * 0.5)])
        else:
            model.run_with_interventions(tokens, Ablate(site, heads=0))
        gc.collect()
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines[1:]}
    return {"held": sizes["Pss"], "own": sizes["Pss_Anon"]}


def _bare(path: str, ids: list[list[int]]) -> dict[str, int]:
    import gc
    from pathlib import Path

    import numpy
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for _ in range(2):
        session.run(["logits"], {"input_ids": numpy.asarray(ids)})
        gc.collect()
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines[1:]}
    return {"held": sizes["Pss"], "own": sizes["Pss_Anon"]}


def run(setup: Setup) -> Findings:
    """MB after two runs in a fresh process: in all, and without pages of files; and its peak. Linux only."""
    model = setup.model
    batch, length = 4, min(512, model.n_ctx)
    ids = [[(row * length + pos) * 7919 % model.d_vocab for pos in range(length)] for row in range(batch)]
    run_child(_ours, str(model.hooked), [[0]], "one head ablated")  # packs the weights, where nobody did before

    def measured(*arguments: Any) -> dict[str, float]:
        found = run_child(*arguments)
        return {**{name: size / 1e6 for name, size in found.result.items()}, "peak": found.peak_bytes / 1e6}

    contenders = {"floor": partial(measured, _bare, str(model.stripped), ids)}
    contenders |= {kind: partial(measured, _ours, str(model.hooked), ids, kind) for kind in KINDS}
    found = rounds(contenders, setup.repeats, warmup=0)
    labels = {"held": "held", "own": "held, without pages of files", "peak": "peak"}
    rows = [
        Row(f"{kind}, {label}", "MB", [one[key] for one in found[kind]], [one[key] for one in found["floor"]])
        for kind in KINDS
        for key, label in labels.items()
    ]
    notes = (
        f"Batch {batch} x {length} tokens; weights {model.weights_bytes / 1e6:,.1f} MB. Held is proportional set size "
        "after two runs, their results freed; the peak is of resident pages, those of packed weights on disk included.",
    )
    return Findings(rows, "a bare InferenceSession on the stripped file, in a process of its own", notes)


CASE = Case(run, repeats=3)
