"""Python hooks that zero one head in place (run_with_hooks) against a run of the stripped file."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from tools.bench.harness import Case, Findings, Setup, against_floor, floor_session, rounds, timed, token_ids

if TYPE_CHECKING:
    from graphlens.model.hooks import Hooks

LIMIT = 1.15


def zero_z(z: Any, hook: Any) -> None:
    """Zeroes head 0 of z [b, p, head, d_head], in place."""
    z[:, :, 0] = 0


def zero_pattern(pattern: Any, hook: Any) -> None:
    """Zeroes head 0 of an attention pattern [b, head, q, k], in place."""
    pattern[:, 0] = 0


def run(setup: Setup) -> Findings:
    """Milliseconds a call, for each set of hooks at each size."""
    import numpy as np

    from graphlens import HookedTransformer

    model, floor = HookedTransformer.from_onnx(setup.model.hooked, "cpu"), floor_session(setup.model)
    layers = range(setup.model.n_layers)
    layer = min(5, layers[-1])
    z, pattern = f"blocks.{layer}.attn.hook_z", f"blocks.{layer}.attn.hook_pattern"
    hooks: dict[str, Hooks] = {
        z: [(z, zero_z)],
        pattern: [(pattern, zero_pattern)],
        f"all {len(layers)} hook_z": [(f"blocks.{i}.attn.hook_z", zero_z) for i in layers],
    }
    rows, unchanged = [], []
    for batch, length in setup.sizes():
        ids = token_ids(setup.model, batch, length)
        bare = partial(floor.run, ["logits"], {"input_ids": ids})
        hooked = {name: partial(model.run_with_hooks, ids, fwd_hooks=fwd_hooks) for name, fwd_hooks in hooks.items()}
        contenders = {"floor": timed(bare), **{name: timed(work) for name, work in hooked.items()}}
        found = rounds(contenders, setup.repeats, warmup=3)
        size = f"b{batch} s{length}"
        rows += [against_floor(f"{size}, {name}", found[name], found["floor"], LIMIT) for name in hooks]
        logits = bare()[0]
        unchanged += [f"{size}, {name}" for name, work in hooked.items() if np.abs(work() - logits).max() < 1e-5]
    note = f"Hooks without an effect on the logits: {', '.join(unchanged) or 'none'}."
    return Findings(rows, "bare InferenceSession on the stripped file, logits fetched", (note,))


CASE = Case(run, repeats=21)
