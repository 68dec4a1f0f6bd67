"""Drift of a model whose matrices are rounded to 8 bits, batch 8 x 128, against one bare forward of each of the two.

With patches, a further forward a site: at the attention output of the first, the middle and the last block.
"""

from __future__ import annotations

from functools import partial
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

LIMIT = 2.5
BATCH, LENGTH = 8, 128


def _opened(folder: str) -> tuple[Any, Any]:
    """The model, and one whose matrices are rounded to 8 bits."""
    import numpy as np

    from graphlens import HookedTransformer

    def rounded(weight: Any) -> Any:
        step = np.abs(weight).max() / 127
        return (np.round(weight / step) * step).astype(weight.dtype)

    model, other = (HookedTransformer.from_onnx(folder, "cpu") for _ in range(2))
    other.set_weights(
        {name: rounded(w) for name, w in model.weights.items() if ".W_" in name and name.startswith("blocks.")}
    )
    return model, other


def _memory(folder: str, batch: int, length: int) -> dict[str, float]:
    """MB more than there are after plain runs of both models: at the peak of a drift's blocks, and of all of it.

    Beside them, one layer's activations of both models, and the logits of both. Linux only.
    """
    import gc
    import math
    from pathlib import Path

    import numpy as np

    import graphlens
    from graphlens.experiments.drift_comparison import Comparison
    from graphlens.experiments.drift_run import Side, requests
    from graphlens.file.names import axis_sizes, split_name

    def held(what: str) -> float:
        return int(Path("/proc/self/status").read_text().split(f"{what}:")[1].split()[0]) / 1e3

    class Peaks:
        """A progress bar that notes the peak so far at each step."""

        found: list[float]

        def advance(self, count: int = 1) -> None:
            self.found.append(held("VmHWM"))

    model, other = (graphlens.HookedTransformer.from_onnx(folder, "cpu") for _ in range(2))
    other.set_weights({"blocks.0.attn.W_O": np.asarray(model.weights["blocks.0.attn.W_O"]) * 1.01})
    ids = np.random.default_rng(0).integers(0, model.cfg.d_vocab, (batch, length))
    for _ in range(2):
        for one in (model, other):  # on the sessions that call Python, as drift's runs
            one.run_with_hooks(ids, return_type=None, fwd_hooks=[("unembed.hook_out", lambda x, hook: x)])
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is there now
    before, peaks = held("VmRSS"), Peaks()
    peaks.found = []
    first, second = requests(model.runner, other.runner, ids, {})
    Comparison(Side(model.runner, first), Side(other.runner, second), keep=False).run(peaks)
    sizes = {**axis_sizes(model.runner.config), "batch": batch, "pos": length, "query_pos": length, "key_pos": length}
    entries = model.runner.engine.manifest.hooks
    layer = sum(
        4 * math.prod(sizes[axis] for axis in entries[name].axes) for name in entries if split_name(name)[0] == 0
    )
    return {
        "blocks": peaks.found[-2] - before,
        "all": peaks.found[-1] - before,
        "layer": 2 * layer / 1e6,
        "logits": 2 * 4 * batch * length * model.cfg.d_vocab / 1e6,
    }


def run(setup: Setup) -> Findings:
    """Milliseconds a drift, beside two bare forwards; of each further site, beside one; and peak memory."""
    import graphlens

    bare = floor_session(setup.model)
    model, other = _opened(str(setup.model.hooked))
    ids = token_ids(model.cfg, BATCH, min(LENGTH, model.cfg.n_ctx))
    forward = partial(bare.run, ["logits"], {"input_ids": ids})

    def two() -> None:
        forward()
        forward()

    plain = partial(graphlens.drift, model, other, ids, verbose=False)
    found = rounds({"floor": timed(two), "ours": timed(plain)}, setup.repeats, warmup=1)
    rows = [against_floor("drift", found["ours"], found["floor"], LIMIT)]
    sites = 12
    patched = partial(graphlens.drift, model, other, ids, patch=True, top=sites, verbose=False)
    more = rounds({"plain": timed(plain), "patched": timed(patched), "floor": timed(forward)}, 1, warmup=1)
    each = [(a - b) / sites for a, b in zip(more["patched"], more["plain"], strict=True)]
    rows.append(Row("patch, each site", "ms", each, more["floor"]))
    memory = run_child(_memory, str(setup.model.hooked), BATCH, min(LENGTH, model.cfg.n_ctx)).result
    for label, key, of in (("blocks", "blocks", "layer"), ("logits too", "all", "logits")):
        target = Target(memory[key], memory[of], "MB") if key == "blocks" else None
        rows.append(Row(f"peak memory above that of sessions, {label}", "MB", [memory[key]], [memory[of]], target))
    result = plain()
    worst = result.worst(1)[0]
    return Findings(
        rows,
        "two forwards of a bare InferenceSession (of a site, one); of memory, a layer's activations (the logits) of both",
        (f"Batch {BATCH} x {ids.shape[1]} tokens, sessions open. Worst step: {worst.hook}, {worst.fresh:.1e}.",),
    )


CASE = Case(run, repeats=5)
