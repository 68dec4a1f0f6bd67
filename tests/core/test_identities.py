"""Identities of activations: they hold in real runs, and no activation in the place of another gets by."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import graphlens
from graphlens import HookedTransformer
from graphlens.analysis.identities import Facts, Identity, failing, identities, unchecked, worst
from graphlens.errors import InputError
from tests.quantised_runs import statically, without_rounding

Array = npt.NDArray[Any]
Values = dict[str, Array]
NAMES = ("tiny-gpt2", "tiny-llama")
# The same as quantize_static writes them, without the rounding of activations: nothing more is allowed there.
QUANTISED = tuple(f"{name} {form}" for name in NAMES for form in ("QDQ", "QOperator"))
# hook -> the hook whose activation takes its place, in block 1 where it is not written out: the mistakes of a matcher.
SWAPS: Mapping[str, str] = {
    "attn.hook_q": "attn.hook_k",
    "attn.hook_k": "attn.hook_q",
    "attn.hook_v": "attn.hook_z",
    "attn.hook_z": "attn.hook_v",
    "attn.hook_attn_scores": "attn.hook_pattern",
    "attn.hook_pattern": "attn.hook_attn_scores",
    "hook_resid_pre": "hook_resid_mid",
    "hook_resid_mid": "hook_resid_post",
    "hook_resid_post": "hook_resid_mid",
    "hook_attn_out": "hook_mlp_out",
    "hook_mlp_out": "hook_attn_out",
    "ln1.hook_scale": "ln2.hook_scale",
    "ln2.hook_scale": "ln1.hook_scale",
    "ln1.hook_normalized": "ln2.hook_normalized",
    "ln2.hook_normalized": "hook_resid_mid",
    "mlp.hook_pre": "mlp.hook_post",
    "mlp.hook_post": "mlp.hook_pre",
}
GATED: Mapping[str, str] = {
    "mlp.hook_pre": "mlp.hook_pre_linear",
    "mlp.hook_pre_linear": "mlp.hook_pre",
    "attn.hook_rot_q": "attn.hook_q",
    "attn.hook_q": "attn.hook_rot_q",
    "attn.hook_rot_k": "attn.hook_k",
    "attn.hook_k": "attn.hook_rot_k",
}


@dataclasses.dataclass
class Run:
    """One run of a model: its activations, logits, mask and facts."""

    values: Values
    logits: Array
    mask: Array
    facts: Facts

    def check(self, **changes: Array) -> list[Identity]:
        """The identities with some activations in the place of others, by hook point."""
        return identities({**self.values, **changes}, self.facts, mask=self.mask, logits=self.logits)


def run_of(name: str) -> Run:
    model = HookedTransformer.from_onnx(graphlens.embedded_model(name), "cpu")
    rng = np.random.default_rng(3)
    tokens, mask = rng.integers(0, model.cfg.d_vocab, (3, 11)), np.ones((3, 11), np.int64)
    mask[1, :4] = mask[2, 8:] = 0
    logits, cache = model.run_with_cache(tokens, attention_mask=mask)
    return Run(dict(cache.items()), logits, mask, Facts.of(dataclasses.asdict(model.runner.config)))


def quantised_run_of(name: str, form: str, folder: Path) -> Run:
    values, logits, mask, found = without_rounding(statically(name, folder, form), name)
    assert found.kind == "decoder"
    return Run(values, logits, mask, Facts.of(found.config))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    made = {name: run_of(name) for name in NAMES}
    for each in QUANTISED:
        made[each] = quantised_run_of(*each.split(), tmp_path_factory.mktemp("quantised"))
    return made


@pytest.mark.parametrize("name", [*NAMES, *QUANTISED])
def test_identities_hold_in_a_real_run_with_padding(runs: dict[str, Run], name: str) -> None:
    run = runs[name]
    found = run.check()
    assert max(identity.residual for identity in found) <= 4e-6
    assert failing(found, run.values) == {}
    assert unchecked(found, run.values) == []


@pytest.mark.parametrize("name", NAMES)
def test_nothing_need_be_known_of_the_model(runs: dict[str, Run], name: str) -> None:
    run = runs[name]
    found = identities(run.values, Facts(run.facts.n_layers), mask=run.mask, logits=run.logits)
    assert max(identity.residual for identity in found) <= 4e-6
    assert len(found) == len(run.check())
    act = {"tiny-gpt2": "gelu_new(pre) = post", "tiny-llama": "silu(pre) x pre_linear = post"}[name]
    assert act in {identity.name for identity in found}


def swapped() -> list[tuple[str, str, str]]:
    """Model, hook point, and the one whose activation takes its place."""
    found = []
    for name in (*NAMES, *QUANTISED):
        swaps = [*SWAPS.items(), *(GATED.items() if "llama" in name else ())]
        found += [(name, f"blocks.1.{hook}", f"blocks.1.{other}") for hook, other in swaps]
        found += [(name, f"blocks.2.{hook}", f"blocks.1.{hook}") for hook in SWAPS]
        found += [(name, "ln_final.hook_normalized", "blocks.3.ln2.hook_normalized")]
        found += [(name, "unembed.hook_in", "blocks.3.hook_resid_post")]
        if "gpt2" in name:
            found += [(name, "hook_pos_embed", "hook_embed"), (name, "hook_embed", "blocks.0.hook_resid_pre")]
    return found


@pytest.mark.parametrize(("name", "hook", "other"), swapped())
def test_an_activation_in_the_place_of_another_is_flagged(
    runs: dict[str, Run], name: str, hook: str, other: str
) -> None:
    run = runs[name]
    if hook not in run.values or other not in run.values:
        pytest.fail(f"{name} has no {hook} or no {other}")
    assert hook in failing(run.check(**{hook: run.values[other]}), run.values)


def test_there_are_forty_such_mistakes_at_least() -> None:
    for name in (*NAMES, *QUANTISED):
        assert len([one for one in swapped() if one[0] == name]) >= 35
    assert len(swapped()) >= 200


@pytest.mark.parametrize("name", [*NAMES, *QUANTISED])
@pytest.mark.parametrize("role", ["attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z"])
def test_heads_in_another_order_are_flagged(runs: dict[str, Run], name: str, role: str) -> None:
    run, hook = runs[name], f"blocks.1.{role}"
    assert hook in failing(run.check(**{hook: run.values[hook][:, :, ::-1]}), run.values)


@pytest.mark.parametrize("role", ["attn.hook_attn_scores", "attn.hook_pattern"])
def test_heads_of_the_scores_in_another_order_are_flagged(runs: dict[str, Run], role: str) -> None:
    run, hook = runs["tiny-gpt2"], f"blocks.1.{role}"
    assert hook in failing(run.check(**{hook: run.values[hook][:, ::-1]}), run.values)


@pytest.mark.parametrize("name", [*NAMES, *QUANTISED])
def test_two_blocks_in_each_others_place_are_flagged(runs: dict[str, Run], name: str) -> None:
    run = runs[name]
    exchanged = {}
    for hook in run.values:
        for here, there in (("1", "2"), ("2", "1")):
            if hook.startswith(f"blocks.{here}."):
                exchanged[hook] = run.values[hook.replace(f"blocks.{here}", f"blocks.{there}", 1)]
    failed = failing(run.check(**exchanged), run.values)
    assert exchanged.keys() <= failed.keys()


def test_a_copy_of_the_wrong_input_of_a_norm_is_flagged(runs: dict[str, Run]) -> None:
    # Any multiple of a norm's input gives the same normalized activation: its own result among them.
    run = runs["tiny-gpt2"]
    hook = "blocks.1.hook_resid_mid"
    assert hook in failing(run.check(**{hook: run.values["blocks.1.ln2.hook_normalized"]}), run.values)


def test_one_wrong_hook_point_leaves_its_neighbours_their_names(runs: dict[str, Run]) -> None:
    run = runs["tiny-gpt2"]
    cases = {
        "blocks.1.hook_attn_out": run.values["blocks.0.hook_attn_out"],
        "blocks.1.hook_mlp_out": run.values["blocks.0.hook_mlp_out"],
        "blocks.1.hook_resid_post": run.values["blocks.1.hook_resid_mid"],
        "blocks.1.attn.hook_pattern": run.values["blocks.0.attn.hook_pattern"],
        "blocks.1.attn.hook_attn_scores": run.values["blocks.0.attn.hook_attn_scores"],
        "blocks.1.ln1.hook_scale": run.values["blocks.0.ln1.hook_scale"],
        "blocks.1.ln1.hook_normalized": run.values["blocks.0.ln1.hook_normalized"],
    }
    for hook, wrong in cases.items():
        assert list(failing(run.check(**{hook: wrong}), run.values)) == [hook]


def test_a_reason_says_which_identity_fails(runs: dict[str, Run]) -> None:
    run = runs["tiny-gpt2"]
    reasons = failing(run.check(**{"blocks.1.attn.hook_z": run.values["blocks.0.attn.hook_z"]}), run.values)
    assert "pattern . v = z in block 1" in reasons["blocks.1.attn.hook_z"]


# The rule of blame, on identities made up


def made(hooks: str, holds: bool, clears: str | None = None) -> Identity:
    return Identity(
        f"of {hooks}", None, tuple(hooks), 0.0 if holds else 1.0, 1e-5, tuple(hooks if clears is None else clears)
    )


def test_what_another_identity_clears_does_not_fail() -> None:
    assert set(failing([made("abc", False), made("ad", True), made("be", True)])) == {"c"}


def test_an_identity_that_proves_nothing_clears_nothing() -> None:
    assert set(failing([made("ab", False), made("ac", True, clears="")])) == {"a", "b", "c"}


def test_what_a_wrong_hook_point_alone_proves_fails_with_it() -> None:
    assert set(failing([made("ab", False), made("bc", True, clears="c"), made("ad", True)])) == {"b", "c"}


def test_identities_that_contradict_each_other_take_down_their_blocks() -> None:
    def at(layer: int, name: str) -> str:
        return f"blocks.{layer}.{name}"

    border = Identity("post = next pre", 0, (at(0, "x"), at(1, "x")), 1.0, 1e-5, (at(0, "x"), at(1, "x")))
    inner = [Identity("in", n, (at(n, "x"), at(n, "y")), 0.0, 1e-5, (at(n, "x"), at(n, "y"))) for n in range(3)]
    assert set(failing([border, *inner])) == {at(n, name) for n in (0, 1) for name in "xy"}


def test_a_contradiction_fails_what_the_identity_could_clear() -> None:
    others = [made("ax", True), made("by", True)]
    assert set(failing([made("ab", False, clears="b"), *others])) == {"b", "y"}
    assert set(failing([made("ab", False, clears=""), *others])) == {"a", "b", "x", "y"}
    assert set(failing([made("a", False), *others])) == {"a", "x"}


def test_the_worst_of_several_runs_counts(runs: dict[str, Run]) -> None:
    run = runs["tiny-gpt2"]
    good, bad = run.check(), run.check(**{"blocks.1.attn.hook_z": run.values["blocks.0.attn.hook_z"]})
    assert failing(worst([good, bad]), run.values) == failing(bad, run.values)
    assert failing(worst([good, good])) == {}


# What is left out, and what is allowed


def test_padding_may_hold_anything(runs: dict[str, Run]) -> None:
    run, changes = runs["tiny-llama"], {}
    for hook, value in run.values.items():
        if value.ndim >= 3 and value.shape[:2] == run.mask.shape:
            changes[hook] = np.where((run.mask == 0).reshape(*run.mask.shape, *[1] * (value.ndim - 2)), np.nan, value)
    found = identities({**run.values, **changes}, run.facts, mask=run.mask)
    assert failing(found) == {}


def test_what_is_no_number_fails(runs: dict[str, Run]) -> None:
    run, hook = runs["tiny-gpt2"], "blocks.1.hook_attn_out"
    value = run.values[hook].copy()
    value[0, 3, 5] = np.nan
    found = {identity.name: identity for identity in run.check(**{hook: value}) if identity.layer == 1}
    assert found["pre + attn = mid"].residual == math.inf


@pytest.mark.parametrize("masked", [-3.4e38, -1e9, -1e4])
def test_masked_scores_are_any_large_negative_number(runs: dict[str, Run], masked: float) -> None:
    run = runs["tiny-gpt2"]
    changes = {
        hook: np.where(np.isneginf(value), np.float32(masked), value)
        for hook, value in run.values.items()
        if hook.endswith("attn_scores")
    }
    assert failing(run.check(**changes), run.values) == {}


@pytest.mark.parametrize("name", NAMES)
def test_a_run_with_earlier_tokens_needs_their_keys_and_values(name: str) -> None:
    model = HookedTransformer.from_onnx(graphlens.embedded_model(name), "cpu")
    facts = Facts.of(dataclasses.asdict(model.runner.config))
    tokens = np.random.default_rng(4).integers(0, model.cfg.d_vocab, (2, 13))
    mask = np.ones((2, 13), np.int64)
    mask[1, :2] = 0
    cut = 5
    past_cache = graphlens.KeyValueCache.init_cache(model.cfg, batch_size=2)
    model(tokens[:, :cut], past_kv_cache=past_cache, attention_mask=mask[:, :cut])
    kept = {
        layer: (np.array(entry.past_keys), np.array(entry.past_values))
        for layer, entry in enumerate(past_cache.entries)
    }
    logits, cache = model.run_with_cache(tokens[:, cut:], past_kv_cache=past_cache, attention_mask=mask[:, cut:])
    values = dict(cache.items())
    assert values["blocks.0.attn.hook_pattern"].shape[2:] == (13 - cut, 13)
    found = identities(values, facts, mask=mask, past=kept, logits=logits)
    assert failing(found, values) == {}
    assert unchecked(found, values) == []
    without = identities(values, facts, mask=mask, logits=logits)
    assert failing(without, values) == {}
    assert "blocks.0.attn.hook_v" in unchecked(without, values)


def test_half_precision_has_a_tolerance_of_its_own(runs: dict[str, Run]) -> None:
    run = runs["tiny-gpt2"]
    half = {hook: value.astype(np.float16) for hook, value in run.values.items()}
    found = identities(half, run.facts, mask=run.mask)
    assert failing(found, half) == {}
    assert {identity.allowed for identity in found} == {8 * float(np.finfo(np.float16).eps)}
    hook = "blocks.1.hook_attn_out"
    assert hook in failing(identities({**half, hook: half["blocks.0.hook_attn_out"]}, run.facts, mask=run.mask))


def test_a_sink_takes_part_of_each_row(runs: dict[str, Run]) -> None:
    run = runs["tiny-gpt2"]
    scores = run.values["blocks.0.attn.hook_attn_scores"].astype(np.float64)
    e = np.exp(np.where(np.isfinite(scores), scores, -np.inf))
    pattern = (e / (e.sum(-1, keepdims=True) + 1.5)).astype(np.float32)
    some = {"blocks.0.attn.hook_attn_scores": scores.astype(np.float32), "blocks.0.attn.hook_pattern": pattern}
    assert failing(identities(some, Facts(1), mask=run.mask))
    found = identities(some, Facts(1, sink=True), mask=run.mask)
    assert found
    assert not failing(found)


def test_a_soft_cap_is_undone(runs: dict[str, Run]) -> None:
    run, hook = runs["tiny-gpt2"], "blocks.0.attn.hook_attn_scores"
    scores, cap = run.values[hook], 3.0
    capped = np.where(np.isneginf(scores), scores, cap * np.tanh(scores.astype(np.float64) / cap)).astype(np.float32)
    some = {
        name: run.values[f"blocks.0.attn.hook_{name[-1]}"] for name in ("blocks.0.attn.hook_q", "blocks.0.attn.hook_k")
    }
    some[hook] = capped
    assert failing(identities(some, Facts(1), mask=run.mask))
    found = identities(some, Facts(1, softcap=cap), mask=run.mask)
    assert found
    assert not failing(found)


def test_a_bias_of_positions_is_the_same_in_all_prompts(runs: dict[str, Run]) -> None:
    run, hook = runs["tiny-gpt2"], "blocks.0.attn.hook_attn_scores"
    scores = run.values[hook]
    bias = np.random.default_rng(0).normal(0, 2, scores.shape[1:]).astype(np.float32)
    names = ("blocks.0.attn.hook_q", "blocks.0.attn.hook_k")
    some = {**{name: run.values[name] for name in names}, hook: scores + bias}
    assert failing(identities(some, Facts(1), mask=run.mask))
    facts = Facts(1, biased=True)
    found = identities(some, facts, mask=run.mask)
    assert [identity.name for identity in found] == ["c q . k + bias = scores"]
    assert not failing(found)
    for name in names:
        wrong = identities({**some, name: run.values[name.replace("blocks.0", "blocks.1")]}, facts, mask=run.mask)
        assert name in failing(wrong)
    one = {name: value[:1] for name, value in some.items()}
    assert identities(one, facts, mask=run.mask[:1]) == []


def test_a_rotation_that_scales_has_one_factor_for_the_file(runs: dict[str, Run]) -> None:
    run = runs["tiny-llama"]
    longer = {hook: value * np.float32(1.2) for hook, value in run.values.items() if "hook_rot_" in hook}
    some = {**{hook: value for hook, value in run.values.items() if hook.endswith(("hook_q", "hook_k"))}, **longer}
    assert not failing(identities(some, run.facts, mask=run.mask))
    some["blocks.1.attn.hook_rot_q"] = run.values["blocks.1.attn.hook_rot_q"]
    assert "blocks.1.attn.hook_rot_q" in failing(identities(some, run.facts, mask=run.mask))


def test_activations_of_another_shape_fail(runs: dict[str, Run]) -> None:
    run, hook = runs["tiny-gpt2"], "blocks.1.hook_mlp_out"
    assert hook in failing(run.check(**{hook: run.values[hook][..., :-1]}), run.values)


def test_facts_need_the_number_of_blocks() -> None:
    with pytest.raises(InputError, match="n_layers"):
        Facts.of({"d_model": 40})
