"""Python hooks that zero one head in place (run_with_hooks) against a run of the stripped file."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from tools.bench.harness import Case, Findings, Setup, against_floor, floor_session, prompts, rounds, timed
from tools.bench.workers.protocol import Work, by_size, logits_check

if TYPE_CHECKING:
    from graphlens.model.hooks import Hooks

LIMIT = 1.15


def zero_z(z: Any, hook: Any) -> None:
    """Zeroes head 0 of z [b, p, head, d_head], in place."""
    z[:, :, 0] = 0


def zero_pattern(pattern: Any, hook: Any) -> None:
    """Zeroes head 0 of an attention pattern [b, head, q, k], in place."""
    pattern[:, 0] = 0


def calls(hooked: str) -> dict[str, dict[str, Callable[[], Any]]]:
    """A run with each set of hooks, by its name, at each size."""
    from graphlens import HookedTransformer

    model = HookedTransformer.from_onnx(hooked, "cpu")
    layers = range(model.cfg.n_layers)
    layer = min(5, layers[-1])
    z, pattern = f"blocks.{layer}.attn.hook_z", f"blocks.{layer}.attn.hook_pattern"
    hooks: dict[str, Hooks] = {
        z: [(z, zero_z)],
        pattern: [(pattern, zero_pattern)],
        f"all {len(layers)} hook_z": [(f"blocks.{i}.attn.hook_z", zero_z) for i in layers],
    }
    return {
        size: {name: partial(model.run_with_hooks, ids, fwd_hooks=fwd_hooks) for name, fwd_hooks in hooks.items()}
        for size, ids in prompts(model.cfg).items()
    }


def works(hooked: str) -> dict[str, Work]:
    """Each set of hooks at each size."""
    return by_size(calls(hooked), logits_check)


def run(setup: Setup) -> Findings:
    """Milliseconds a call, for each set of hooks at each size."""
    import numpy as np

    ours, floor = calls(str(setup.model.hooked)), floor_session(setup.model)
    rows, unchanged = [], []
    for size, ids in prompts(setup.model).items():
        bare = partial(floor.run, ["logits"], {"input_ids": ids})
        hooked = ours[size]
        contenders = {"floor": timed(bare), **{name: timed(work) for name, work in hooked.items()}}
        found = rounds(contenders, setup.repeats, warmup=3)
        rows += [against_floor(f"{size}, {name}", found[name], found["floor"], LIMIT) for name in hooked]
        logits = bare()[0]
        unchanged += [f"{size}, {name}" for name, work in hooked.items() if np.abs(work() - logits).max() < 1e-5]
    note = f"Hooks without an effect on the logits: {', '.join(unchanged) or 'none'}."
    return Findings(rows, "bare InferenceSession on the stripped file, logits fetched", (note,))


CASE = Case(run, repeats=21, works=works)
