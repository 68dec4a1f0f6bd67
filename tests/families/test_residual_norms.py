"""OPT-350m: norms of the residual stream itself and narrow embeddings. What its torch hooks show is in the matrix."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import graphlens
from graphlens import HookedTransformer, InputError, attribution, surgery
from graphlens.errors import ExportError, UnknownHookPoint
from graphlens.file.names import in_block
from graphlens.metrics import LogitDiff
from graphlens.patching import path_patch
from tests.families.comparing import TOLERANCE, prompt, relative

TOKENS = prompt(101, 2, 9)
EFFECT = LogitDiff(7, 60)
NAME = "opt-350m"


@pytest.fixture(scope="module")
def model(family_model: Callable[[str], HookedTransformer]) -> HookedTransformer:
    return family_model(NAME)


def test_a_block_is_two_sums_and_two_norms_of_them(model: HookedTransformer, family_reference: Any) -> None:
    _, cache = model.run_with_cache(TOKENS)
    theirs = family_reference(NAME)
    hidden = theirs(torch.from_numpy(TOKENS), output_hidden_states=True).hidden_states
    assert relative(cache["hook_embed"] + cache["hook_pos_embed"], cache["resid_pre", 0], "embeddings") <= TOLERANCE
    for layer, block in enumerate(theirs.model.decoder.layers):
        assert relative(cache["resid_pre", layer], hidden[layer].numpy(), "resid_pre") <= TOLERANCE
        middle, after = cache["resid_mid", layer], cache["resid_post", layer]
        assert relative(cache["resid_pre", layer] + cache["attn_out", layer], middle, "mid") <= TOLERANCE
        normal = block.self_attn_layer_norm(torch.from_numpy(np.array(middle))).numpy()
        assert relative(normal + cache["mlp_out", layer], after, "post") <= TOLERANCE
        assert relative(model.blocks[layer].ln1(np.array(middle)), normal, "ln1") <= TOLERANCE
        end = cache["normalized_resid_post", layer]
        assert relative(end, block.final_layer_norm(torch.from_numpy(np.array(after))).numpy(), "end") <= TOLERANCE
        following = cache["resid_pre", layer + 1] if layer + 1 < model.cfg.n_layers else cache["unembed.hook_in"]
        np.testing.assert_array_equal(end, following)


@pytest.mark.parametrize("name", [NAME, "opt-projected"])
def test_embedding_and_unembedding_are_products(
    name: str, family_model: Callable[[str], HookedTransformer], family_reference: Any
) -> None:
    opened, decoder = family_model(name), family_reference(name).model.decoder
    _, cache = opened.run_with_cache(TOKENS)
    expected = decoder.embed_tokens.weight @ decoder.project_in.weight.T
    assert relative(opened.W_E, expected.numpy(), "W_E") <= TOLERANCE
    assert relative(opened.embed(TOKENS), cache["hook_embed"], "embed") <= TOLERANCE
    assert (
        relative(opened.unembed(np.array(cache["unembed.hook_in"])), cache["unembed.hook_out"], "unembed") <= TOLERANCE
    )
    assert relative(opened.tokens_to_residual_directions(5), np.asarray(opened.W_U)[:, 5], "direction") <= 1e-6
    assert not opened.b_U.any()
    assert not opened.W_E.flags.writeable
    state = opened.state_dict()
    assert "embed.W_E" not in state
    opened.set_weights({"unembed.W_project": 2 * np.asarray(state["unembed.W_project"])})
    assert relative(opened(TOKENS), 2 * cache["unembed.hook_out"], "doubled") <= TOLERANCE
    assert (
        relative(opened.unembed(np.array(cache["unembed.hook_in"])), 2 * cache["unembed.hook_out"], "W_U") <= TOLERANCE
    )


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m, t, c: c.decompose_resid(), "decompose_resid is not for this model"),
        (lambda m, t, c: c.accumulated_resid(), "accumulated_resid is not for this model"),
        (lambda m, t, c: c.logit_attrs(c["resid_pre", 1], 3), "logit_attrs is not for this model"),
        (lambda m, t, c: c.logit_lens(), "logit_lens is not for this model"),
        (lambda m, t, c: c.get_full_resid_decomposition(), "get_full_resid_decomposition is not for this model"),
        (lambda m, t, c: c.apply_ln_to_stack(c["resid_pre", 1][None], 1), "apply_ln_to_stack is not for this model"),
        (lambda m, t, c: c.stack_head_results(apply_ln=True), "stack_head_results with apply_ln is not for this model"),
        (lambda m, t, c: m.accumulated_bias(1), "accumulated_bias is not for this model"),
        (lambda m, t, c: attribution.edge_attribution(m, t, c, EFFECT), "is not the sum of what its components write"),
        (lambda m, t, c: attribution.direct_logit_attribution(m, t, EFFECT), "is not for this model"),
        (
            lambda m, t, c: path_patch(m, t, c, EFFECT, verbose=False),
            "normalises its residual stream after each sublayer",
        ),
    ],
)
def test_what_needs_a_sum_is_refused(call: Callable[..., object], said: str, model: HookedTransformer) -> None:
    _, cache = model.run_with_cache(TOKENS)
    with pytest.raises(InputError, match=said):
        call(model, TOKENS, cache)


def test_there_is_no_final_norm(model: HookedTransformer) -> None:
    with pytest.raises(AttributeError, match="this model has no ln_final: each block ends with a norm"):
        _ = model.ln_final
    with pytest.raises(
        UnknownHookPoint, match=r"ln_final\.hook_scale' is not .*: no norm comes before unembed\.hook_in"
    ):
        model.run_with_cache(TOKENS, names_filter="ln_final.hook_scale")


def test_heads_and_neurons_sum_to_what_a_sublayer_adds(model: HookedTransformer) -> None:
    _, cache = model.run_with_cache(TOKENS)
    heads = cache.stack_head_results(2)[model.cfg.n_heads :].sum(0) + model.blocks[1].attn.b_O
    assert relative(heads, cache["attn_out", 1], "heads") <= TOLERANCE
    neurons = cache.get_neuron_results(1).sum(-2) + model.blocks[1].mlp.b_out
    assert relative(neurons, cache["mlp_out", 1], "neurons") <= TOLERANCE


def test_fewer_layers_are_transformers_first_ones(
    family_folder: Callable[[str], Path], family_reference: Any, tmp_path: Path
) -> None:
    surgery.save(surgery.first_layers(surgery.load(family_folder(NAME)), 2), tmp_path / "two")
    short, theirs = HookedTransformer.from_onnx(tmp_path / "two", "cpu"), family_reference(NAME)
    theirs.model.decoder.layers = theirs.model.decoder.layers[:2]
    logits, cache = short.run_with_cache(TOKENS)
    assert relative(logits, theirs(torch.from_numpy(TOKENS)).logits.numpy(), "logits") <= TOLERANCE
    np.testing.assert_array_equal(cache["unembed.hook_in"], cache["normalized_resid_post", 1])
    end = short.run_with_hooks(TOKENS, fwd_hooks=[("unembed.hook_in", lambda x, hook: x * 2)])
    assert relative(end, 2 * logits, "an edit of what is unembedded") <= TOLERANCE


def test_weights_are_not_processed_and_the_user_is_told(
    family_folder: Callable[[str], Path], family_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: Any
) -> None:
    with pytest.raises(
        ExportError, match=r"its weights are not processed.*fold_ln is left out: the norms of this arch"
    ):
        graphlens.process_weights(family_folder(NAME), tmp_path / "processed")
    assert not (tmp_path / "processed").exists()
    monkeypatch.setenv("GRAPHLENS_CACHE", str(tmp_path / "cache"))
    opened = HookedTransformer.from_pretrained(family_folder(NAME))
    assert opened.cfg.processing == ()
    plain = HookedTransformer.from_onnx(family_folder(NAME), "cpu")
    np.testing.assert_array_equal(opened(TOKENS), plain(TOKENS))


def test_an_edit_of_the_stream_bakes(model: HookedTransformer, tmp_path: Path) -> None:
    from graphlens import Ablate, Scale, Steer

    vector = np.random.default_rng(0).standard_normal(model.cfg.d_model).astype(np.float32)
    edits = [
        Steer(in_block(0, "hook_resid_mid"), vector),
        Scale(in_block(1, "hook_resid_post"), 0.5),
        Steer(in_block(1, "hook_normalized_resid_post"), vector),
        Ablate(in_block(2, "attn.hook_z"), heads=1),
        Scale(in_block(2, "ln1.hook_normalized"), -1.0),
    ]
    expected = model.run_with_interventions(TOKENS, edits)
    baked = HookedTransformer.from_onnx(model.bake(edits, tmp_path / "baked", keep_hooks=True), "cpu")
    assert relative(baked(TOKENS), expected, "baked") <= TOLERANCE
    assert relative(expected, model(TOKENS), "plain") > 0.01
