"""Greedy decoding with a KV cache while a vector is added to the residual stream, against decoding without."""

from __future__ import annotations

from functools import partial
from typing import Any

from tools.bench.harness import Case, Findings, Setup, against_floor, rounds, timed, token_ids

NEW_TOKENS = 64
LIMIT = 1 / 0.93


def run(setup: Setup) -> Findings:
    """Milliseconds for a prompt of 16 tokens and 64 new ones, batch 1."""
    import numpy as np

    from graphlens import HookedTransformer, Steer

    model = HookedTransformer.from_onnx(setup.model.hooked, "cpu")
    ids = token_ids(setup.model, 1, 16)
    options = {"do_sample": False, "stop_at_eos": False, "verbose": False, "return_type": "tokens"}
    plain = partial(model.generate, ids, NEW_TOKENS, **options)
    vector = 20 * np.random.default_rng(0).standard_normal(model.cfg.d_model).astype(np.float32)
    layer = min(5, setup.model.n_layers - 1)

    def steered() -> Any:
        with model.intervene(Steer(f"blocks.{layer}.hook_resid_post", vector)):
            return plain()

    found = rounds({"plain": timed(plain), "steered": timed(steered)}, setup.repeats, warmup=2)
    speeds = {name: NEW_TOKENS / (sorted(times)[len(times) // 2] / 1e3) for name, times in found.items()}
    changed = int((plain() != steered()).sum())
    return Findings(
        (against_floor(f"{NEW_TOKENS} new tokens, steered", found["steered"], found["plain"], LIMIT),),
        "the same generation without the vector",
        (
            f"Tokens a second: {speeds['plain']:.1f} without, {speeds['steered']:.1f} with "
            f"({speeds['steered'] / speeds['plain']:.3f}x). The vector changes {changed} tokens.",
        ),
    )


CASE = Case(run, repeats=11)
