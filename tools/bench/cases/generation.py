"""Greedy decoding with a KV cache, batch 1, against transformers' generate (torch eager kernels, sdpa attention)."""

from __future__ import annotations

from functools import partial
from typing import Any

from tools.bench.harness import Case, Findings, Setup, against_floor, rounds, timed, token_ids

NEW_TOKENS = 64
LIMIT, HOOKED_LIMIT = 1 / 1.5, 1 / 1.3


def run(setup: Setup) -> Findings:
    """Milliseconds for a prompt of 16 tokens and 64 new ones."""
    import numpy as np
    import torch
    import transformers

    from graphlens import HookedTransformer

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    theirs = transformers.GPT2LMHeadModel.from_pretrained(setup.model.checkpoint).eval()
    model = HookedTransformer.from_onnx(setup.model.hooked, "cpu")
    ids = token_ids(setup.model, 1, 16)
    options = {"do_sample": False, "stop_at_eos": False, "verbose": False, "return_type": "tokens"}
    ours = partial(model.generate, ids, NEW_TOKENS, **options)

    def keep(z: Any, hook: Any) -> None:
        """An identity hook."""

    def hooked() -> Any:
        with model.hooks([("blocks.1.attn.hook_z", keep)]):
            return ours()

    def peer() -> Any:
        with torch.inference_mode():
            return theirs.generate(
                torch.from_numpy(ids),
                attention_mask=torch.ones(ids.shape, dtype=torch.long),
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
                pad_token_id=0,
            )

    found = rounds({"theirs": timed(peer), "ours": timed(ours), "hooked": timed(hooked)}, setup.repeats, warmup=1)
    same = bool(np.array_equal(ours(), peer().numpy()))
    rows = []
    for label, name, limit in (("no hook", "ours", LIMIT), ("one Python hook at hook_z", "hooked", HOOKED_LIMIT)):
        row = against_floor(f"{NEW_TOKENS} new tokens, {label}", found[name], found["theirs"], limit)
        rows.append(row)
    speeds = {name: NEW_TOKENS / (sorted(times)[len(times) // 2] / 1e3) for name, times in found.items()}
    return Findings(
        rows,
        "transformers' generate, torch on the CPU",
        (
            f"Tokens a second: transformers {speeds['theirs']:.1f}, ours {speeds['ours']:.1f} "
            f"({speeds['ours'] / speeds['theirs']:.2f}x), with a hook {speeds['hooked']:.1f} "
            f"({speeds['hooked'] / speeds['theirs']:.2f}x). The tokens are {'equal' if same else 'NOT equal'}.",
            f"transformers {transformers.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads. "
            "torch's matrix library (MKL) is slow on AMD processors.",
        ),
    )


CASE = Case(run, repeats=7)
