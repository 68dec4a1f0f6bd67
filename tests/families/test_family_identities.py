"""Identities hold at every hook point of every family's own export, with padding and whatever is known of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from graphlens import HookedEncoder, HookedTransformer, Scale, drift
from graphlens.analysis.identities import Facts, failing, identities, unchecked
from tests.families.encoders import ENCODERS, PAD, TYPES
from tests.families.encoders import hooked_of as encoder_of
from tests.families.variants import CHOSEN, VARIANTS

# What no identity speaks of: the scales of norms whose input shows nowhere (after a sublayer, in an embedding's end), where eps
# is next to nothing; queries and keys that are normalised and then clipped; what chooses experts.
UNTOLD = ("_post.hook_scale", "ln1.hook_scale", "ln2.hook_scale", "embed.ln.hook_scale", "mlm_head.ln.hook_scale")
EXPERTS = ("mlp.hook_expert_weights", "mlp.hook_expert_indices")


def facts_of(name: str, model: HookedTransformer) -> Facts:
    """What the manifest says, and the bound of OLMo's queries, keys and values, which it does not."""
    facts = Facts.of(dataclasses.asdict(model.runner.config))
    return dataclasses.replace(facts, clip=VARIANTS[name].arguments.get("clip_qkv"))


@pytest.mark.parametrize("name", CHOSEN)
def test_identities_hold_with_padding(name: str, family_model: Callable[[str], HookedTransformer]) -> None:
    model = family_model(name)
    rng = np.random.default_rng(2)
    tokens, mask = rng.integers(0, model.cfg.d_vocab, (3, 11)), np.ones((3, 11), np.int64)
    mask[1, :4] = mask[2, 8:] = 0
    logits, cache = model.run_with_cache(tokens, attention_mask=mask)
    values = dict(cache.items())
    for facts in (facts_of(name, model), dataclasses.replace(facts_of(name, model), eps=None, act_fn=None, scale=None)):
        found = identities(values, facts, mask=mask, logits=logits)
        assert max(identity.residual for identity in found) <= 5e-6
        assert failing(found, values) == {}
        told = [hook for hook in unchecked(found, values) if not hook.endswith((*UNTOLD, *EXPERTS))]
        assert told == []


@pytest.mark.parametrize("name", CHOSEN)
def test_the_same_hook_point_of_another_block_is_flagged(
    name: str, family_model: Callable[[str], HookedTransformer]
) -> None:
    model = family_model(name)
    tokens = np.random.default_rng(2).integers(0, model.cfg.d_vocab, (2, 12))
    logits, cache = model.run_with_cache(tokens)
    values, facts = dict(cache.items()), facts_of(name, model)
    silent = set(unchecked(identities(values, facts, logits=logits), values))
    for hook in values:
        other = hook.replace("blocks.1.", "blocks.0.")
        if hook != other and other in values and hook not in silent and not hook.endswith(UNTOLD):
            found = identities({**values, hook: values[other]}, facts, logits=logits)
            assert hook in failing(found, values), hook


@pytest.mark.parametrize("name", ENCODERS)
def test_identities_of_encoders_hold_with_padding(name: str, families_root: Path) -> None:
    model = HookedEncoder.from_onnx(encoder_of(name, families_root), "cpu")
    rng = np.random.default_rng(2)
    tokens, mask = rng.integers(5, model.cfg.d_vocab, (3, 11)), np.ones((3, 11), np.int64)
    mask[1, 7:] = mask[2, 9:] = 0
    tokens[mask == 0] = PAD[name]
    types = rng.integers(0, TYPES, tokens.shape)
    logits, cache = model.run_with_cache(tokens, one_zero_attention_mask=mask, token_type_ids=types)
    values = dict(cache.items())
    facts = Facts.of(dataclasses.asdict(model.runner.config), "encoder")
    found = identities(values, facts, mask=mask, logits=logits)
    assert max(identity.residual for identity in found) <= 5e-6
    assert failing(found, values) == {}
    assert unchecked(found, values) == ["mlm_head.ln.hook_scale"]
    # Two encoders of one file do not drift, and text's mask and types reach both.
    result = drift(model, model, tokens, one_zero_attention_mask=mask, token_type_ids=types, verbose=False)
    assert max(site.fresh for site in result.sites) == 0


@pytest.mark.parametrize("name", CHOSEN)
def test_a_damaged_matrix_is_where_drift_sees_it(name: str, family_model: Callable[[str], HookedTransformer]) -> None:
    first, second = family_model(name), family_model(name)
    weight = np.array(second.weights["blocks.1.attn.W_O"])
    noise = np.random.default_rng(0).normal(0, 0.2 * weight.std(), weight.shape)
    second.set_weights({"blocks.1.attn.W_O": weight + noise})
    tokens, mask = np.random.default_rng(3).integers(0, first.cfg.d_vocab, (2, 9)), np.ones((2, 9), np.int64)
    mask[1, :3] = 0
    result = drift(first, second, tokens, attention_mask=mask, patch=True, top=3, verbose=False)
    after = [site.hook for site in result.sites if site.fresh > 1e-5]
    assert all(
        hook.startswith(("blocks.1.ln1", "blocks.1.hook_attn_out")) for hook in after
    )  # OLMo 2 normalises it first
    assert after
    assert result.worst(1)[0].recovered == pytest.approx(1, abs=1e-3)
    assert result.notes == ()


def test_patches_of_an_encoder_are_whole_runs(families_root: Path) -> None:
    model = HookedEncoder.from_onnx(encoder_of("bert", families_root), "cpu")
    other = HookedEncoder.from_onnx(encoder_of("bert", families_root), "cpu")
    tokens = np.random.default_rng(2).integers(5, model.cfg.d_vocab, (2, 8))
    with other.intervene(Scale("blocks.1.hook_mlp_out", 1.2)):
        result = drift(model, other, tokens, patch=True, verbose=False)
    assert result.worst(1)[0].hook == "blocks.1.hook_mlp_out"
    assert result.worst(1)[0].recovered == pytest.approx(1, abs=1e-5)
    assert result.notes == ()
