"""Attribution: exact where the model is linear, complete where the gradients are integrated, and summing as it should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from graphlens import HookedTransformer, InputError, Patch, UnknownHookPoint, embedded_model, process_weights
from graphlens.attribution import (
    attribution_patch,
    circuit,
    compare_with_sweep,
    direct_logit_attribution,
    edge_attribution,
    faithfulness,
)
from graphlens.metrics import CrossEntropy, KLDivergence, LogitDiff, Probability
from graphlens.model.runner import Runner
from graphlens.patching import Site, SweepResult, act_patch_sites, sweep
from tests.models import MODEL

Array = npt.NDArray[Any]
CLEAN = "When John and Mary went to the store, John gave a drink to"
CORRUPTED = "When John and Mary went to the store, Mary gave a drink to"
METRIC = LogitDiff(" Mary", " John")


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return MODEL


@pytest.fixture(scope="module")
def cache(model: HookedTransformer) -> Any:
    return model.run_with_cache(CLEAN)[1]


def effects(result: SweepResult) -> Array:
    return result.values - result.against("corrupted")


def test_it_is_the_sweep_where_the_model_is_linear(model: HookedTransformer, cache: Any) -> None:
    """With patterns, LayerNorm scales and MLP outputs held at their corrupted values, all that is left is linear."""
    _, corrupted = model.run_with_cache(CORRUPTED)
    frozen = ("hook_pattern", "hook_scale", "hook_mlp_out")
    held = [Patch(name, corrupted[name]) for name in corrupted if name.endswith(frozen)]
    tokens = model.to_tokens(CORRUPTED)
    sites = [*act_patch_sites(model, tokens, "attn_head_out_by_pos").sites, *(Site("resid_pre", i) for i in range(4))]
    sites += [Site("v", 1, head=2), Site("attn_out", 2, position=[3, 10]), Site("hook_embed")]
    with model.intervene(held):
        exact = sweep(model, tokens, sites, cache, METRIC, verbose=False)
        estimate = attribution_patch(model, tokens, sites, cache, METRIC, verbose=False)
    scale = float(np.abs(effects(exact)).max())
    assert scale > 1
    assert float(np.abs(estimate.values - exact.values).max()) <= 1e-5 * max(scale, float(np.abs(exact.values).max()))
    assert compare_with_sweep(estimate, exact).correlation > 0.999999


@pytest.mark.parametrize(
    "metric",
    [METRIC, Probability(" Mary"), CrossEntropy(" Mary"), METRIC.normalised()],
    ids=["difference", "probability", "cross-entropy", "normalised"],
)
def test_integrated_gradients_are_complete(model: HookedTransformer, cache: Any, metric: Any) -> None:
    """Summed over a whole hook point they are what patching it does; the error falls as steps are added."""
    sites = [Site("resid_mid", 0), Site("z", 2), Site("q", 2), Site("mlp_out", 1), Site("pattern", 1), Site("post", 2)]
    exact = effects(sweep(model, CORRUPTED, sites, cache, metric, verbose=False))
    errors = []
    for steps in (4, 16, 64):
        found = effects(attribution_patch(model, CORRUPTED, sites, cache, metric, steps=steps, verbose=False))
        errors.append(np.abs(found - exact))
    scale = np.abs(exact).max()
    assert float(errors[2].max()) <= 0.01 * scale
    large = np.abs(exact) > 0.05 * scale
    assert np.all(errors[2][large] <= 0.01 * np.abs(exact)[large])
    assert float(errors[2].max()) < 0.2 * float(errors[1].max()) < 0.2 * float(errors[0].max())


def test_steps_that_share_a_run_are_those_that_run_alone(
    model: HookedTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, run_backward = [0], Runner.run_backward

    def counted(*args: Any, **options: Any) -> Any:
        runs[0] += 1
        return run_backward(*args, **options)

    monkeypatch.setattr(Runner, "run_backward", counted)
    prompts = ["When John and Mary went home, John gave it to", "Then John saw Mary and John gave it to"]
    others = [prompt.replace("Mary", "Anna") for prompt in prompts]
    options: dict[str, Any] = {"padding_side": "left"}
    _, clean = model.run_with_cache(prompts, **options)
    sites = [Site("resid_pre", 1), Site("pattern", 2, head=1), Site("attn_scores", 3), Site("z", 0, position=-2)]

    def estimate() -> tuple[Array, int]:
        runs[0] = 0
        metrics = [METRIC, CrossEntropy([" Mary"] * 2)]
        found = attribution_patch(model, others, sites, clean, metrics, steps=13, verbose=False, **options)
        return found.values, runs[0]

    shared, few = estimate()
    with model.hooks([("blocks.0.hook_resid_pre", lambda activation, hook: None)]):  # a hook sees the rows of its run
        alone, many = estimate()
    assert many == 2 * 13 * len(sites)
    assert few == (2 + 13) * len(sites)  # a metric that is not linear has another gradient in each run
    np.testing.assert_allclose(shared, alone, rtol=1e-4, atol=1e-5)


def test_a_sites_estimate_is_the_product_summed_over_it(model: HookedTransformer, cache: Any) -> None:
    gradients = model.gradients(CORRUPTED, METRIC)
    _, corrupted = model.run_with_cache(CORRUPTED)
    sites = [
        Site("z", 1, head=[0, 2], position=slice(3, 12)),
        Site("post", 2, dims=range(5, 90), position=-1),
        Site("attn_scores", 2, head=1),
        Site("pattern", 0, head=2, position=10, dims=[1, 4]),
        Site("resid_post", 3),
    ]
    picks: list[tuple[Any, ...]] = [
        (slice(None), slice(3, 12), [0, 2]),
        (slice(None), -1, slice(5, 90)),
        (slice(None), 1),
        (slice(None), 2, 10, [1, 4]),
        (),
    ]
    found = effects(attribution_patch(model, CORRUPTED, sites, cache, METRIC, verbose=False))
    for value, site, pick in zip(found, sites, picks, strict=True):
        name = site.hook
        with np.errstate(invalid="ignore"):  # -inf less -inf, where it is masked
            apart = np.nan_to_num(cache[name].astype(np.float64) - corrupted[name], nan=0.0)
        assert value == pytest.approx(float((apart * gradients[name])[pick].sum()), rel=1e-5, abs=1e-7)


def test_sources_and_several_metrics(model: HookedTransformer) -> None:
    sites = [Site("z", 1, head=0), Site("mlp_out", 2, position=-1)]
    gradients, (_, cache) = model.gradients(CLEAN, METRIC), model.run_with_cache(CLEAN)
    found = attribution_patch(model, CLEAN, sites, "zero", {"a": METRIC, "b": Probability(" Mary")}, verbose=False)
    assert found.axes == ("metric", "site")
    z, out = ("blocks.1.attn.hook_z", "blocks.2.hook_mlp_out")
    expected = [-(cache[z] * gradients[z])[:, :, 0].sum(), -(cache[out] * gradients[out])[:, -1].sum()]
    np.testing.assert_allclose(effects(found)[0], expected, rtol=1e-4)


def test_how_far_the_estimate_is_from_the_sweep(model: HookedTransformer, cache: Any) -> None:
    sites = act_patch_sites(model, model.to_tokens(CORRUPTED), "attn_head_pattern_all_pos")
    exact = sweep(model, CORRUPTED, sites, cache, METRIC, verbose=False)
    estimate = attribution_patch(model, CORRUPTED, sites, cache, METRIC, verbose=False)
    found = compare_with_sweep(estimate, exact, 3)
    a, b = effects(estimate).ravel(), effects(exact).ravel()
    assert found.correlation == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert found.largest_error == pytest.approx(np.abs(a - b).max())
    assert [abs(x - y) for _, x, y in found.worst] == sorted(np.abs(a - b), reverse=True)[:3]
    assert "correlation" in str(found)
    itself = compare_with_sweep(exact, exact)
    assert (itself.correlation, itself.slope, itself.largest_error) == pytest.approx((1, 1, 0))
    with pytest.raises(InputError, match="same sites"):
        compare_with_sweep(estimate.sel(layer=0), exact)


# Edges


@pytest.fixture(scope="module")
def scores(model: HookedTransformer, cache: Any) -> SweepResult:
    return edge_attribution(model, CORRUPTED, cache, METRIC)


def test_a_senders_edges_sum_to_its_attribution(model: HookedTransformer, scores: SweepResult) -> None:
    model.set_use_attn_result(True)
    try:
        _, cache = model.run_with_cache(CLEAN)
        sites = [Site("result", layer, head=head) for layer in range(4) for head in range(4)]
        sites += [*(Site("mlp_out", layer) for layer in range(4)), Site("resid_pre", 0)]
        expected = effects(attribution_patch(model, CORRUPTED, sites, cache, METRIC, verbose=False))
    finally:
        model.set_use_attn_result(False)
    names = [f"L{layer}H{head}" for layer in range(4) for head in range(4)]
    names += [*(f"L{layer}MLP" for layer in range(4)), "embed"]
    for name, value in zip(names, expected, strict=True):
        outgoing = [
            v for v, edge in zip(scores.values, scores.labels["edge"], strict=True) if edge.startswith(f"{name}->")
        ]
        assert sum(outgoing) == pytest.approx(value, rel=1e-4, abs=1e-5 * float(np.abs(expected).max()))


def test_every_edge_is_there_once_and_points_forward(scores: SweepResult) -> None:
    labels = scores.labels["edge"]
    # Senders: embed, and per layer 4 heads and an MLP; receivers: per layer 12 head inputs and an MLP, and the logits.
    count = 4 * 13 + 1 + sum(4 * (13 * (3 - layer) + 2) + 13 * (3 - layer) + 1 for layer in range(4))
    assert len(set(labels)) == len(labels) == count
    assert {"embed->L0H0.q", "L0H3->L0MLP", "L0H3->L1H2.v", "L3MLP->logits"} <= set(labels)
    assert not {"L0MLP->L0H0.q", "L1H0->L1H1.q", "L2H0->L1MLP"} & set(labels)


def test_circuits_of_all_edges_and_of_none(model: HookedTransformer, cache: Any, scores: SweepResult) -> None:
    everything = len(scores.labels["edge"])
    sizes = (0, 5, 10, 40, everything)
    found = faithfulness(model, CORRUPTED, cache, METRIC, {n: circuit(scores, n) for n in sizes})
    clean, corrupted = (float(METRIC.bound(model.to_single_token)(model(text))) for text in (CLEAN, CORRUPTED))
    assert found.values[0] == pytest.approx(corrupted, rel=1e-5)
    assert found.values[-1] == pytest.approx(clean, rel=1e-5)
    shares = (found.values - corrupted) / (clean - corrupted)
    assert shares[3] > 0.9, "forty edges of the highest score restore the answer"
    worst = circuit(SweepResult(1 / (np.abs(scores.values) + 1e-9), scores.axes, scores.labels), 40)
    rest = faithfulness(model, CORRUPTED, cache, METRIC.normalised(), {"worst": worst})
    assert abs(float(rest.values[0])) < 0.1


def test_a_circuit_of_one_path_is_path_patching(model: HookedTransformer, cache: Any) -> None:
    """embed -> all of head 2.2's inputs -> logits, against hooks that freeze everything else."""
    edges = ["embed->L2H2.q", "embed->L2H2.k", "embed->L2H2.v", "L2H2->logits"]
    found = faithfulness(model, CORRUPTED, cache, METRIC, {"path": edges})
    _, base = model.run_with_cache(CORRUPTED)
    change = cache["blocks.0.hook_resid_pre"] - base["blocks.0.hook_resid_pre"]
    _, reached = model.run_with_interventions(
        CORRUPTED,
        Patch("blocks.2.hook_resid_pre", base["blocks.2.hook_resid_pre"] + change),
        names_filter="blocks.2.attn.hook_z",
    )
    z = base["blocks.2.attn.hook_z"].copy()
    z[:, :, 2] = reached["blocks.2.attn.hook_z"][:, :, 2]
    out = (z[:, :, 2] - base["blocks.2.attn.hook_z"][:, :, 2]) @ model.W_O[2, 2]
    end = base["blocks.3.hook_resid_post"] + out
    expected = float(METRIC.bound(model.to_single_token)(model.unembed(model.ln_final(end))))
    assert found.values[0] == pytest.approx(expected, rel=1e-4)


def test_edges_by_integrated_gradients(model: HookedTransformer, cache: Any, scores: SweepResult) -> None:
    """From the embeddings on, all of them together are complete: embed's edges, summed, are the whole effect."""
    found = edge_attribution(model, CORRUPTED, cache, METRIC, steps=32)
    embed = [edge.startswith("embed->") for edge in found.labels["edge"]]
    clean, corrupted = (float(METRIC.bound(model.to_single_token)(model(text))) for text in (CLEAN, CORRUPTED))
    assert float(found.values[embed].sum()) == pytest.approx(clean - corrupted, rel=0.01)
    assert abs(float(scores.values[embed].sum()) - (clean - corrupted)) > 0.1 * abs(clean - corrupted)


# Direct logit attribution


@pytest.mark.parametrize("processed", [False, True])
def test_direct_logit_attribution_sums_to_the_metric(processed: bool, tmp_path: Path) -> None:
    folder = process_weights(embedded_model(), tmp_path / "processed") if processed else embedded_model()
    model = HookedTransformer.from_onnx(folder, "cpu")
    metric = LogitDiff([model.to_single_token(" Mary"), 7], [5, model.to_single_token(" John")], position=[-1, 6])
    tokens = np.concatenate([model.to_tokens(CLEAN), model.to_tokens(CORRUPTED)])
    found = direct_logit_attribution(model, tokens, metric)
    assert found.metadata["total"] == pytest.approx(float(metric(model(tokens))), rel=1e-6)
    assert float(found.values.sum()) == pytest.approx(found.metadata["total"], rel=1e-4)
    assert {"L0H0", "3_mlp_out", "embed", "pos_embed", "bias"} <= set(found.labels["component"])
    _, cache = model.run_with_cache(tokens)
    head = np.stack([cache["z", 2][0, -1, 1], cache["z", 2][1, 6, 1]]) @ model.W_O[2, 1]
    scale = np.stack([cache["ln_final.hook_scale"][0, -1], cache["ln_final.hook_scale"][1, 6]])
    weight = model.weights.get("ln_final.w")
    direction = (model.W_U[:, metric.correct] - model.W_U[:, metric.incorrect]).T
    direction = direction if weight is None else direction * weight
    expected = float(((head - head.mean(-1, keepdims=True)) / scale * direction).sum(-1).mean())
    place = found.labels["component"].index("L2H1")
    assert found.values[place] == pytest.approx(expected, rel=1e-3, abs=1e-5)


# Bad input


def test_bad_input(model: HookedTransformer, cache: Any) -> None:
    site = Site("z", 1, head=0)
    with pytest.raises(InputError, match="has no derivative"):
        attribution_patch(model, CORRUPTED, site, cache, lambda logits: float(logits.sum()))
    with pytest.raises(InputError, match="reduction='mean'"):
        model.gradients(CORRUPTED, LogitDiff(5, 7, reduction="none"), "blocks.1.attn.hook_z")
    with pytest.raises(InputError, match="steps=-1"):
        attribution_patch(model, CORRUPTED, site, cache, METRIC, steps=-1)
    with pytest.raises(InputError, match="empty"):
        attribution_patch(model, CORRUPTED, [], cache, METRIC)
    with pytest.raises(UnknownHookPoint, match="hook_z"):
        attribution_patch(model, CORRUPTED, site, {}, METRIC)
    with pytest.raises(UnknownHookPoint, match="resid_pre"):
        edge_attribution(model, CORRUPTED, {}, METRIC)
    with pytest.raises(InputError, match="no edge of this model"):
        faithfulness(model, CORRUPTED, cache, METRIC, {"mine": ["L2MLP->L0H0.q"]})
    with pytest.raises(InputError, match="n=10000"):
        circuit(edge_attribution(model, CORRUPTED, cache, METRIC), 10000)
    with pytest.raises(InputError, match="LogitDiff with a mean, not of Probability"):
        direct_logit_attribution(model, CLEAN, Probability(" Mary"))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="edges are of the plain model"), model.intervene(Patch("hook_embed", 0.0)):
        edge_attribution(model, CORRUPTED, cache, METRIC)
    model.set_use_hook_tokens(True)
    try:
        with pytest.raises(InputError, match="int64"):
            attribution_patch(model, CORRUPTED, Site("hook_tokens"), {"hook_tokens": model.to_tokens(CLEAN)}, METRIC)
        with pytest.raises(InputError, match="int64"):
            model.gradients(CORRUPTED, METRIC, "hook_tokens")
    finally:
        model.set_use_hook_tokens(False)


def test_a_reference_that_is_the_run_itself_has_no_gradient(model: HookedTransformer) -> None:
    found = model.gradients(CLEAN, KLDivergence(model(CLEAN)), "blocks.1.hook_resid_pre")
    largest = float(np.abs(model.gradients(CLEAN, METRIC, "blocks.1.hook_resid_pre")["blocks.1.hook_resid_pre"]).max())
    assert float(np.abs(found["blocks.1.hook_resid_pre"]).max()) <= 1e-5 * largest
