"""Drift: its figures against runs made by hand, planted faults named first, and what is refused."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

import graphlens
from graphlens import HookedTransformer, Scale, surgery
from graphlens.analysis.drift_figures import apart, signal_to_noise
from graphlens.errors import GraphlensError, HookResultError, InputError
from graphlens.experiments.drift_comparison import Comparison
from graphlens.experiments.drift_run import Side, requests
from graphlens.experiments.stepped_run import Company, SteppedRun
from graphlens.metrics import LogitDiff
from graphlens.patching import Drifted, DriftResult
from graphlens.pipelines.hub import embedded_model
from graphlens.views.progress import steps

Array = npt.NDArray[Any]
Model = HookedTransformer
LAST = "unembed.hook_out"


def opened(name: str = "tiny-gpt2") -> Model:
    return HookedTransformer.from_onnx(embedded_model(name), "cpu")


def with_weight(model: Model, name: str, share: float) -> Model:
    """The model with one weight off by a share of its spread."""
    weight = np.array(model.weights[name])
    noise = np.random.default_rng(1).normal(0, share * weight.std(), weight.shape).astype(weight.dtype)
    model.set_weights({name: weight + noise})
    return model


def rounded(weight: Array, bits: int) -> Array:
    """A weight in so many bits, with one step for all of it."""
    step = np.abs(weight).max() / (2 ** (bits - 1) - 1)
    return np.asarray(np.round(weight / step) * step, weight.dtype)


def in_few_bits(model: Model, bits: int, only: str = ".W_") -> Model:
    """The model with its matrices rounded, as a quantiser does it."""
    names = [name for name in model.weights if only in name]
    model.set_weights({name: rounded(np.asarray(model.weights[name]), bits) for name in names})
    return model


def off(reference: Array, other: Array, where: Array | None = None) -> float:
    """The relative error, in float64, by the definition."""
    a, b = reference.astype(np.float64), other.astype(np.float64)
    keep = np.ones(a.shape, bool) if where is None else np.broadcast_to(where, a.shape)
    return float(np.sqrt(np.square(b[keep] - a[keep]).sum() / np.square(a[keep]).sum()))


@pytest.fixture(scope="module")
def prompts() -> tuple[Array, Array]:
    """Three prompts, one padded on the left and one on the right."""
    tokens = np.random.default_rng(5).integers(0, opened().cfg.d_vocab, (3, 9))
    mask = np.ones((3, 9), np.int64)
    mask[1, :3] = mask[2, 7:] = 0
    return tokens, mask


@pytest.fixture(scope="module", params=["tiny-gpt2", "tiny-llama"])
def pair(request: pytest.FixtureRequest) -> tuple[Model, Model]:
    """A model, and the same one in 6 bits."""
    return opened(request.param), in_few_bits(opened(request.param), 6, "blocks.")


# The figures


def test_relative_error_and_cosine_are_those_of_two_runs(
    pair: tuple[Model, Model], prompts: tuple[Array, Array]
) -> None:
    (reference, other), (tokens, mask) = pair, prompts
    tokens = tokens % reference.cfg.d_vocab
    result = graphlens.drift(reference, other, tokens, attention_mask=mask, verbose=False)
    (logits, right), (others, wrong) = (one.run_with_cache(tokens, attention_mask=mask) for one in pair)
    assert [site.hook for site in result.sites] == list(right)
    real = mask.astype(bool)
    for site in result.sites:
        a, b = right[site.hook], wrong[site.hook]
        if site.role in ("attn.hook_attn_scores", "attn.hook_pattern"):
            seen = np.broadcast_to(real[:, None, :, None] & real[:, None, None] & np.isfinite(a), a.shape)
            seen = seen & np.tril(np.ones(a.shape[2:], bool)) if site.role.endswith("scores") else seen
        else:
            seen = np.broadcast_to(real.reshape(3, 9, *[1] * (a.ndim - 2)), a.shape)
        assert site.relative == pytest.approx(off(a, b, seen), rel=1e-4, abs=1e-9)
        x, y = a[seen].astype(np.float64), b[seen].astype(np.float64)
        assert site.cosine == pytest.approx(x @ y / math.sqrt((x @ x) * (y @ y)), abs=1e-6)
    assert result.logits == pytest.approx(off(logits[real], others[real]), rel=1e-4)


def test_heads_are_measured_apart(pair: tuple[Model, Model], prompts: tuple[Array, Array]) -> None:
    (reference, other), tokens = pair, prompts[0]
    tokens = tokens % reference.cfg.d_vocab
    result = graphlens.drift(reference, other, tokens, verbose=False)
    (_, right), (_, wrong) = (one.run_with_cache(tokens) for one in pair)
    for hook, axis in (("blocks.1.attn.hook_z", 2), ("blocks.2.attn.hook_pattern", 1), ("blocks.0.attn.hook_k", 2)):
        wanted = [off(right[hook].take(h, axis), wrong[hook].take(h, axis)) for h in range(right[hook].shape[axis])]
        np.testing.assert_allclose(result[hook].heads, wanted, rtol=1e-4)
    grid = result.by_head("attn.hook_z", "relative")
    assert grid.axes == ("layer", "head")
    np.testing.assert_allclose(grid.values[1], result["blocks.1.attn.hook_z"].heads)


def test_fresh_error_is_that_of_the_step_on_the_references_input(
    pair: tuple[Model, Model], prompts: tuple[Array, Array]
) -> None:
    (reference, other), tokens = pair, prompts[0]
    tokens = tokens % reference.cfg.d_vocab
    result = graphlens.drift(reference, other, tokens, verbose=False)
    _, right = reference.run_with_cache(tokens)
    gated = reference.cfg.gated_mlp
    steps = {  # what each reads
        "attn.hook_v": ["ln1.hook_normalized"],
        "hook_attn_out": ["attn.hook_z"],
        "mlp.hook_pre": ["ln2.hook_normalized"],
        "hook_mlp_out": ["mlp.hook_post"],
        "attn.hook_z": ["attn.hook_pattern", "attn.hook_v"],
        "hook_resid_post": ["hook_resid_mid", "hook_mlp_out"],
        "mlp.hook_post": ["mlp.hook_pre", *(["mlp.hook_pre_linear"] if gated else [])],
    }
    for role, read in steps.items():
        for layer in (0, 2):
            name = f"blocks.{layer}.{role}"
            put = [(f"blocks.{layer}.{one}", lambda x, hook: right[hook.name]) for one in read]
            with other.hooks(fwd_hooks=put):
                _, cache = other.run_with_cache(tokens, names_filter=name)
            assert result[name].fresh == pytest.approx(off(right[name], cache[name]), rel=1e-3, abs=1e-8)
    assert max(site.fresh for site in result.sites if site.role in ("hook_resid_mid", "hook_resid_post")) < 1e-6
    assert result["blocks.0.attn.hook_q"].fresh > 1e-3


def test_equal_models_do_not_drift(prompts: tuple[Array, Array]) -> None:
    tokens, mask = prompts
    model = opened()
    result = graphlens.drift(model, model, tokens, attention_mask=mask, patch=True, verbose=False)
    assert {(site.relative, site.fresh) for site in result.sites} == {(0.0, 0.0)}
    assert result.logits == 0
    assert not result.patched
    assert "equal" in result.notes[0]
    assert result.sites[0].snr == math.inf


def test_padding_may_differ_as_it_likes(prompts: tuple[Array, Array]) -> None:
    tokens, mask = prompts
    first, second = opened(), opened()
    wild = np.where((mask == 0)[..., None], 1e30, 0).astype(np.float32)
    with second.hooks(fwd_hooks=[("hook_embed", lambda x, hook: x + wild)]):
        result = graphlens.drift(first, second, tokens, attention_mask=mask, verbose=False)
    assert result.logits == 0
    assert max(site.relative for site in result.sites) == 0


@pytest.mark.parametrize("masked", [-3.4e38, -1e9])
def test_masked_scores_may_be_any_large_negative_number(prompts: tuple[Array, Array], masked: float) -> None:
    tokens, mask = prompts
    first, second = opened(), with_weight(opened(), "blocks.0.attn.W_Q", 0.02)

    def remask(scores: Array, hook: Any) -> Array:
        return np.where(np.isneginf(scores), np.float32(masked), scores)

    places = [(f"blocks.{layer}.attn.hook_attn_scores", remask) for layer in range(4)]
    plain = graphlens.drift(first, second, tokens, attention_mask=mask, verbose=False)
    with second.hooks(fwd_hooks=places):
        one = graphlens.drift(first, second, tokens, attention_mask=mask, verbose=False)
    with second.hooks(fwd_hooks=places), first.hooks(fwd_hooks=places):
        both = graphlens.drift(first, second, tokens, attention_mask=mask, verbose=False)
    for site, a, b in zip(plain.sites, one.sites, both.sites, strict=True):
        assert a.relative == pytest.approx(site.relative, abs=1e-6)
        assert b.fresh == pytest.approx(site.fresh, abs=1e-6)


def test_text_is_read_by_the_references_tokenizer() -> None:
    first, second = opened(), with_weight(opened(), "blocks.1.attn.W_O", 0.1)
    texts = ["When John and Mary went to the store", "The cat"]
    result = graphlens.drift(first, second, texts, verbose=False)
    right = first(texts, padding_side="left")
    assert result.shape == right.shape[:2]
    assert graphlens.drift(first, second, texts[0], verbose=False).shape == (1, first.to_tokens(texts[0]).shape[1])


# Planted faults


def test_an_unembedding_that_alone_is_quantised_is_named_first(prompts: tuple[Array, Array]) -> None:
    first, second = opened(), opened()
    embedding, unembedding = np.array(first.W_E), np.array(first.W_U)
    second.set_weights({"unembed.W_U": rounded(unembedding, 4), "embed.W_E": embedding})
    result = graphlens.drift(first, second, prompts[0], patch=True, verbose=False)
    assert [site.hook for site in result.worst(3, "fresh") if site.fresh] == [LAST]
    assert result.worst(1)[0].hook == LAST
    assert result[LAST].recovered == pytest.approx(1, abs=1e-6)
    assert result.logits > 0.05


def test_scores_that_a_mask_rounds_to_one_value_are_named_first(tmp_path: Path, prompts: tuple[Array, Array]) -> None:
    # A quantiser that counts the mask's -3.4e38 as part of the scores' range.
    model = surgery.load(embedded_model())

    def round_by_the_mask(value: ir.Value, scope: surgery.splice.Scope) -> ir.Value:  # type: ignore[name-defined]
        step, zero = scope.constant(np.float32(1.3e36), "step"), scope.constant(np.int8(0), "zero")
        return scope.op("DequantizeLinear", [scope.op("QuantizeLinear", [value, step, zero]), step, zero])

    hooks = [f"blocks.{layer}.attn.hook_attn_scores" for layer in range(4)]
    path = surgery.save(surgery.splice(model, dict.fromkeys(hooks, round_by_the_mask)), tmp_path / "faulty")
    other = HookedTransformer.from_onnx(path, "cpu")
    result = graphlens.drift(opened(), other, *prompts[:1], verbose=False)
    assert result.worst(1)[0].hook == hooks[0]
    assert [site.hook for site in result.worst(4)] == hooks
    assert result.worst(1)[0].fresh == 1.0
    assert all(math.isfinite(site.relative) for site in result.sites)


@pytest.mark.parametrize(("name", "weight", "site"), [
    ("tiny-gpt2", "blocks.2.attn.W_O", "blocks.2.hook_attn_out"),
    ("tiny-llama", "blocks.1.attn.W_O", "blocks.1.hook_attn_out"),
    ("tiny-gpt2", "blocks.1.mlp.W_in", "blocks.1.mlp.hook_pre"),
])  # fmt: skip
def test_a_damaged_weight_is_where_the_error_comes_in_and_goes_away(
    name: str, weight: str, site: str, prompts: tuple[Array, Array]
) -> None:
    tokens, mask = prompts
    first = opened(name)
    second = with_weight(opened(name), weight, 0.2)
    tokens = tokens % first.cfg.d_vocab
    result = graphlens.drift(first, second, tokens, attention_mask=mask, patch=True, verbose=False)
    assert [one.hook for one in result.worst(10, "fresh") if one.fresh > 1e-6] == [site]
    assert result.worst(1)[0].hook == site
    assert result[site].recovered == pytest.approx(1, abs=1e-5)


def test_a_damaged_head_is_the_one_that_stands_out(prompts: tuple[Array, Array]) -> None:
    first, second = opened(), opened()
    with second.intervene(Scale("blocks.1.attn.hook_v", 1.3, heads=2)):
        result = graphlens.drift(first, second, prompts[0], verbose=False)
    site = result["blocks.1.attn.hook_v"]
    assert site.fresh_heads.index(max(site.fresh_heads)) == 2
    assert [head for head, value in enumerate(site.fresh_heads) if value] == [2]
    assert max(site.fresh_heads) == pytest.approx(0.3, rel=1e-4)


# Patches


def test_recovered_is_what_a_patch_by_hand_recovers(pair: tuple[Model, Model], prompts: tuple[Array, Array]) -> None:
    (reference, other), (tokens, mask) = pair, prompts
    tokens = tokens % reference.cfg.d_vocab
    real = mask.astype(bool)
    metric = LogitDiff(3, 8, position=5)  # real in each prompt
    result = graphlens.drift(
        reference, other, tokens, attention_mask=mask, patch=True, top=7, metric=metric, verbose=False
    )
    logits, right = reference.run_with_cache(tokens, attention_mask=mask)
    before = other(tokens, attention_mask=mask)
    patched = [site for site in result.sites if site.recovered is not None]
    assert len(patched) == 7
    assert result.notes == ()
    for site in patched:

        def put(x: Array, hook: Any) -> Array:
            seen = real.reshape(3, 9, *[1] * (x.ndim - 2)) if x.shape[:2] == (3, 9) else np.isfinite(right[hook.name])
            return np.where(seen, right[hook.name], x)

        after = other.run_with_hooks(tokens, attention_mask=mask, fwd_hooks=[(site.hook, put)])
        wanted = 1 - off(logits[real], after[real]) / off(logits[real], before[real])
        if site.hook != LAST:
            assert site.recovered == pytest.approx(wanted, abs=2e-4)
            masked = metric.masked(mask)
            left = abs(float(masked(after)) - float(masked(logits)))
            share = 1 - left / abs(float(masked(before)) - float(masked(logits)))
            assert site.metric == pytest.approx(share, abs=2e-3)
    assert result.metric is not None
    assert result.metric[1] == pytest.approx(float(metric.masked(mask)(logits)), rel=1e-5)


def test_a_patched_run_starts_at_its_layer(prompts: tuple[Array, Array]) -> None:
    first, second = opened(), with_weight(opened(), "blocks.3.mlp.W_in", 0.1)
    graphlens.drift(first, second, prompts[0], patch=True, verbose=False)
    assert 3 in {plan.start for plan in second.runner.engine.open_sessions}


def test_what_is_active_counts_and_a_patched_run_is_whole_then(prompts: tuple[Array, Array]) -> None:
    first, second = opened(), opened()
    with second.intervene(Scale("blocks.0.hook_attn_out", 1.1)):
        result = graphlens.drift(first, second, prompts[0], patch=True, verbose=False)
    assert result.worst(1, "fresh")[0].hook == "blocks.0.hook_attn_out"
    assert result["blocks.0.hook_attn_out"].fresh == pytest.approx(0.1, rel=1e-4)


def test_half_precision_is_compared_with_single(tmp_path: Path, prompts: tuple[Array, Array]) -> None:
    from graphlens.surgery.precision import convert_into

    stage = tmp_path / "half"
    stage.mkdir()
    convert_into(embedded_model() / "model.onnx", stage, "float16")
    first, second = opened(), HookedTransformer.from_onnx(stage, "cpu")
    result = graphlens.drift(first, second, prompts[0], attention_mask=prompts[1], patch=True, top=3, verbose=False)
    assert 1e-5 < result.logits < 1e-2
    assert max(site.fresh for site in result.sites) < 2e-3
    assert len([site for site in result.sites if site.recovered is not None]) == 3
    back = graphlens.drift(second, first, prompts[0], attention_mask=prompts[1], verbose=False)
    assert back.logits == pytest.approx(result.logits, rel=0.05)


# The result


@pytest.fixture(scope="module")
def result(prompts: tuple[Array, Array]) -> DriftResult:
    first, second = opened(), in_few_bits(opened(), 6, "blocks.")
    return graphlens.drift(first, second, prompts[0], patch=True, top=4, verbose=False)


def test_a_result_is_saved_and_loaded(result: DriftResult, tmp_path: Path) -> None:
    path = result.save(tmp_path / "drift")
    assert path.name == "drift.json"
    assert DriftResult.load(path) == result
    assert DriftResult.load(tmp_path / "drift") == result
    record = json.loads(path.read_text())
    assert record["sites"][0]["hook"] == "hook_embed"


def test_what_is_infinite_or_undefined_is_saved_too(tmp_path: Path) -> None:
    odd = DriftResult((Drifted("blocks.0.hook_z", math.inf, math.nan, 0.0, recovered=-2.0),), math.inf, end="hook_z")
    found = DriftResult.load(odd.save(tmp_path / "odd"))
    assert found.sites[0].relative == found.logits == math.inf
    assert math.isnan(found.sites[0].cosine)
    assert found.sites[0].snr == -math.inf


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "no JSON"),
        ("[]", "not the result of a drift"),
        ('{"format": "graphlens.drift", "version": 9}', "Update"),
        ('{"format": "graphlens.drift", "version": 1, "sites": [{}]}', "do not fit"),
    ],
)
def test_a_file_that_is_no_result_is_refused(tmp_path: Path, text: str, what: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InputError, match=what):
        DriftResult.load(tmp_path / "x.json")
    with pytest.raises(InputError, match="cannot be read"):
        DriftResult.load(tmp_path / "missing.json")


def test_a_result_by_role_and_layer(result: DriftResult, tmp_path: Path) -> None:
    grid = result.by_layer("relative")
    assert grid.axes == ("role", "layer")
    assert grid.sel(role="hook_resid_post", layer="2").values == result["blocks.2.hook_resid_post"].relative
    assert np.isnan(grid.sel(role="hook_embed", layer="2").values)
    result.plot(tmp_path / "heat.txt", "recovered")
    assert "hook_attn_out" in (tmp_path / "heat.txt").read_text()


def test_the_worst_sites_come_first(result: DriftResult) -> None:
    fresh = [site.fresh for site in result.worst(100, "fresh")]
    assert fresh == sorted(fresh, reverse=True)
    assert len(result.worst(100)) == 4
    assert result.worst(1, "snr")[0] == max(result.sites, key=lambda site: site.relative)
    for wrong in (lambda: result.worst(0), lambda: result.worst(1, "size"), lambda: result.by_layer("size")):
        with pytest.raises(InputError):
            wrong()
    with pytest.raises(InputError, match="no heads"):
        result.by_head("hook_resid_pre")
    with pytest.raises(InputError, match="neither model"):
        result["blocks.9.hook_z"]


def test_equals_come_in_firing_order() -> None:
    sites = tuple(Drifted(f"blocks.{layer}.x", 1.0, 0.0, 1.0, recovered=0.999 + layer / 1e4) for layer in range(4))
    assert DriftResult(sites, 1.0).worst(4) == list(sites)


def test_names_of_nodes_are_those_of_the_worst_sites() -> None:
    sites = (
        Drifted("a", 0.1, 1.0, 0.1, nodes=("one", "two")),
        Drifted("b", 0.5, 1.0, 0.5),
        Drifted("c", 0.3, 1.0, 0.3, nodes=("three",)),
    )
    assert DriftResult(sites, 0.1).nodes_to_exclude(1) == ["three"]
    assert DriftResult(sites, 0.1).nodes_to_exclude(5) == ["three", "one", "two"]


# What is refused, and what goes wrong on the way


def test_models_of_another_shape_are_refused(prompts: tuple[Array, Array]) -> None:
    with pytest.raises(InputError, match=r"d_mlp .neurons. is 512 in the reference and 384"):
        graphlens.drift(opened(), opened("tiny-llama"), prompts[0] % 50)


def test_what_belongs_to_patches_needs_them(prompts: tuple[Array, Array]) -> None:
    with pytest.raises(InputError, match="patch=True"):
        graphlens.drift(opened(), opened(), prompts[0], top=3)


def test_hook_points_of_one_model_alone_are_listed(prompts: tuple[Array, Array]) -> None:
    first, second = opened(), opened()
    second.set_use_attn_result(True)
    result = graphlens.drift(first, second, prompts[0][:1], verbose=False)
    assert result.only_other == tuple(f"blocks.{layer}.attn.hook_result" for layer in range(4))
    assert result.only_reference == ()
    with pytest.raises(InputError, match="only the other model has it"):
        result["blocks.0.attn.hook_result"]


def test_split_inputs_fire_several_times(prompts: tuple[Array, Array]) -> None:
    first, second = opened(), with_weight(opened(), "blocks.1.attn.W_O", 0.1)
    for one in (first, second):
        one.set_use_split_qkv_input(True)
    result = graphlens.drift(first, second, prompts[0], verbose=False)
    assert result.worst(1)[0].hook == "blocks.1.hook_attn_out"


def test_an_error_in_a_run_ends_all_of_them(prompts: tuple[Array, Array]) -> None:
    first, second = opened(), opened()

    def fail(x: Array, hook: Any) -> Array:
        raise ZeroDivisionError("planted")

    before = threading.active_count()
    with second.hooks(fwd_hooks=[("blocks.2.attn.hook_z", fail)]), pytest.raises(ZeroDivisionError, match="planted"):
        graphlens.drift(first, second, prompts[0], verbose=False)
    with first.hooks(fwd_hooks=[("blocks.2.attn.hook_z", lambda x, hook: x[:1])]), pytest.raises(HookResultError):
        graphlens.drift(first, second, prompts[0], verbose=False)
    assert threading.active_count() == before
    assert graphlens.drift(first, second, prompts[0], verbose=False).logits == 0


class Narrower(Side[Any]):
    """A side whose MLP of block 1 gives one number less."""

    def run(self, passing: Any, at: Any, read: str = "") -> Any:
        def cut(name: str, x: Array) -> Array:
            if name != "blocks.1.hook_mlp_out":
                return np.asarray(passing(name, x))
            passing(name, x[..., :-1])
            return x

        return super().run(cut, at, read)


def test_an_activation_of_another_shape_is_an_error_in_a_sentence(prompts: tuple[Array, Array]) -> None:
    one, other = opened().runner, opened().runner
    first, second = requests(one, other, prompts[0], {})
    comparison = Comparison(Narrower(one, first), Side(other, second), keep=False)
    with (
        pytest.raises(InputError, match=r"blocks.1.hook_mlp_out' has shape \[3, 9, 127\] in the reference"),
        steps("", 1) as progress,
    ):
        comparison.run(progress)


def test_a_run_that_nobody_waits_for_ends() -> None:
    seen: list[str] = []

    def run(passing: Any) -> int:
        for name in "abc":
            passing(name, np.zeros(1))
        return 7

    def at(firing: tuple[str, int], x: Array) -> Array:
        seen.append(firing[0])
        return x

    stepped = SteppedRun(run, at, lambda firing: firing[0] == "b", Company())
    stepped.advance()
    assert (seen, stepped.done) == (["a"], False)
    stepped.close()
    assert (seen, stepped.result) == (["a"], None)
    whole = SteppedRun(run, at, lambda firing: False, Company())
    whole.advance()
    assert (whole.done, whole.result) == (True, 7)


# Figures of arrays


def test_figures_of_what_is_large_zero_or_no_number() -> None:
    x = np.asarray([[3.0, 4.0]], np.float32)
    assert apart(x, x * 2).relative == pytest.approx(1)
    assert apart(x, -x).cosine == pytest.approx(-1)
    assert apart(x * 0, x).relative == math.inf
    assert apart(x * 0, x * 0).relative == 0
    assert apart(x, np.asarray([[3.0, np.nan]], np.float32)).relative == math.inf
    huge = np.asarray([[-3.4e38, 1.0]], np.float32)
    assert apart(x, huge).relative == pytest.approx(3.4e38 / 5, rel=1e-6)
    assert apart(x, huge, np.asarray([[False, True]])).relative == pytest.approx(3 / 4)
    ids = np.asarray([[1, 2], [3, 4]])
    assert apart(ids, np.asarray([[1, 5], [3, 4]])).relative == 0.25
    assert signal_to_noise(0.1) == pytest.approx(20)


def test_a_graphlens_error_names_the_missing_package(monkeypatch: pytest.MonkeyPatch, prompts: Any) -> None:
    from graphlens.runtime import operators

    def missing() -> str:
        raise graphlens.RuntimeUnavailable("Python hooks need onnxruntime-extensions.")

    monkeypatch.setattr("graphlens.engine.engine.callback_library", missing)
    assert operators.callback_library is not missing
    first = with_weight(opened(), "blocks.0.attn.W_O", 0.123)
    with pytest.raises(GraphlensError, match="onnxruntime-extensions"):
        graphlens.drift(first, first, prompts[0], verbose=False)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there are no timers here")
def test_a_ctrl_c_at_any_moment_ends_a_drift_and_leaves_nothing(
    pair: tuple[Model, Model], prompts: tuple[Array, Array]
) -> None:
    def run() -> dict[str, object]:
        return graphlens.drift(*pair, prompts[0], verbose=False).to_dict()

    started = time.perf_counter()
    expected = run()
    lasts, before, interrupted = time.perf_counter() - started, threading.active_count(), 0
    earlier = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for share in np.random.default_rng(6).uniform(0.02, 0.9, 20):
            signal.setitimer(signal.ITIMER_REAL, float(share) * lasts)
            try:
                while True:  # a quick run may have ended before
                    run()
            except KeyboardInterrupt:
                interrupted += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)
    until = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < until:
        time.sleep(0.01)
    assert (interrupted, threading.active_count()) == (20, before), threading.enumerate()
    assert run() == expected
    assert all(model.runner.active().plain for model in pair)
