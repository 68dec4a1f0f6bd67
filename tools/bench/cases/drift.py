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
    """MB at the peak: after plain runs of both models, and after their drift; and of one layer's activations of both."""
    import math
    import resource
    import sys

    import numpy as np

    import graphlens
    from graphlens.file.names import axis_sizes, split_name

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)

    model, other = (graphlens.HookedTransformer.from_onnx(folder, "cpu") for _ in range(2))
    other.set_weights({"blocks.0.attn.W_O": np.asarray(model.weights["blocks.0.attn.W_O"]) * 1.01})
    ids = np.random.default_rng(0).integers(0, model.cfg.d_vocab, (batch, length))
    calls = [("blocks.0.hook_resid_pre", lambda x, hook: x)]
    for one in (model, other):  # with the sessions that call Python, which drift runs on
        one.run_with_hooks(ids, fwd_hooks=calls)
    before = peak()
    graphlens.drift(model, other, ids, verbose=False)
    after = peak()
    sizes = {**axis_sizes(model.runner.config), "batch": batch, "pos": length, "query_pos": length, "key_pos": length}
    layer = sum(
        4 * math.prod(sizes[axis] for axis in entry.axes)
        for name, entry in model.runner.engine.manifest.hooks.items()
        if split_name(name)[0] == 0
    )
    return {"before": before, "after": after, "layer": 2 * layer / 1e6}


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
    grown, layer = memory["after"] - memory["before"], memory["layer"]
    rows.append(Row("peak memory, more than of plain runs", "MB", [grown], [layer], Target(grown, layer, "MB")))
    result = plain()
    worst = result.worst(1)[0]
    return Findings(
        rows,
        "two forwards of a bare InferenceSession (of a site, one); of memory, one layer's activations of both",
        (f"Batch {BATCH} x {ids.shape[1]} tokens, sessions open. Worst step: {worst.hook}, {worst.fresh:.1e}.",),
    )


CASE = Case(run, repeats=5)
