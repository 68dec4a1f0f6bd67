"""What a model is asked for in the soak and in the tests of interruptions: each job gives the same arrays whoever runs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from graphlens import Ablate, HookedTransformer, KeyValueCache, Patch, Steer
from graphlens.attribution import attribution_patch
from graphlens.metrics import LogitDiff
from graphlens.patching import grid, sweep

Arrays = list[npt.NDArray[Any]]
Job = Callable[[], Arrays]
Z, PRE, MLP = "blocks.1.attn.hook_z", "blocks.1.hook_resid_pre", "blocks.2.hook_mlp_out"
DIFFERENCE = LogitDiff([5, 17], [9, 300])


def jobs(model: HookedTransformer[Any]) -> dict[str, Job]:
    """The jobs on a model, by name.

    Args:
        model: The embedded model, or a copy of it. A job leaves it as it was.
    """
    rng = np.random.default_rng(3)
    clean, corrupted = (rng.integers(0, model.cfg.d_vocab, (2, 7)) for _ in range(2))
    vector = rng.standard_normal(model.cfg.d_model).astype(np.float32)

    def double(activation: Any, hook: Any) -> Any:
        return activation * np.float32(2)

    def zero(activation: Any, hook: Any) -> None:
        activation[:, :, 0] = 0

    def cache() -> Arrays:
        logits, values = model.run_with_cache(clean)
        return [logits, *values.values()]

    def hooks() -> Arrays:
        with model.hooks([(Z, zero)]):
            logits, values = model.run_with_cache(clean, names_filter=[Z, MLP])
        return [logits, values[Z], values[MLP]]

    def hook_in_hook() -> Arrays:
        inside: list[bool] = []  # the run inside has the same hook

        def patched(activation: Any, hook: Any) -> Any:
            if inside:
                return None
            inside.append(True)
            value = model.run_with_cache(corrupted, names_filter=hook.name)[1][hook.name]
            inside.clear()
            return value

        with model.hooks([(PRE, patched)]):
            return [model(clean)]

    def edits() -> Arrays:
        value = np.ones((model.cfg.d_model,), np.float32)
        items = [Ablate(Z, heads=1), Steer(PRE, vector, 2.0), Patch(MLP, value, positions=3)]
        return [model.run_with_interventions(clean, items), model.run_with_interventions(clean, items[:1])]

    def edits_and_hooks() -> Arrays:
        with model.intervene(Ablate(Z, heads=1)):
            return [model.run_with_hooks(clean, fwd_hooks=[(PRE, double)])]

    def generation() -> Arrays:
        with model.intervene(Steer(PRE, vector, 3.0)), model.hooks([(Z, zero)]):
            return [model.generate(clean, max_new_tokens=4, do_sample=False, verbose=False)]

    def kv_cache() -> Arrays:
        past = KeyValueCache.init_cache(model.cfg, "cpu", 2)
        return [model(clean[:, :4], past_kv_cache=past), model(clean[:, 4:], past_kv_cache=past)]

    def swept(recompute: bool) -> Arrays:
        source = model.run_with_cache(clean)[1]
        sites = grid("resid_pre", ("layer", "pos"), {"layer": range(model.cfg.n_layers), "pos": range(0, 7, 2)})
        return [sweep(model, corrupted, sites, source, DIFFERENCE, recompute=recompute, verbose=False).values]

    def gradients() -> Arrays:
        return list(model.gradients(clean, DIFFERENCE, [Z, PRE]).values())

    def backward_hooks() -> Arrays:
        seen: Arrays = []
        with model.hooks([(Z, lambda z, hook: None)], [(PRE, lambda gradient, hook: seen.append(np.array(gradient)))]):
            loss = model(clean, return_type="loss")
        return [np.asarray(loss), *seen]

    def attribution() -> Arrays:
        source = model.run_with_cache(clean)[1]
        sites = grid("z", ("layer", "head"), {"layer": range(model.cfg.n_layers), "head": range(model.cfg.n_heads)})
        return [attribution_patch(model, corrupted, sites, source, DIFFERENCE, verbose=False).values]

    return {
        "run": lambda: [model(clean)],
        "cache": cache,
        "hooks": hooks,
        "hook in hook": hook_in_hook,
        "edits": edits,
        "edits and hooks": edits_and_hooks,
        "generation": generation,
        "kv cache": kv_cache,
        "sweep": lambda: swept(recompute=True),
        "sweep of whole runs": lambda: swept(recompute=False),
        "gradients": gradients,
        "backward hooks": backward_hooks,
        "attribution": attribution,
    }


def differs(found: Arrays, expected: Arrays) -> str:
    """How two results differ, "" where they agree: integers exactly, floats to 2e-5 of the largest.

    Which session serves a run depends on what ran before, and ONNX Runtime adds up in another order in another graph.
    """
    if len(found) != len(expected):
        return f"{len(found)} arrays, not {len(expected)}"
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        if one.shape != other.shape or one.dtype != other.dtype:
            return f"array {index} is {one.dtype} {one.shape}, not {other.dtype} {other.shape}"
        if one.dtype.kind != "f":
            if not np.array_equal(one, other):
                return f"array {index}: {one.tolist()}, not {other.tolist()}"
            continue
        finite = np.isfinite(other)
        if not np.array_equal(one[~finite], other[~finite]):
            return f"array {index} is infinite or NaN elsewhere"
        apart = np.abs(one[finite] - other[finite]).max(initial=0)
        if not apart <= 2e-5 * max(1.0, np.abs(other[finite]).max(initial=0)):
            return f"array {index} is off by {apart:.2e}"
    return ""
