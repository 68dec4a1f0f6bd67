"""Estimates over a data set of pairs, against estimates of each pair alone and against a model that is linear."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from graphlens import Patch, attribution_pairs, sweep_pairs
from graphlens.attribution import attribution_patch
from graphlens.errors import InputError
from graphlens.metrics import CrossEntropy, LogitDiff, Probability
from graphlens.patching import Site, grid
from tests.models import MODEL

CFG = MODEL.cfg
RNG = np.random.default_rng(11)
LENGTHS = (5, 7, 5, 5, 6, 7, 5)
CLEAN, CORRUPTED = ([RNG.integers(0, CFG.d_vocab, length) for length in LENGTHS] for _ in range(2))
CORRECT, WRONG = RNG.integers(0, CFG.d_vocab, (2, len(LENGTHS)))
DIFFERENCE = LogitDiff(CORRECT, WRONG)
SITES = grid("z", ("layer", "head"), {"layer": range(CFG.n_layers), "head": range(CFG.n_heads)})
# One position, several, a stretch of numbers, a whole hook point, attention.
MIXED = [
    *(Site("z", 1, position=-2, head=3), Site("resid_pre", 2, position=[1, 4]), Site("mlp_post", 0, dims=[3, 5, 70])),
    *(Site("attn_out", 2), Site("pattern", 1, head=2), Site("pattern", 0, position=2)),
]


def each_alone(metric_of: Any, sites: Any, steps: int = 0) -> np.ndarray:
    """The estimates of each pair alone, [..., pair]."""
    found = []
    for row, (clean, corrupted) in enumerate(zip(CLEAN, CORRUPTED, strict=True)):
        cache = MODEL.run_with_cache(clean[None])[1]
        made = attribution_patch(MODEL, corrupted[None], sites, cache, metric_of(row), steps=steps, verbose=False)
        found.append(made.values)
    return np.stack(found, -1)


def close(found: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("sites", [SITES, MIXED], ids=["heads", "mixed"])
def test_each_pair_has_the_estimate_that_it_has_alone(sites: Any, batch_size: int) -> None:
    found = attribution_pairs(
        MODEL, CLEAN, CORRUPTED, sites, DIFFERENCE, batch_size=batch_size, per_example=True, verbose=False
    )
    assert found.examples is not None
    alone = each_alone(lambda row: LogitDiff(int(CORRECT[row]), int(WRONG[row])), sites)
    assert np.ptp(alone, axis=-1).min() > 0.01  # prompts differ, so that one taken for another would show
    close(found.examples.values, alone)
    close(found.mean.values, (alone - found.examples.baselines["corrupted"]).mean(-1))


def test_integrated_gradients_and_metrics_that_are_not_linear() -> None:
    metrics = {"p": Probability(CORRECT), "difference": DIFFERENCE.normalised()}
    found = attribution_pairs(
        MODEL, CLEAN, CORRUPTED, SITES, metrics, steps=3, batch_size=4, per_example=True, verbose=False
    ).examples
    assert found is not None
    assert found.axes == ("metric", "layer", "head", "batch")

    def own(row: int) -> Any:
        difference = LogitDiff(int(CORRECT[row]), int(WRONG[row]))
        return {"p": Probability(int(CORRECT[row])), "difference": difference.normalised()}

    alone = each_alone(own, SITES, steps=3)
    for index in range(2):
        np.testing.assert_allclose(found.values[index], alone[index], rtol=1e-3, atol=1e-4 * np.abs(alone[index]).max())


def test_prompts_with_padding_have_each_their_own() -> None:
    """Of a mean over positions that leaves padding out, prompts count by their tokens: not so where each has its own."""
    mask = np.ones((2, 6), np.int64)
    mask[0, :3] = 0
    clean, corrupted = RNG.integers(0, CFG.d_vocab, (2, 2, 6))
    targets = np.roll(corrupted, -1, 1)
    _, cache = MODEL.run_with_cache(clean, attention_mask=mask)
    site = [Site("mlp_out", 1), Site("z", 0, head=1)]
    metric = CrossEntropy(targets, position=None, reduction="none")
    found = attribution_patch(MODEL, corrupted, site, cache, metric, verbose=False, attention_mask=mask)
    assert found.axes == ("site", "batch")
    for row, start in ((0, 3), (1, 0)):
        _, own = MODEL.run_with_cache(clean[row : row + 1, start:])
        alone = CrossEntropy(targets[row : row + 1, start:], position=None)
        wanted = attribution_patch(MODEL, corrupted[row : row + 1, start:], site, own, alone, verbose=False)
        close(found.values[:, row], wanted.values)


def test_it_is_the_sweep_where_the_model_is_linear() -> None:
    """With patterns, scales and MLP outputs held, a patch does what its gradient says."""
    same = [row for row, length in enumerate(LENGTHS) if length == 5]
    clean, corrupted = ([tokens[row] for row in same] for tokens in (CLEAN, CORRUPTED))
    _, cache = MODEL.run_with_cache(np.stack(corrupted))
    held = [Patch(name, cache[name]) for name in cache if name.endswith(("hook_pattern", "hook_scale", "hook_mlp_out"))]
    metric = LogitDiff(CORRECT[same], WRONG[same])
    options: dict[str, Any] = {"per_example": True, "verbose": False}
    with MODEL.intervene(held):
        exact = sweep_pairs(MODEL, clean, corrupted, SITES, metric, **options)
        estimate = attribution_pairs(MODEL, clean, corrupted, SITES, metric, **options)
    assert exact.examples is not None
    assert estimate.examples is not None
    close(estimate.examples.values, exact.examples.values)
    close(estimate.mean.values, exact.mean.values)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="steps=-1"):
        attribution_pairs(MODEL, CLEAN, CORRUPTED, SITES, DIFFERENCE, steps=-1, verbose=False)
    with pytest.raises(InputError, match="does not say what each prompt's is"):
        attribution_pairs(MODEL, CLEAN, CORRUPTED, SITES, lambda logits: 0, verbose=False)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="7 clean prompts and 6"):
        attribution_pairs(MODEL, CLEAN, CORRUPTED[:6], SITES, DIFFERENCE, verbose=False)
    with pytest.raises(InputError, match="per_example"):
        attribution_pairs(MODEL, CLEAN, CORRUPTED, SITES, DIFFERENCE, per_example=2, verbose=False)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="engine='spark'"):
        attribution_pairs(MODEL, CLEAN, CORRUPTED, SITES, DIFFERENCE, engine="spark", verbose=False)
