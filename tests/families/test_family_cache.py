"""ActivationCache's algebra on every family: sums are the residual, and TransformerLens 3.9's where that is right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graphlens import ActivationCache, HookedTransformer
from graphlens.errors import InputError
from graphlens.file.names import in_block
from tests.families.comparing import TOLERANCE, prompt, relative
from tests.families.variants import CHOSEN, PROCESSED, SUMMED, VARIANTS

Folders = Callable[[str], Path]
Models = Callable[[str], HookedTransformer]
TOKENS = prompt(101, 2, 9)
WITH_LENS = [name for name in CHOSEN if VARIANTS[name].lens is not None]


@pytest.fixture(scope="module")
def run(family_model: Models) -> Callable[[str], tuple[HookedTransformer, np.ndarray, ActivationCache]]:
    """(a variant's model, its logits, its cache), by its name."""
    made: dict[str, Any] = {}

    def find(name: str) -> Any:
        if name not in made:
            model = family_model(name)
            made[name] = (model, *model.run_with_cache(TOKENS))
        return made[name]

    return find


Runs = Callable[[str], tuple[HookedTransformer, np.ndarray, ActivationCache]]


def residual(model: HookedTransformer, cache: ActivationCache, layer: int) -> np.ndarray:
    """The residual stream before a layer."""
    last = model.cfg.n_layers
    return np.asarray(cache["resid_post", last - 1] if layer == last else cache["resid_pre", layer])


def normalised(model: HookedTransformer, cache: ActivationCache, layer: int) -> np.ndarray:
    """What the norm before a layer made of it."""
    norm = "ln_final" if layer == model.cfg.n_layers else in_block(layer, "ln1")
    return np.asarray(cache[f"{norm}.hook_normalized"])


@pytest.mark.parametrize("name", SUMMED)
def test_what_was_written_sums_to_the_residual(name: str, run: Runs) -> None:
    model, _, cache = run(name)
    expanded = (False,) if model.cfg.num_experts else (True, False)
    for layer in range(model.cfg.n_layers + 1):
        whole = residual(model, cache, layer)
        assert relative(cache.decompose_resid(layer).sum(0), whole, "decompose_resid") <= TOLERANCE
        for expand in expanded:
            stack, labels = cache.get_full_resid_decomposition(layer, expand_neurons=expand, return_labels=True)
            assert relative(stack.sum(0), whole, "full") <= TOLERANCE
            assert len(labels) == len(stack)
            assert ("pos_embed" in labels) == ("hook_pos_embed" in cache)
        accumulated = cache.accumulated_resid(layer)
        np.testing.assert_array_equal(accumulated[-1], whole)


@pytest.mark.parametrize("name", SUMMED)
def test_norms_are_applied_as_in_the_run(name: str, run: Runs) -> None:
    """RMSNorm without centring; where norms come after the sublayers alone, no norm before a layer can be."""
    model, _, cache = run(name)
    last = model.cfg.n_layers
    stacks = cache.get_full_resid_decomposition(last, expand_neurons=False, apply_ln=True)
    assert relative(stacks.sum(0), normalised(model, cache, last), "final") <= TOLERANCE
    if model.cfg.post_norm_only:
        with pytest.raises(InputError, match="no norm reads the residual before layer 1"):
            cache.decompose_resid(1, apply_ln=True)
        return
    stack = cache.decompose_resid(1, apply_ln=True)
    assert relative(stack.sum(0), normalised(model, cache, 1), "ln1") <= TOLERANCE
    assert relative(cache.accumulated_resid(apply_ln=True)[-1], cache["unembed.hook_in"], "final") <= TOLERANCE


@pytest.mark.parametrize("name", SUMMED)
def test_the_middle_of_a_block(name: str, run: Runs) -> None:
    model, _, cache = run(name)
    if model.cfg.parallel_attn_mlp:
        for call in (
            lambda: cache.accumulated_resid(incl_mid=True),
            lambda: cache.decompose_resid(1, mlp_input=True),
            lambda: cache.get_full_resid_decomposition(1, mlp_input=True),
        ):
            with pytest.raises(InputError, match="attention and MLP of a block read the same residual in this model"):
                call()
        # The norm that the MLP reads is there nevertheless.
        one = cache.apply_ln_to_stack(cache["resid_pre", 1][None], 1, mlp_input=True)
        assert relative(one[0], cache[in_block(1, "ln2.hook_normalized")], name) <= TOLERANCE
        return
    middle = cache["resid_mid", 1]
    assert relative(cache.decompose_resid(1, mlp_input=True).sum(0), middle, "decompose") <= TOLERANCE
    full = cache.get_full_resid_decomposition(1, mlp_input=True, expand_neurons=not model.cfg.num_experts)
    assert relative(full.sum(0), middle, "full") <= TOLERANCE
    np.testing.assert_array_equal(cache.accumulated_resid(1, mlp_input=True)[-1], middle)


@pytest.mark.parametrize("name", SUMMED)
def test_logits_of_the_last_residual_are_the_models(name: str, run: Runs) -> None:
    _, logits, cache = run(name)
    assert relative(cache.logit_lens()[-1], logits, name) <= TOLERANCE


@pytest.mark.parametrize("name", PROCESSED)
def test_logit_attributions_sum_to_the_logit(name: str, run: Runs, family_folder: Folders, tmp_path: Path) -> None:
    from graphlens import process_weights

    model = HookedTransformer.from_onnx(
        process_weights(family_folder(name), tmp_path / "model", announce=lambda _: None), "cpu"
    )
    if "fold_ln" not in model.cfg.processing and "ln_final.w" in model.weights:
        pytest.skip("the final norm's weights are not folded")
    _, cache = model.run_with_cache(TOKENS)
    stack = cache.get_full_resid_decomposition(expand_neurons=False)
    found = cache.logit_attrs(stack, tokens=5, incorrect_tokens=7).sum(0)
    unembedded = cache["unembed.hook_out"] - model.unembed.b_U
    assert relative(found, unembedded[..., 5] - unembedded[..., 7], name) <= TOLERANCE


@pytest.mark.parametrize("name", WITH_LENS)
def test_every_method_is_transformerlenss(name: str, run: Runs, family_checkpoint: Folders) -> None:
    """Where a norm comes after attention, TransformerLens's results of heads and neurons are not what was written."""
    from tests.families.lens import lens_of

    model, _, cache = run(name)
    lens = lens_of(name, family_checkpoint(name))
    _, theirs = lens.run_with_cache(torch.from_numpy(TOKENS))
    assert relative(cache.accumulated_resid(), theirs.accumulated_resid(), "accumulated") <= TOLERANCE
    assert relative(cache.decompose_resid(2), theirs.decompose_resid(2), "decompose") <= TOLERANCE
    stack, expected = cache.decompose_resid(), theirs.decompose_resid()
    assert relative(cache.apply_ln_to_stack(stack), theirs.apply_ln_to_stack(expected), "ln") <= TOLERANCE
    assert relative(cache.logit_attrs(stack, 5), theirs.logit_attrs(expected, torch.tensor(5)), "attrs") <= TOLERANCE
    if model.cfg.post_norm_only or model.cfg.use_normalization_before_and_after or model.cfg.num_experts:
        return
    assert relative(cache.stack_head_results(), theirs.stack_head_results(), "heads") <= TOLERANCE
    found, wanted = (each.get_full_resid_decomposition(2, expand_neurons=True) for each in (cache, theirs))
    assert relative(found, wanted, "full") <= TOLERANCE
    assert relative(cache.get_neuron_results(1), theirs.get_neuron_results(1), "neurons") <= TOLERANCE


@pytest.mark.parametrize("name", SUMMED)
def test_heads_and_neurons_through_norms_after_sublayers(name: str, run: Runs) -> None:
    """Each head's result, and each neuron's, sum to what the sublayer wrote but for its biases."""
    model, _, cache = run(name)
    if model.cfg.num_experts:
        pytest.skip("its neurons are those of several experts")
    for key, stack in (
        ("attn_out", cache.stack_head_results(2)[model.cfg.n_heads :]),
        ("mlp_out", np.moveaxis(cache.get_neuron_results(1), -2, 0)),
    ):
        bias = "attn.b_O" if key == "attn_out" else "mlp.b_out"
        written = cache[key, 1]
        if not (model.cfg.post_norm_only or model.cfg.use_normalization_before_and_after):
            written = written - model.weights.get(in_block(1, bias), 0.0)
        assert relative(stack.sum(0), written, key) <= TOLERANCE
    onto = np.random.default_rng(1).standard_normal(model.cfg.d_model).astype(np.float32)
    projected = cache.get_full_resid_decomposition(project_output_onto=onto, pos_slice=-1).sum(0)
    assert relative(projected, residual(model, cache, model.cfg.n_layers)[:, -1] @ onto, "projected") <= TOLERANCE


@pytest.mark.parametrize("name", CHOSEN)
def test_a_prompt_of_a_batch_is_the_prompt_alone(name: str, run: Runs) -> None:
    """Also where prompts, positions and heads are one axis."""
    model, _, cache = run(name)
    alone = model.run_with_cache(TOKENS[1:], remove_batch_dim=True)[1]
    one, several = cache.apply_slice_to_batch_dim(1), cache.apply_slice_to_batch_dim([1, 0])
    for hook in cache:
        assert relative(one[hook], alone[hook], hook) <= TOLERANCE
        assert several[hook].shape == cache[hook].shape
    again = several.apply_slice_to_batch_dim([1, 0])
    for hook in cache:
        np.testing.assert_array_equal(again[hook], cache[hook])


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_positions_of_norms_of_queries_and_keys(name: str, run: Runs) -> None:
    model, _, cache = run(name)
    for part, heads in (("q_norm", model.cfg.n_heads), ("k_norm", model.cfg.n_key_value_heads)):
        hook = in_block(1, f"attn.{part}.hook_normalized")
        _, some = model.run_with_cache(TOKENS, names_filter=hook, pos_slice=(2, 5))
        whole = cache[hook].reshape(2, 9, heads, -1)
        np.testing.assert_array_equal(some[hook], whole[:, 2:5].reshape(-1, whole.shape[-1]))
        with pytest.raises(InputError, match="nothing else in this cache tells how many prompts"):
            ActivationCache({hook: cache[hook]}, model).apply_slice_to_batch_dim(0)
