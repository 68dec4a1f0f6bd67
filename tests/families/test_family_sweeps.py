"""Sweeps of every family: each equals one whole run for each patch, at every kind of hook point."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from graphlens import HookedTransformer, InputError
from graphlens.errors import UnknownHookPoint
from graphlens.experiments.stages import STAGES
from graphlens.file.names import split_name
from graphlens.metrics import CrossEntropy, KLDivergence, LogitDiff
from graphlens.patching import Site, act_patch_sites, get_act_patch_attn_head_all_pos_every, sweep
from tests.families.variants import CHOSEN
from tests.intervention_specs import fields_of, patch_of, reference, shape_of

CLEAN, CORRUPTED = (np.random.default_rng(seed).integers(0, 101, (3, 9)) for seed in (1, 2))
LEFT, RIGHT = np.ones((3, 9), int), np.ones((3, 9), int)
LEFT[0, :3] = LEFT[2, :1] = 0
RIGHT[1, 6:] = 0
MASKS = {"whole": {}, "left-padded": {"attention_mask": LEFT}, "right-padded": {"attention_mask": RIGHT}}
METRICS: dict[str, Any] = {
    "difference": LogitDiff([7, 50, 3], [60, 8, 9], position=[-1, 5, 7], reduction="none"),
    "loss": CrossEntropy(CORRUPTED, position=None, reduction="none"),
    "KL": KLDivergence(np.random.default_rng(0).standard_normal((3, 101)), position=5, reduction="none"),
}


@pytest.fixture(scope="module", params=CHOSEN)
def model(request: pytest.FixtureRequest, family_model: Callable[[str], HookedTransformer]) -> HookedTransformer:
    found = family_model(request.param)
    found.runner.engine.max_sessions = 48
    with contextlib.suppress(InputError):  # refused where it cannot be had
        found.set_use_attn_result(True)
    return found


def kinds(model: HookedTransformer) -> list[str]:
    """The hook points of a model without their blocks, in firing order."""
    return list(dict.fromkeys(split_name(name)[1] for name in model.runner.names()))


def places(model: HookedTransformer, tail: str) -> list[Site]:
    """Sites at one kind of hook point: whole and in part, early and late, in the first block and the last."""
    found = []
    for layer in range(0, model.cfg.n_layers, 2):
        hook = f"blocks.{layer}.{tail}"
        if hook not in model.runner.names():
            continue
        axes, sizes = shape_of(model, hook, 3, 9)
        fields = fields_of(axes)
        head = {"head": -1} if "heads" in fields else {}
        few = {"dims": [0, 2, sizes[-1] - 1]} if "dims" in fields else {}
        found += [
            Site(hook),
            Site(hook, position=[1, 4], **head),
            Site(hook, position=slice(3, None), **few),
            Site(hook, position=-1, **head),
        ]
    if tail in model.runner.names():
        found += [Site(tail), Site(tail, position=2), Site(tail, position=[5, -1])]
    return found


def by_whole_runs(model: HookedTransformer, sites: Sequence[Site], cache: Any, **options: Any) -> dict[str, Any]:
    """Each metric of a run with a Python hook for each site, [site, b]."""
    rows = []
    for site in sites:
        axes, _ = shape_of(model, site.hook, 3, 9)
        item = patch_of(site, cache[site.hook], axes)

        def edit(activation: Any, hook: Any, item: Any = item, axes: Any = axes) -> Any:
            return reference(item, activation, axes, scores="scores" in hook.name)

        logits = model.run_with_hooks(CORRUPTED, fwd_hooks=[(site.hook, edit)], **options)
        rows.append([metric.masked(options.get("attention_mask"))(logits) for metric in METRICS.values()])
    return dict(zip(METRICS, map(np.stack, zip(*rows, strict=True)), strict=True))


@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS)
def test_a_sweep_is_a_loop_of_whole_runs(options: dict[str, Any], model: HookedTransformer) -> None:
    _, cache = model.run_with_cache(CLEAN, **options)
    for tail in kinds(model):
        if tail not in STAGES:
            continue
        sites = places(model, tail)
        values = dict(cache)
        if tail == "hook_pos_embed":  # the same in every run: so another order of it
            values[tail] = cache[tail][:, ::-1]
        expected = by_whole_runs(model, sites, values, **options)
        assert expected["loss"].std() > 1e-3, f"patching {tail} changes nothing, so this tests nothing"
        for given, tokens in ((METRICS, 24), (METRICS, 4096), ({"difference": METRICS["difference"]}, 64)):
            result = sweep(model, CORRUPTED, sites, values, given, max_batch_tokens=tokens, verbose=False, **options)
            for name in given:
                apart = np.abs(result.sel(metric=name).values - expected[name]).max()
                assert apart <= 1e-5 * np.abs(expected[name]).max(), (tail, name, tokens)
            if "general_path" in result.metadata:  # a norm or a factor comes after the sum over heads
                if model.cfg.residual_norms:
                    assert "normalises its residual stream after each sublayer" in result.metadata["general_path"]
                    continue
                assert tail == "attn.hook_result", result.metadata
                assert "hook_attn_out is not the sum of attn.hook_result" in result.metadata["general_path"]


@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS)
def test_a_run_patched_from_itself_is_itself(options: dict[str, Any], model: HookedTransformer) -> None:
    _, cache = model.run_with_cache(CORRUPTED, **options)
    sites = [site for tail in kinds(model) if tail in STAGES for site in places(model, tail)]
    result = sweep(model, CORRUPTED, sites, cache, METRICS, verbose=False, **options)
    for name in METRICS:
        found = result.sel(metric=name)
        np.testing.assert_array_equal(found.values, np.stack([found.baselines["corrupted"]] * len(sites)))


def test_where_there_is_no_shortcut(model: HookedTransformer) -> None:
    """Norms and what comes after the blocks take whole runs, and the result says so."""
    _, cache = model.run_with_cache(CLEAN)
    for tail in kinds(model):
        if tail in STAGES:
            continue
        name = f"blocks.1.{tail}" if f"blocks.1.{tail}" in cache else tail
        if not np.issubdtype(cache[name].dtype, np.floating):
            continue  # numbers of experts
        result = sweep(model, CORRUPTED, [Site(name)], cache, METRICS, verbose=False)
        logits = model.run_with_hooks(CORRUPTED, fwd_hooks=[(name, lambda activation, hook: cache[hook.name])])
        for metric, measure in METRICS.items():
            expected = measure(logits)
            apart = np.abs(result.sel(metric=metric).values[0] - expected).max()
            assert apart <= 1e-5 * np.abs(expected).max(), (name, metric)
        said = "normalises its residual stream" if model.cfg.residual_norms else tail
        assert said in result.metadata["general_path"]


def test_heads_of_keys_and_values_are_as_many_as_there_are(model: HookedTransformer) -> None:
    cfg, (_, cache) = model.cfg, model.run_with_cache(CLEAN)
    for letter in "qkv":
        sites = act_patch_sites(model, CORRUPTED, f"attn_head_{letter}_all_pos")
        assert sites.shape == (cfg.n_layers, cfg.n_heads if letter == "q" else cfg.n_key_value_heads)
        result = sweep(model, CORRUPTED, sites, cache, METRICS["difference"], verbose=False)
        expected = by_whole_runs(model, sites.sites[-2:], cache)["difference"]
        assert np.abs(result.values.reshape(-1, 3)[-2:] - expected).max() <= 1e-5 * np.abs(expected).max()
    if cfg.n_heads != cfg.n_key_value_heads:
        with pytest.raises(InputError, match=r"of keys and values.*get_act_patch_attn_head_k_all_pos"):
            get_act_patch_attn_head_all_pos_every(model, CORRUPTED, cache, METRICS["difference"])


def test_what_a_model_lacks_is_refused_by_name(model: HookedTransformer) -> None:
    names = model.runner.names()
    lacking = {
        "hook_resid_mid": "hook_resid_post has the sum",
        "attn.hook_rot_q": "attn.hook_q",
        "mlp.hook_pre_linear": "mlp.hook_expert_weights" if model.cfg.num_experts else "mlp.hook_post",
    }
    for tail, said in lacking.items():
        if f"blocks.1.{tail}" not in names:
            with pytest.raises(UnknownHookPoint, match=f"blocks.1.{tail}' is not a hook point of this model.*{said}"):
                sweep(model, CORRUPTED, Site(f"blocks.1.{tail}"), "zero", METRICS["difference"], verbose=False)
