"""Interventions by data (run_with_interventions) against a run of the stripped file."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from tools.bench.harness import Case, Findings, Setup, against_floor, floor_session, prompts, rounds, timed, token_ids
from tools.bench.workers.protocol import Work, by_size, logits_check

if TYPE_CHECKING:
    from graphlens import HookedTransformer

LIMIT, LAYERS_LIMIT = 1.05, 1.08


def calls(model: HookedTransformer) -> dict[str, dict[str, Callable[[], Any]]]:
    """A run with each set of edits, by its name, at each size."""
    from graphlens import Ablate, Steer

    layers = range(model.cfg.n_layers)
    layer = min(5, layers[-1])
    edits: dict[str, Any] = {
        "one head ablated": [Ablate(f"blocks.{layer}.attn.hook_z", heads=0)],
        "one vector added": [Steer(f"blocks.{layer}.hook_resid_post", _vector(model))],
        f"a head ablated in {len(layers)} blocks": [Ablate(f"blocks.{i}.attn.hook_z", heads=0) for i in layers],
    }
    return {
        size: {name: partial(model.run_with_interventions, ids, items) for name, items in edits.items()}
        for size, ids in prompts(model.cfg).items()
    }


def _vector(model: HookedTransformer) -> Any:
    import numpy as np

    return np.random.default_rng(0).standard_normal(model.cfg.d_model).astype(np.float32)


def works(hooked: str) -> dict[str, Work]:
    """Each set of edits at each size."""
    from graphlens import HookedTransformer

    return by_size(calls(HookedTransformer.from_onnx(hooked, "cpu")), logits_check)


def run(setup: Setup) -> Findings:
    """Milliseconds a call: one head ablated, one vector added, and a head ablated in every block."""
    import numpy as np

    from graphlens import Ablate, HookedTransformer, Steer

    model, floor = HookedTransformer.from_onnx(setup.model.hooked, "cpu"), floor_session(setup.model)
    ours, layer, vector = calls(model), min(5, model.cfg.n_layers - 1), _vector(model)
    rows, unchanged = [], []
    for size, ids in prompts(setup.model).items():
        bare = partial(floor.run, ["logits"], {"input_ids": ids})
        edited = ours[size]
        contenders = {"floor": timed(bare), **{name: timed(work) for name, work in edited.items()}}
        found = rounds(contenders, setup.repeats, warmup=3)
        for name in edited:
            limit = LAYERS_LIMIT if name.endswith("blocks") else LIMIT
            rows.append(against_floor(f"{size}, {name}", found[name], found["floor"], limit))
        logits = bare()[0]
        unchanged += [f"{size}, {name}" for name, work in edited.items() if np.abs(work() - logits).max() < 1e-5]
    built = model.runner.engine.sessions_built
    for head in range(3):
        for item in (
            Ablate(f"blocks.{layer}.attn.hook_z", float(head), heads=head),
            Steer(f"blocks.{layer}.hook_resid_post", vector, head),
        ):
            model.run_with_interventions(token_ids(setup.model, 1, 16), item)
    notes = (
        f"Edits without an effect on the logits: {', '.join(unchanged) or 'none'}.",
        f"Sessions built for other values, heads and coefficients afterwards: {model.runner.engine.sessions_built - built}.",
    )
    return Findings(rows, "bare InferenceSession on the stripped file, logits fetched", notes)


CASE = Case(run, repeats=21, works=works)
