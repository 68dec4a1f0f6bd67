"""Attribution of 24,576 features at 128 tokens, in forwards of the plain model, and a sweep over active features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tools.bench.harness import Case, Findings, Row, Setup, against_floor, rounds, timed
from tools.bench.sweeps import random_prompts

FEATURES, LENGTH, FORWARDS, ABLATIONS, FASTER = 24_576, 128, 4, 40, 2.0
METHODS = ("direct", "patching", "integrated")


def an_sae(width: int) -> Any:
    """An SAE of random directions: about every twelfth feature is active."""
    from graphlens import Sae

    random = np.random.default_rng(0)
    rows = random.standard_normal((FEATURES, width)).astype(np.float32) / np.float32(width**0.5)
    bias = np.full(FEATURES, -1.4, np.float32)
    settings = {"normalize_activations": "layer_norm"}
    return Sae.from_arrays(rows.T, bias, rows, np.zeros(width), "blocks.6.hook_resid_post", **settings)


def counted(model: Any, call: Callable[[], object]) -> int:
    """How many runs of the model a call takes."""
    ran = []
    engine = type(model.runner.engine)
    run = engine.run

    def noted(self: Any, *given: Any, **options: Any) -> Any:
        ran.append(1)
        return run(self, *given, **options)

    engine.run = noted
    try:
        call()
    finally:
        engine.run = run
    return len(ran)


def run(setup: Setup) -> Findings:
    """Milliseconds of each method beside a plain forward of the model, and of a sweep beside a run for each ablation."""
    from graphlens import HookedTransformer, feature_attribution
    from graphlens.metrics import LogitDiff
    from graphlens.patching import feature_sites, sweep

    model = HookedTransformer.from_onnx(setup.model.hooked, "cpu")
    prompts = random_prompts(setup.model.d_vocab, 1, min(LENGTH, setup.model.n_ctx))
    tokens, metric, sae = prompts.corrupted, LogitDiff(*prompts.answers), an_sae(model.cfg.d_model)
    calls = {name: lambda name=name: feature_attribution(model, tokens, metric, sae, method=name) for name in METHODS}
    runs = {name: counted(model, call) for name, call in calls.items()}
    sites = feature_sites(model, tokens, sae, most=ABLATIONS)

    def swept(quick: bool) -> None:
        with model.saes(sae, use_error_term=True):
            sweep(model, tokens, sites, "zero", metric, recompute=quick, verbose=False)

    contenders: dict[str, Callable[[], float]] = {name: timed(call) for name, call in calls.items()}
    contenders |= {
        "forward": timed(lambda: model(tokens)),
        "quick": timed(lambda: swept(True)),
        "loop": timed(lambda: swept(False)),
    }
    times = rounds(contenders, setup.repeats)
    size = f"{FEATURES:,} features x {tokens.shape[1]} tokens"
    rows: list[Row] = [
        against_floor(
            f"{name} ({runs[name]} forward{'s' if runs[name] > 1 else ''}), {size}", times[name], times["forward"], None
        )
        for name in METHODS
    ]
    rows.append(
        against_floor(
            f"{ABLATIONS} features ablated in turn, beside a run each", times["quick"], times["loop"], 1 / FASTER
        )
    )
    most = max(runs.values())
    note = f"At most {FORWARDS} runs are allowed; most took {most}. Integrated gradients have 8 steps, 4 in a run."
    assert most <= FORWARDS, runs
    return Findings(rows, "a plain forward", (note,))


CASE = Case(run, repeats=3)
