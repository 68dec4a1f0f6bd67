"""The floor: plain ONNX Runtime, defaults but for its warnings, on a file that holds just what the work needs."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from tools.bench.sweeps import KINDS, clean_activations, floor_loop, open_bare, unpatched
from tools.bench.workers.protocol import Job, Work, logits_check, opened_twice


def _sweep(job: Job, kind: str) -> Work:
    import numpy as np

    clean = clean_activations(job.hooked, KINDS[kind], np.array(job.tokens))
    session = open_bare(job.files[0])
    corrupted = np.array(job.corrupted)
    work = partial(floor_loop, session, KINDS[kind], corrupted, clean, job.answers, job.layers)
    return Work(
        work,
        lambda values: {"values": values.tolist()},
        lambda values: {"unpatched": unpatched(session, corrupted, job.answers)},
    )


def _generate(session: Any, ids: Any, new_tokens: int) -> Any:
    """Greedy decoding; the KV cache is fed back as it came."""
    import numpy as np

    shapes = {value.name: value.shape for value in session.get_inputs() if value.name.startswith("past_key_values.")}
    batch, heads, _, width = next(iter(shapes.values()))
    batch = ids.shape[0]
    past = dict.fromkeys(shapes, np.zeros((batch, heads, 0, width), np.float32))
    outputs = ["logits", *(name.replace("past_key_values", "present") for name in shapes)]
    step, tokens = ids, [ids]
    for _ in range(new_tokens):
        total = sum(part.shape[1] for part in tokens)
        feed = {
            "input_ids": step,
            "attention_mask": np.ones((batch, total), np.int64),
            "position_ids": np.broadcast_to(np.arange(total - step.shape[1], total), step.shape),
        }
        logits, *present = session.run(outputs, feed | past)
        past = dict(zip(shapes, present, strict=True))
        step = logits[:, -1].argmax(-1)[:, None]
        tokens.append(step)
    return np.concatenate(tokens, 1)


def prepare(job: Job) -> Work:
    """Every work but a full cache."""
    import numpy as np

    ids = np.array(job.tokens)
    if job.work.startswith("sweep:"):
        return _sweep(job, job.work.removeprefix("sweep:"))

    def run(session: Any, names: Any = ("logits",), **inputs: Any) -> Any:
        return session.run(names, {"input_ids": ids, **inputs})

    if job.work == "two_variants":
        return opened_twice(lambda head: open_bare(job.files[head]), lambda session: run(session)[0])
    session = open_bare(job.files[0])
    scale = f"blocks.{job.layer}.attn.hook_z/scale"
    if job.work == "generation":
        work = partial(_generate, session, ids, job.new_tokens)
        return Work(work, lambda tokens: {"tokens": tokens[0, -job.new_tokens :].tolist()})
    if job.work == "filtered_cache":
        return Work(
            partial(run, session, None),
            lambda r: logits_check(r[0]) | {"last resid_pre": r[-1][0, -1, :8].tolist()},
        )
    inputs: dict[str, Any] = {}
    if job.work == "one_hook":
        inputs = {scale: np.full((1, 1, 1, 1), 0.5, np.float32)}
    elif job.work == "edit":
        heads = json.loads((Path(job.checkpoint) / "config.json").read_text())["n_head"]
        kept = np.ones((1, 1, heads, 1), np.float32)
        kept[:, :, 0] = 0
        inputs = {scale: kept}
    return Work(partial(run, session, **inputs), lambda r: logits_check(r[0]))
