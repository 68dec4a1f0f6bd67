"""Ablating features one by one, by the quick path, is what one run per ablation is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from graphlens import Ablate, HookedTransformer, Patch, Sae, sweep
from graphlens.errors import InputError
from graphlens.metrics import CrossEntropy, LogitDiff
from graphlens.patching import Site, feature_sites
from tests.saes.odd_model import TOKENS, model
from tests.saes.sae_cases import D_SAE, MID, MLP_OUT, NORMED, RESID, Z, made

METRIC = LogitDiff([3, 4], [7, 8])
LAST, FIRST = "blocks.2.hook_resid_post", "blocks.1.hook_resid_pre"
PLACES = {
    "resid_post": made(hook=RESID),
    "last": made(hook=LAST, architecture="jumprelu"),
    "resid_pre": made(hook=FIRST, architecture="topk", k=6, rescale_acts_by_decoder_norm=True),
    "resid_mid": made(hook=MID, normalize_activations="layer_norm"),
    "mlp_out": made(hook=MLP_OUT, architecture="gated", normalize_activations="constant_norm_rescale"),
    "hook_z": made(hook=Z, reshape_activations="hook_z"),
    "transcoder": made(hook=NORMED, hook_out=MLP_OUT, architecture="skip_transcoder"),
}
each_place = pytest.mark.parametrize("sae", PLACES.values(), ids=list(PLACES))
MASK = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])


@pytest.fixture(scope="module")
def odd() -> HookedTransformer:
    return model()


def hook_of(sae: Sae) -> str:
    return f"{sae.cfg.writes}.hook_sae_acts_post"


def close(found: Any, expected: Any) -> None:
    assert np.shape(found) == np.shape(expected)
    assert np.abs(found - expected).max() <= 1e-4 * max(1.0, float(np.abs(expected).max()))


@each_place
@pytest.mark.parametrize("error_term", [False, True])
def test_it_is_one_run_per_ablation(odd: HookedTransformer, sae: Sae, error_term: bool) -> None:
    sites = [site for by in (True, False) for site in feature_sites(odd, TOKENS, sae, by_position=by, most=8).sites]
    with odd.saes([sae], use_error_term=error_term):
        found = sweep(odd, TOKENS, sites, "zero", METRIC, verbose=False)
        assert "general_path" not in found.metadata
        plain = float(METRIC(odd(TOKENS)))
        expected = [
            float(METRIC(odd.run_with_interventions(TOKENS, Ablate(s.hook, positions=s.position, dims=s.dims))))
            for s in sites
        ]
    close(found.values, np.array(expected))
    close(found.against(), np.array(plain))
    assert np.abs(np.array(expected) - plain).max() > 1e-3


@each_place
def test_other_sources_metrics_sites_and_padding(odd: HookedTransformer, sae: Sae) -> None:
    """A cache, sites of several features, of all positions, one value for each prompt, a mask: as without the quick path."""
    hook = hook_of(sae)
    sites = [
        Site(hook, dims=[1, 5, 30]),
        Site(hook, position=[2, 4]),
        Site(hook, dims=7),
        Site(hook),
        Site(hook, position=5, dims=2),
    ]
    metrics = {
        "difference": LogitDiff([3, 4], [7, 8], reduction="none"),
        "loss": CrossEntropy(TOKENS, position=None, reduction="none"),
    }
    with odd.saes([sae], use_error_term=False):
        _, cache = odd.run_with_cache(TOKENS[::-1, ::-1].copy(), names_filter=hook)
        found, expected = (
            sweep(odd, TOKENS, sites, cache, metrics, recompute=quick, verbose=False, attention_mask=MASK)
            for quick in (True, False)
        )
    assert "general_path" in expected.metadata
    assert "general_path" not in found.metadata
    close(found.values, expected.values)


def test_a_function_of_logits(odd: HookedTransformer) -> None:
    sae = PLACES["resid_post"]
    sites = feature_sites(odd, TOKENS, sae, by_position=False, most=5)
    with odd.saes([sae]):
        found, expected = (
            sweep(
                odd, TOKENS, sites, "mean", lambda logits: (logits[:, 1:4] ** 2).mean(), recompute=quick, verbose=False
            )
            for quick in (True, False)
        )
    close(found.values, expected.values)


def test_tokens_that_are_left_out_change_nothing(odd: HookedTransformer) -> None:
    sae = PLACES["resid_post"]
    sites = [Site(hook_of(sae), position=p, dims=d) for p in range(6) for d in range(0, D_SAE, 9)]
    with odd.saes([sae], exclude_special_tokens=[int(TOKENS[0, 3]), int(TOKENS[1, 5])]):
        found, expected = (sweep(odd, TOKENS, sites, "zero", METRIC, recompute=q, verbose=False) for q in (True, False))
    close(found.values, expected.values)


def test_two_saes_and_other_sites_go_the_other_way(odd: HookedTransformer) -> None:
    one, two = PLACES["resid_post"], PLACES["last"]
    with odd.saes([one, two], use_error_term=True):
        found = sweep(
            odd, TOKENS, [Site(hook_of(one), dims=5), Site(hook_of(two), dims=8)], "zero", METRIC, verbose=False
        )
        each = [
            float(METRIC(odd.run_with_interventions(TOKENS, Patch(hook_of(s), 0.0, dims=d))))
            for s, d in ((one, 5), (two, 8))
        ]
    close(found.values, np.array(each))
    assert "general_path" in found.metadata


def test_sites_are_the_active_features(odd: HookedTransformer) -> None:
    sae = PLACES["resid_post"]
    _, cache = odd.run_with_cache_with_saes(TOKENS, saes=[sae], use_error_term=True)
    peaks = cache[hook_of(sae)].max(0)
    sites = feature_sites(odd, TOKENS, sae)
    assert {(s.position, s.dims) for s in sites.sites} == set(map(tuple, np.argwhere(peaks > 0)))
    assert sites.labels["feature"][0] == f"{sites.sites[0].dims} at {sites.sites[0].position}"
    few = feature_sites(odd, TOKENS, sae, most=3)
    assert min(peaks[s.position, s.dims] for s in few.sites) >= np.sort(peaks.ravel())[-3]
    whole = feature_sites(odd, TOKENS, sae, by_position=False, least=1.0)
    assert [s.dims for s in whole.sites] == list(np.flatnonzero(peaks.max(0) > 1.0))
    with pytest.raises(InputError, match="no feature"):
        feature_sites(odd, TOKENS, sae, least=1e6)
