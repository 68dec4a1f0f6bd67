"""Gradients of a logit difference with respect to activations, against a forward and against torch autograd."""

from __future__ import annotations

import time
from typing import Any

from tools.bench.children import run_child
from tools.bench.harness import (
    Case,
    Findings,
    Row,
    Setup,
    Target,
    against_floor,
    floor_session,
    rounds,
    timed,
    token_ids,
)
from tools.bench.workers.protocol import Work

BATCH, LENGTH = 8, 16
RESIDUALS, EVERY, MEMORY, BUILD = 4.5, 6.0, 3.0, 5.0
SOME = ("hook_resid_pre", "attn.hook_z")
ANSWERS = (5, 7)


def works(hooked: str) -> dict[str, Work]:
    """A forward and backward, to some and to all hook points."""
    from graphlens import HookedTransformer
    from graphlens.metrics import LogitDiff

    model = HookedTransformer.from_onnx(hooked, "cpu")
    ids, metric = token_ids(model.cfg, BATCH, min(LENGTH, model.cfg.n_ctx)), LogitDiff(*ANSWERS)
    some = [name for name in model.hook_dict if name.endswith(SOME)]

    def check(found: Any) -> dict[str, Any]:
        return {name: found[name].ravel()[:8].tolist() for name in some}

    size = f"b{BATCH} s{ids.shape[1]}"
    return {
        f"to every resid_pre and hook_z, {size}": Work(lambda: model.gradients(ids, metric, some), check),
        f"to every hook point, {size}": Work(lambda: model.gradients(ids, metric, list(model.hook_dict)), check),
    }


def run(setup: Setup) -> Findings:
    """Milliseconds of a forward and backward, peak memory, and how long the graph takes to build."""
    from graphlens import HookedTransformer
    from graphlens.metrics import LogitDiff

    ids = token_ids(setup.model, BATCH, min(LENGTH, setup.model.n_ctx))
    model = HookedTransformer.from_onnx(setup.model.hooked, "cpu")
    metric = LogitDiff(*ANSWERS)
    some = [name for name in model.hook_dict if name.endswith(SOME)]
    every = list(model.hook_dict)
    started = time.perf_counter()
    ours = model.gradients(ids, metric, some)
    first = time.perf_counter() - started
    floor = floor_session(setup.model)
    theirs, reference = _autograd(setup, ids, some)
    apart = max(float(abs(ours[name] - reference[name]).max() / abs(reference[name]).max()) for name in some)
    if apart > 1e-4:
        raise RuntimeError(f"gradients differ from torch's by {apart:.1e} of the largest")
    contenders = {
        "floor": timed(lambda: floor.run(["logits"], {"input_ids": ids})),
        "some": timed(lambda: model.gradients(ids, metric, some)),
        "every": timed(lambda: model.gradients(ids, metric, every)),
        "torch": timed(theirs),
    }
    times = rounds(contenders, setup.repeats)
    size = f"b{BATCH} s{ids.shape[1]}"
    peaks = [run_child(_peak, str(setup.model.hooked), ids.tolist(), which).result for which in ("gradients", "cache")]
    rows = [
        against_floor(f"to every resid_pre and hook_z, {size}; floor: one forward", times["some"], times["floor"], RESIDUALS),
        against_floor(f"the same; floor: torch autograd, weights frozen, {size}", times["some"], times["torch"], 1.0),
        against_floor(f"to every hook point, {size}; floor: one forward", times["every"], times["floor"], EVERY),
        Row("peak memory of a process, every hook point; floor: one full cache", "MB", [peaks[0] / 1e6], [peaks[1] / 1e6],
            Target(peaks[0] / peaks[1], MEMORY, "x", "a full cache's")),
        Row("the first call: building the graph and its session, and a run", "s", [first], (), Target(first, BUILD, "s")),
    ]  # fmt: skip
    note = f"Gradients differ from torch's by at most {apart:.0e} of the largest."
    return Findings(rows, "as each row says", (note,))


def _autograd(setup: Setup, ids: Any, names: list[str]) -> tuple[Any, dict[str, Any]]:
    """(forward and backward in torch, the gradients it gives) on transformers' model, its weights frozen."""
    import torch
    from transformers import AutoModelForCausalLM

    model = (
        AutoModelForCausalLM.from_pretrained(setup.model.checkpoint, dtype=torch.float32).eval().requires_grad_(False)
    )
    tokens = torch.from_numpy(ids)
    if setup.model.architecture == "gpt2":
        blocks = [(block, block.attn.c_proj) for block in model.transformer.h]
    else:  # as Llama
        blocks = [(block, block.self_attn.o_proj) for block in model.model.layers]
    n_heads = model.config.num_attention_heads

    def work() -> dict[str, Any]:
        kept: dict[str, Any] = {}

        def keep(name: str, value: Any) -> Any:
            value = value if value.requires_grad else value.detach().requires_grad_(True)
            value.retain_grad()
            kept[name] = value
            return value

        handles = []
        for layer, (block, projection) in enumerate(blocks):
            at = f"blocks.{layer}."
            handles.append(
                block.register_forward_pre_hook(
                    lambda _, given, at=at: (keep(f"{at}hook_resid_pre", given[0]), *given[1:])
                )
            )
            handles.append(
                projection.register_forward_pre_hook(lambda _, given, at=at: (keep(f"{at}attn.hook_z", given[0]),))
            )
        with torch.enable_grad():
            logits = model(tokens).logits[:, -1]
            (logits[:, ANSWERS[0]] - logits[:, ANSWERS[1]]).mean().backward()
        for handle in handles:
            handle.remove()
        found = {name: kept[name].grad.numpy() for name in names}
        return {n: g.reshape(*g.shape[:2], n_heads, -1) if n.endswith("hook_z") else g for n, g in found.items()}

    return work, work()


def _peak(hooked: str, ids: list[list[int]], which: str) -> int:
    from pathlib import Path

    from graphlens import HookedTransformer
    from graphlens.metrics import LogitDiff

    model = HookedTransformer.from_onnx(hooked, "cpu")
    if which == "gradients":
        model.gradients(ids, LogitDiff(5, 7))
    else:
        model.run_with_cache(ids)
    # Of this program alone: what getrusage says is never below what the parent had when it started it.
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024


CASE = Case(run, repeats=9, works=works)
