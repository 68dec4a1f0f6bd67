"""Greedy decoding with a KV cache, batch 1, against transformers' generate (torch eager kernels, sdpa attention)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tools.bench.harness import Case, Findings, Setup, against_floor, rounds, timed, token_ids
from tools.bench.workers.protocol import Work

NEW_TOKENS = 64
LIMITS = {"no hook": 1 / 1.5, "one Python hook at hook_z": 1 / 1.3}


def calls(hooked: str) -> dict[str, Callable[[], Any]]:
    """Decoding without and with a hook, by name."""
    from graphlens import HookedTransformer

    model = HookedTransformer.from_onnx(hooked, "cpu")
    options: dict[str, Any] = {"do_sample": False, "stop_at_eos": False, "verbose": False, "return_type": "tokens"}
    plain = partial(model.generate, token_ids(model.cfg, 1, 16), NEW_TOKENS, **options)

    def keep(z: Any, hook: Any) -> None:
        """An identity hook."""

    def with_hook() -> Any:
        with model.hooks([("blocks.1.attn.hook_z", keep)]):
            return plain()

    return dict(zip(LIMITS, (plain, with_hook), strict=True))


def works(hooked: str) -> dict[str, Work]:
    """Decoding without and with a hook."""
    return {_label(name): Work(call, lambda t: {"tokens": t[0].tolist()}) for name, call in calls(hooked).items()}


def _label(name: str) -> str:
    return f"{NEW_TOKENS} new tokens, {name}"


def run(setup: Setup) -> Findings:
    """Milliseconds for a prompt of 16 tokens and 64 new ones."""
    import numpy as np
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(setup.model.checkpoint, dtype=torch.float32).eval()
    theirs.generation_config.eos_token_id = None  # never stop early
    ours, ids = calls(str(setup.model.hooked)), token_ids(setup.model, 1, 16)
    plain, hooked = ours

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

    contenders = {"theirs": timed(peer), **{name: timed(call) for name, call in ours.items()}}
    found = rounds(contenders, setup.repeats, warmup=1)
    same = bool(np.array_equal(ours[plain](), peer().numpy()))
    rows = [against_floor(_label(name), found[name], found["theirs"], limit) for name, limit in LIMITS.items()]
    speeds = {name: NEW_TOKENS / (sorted(times)[len(times) // 2] / 1e3) for name, times in found.items()}
    return Findings(
        rows,
        "transformers' generate, torch on the CPU",
        (
            f"Tokens a second: transformers {speeds['theirs']:.1f}, ours {speeds[plain]:.1f} "
            f"({speeds[plain] / speeds['theirs']:.2f}x), with a hook {speeds[hooked]:.1f} "
            f"({speeds[hooked] / speeds['theirs']:.2f}x). The tokens are {'equal' if same else 'NOT equal'}.",
            f"transformers {transformers.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads. "
            "torch's matrix library (MKL) is slow on AMD processors.",
        ),
    )


CASE = Case(run, repeats=7, works=works)
