"""Where a sweep's patches come from: zeros, means, noise, and a source of one's own."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest

from graphlens import Ablate, Scale
from graphlens.metrics import LogitDiff
from graphlens.patching import Mean, Noise, Site, Zero, sweep
from tests.sweep_cases import (
    CLEAN,
    CORRUPTED,
    DIFFERENCE,
    MASKS,
    MODEL,
    SOME,
    TAILS,
    agrees,
    apart,
    at,
    in_one_session,
    loop,
    places,
)

pytestmark = pytest.mark.usefixtures("no_flags")


@MASKS
@TAILS
def test_zero_is_ablation(tail: str, options: dict[str, Any]) -> None:
    MODEL.set_use_attn_result(tail == "attn.hook_result")
    sites = places(tail)
    result = sweep(MODEL, CORRUPTED, sites, "zero", DIFFERENCE, verbose=False, **options)
    ablations = [Ablate(site.hook, heads=site.head, positions=site.position, dims=site.dims) for site in sites]
    in_one_session(CORRUPTED, ablations, **options)
    expected = [DIFFERENCE(MODEL.run_with_interventions(CORRUPTED, ablation, **options)) for ablation in ablations]
    agrees(result, np.asarray(expected))
    assert result.baselines["clean"] is None
    assert sweep(MODEL, CORRUPTED, sites, Zero(), DIFFERENCE, verbose=False, **options) == result


def mean_of(hook: str, array: Any, mask: Any) -> Any:
    """The mean activation, a number at a time over prompts and positions that are no padding."""
    if "attn_scores" in hook or "pattern" in hook:
        found = array.astype(np.float64)
        for query, key in np.ndindex(*array.shape[2:]):
            rows = [row for row in range(len(array)) if mask[row, query] and mask[row, key]]
            if rows:  # what is padding stays as it is
                found[rows, :, query, key] = array[rows, :, query, key].astype(np.float64).sum(0) / len(rows)
        return found
    rows = [array[b, p].astype(np.float64) for b, p in np.ndindex(*mask.shape) if mask[b, p]]
    return (sum(rows) / len(rows))[None, None]


@MASKS
@TAILS
def test_mean_is_that_of_the_real_tokens(tail: str, options: dict[str, Any]) -> None:
    MODEL.set_use_attn_result(tail == "attn.hook_result")
    sites = places(tail)
    _, cache = MODEL.run_with_cache(CORRUPTED, **options)
    mask = options.get("attention_mask", np.ones_like(CORRUPTED))
    values = {}
    for hook in {site.hook for site in sites}:
        values[hook] = np.broadcast_to(mean_of(hook, cache[hook], mask), cache[hook].shape)
        if options and "attn_" not in hook:  # the padding counts for nothing, and would count
            assert np.abs(Mean().value(hook, cache[hook], mask) - mean_of(hook, cache[hook], mask)).max() < 1e-5
            unlike = np.abs(Mean().value(hook, cache[hook], None) - mean_of(hook, cache[hook], mask)).max()
            assert unlike > 1e-3 or "pattern" in hook
    result = sweep(MODEL, CORRUPTED, sites, "mean", DIFFERENCE, verbose=False, **options)
    agrees(result, loop(CORRUPTED, sites, values, DIFFERENCE, **options))
    agrees(sweep(MODEL, CORRUPTED, sites, Mean(), DIFFERENCE, verbose=False, **options), result.values)


def noised(hook: str, array: Any, scale: float, seed: int, mask: Any) -> Any:
    """The documented noise, written out: as large as the activation's deviation where neither query nor key is padding."""
    digest = int.from_bytes(hashlib.sha256(hook.encode()).digest()[:8], "little")
    noise = np.random.default_rng([seed, digest]).standard_normal(array.shape)
    if "attn_scores" in hook or "pattern" in hook:
        counted = np.stack([np.outer(row, row) for row in mask == 1])[:, None] & np.isfinite(array)
    else:
        counted = np.broadcast_to((mask == 1).reshape(*mask.shape, *(1,) * (array.ndim - 2)), array.shape)
    finite = array[counted].astype(np.float64)
    noise[array == 0 if "pattern" in hook else np.isinf(array)] = 0
    return (array + scale * np.sqrt(((finite - finite.mean()) ** 2).mean()) * noise).astype(np.float32)


@MASKS
@TAILS
def test_noise_is_seeded_by_hook_and_seed(tail: str, options: dict[str, Any]) -> None:
    MODEL.set_use_attn_result(tail == "attn.hook_result")
    sites = places(tail)
    _, cache = MODEL.run_with_cache(CORRUPTED, **options)
    for source, scale, seed in (("noise", 3.0, 0), (Noise(0.5, seed=4), 0.5, 4)):
        mask = options.get("attention_mask", np.ones_like(CORRUPTED))
        values = {hook: noised(hook, cache[hook], scale, seed, mask) for hook in {site.hook for site in sites}}
        result = sweep(MODEL, CORRUPTED, sites, source, DIFFERENCE, verbose=False, **options)
        agrees(result, loop(CORRUPTED, sites, values, DIFFERENCE, **options))
        again = sweep(MODEL, CORRUPTED, sites[::-1], source, DIFFERENCE, verbose=False, **options)
        agrees(again, result.values[::-1])
    other = sweep(MODEL, CORRUPTED, sites, Noise(0.5, seed=5), DIFFERENCE, verbose=False, **options)
    assert apart(other.values, result.values, other.baselines) > 1e-3


@pytest.mark.parametrize("tail", ["attn.hook_attn_scores", "attn.hook_pattern"])
@pytest.mark.parametrize("source", ["noise", "zero", "mean"])
def test_no_source_looks_ahead(tail: str, source: str) -> None:
    """What is read at a position does not change with the tokens after it, whatever is put into the attention there."""
    later = CORRUPTED.copy()
    later[:, 5:] = CLEAN[:, 5:]
    # With the last position read too, everything up to there is computed, and could be looked at.
    metrics = [LogitDiff(5, 9, position=place, reduction="none") for place in (4, 6)]
    sites = [Site(at(tail, layer), position=place) for layer in range(4) for place in (None, [2, 4])]
    one, two = (
        # The noise's size is that of the whole activation, so here it is taken from one of the two.
        sweep(MODEL, tokens, sites, _Fixed(CORRUPTED, source), metrics, verbose=False).sel(metric=0)
        for tokens in (CORRUPTED, later)
    )
    assert apart(one.values, two.values, one.baselines) <= 1e-5
    assert apart(one.values, np.broadcast_to(one.baselines["corrupted"], one.shape), one.baselines) > 1e-3


class _Fixed:
    """A source of one's own: what another makes of some tokens' run."""

    def __init__(self, tokens: Any, source: str) -> None:
        self._cache = MODEL.run_with_cache(tokens)[1]
        self._source = {"noise": Noise(), "zero": Zero(), "mean": Mean()}[source]

    def value(self, hook: str, corrupted: Any, mask: Any) -> Any:
        return self._source.value(hook, self._cache[hook], mask)


def test_a_source_of_ones_own() -> None:
    class Twice:
        def value(self, hook: str, corrupted: Any, mask: Any) -> Any:
            return corrupted * 2

    result = sweep(MODEL, CORRUPTED, SOME[:10], Twice(), DIFFERENCE, verbose=False)
    expected = [
        DIFFERENCE(MODEL.run_with_interventions(CORRUPTED, Scale(s.hook, 2, heads=s.head, positions=s.position)))
        for s in SOME[:10]
    ]
    agrees(result, np.asarray(expected))
