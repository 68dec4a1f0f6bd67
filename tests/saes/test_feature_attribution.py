"""What features add to a metric: against autograd, direct logit attribution, exact runs and gradients of our own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sae_reference import passed

import graphlens
from graphlens import HookedTransformer, Patch, Sae, feature_attribution
from graphlens.attribution import attribution_patch, direct_logit_attribution
from graphlens.errors import InputError, UnknownHookPoint
from graphlens.metrics import CrossEntropy, LogitDiff, Probability
from graphlens.patching import Site
from tests.saes.odd_model import TOKENS, model
from tests.saes.sae_cases import D_SAE, MLP_OUT, NORMED, RESID, Z, made

METRIC = LogitDiff([3, 4], [7, 8])
LAST = "blocks.2.hook_resid_post"
PLACES = {
    "resid": made(hook=RESID),
    "rescaled": made(hook=RESID, architecture="topk", k=6, rescale_acts_by_decoder_norm=True),
    "normalised": made(hook=RESID, normalize_activations="layer_norm"),
    "mlp_out": made(hook=MLP_OUT, architecture="gated"),
    "hook_z": made(hook=Z, reshape_activations="hook_z"),
    "transcoder": made(hook=NORMED, hook_out=MLP_OUT, architecture="skip_transcoder"),
}
each_place = pytest.mark.parametrize("sae", PLACES.values(), ids=list(PLACES))
METHODS = ("direct", "patching", "integrated")


@pytest.fixture(scope="module")
def odd() -> HookedTransformer:
    return model()


def close(found: Any, expected: Any, tolerance: float = 1e-4) -> None:
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    assert np.abs(expected).max() > 1e-3
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def features_of(odd: HookedTransformer, sae: Sae, tokens: Any = TOKENS) -> Any:
    _, cache = odd.run_with_cache_with_saes(tokens, saes=[sae], use_error_term=True)
    return cache[f"{sae.cfg.writes}.hook_sae_acts_post"]


def count(odd: HookedTransformer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each run of the model."""
    ran: list[int] = []
    run = type(odd.runner.engine).run

    def counted(engine: Any, *given: Any, **options: Any) -> Any:
        ran.append(1)
        return run(engine, *given, **options)

    monkeypatch.setattr(type(odd.runner.engine), "run", counted)
    return ran


def test_gradients_are_autograds(odd: HookedTransformer) -> None:
    """The SAE in torch, its output's gradient by the plain graph, and back through the decoder by autograd."""
    sae = PLACES["normalised"]
    _, cache = odd.run_with_cache(TOKENS)
    x = torch.from_numpy(cache[RESID].copy())
    there = passed(sae, x.requires_grad_(), error_term=True)
    (upstream,) = odd.gradients(TOKENS, METRIC, [RESID]).values()
    there.values["hook_sae_output"].backward(torch.from_numpy(upstream))
    acts = there.values["hook_sae_acts_post"]
    expected = (acts * acts.grad).sum(0).detach().numpy()
    close(feature_attribution(odd, TOKENS, METRIC, sae), expected)


@each_place
def test_patching_is_attribution_patching_of_each_feature(odd: HookedTransformer, sae: Sae) -> None:
    hook, other = f"{sae.cfg.writes}.hook_sae_acts_post", TOKENS[:, ::-1].copy()
    cache = {hook: features_of(odd, sae, other)}
    sites = [Site(hook, position=p, dims=f) for p in (0, 4) for f in range(D_SAE)]
    for source in ("zero", "mean", cache):
        found = feature_attribution(odd, TOKENS, METRIC, sae, source=source)
        assert found.axes == ("position", "feature")
        assert found.shape == (TOKENS.shape[1], D_SAE)
        with odd.saes([sae], use_error_term=True):
            expected = attribution_patch(odd, TOKENS, sites, source, METRIC, verbose=False)
        close(found.values[[0, 4]].ravel(), expected.against().item() - expected.values)


@each_place
def test_direct_is_what_a_change_of_a_feature_writes(odd: HookedTransformer, sae: Sae) -> None:
    """The logit difference is linear in the stream once the norm's scale is held: a feature's share by finite differences."""
    found = feature_attribution(odd, TOKENS, METRIC, sae, method="direct").values
    assert not found[:-1].any()
    acts, hook = features_of(odd, sae), f"{sae.cfg.writes}.hook_sae_acts_post"
    scale = odd.run_with_cache(TOKENS)[1]["ln_final.hook_scale"][:, -1].astype(np.float64)
    w_u = np.asarray(odd.W_U, np.float64)
    seen = (w_u[:, METRIC.correct] - w_u[:, METRIC.incorrect]).T * np.asarray(odd.weights["ln_final.w"], np.float64)
    seen = (seen - seen.mean(-1, keepdims=True)) / scale
    layer = sae.cfg.writes.split(".")[1]
    for feature in np.flatnonzero(acts[:, -1].any(0))[:4]:
        with odd.saes([sae], use_error_term=True):
            ran = []
            for factor in (0.0, 1.0):
                patch = Patch(hook, acts[..., feature] * factor, dims=int(feature), positions=None)
                with odd.intervene(patch):
                    _, cache = odd.run_with_cache(TOKENS)
                written = f"{sae.cfg.writes}.hook_sae_output"
                value = cache[written] if "attn" not in written else cache[f"blocks.{layer}.hook_attn_out"]
                ran.append(value[:, -1].astype(np.float64))
        expected = ((ran[1] - ran[0]) * seen).sum(-1).mean()
        assert abs(found[-1, feature] - expected) <= 1e-4 * np.abs(found).max()


def test_at_the_last_stream_features_and_bias_make_the_whole_metric(odd: HookedTransformer) -> None:
    sae = made(hook=LAST)
    found = feature_attribution(odd, TOKENS, METRIC, sae, method="direct", use_error_term=False)
    with odd.saes([sae]):
        total = float(METRIC(odd(TOKENS)))
        _, cache = odd.run_with_cache(TOKENS)
    scale = np.asarray(cache["ln_final.hook_scale"][:, -1], np.float64)
    w_u, b_u = (np.asarray(each, np.float64) for each in (odd.W_U, odd.b_U))
    plain = (w_u[:, METRIC.correct] - w_u[:, METRIC.incorrect]).T
    seen = plain * np.asarray(odd.weights["ln_final.w"], np.float64)
    seen = (seen - seen.mean(-1, keepdims=True)) / scale
    rest = (seen * sae.b_dec).sum(-1) + plain @ np.asarray(odd.weights["ln_final.b"], np.float64)
    rest += b_u[METRIC.correct] - b_u[METRIC.incorrect]
    assert abs(found.values.sum() + rest.mean() - total) <= 1e-4 * abs(total)


def test_directly_an_exact_sae_of_mlps_is_the_mlps_own_attribution(odd: HookedTransformer) -> None:
    """Each feature is a coordinate's positive or negative part: together they are hook_mlp_out itself."""
    eye = np.eye(35)
    both = np.concatenate([eye, -eye], 1)
    sae = Sae.from_arrays(both, np.zeros(70), both.T, np.zeros(35), MLP_OUT)
    found = feature_attribution(odd, TOKENS, METRIC, sae, method="direct")
    expected = direct_logit_attribution(odd, TOKENS, METRIC).sel(component="1_mlp_out")
    assert abs(found.values.sum() - expected.values) <= 1e-4 * abs(expected.values)


def test_integrated_gradients_are_complete_and_the_limit_of_patching(odd: HookedTransformer) -> None:
    sae = PLACES["resid"]
    hook, acts = f"{RESID}.hook_sae_acts_post", features_of(odd, PLACES["resid"])
    with odd.saes([sae], use_error_term=True):
        change = float(METRIC(odd(TOKENS))) - float(METRIC(odd.run_with_interventions(TOKENS, Patch(hook, acts * 0))))
    apart = []
    for steps in (2, 64):
        found = feature_attribution(odd, TOKENS, METRIC, sae, method="integrated", steps=steps)
        apart.append(abs(found.values.sum() - change))
    assert apart[1] <= 1e-2 * abs(change)
    assert apart[1] < apart[0]
    # Of a source very near, the two are one.
    near = {hook: acts * np.float32(0.999)}
    both = [feature_attribution(odd, TOKENS, METRIC, sae, method=name, source=near) for name in METHODS[1:]]
    close(both[1], both[0], 2e-2)


@pytest.mark.parametrize("metric", [METRIC, Probability([3, 4]), CrossEntropy([3, 4])], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_few_runs(
    odd: HookedTransformer, monkeypatch: pytest.MonkeyPatch, metric: graphlens.metrics.Metric, method: str
) -> None:
    """All features and positions at once: a run, one back from the metric, one for its slope where the metric bends."""
    if method == "direct" and metric is not METRIC:
        with pytest.raises(InputError, match="LogitDiff"):
            feature_attribution(odd, TOKENS, metric, PLACES["resid"], method=method)
        return
    ran = count(odd, monkeypatch)
    feature_attribution(odd, TOKENS, metric, PLACES["resid"], method=method)
    bends = not metric.linear
    most = {"direct": 1, "patching": 2 + bends, "integrated": 1 + (2 * 8 if bends else 1)}[method]
    assert len(ran) == most


def test_an_attached_sae_by_its_hook_point_and_features_by_their_numbers(odd: HookedTransformer) -> None:
    sae = PLACES["resid"]
    whole = feature_attribution(odd, TOKENS, METRIC, sae)
    with odd.saes([sae], use_error_term=True):
        assert feature_attribution(odd, TOKENS, METRIC, RESID) == whole
    some = made(hook=RESID, seed=0).only([40, 3, 17])
    found = feature_attribution(odd, TOKENS, METRIC, some)
    assert found.labels["feature"] == ["40", "3", "17"]
    close(found.sel(feature="17"), whole.sel(feature="17"))
    assert not odd.acts_to_saes


def test_excluded_tokens_have_none(odd: HookedTransformer) -> None:
    sae = PLACES["resid"]
    for method in METHODS:
        with odd.saes([sae], use_error_term=True, exclude_special_tokens=[int(t) for t in TOKENS[:, -1]]):
            assert not feature_attribution(odd, TOKENS, METRIC, RESID, method=method).values[-1].any()
        assert feature_attribution(odd, TOKENS, METRIC, sae, method=method).values[-1].any()


def test_prompts_that_are_read_at_different_positions(odd: HookedTransformer) -> None:
    metric = LogitDiff([3, 4], [7, 8], position=[2, 5])
    both = feature_attribution(odd, TOKENS, metric, PLACES["resid"], method="direct").values
    for row, position in enumerate((2, 5)):
        one = LogitDiff(metric.correct[row : row + 1], metric.incorrect[row : row + 1], position=position)
        alone = feature_attribution(odd, TOKENS[row : row + 1], one, PLACES["resid"], method="direct").values
        close(both[position] * 2, alone[position])


def test_what_is_refused(odd: HookedTransformer) -> None:
    sae = PLACES["resid"]
    for bad, said in (
        ({"method": "shapley"}, "there are 'direct'"),
        ({"steps": 0}, "steps"),
        ({"source": {RESID: np.zeros((2, 6, 35))}}, "hook_sae_acts_post"),
    ):
        with pytest.raises((InputError, UnknownHookPoint), match=said):
            feature_attribution(odd, TOKENS, METRIC, sae, **bad)
    with pytest.raises(InputError, match="no SAE is attached"):
        feature_attribution(odd, TOKENS, METRIC, RESID)
    with pytest.raises(InputError, match="hook point of one that is attached"):
        feature_attribution(odd, TOKENS, METRIC, 3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="method='patching'"):
        feature_attribution(odd, TOKENS, METRIC, made(hook=NORMED), method="direct")
    with pytest.raises(InputError, match="gradient"):
        feature_attribution(odd, TOKENS, lambda logits: logits[0, 0, 0], sae)
    assert not odd.acts_to_saes
