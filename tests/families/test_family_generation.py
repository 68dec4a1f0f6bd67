"""Generation and the KV cache: transformers' tokens, the same activations as without a cache, hooks in each step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graphlens import Ablate, HookedTransformer, InputError, KeyValueCache, Patch, Scale, Steer
from graphlens.file.names import KEYS, QUERIES, TOKENS
from graphlens.interventions import Intervention
from tests.closeness import close
from tests.families.layout import editing_z
from tests.families.variants import CHOSEN

ALL = 64  # positions of a variant, prompt included
GREEDY: dict[str, Any] = {"do_sample": False, "stop_at_eos": False, "return_type": "tokens", "verbose": False}
LENGTHS = (3, 11, 1, 7)
PIECES = ((0, 5), (5, 6), (6, 11), (11, 20))  # longer than Gemma's window of 4, shorter, and a single token
Z = "blocks.1.attn.hook_z"


@dataclass(frozen=True)
class Pair:
    """One checkpoint, here and in transformers."""

    ours: HookedTransformer
    theirs: Any

    def expected(self, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """transformers' greedy continuation, prompt included."""
        with torch.no_grad():
            found = self.theirs.generate(
                torch.from_numpy(tokens),
                attention_mask=torch.from_numpy(np.ones_like(tokens) if mask is None else mask),
                do_sample=False,
                max_new_tokens=ALL - tokens.shape[1],
                pad_token_id=0,
            )
        return np.asarray(found.numpy())


@pytest.fixture(scope="module", params=CHOSEN)
def pair(
    request: pytest.FixtureRequest,
    family_model: Callable[[str], HookedTransformer],
    family_reference: Callable[[str], Any],
) -> Pair:
    theirs = family_reference(request.param)
    theirs.generation_config.eos_token_id = None  # nothing stops it
    return Pair(family_model(request.param), theirs)


def refuse_two_rotations(model: HookedTransformer) -> None:
    """Skips a test whose cache would hold keys of a short input in a long one."""
    if model.cfg.rotary_short is not None:
        pytest.skip("longer inputs are rotated otherwise")


def prompts(batch: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 101, (batch, length))


def logits_of(theirs: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(theirs(torch.from_numpy(tokens)).logits.numpy())


def left_padded() -> tuple[np.ndarray, np.ndarray]:
    """Prompts of several lengths, padded on the left with 0, and their mask."""
    width = max(LENGTHS)
    mask = (np.arange(width) >= width - np.asarray(LENGTHS)[:, None]).astype(np.int64)
    return prompts(len(LENGTHS), width) * mask, mask


# Greedy


@pytest.mark.parametrize("use_past_kv_cache", [True, False])
def test_greedy_tokens_are_transformers(pair: Pair, use_past_kv_cache: bool) -> None:
    tokens = prompts(1, 5)
    found = pair.ours.generate(tokens, ALL - 5, use_past_kv_cache=use_past_kv_cache, **GREEDY)
    np.testing.assert_array_equal(found, pair.expected(tokens))


@pytest.mark.parametrize("use_past_kv_cache", [True, False])
def test_greedy_tokens_of_left_padded_prompts_are_transformers(pair: Pair, use_past_kv_cache: bool) -> None:
    tokens, mask = left_padded()
    options = {**GREEDY, "attention_mask": mask, "use_past_kv_cache": use_past_kv_cache}
    expected = pair.expected(tokens, mask)
    new = ALL - tokens.shape[1]
    np.testing.assert_array_equal(pair.ours.generate(tokens, new, **options), expected)
    if use_past_kv_cache and pair.ours.cfg.rotary_short is None:  # padding is no part of a prompt: each continues alone
        for row, length in enumerate(LENGTHS):
            alone = pair.ours.generate(tokens[row : row + 1, -length:], new, **GREEDY)
            np.testing.assert_array_equal(alone[0], expected[row, tokens.shape[1] - length :])


@pytest.mark.parametrize("use_past_kv_cache", [True, False])
def test_embeddings_are_continued_as_their_tokens(pair: Pair, use_past_kv_cache: bool) -> None:
    tokens = prompts(2, 5)
    given = pair.ours.generate(tokens, 0, return_type="embeds", stop_at_eos=False, verbose=False)
    close(given, pair.ours.run_with_cache(tokens, names_filter="hook_embed")[1]["hook_embed"])
    options = {**GREEDY, "use_past_kv_cache": use_past_kv_cache}
    found = pair.ours.generate(given, 59, **options)
    np.testing.assert_array_equal(found, pair.ours.generate(tokens, 59, **options)[:, 5:])


@pytest.mark.parametrize("use_past_kv_cache", [True, False])
def test_a_hook_acts_on_every_step_as_a_torch_hook_does(pair: Pair, use_past_kv_cache: bool) -> None:
    tokens, mask = left_padded()

    def theirs(z: torch.Tensor) -> torch.Tensor:
        edited = z.clone()
        edited[..., 1, :] *= -2
        return edited

    def ours(z: np.ndarray, hook: Any) -> None:
        z[:, :, 1] *= -2

    with editing_z(pair.theirs, 1, theirs):
        expected = pair.expected(tokens, mask)
        edited = logits_of(pair.theirs, expected)
    assert np.abs(edited - logits_of(pair.theirs, expected)).max() > 1e-3
    options = {**GREEDY, "attention_mask": mask, "use_past_kv_cache": use_past_kv_cache}
    with pair.ours.hooks(fwd_hooks=[(Z, ours)]):
        found = pair.ours.generate(tokens, ALL - tokens.shape[1], **options)
    np.testing.assert_array_equal(found, expected)


def test_what_is_cached_is_what_transformers_caches(pair: Pair) -> None:
    refuse_two_rotations(pair.ours)
    tokens = prompts(2, 20)
    cache = KeyValueCache.init_cache(pair.ours.cfg, batch_size=2)
    for start, end in PIECES:
        pair.ours.forward(tokens[:, start:end], past_kv_cache=cache)
    with torch.no_grad():
        theirs = pair.theirs(torch.from_numpy(tokens), use_cache=True).past_key_values
    for layer, kept in enumerate(theirs.layers):
        for part, expected in (("key", kept.keys), ("value", kept.values)):
            held = cache.present[f"present.{layer}.{part}"]
            found = held if isinstance(held, np.ndarray) else held.numpy()
            assert found.shape[2] == 20
            found = found.repeat(expected.shape[1] // found.shape[1], 1)  # Falcon's are repeated for all heads there
            close(found[:, :, -expected.shape[2] :], expected.numpy())  # transformers drops what no window reaches


# With a cache and without


@pytest.mark.parametrize("masked", [False, True])
def test_every_activation_is_the_same_with_a_cache(pair: Pair, masked: bool) -> None:
    refuse_two_rotations(pair.ours)
    model, tokens = pair.ours, prompts(3, 20)
    mask = np.ones_like(tokens)
    if masked:
        mask[0, :7], mask[1, :2] = 0, 0
    whole_logits, whole = model.run_with_cache(tokens, attention_mask=mask)
    cache = KeyValueCache.init_cache(model.cfg, batch_size=3)
    entries = model.runner.engine.hooks(model.runner.plan())
    for start, end in PIECES:
        part = slice(start, end)
        logits, found = model.run_with_cache(tokens[:, part], attention_mask=mask[:, part], past_kv_cache=cache)
        real = mask[:, part] == 1
        close(logits[real], whole_logits[:, part][real])
        for name, value in found.items():
            axes = entries[name].axes
            expected, got = whole[name], value
            if axes[0] in (TOKENS, QUERIES, KEYS):
                heads = {TOKENS: 1, QUERIES: model.cfg.n_heads}.get(axes[0], model.cfg.n_key_value_heads)
                expected, got = (each.reshape(3, -1, heads, each.shape[1]) for each in (expected, got))
            elif "query_pos" in axes:
                expected, got = expected.transpose(0, 2, 1, 3)[..., :end], got.transpose(0, 2, 1, 3)
            expected, got = expected[:, part][real], got[real]
            seen = np.isfinite(expected)  # scores of what is masked are -inf
            np.testing.assert_array_equal(np.isfinite(got), seen, err_msg=name)
            close(got[seen], expected[seen])
    assert cache.length == 20


def edits(model: HookedTransformer) -> dict[str, list[Intervention]]:
    """Interventions that reach what is cached, what is not, and positions that only generation knows."""
    cfg, rng = model.cfg, np.random.default_rng(3)
    vector = rng.standard_normal(cfg.d_model).astype(np.float32)
    keys = (cfg.n_key_value_heads, cfg.d_head)
    made: dict[str, list[Intervention]] = {
        "keys": [Scale("blocks.0.attn.hook_k", -1.5), Steer("blocks.1.attn.hook_k", rng.standard_normal(keys))],
        "values": [Patch("blocks.1.attn.hook_v", rng.standard_normal(keys), positions=[2, 7, 30], strict=False)],
        "generated": [Steer("blocks.1.hook_resid_pre", 2 * vector, positions="generated")],
        "a head": [Ablate(Z, heads=1), Ablate("blocks.2.attn.hook_pattern", heads=0)],
        "an MLP": [Scale("blocks.1.hook_mlp_out", -3.0, dims=slice(10, 30))],
    }
    for label, name in {
        "rotated keys": "blocks.0.attn.hook_rot_k",
        "rotated queries": "blocks.1.attn.hook_rot_q",
        "norms of keys": "blocks.0.attn.k_norm.hook_normalized",
        "norms of queries": "blocks.1.attn.q_norm.hook_scale",
        "norms after attention": "blocks.1.ln1_post.hook_normalized",
        "gates": "blocks.1.mlp.hook_pre_linear",
        "neurons": "blocks.1.mlp.hook_post",
        "experts": "blocks.1.mlp.hook_expert_weights",
    }.items():
        if name in model.hook_dict:
            made[label] = [Scale(name, -2.0)]
    return made


def test_interventions_act_the_same_with_a_cache(pair: Pair) -> None:
    tokens, mask = left_padded()
    options: dict[str, Any] = {**GREEDY, "attention_mask": mask}
    plain, unlike = pair.ours.forward(tokens), 0
    unedited = pair.ours.generate(tokens, 30, **options)
    for label, items in edits(pair.ours).items():
        cache = KeyValueCache.init_cache(pair.ours.cfg, batch_size=len(tokens))
        with pair.ours.intervene(items):
            cached = pair.ours.generate(tokens, 30, **options)
            whole = pair.ours.generate(tokens, 30, use_past_kv_cache=False, **options)
            logits = pair.ours.forward(tokens)
            pieces = [pair.ours.forward(tokens[:, at : at + 4], past_kv_cache=cache) for at in (0, 4, 8)]
        np.testing.assert_array_equal(cached, whole, err_msg=label)
        unlike += int((cached != unedited).any())
        if label != "generated":  # a run without a prompt before it has no such positions
            close(np.concatenate(pieces, 1), logits)
            assert np.abs(logits - plain).max() > 1e-6, label
    assert unlike, "no edit changes a token"


def test_a_cache_starts_at_any_layer(pair: Pair) -> None:
    refuse_two_rotations(pair.ours)
    model, tokens = pair.ours, prompts(2, 20)
    logits, activations = model.run_with_cache(tokens)
    for layer in range(model.cfg.n_layers):
        residual = activations[f"blocks.{layer}.hook_resid_pre"]
        cache = KeyValueCache.init_cache(model.cfg, batch_size=2)
        found = [
            model.forward(residual[:, start:end], start_at_layer=layer, past_kv_cache=cache) for start, end in PIECES
        ]
        close(np.concatenate(found, 1), logits)


# What does not go


def test_keys_that_a_longer_input_rotates_otherwise_are_no_cache_for_it(
    family_model: Callable[[str], HookedTransformer],
) -> None:
    model = family_model("phi3-longrope")
    short = model.cfg.rotary_short
    assert short is not None
    cache = KeyValueCache.init_cache(model.cfg)
    model.forward(prompts(1, short - 1), past_kv_cache=cache)
    model.forward(prompts(1, 1), past_kv_cache=cache)
    with pytest.raises(InputError, match=f"more than {short} tokens by other frequencies, .*as generate.. does"):
        model.forward(prompts(1, 1), past_kv_cache=cache)


def test_norms_of_queries_have_no_positions_to_choose(family_model: Callable[[str], HookedTransformer]) -> None:
    model = family_model("gemma3")
    name = "blocks.0.attn.q_norm.hook_scale"
    for field in ("positions", "heads", "batch"):
        with pytest.raises(InputError, match=f"it has no {field}"), model.intervene([Scale(name, 2.0, **{field: 0})]):
            model.forward(prompts(1, 4))


def test_longer_than_n_ctx_is_refused(family_folder: Callable[[str], Path]) -> None:
    model = HookedTransformer.from_onnx(family_folder("llama"), "cpu", n_ctx=20)
    with pytest.raises(InputError, match=r"5 tokens and 16 new ones are too many: .* takes at most 20 \(n_ctx\)"):
        model.generate(prompts(1, 5), 16, **GREEDY)
    assert model.generate(prompts(1, 5), 15, **GREEDY).shape == (1, 20)
