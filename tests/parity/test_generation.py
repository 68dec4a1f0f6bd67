"""Generation: Hugging Face's own tokens, whatever the cache, the padding and the hooks; sampling by its formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from conftest import save_model
from torch_reference import ODD_CONFIG

import graphlens
from graphlens import HookedTransformer
from graphlens.model.kv_cache import KeyValueCache
from graphlens.model.sampling import Sampling, sample

NEW = 64
GREEDY: dict[str, Any] = {"do_sample": False, "stop_at_eos": False, "return_type": "tokens", "verbose": False}
HOOKED = "blocks.1.attn.hook_z"


@dataclass(frozen=True)
class Pair:
    """One checkpoint, here and in transformers."""

    ours: HookedTransformer
    theirs: Any

    def expected(self, tokens: np.ndarray, mask: np.ndarray | None = None, new: int = NEW) -> np.ndarray:
        """Hugging Face's greedy continuation, prompt included."""
        attention = torch.from_numpy(np.ones_like(tokens) if mask is None else mask)
        with torch.no_grad():
            out = self.theirs.generate(
                torch.from_numpy(np.array(tokens)),
                attention_mask=attention,
                do_sample=False,
                max_new_tokens=new,
                pad_token_id=0,
            )
        return out.numpy()


@pytest.fixture(scope="module", params=["tiny-gpt2", "random"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    if request.param == "tiny-gpt2":
        checkpoint = hooked = graphlens.embedded_model()
    else:
        checkpoint = tmp_path_factory.mktemp("random") / "checkpoint"
        save_model(checkpoint, transformers.GPT2Config(**{**ODD_CONFIG, "n_positions": 97}))
        hooked = graphlens.export_model(checkpoint, checkpoint.parent / "hooked").folder
    theirs = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager").eval()
    theirs.generation_config.eos_token_id = None  # nothing stops it
    return Pair(HookedTransformer.from_onnx(hooked, "cpu"), theirs)


def prompts(model: HookedTransformer, batch: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, model.cfg.d_vocab, (batch, length))


def left_padded(model: HookedTransformer, lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of these lengths, padded on the left with 0, and their mask."""
    width = max(lengths)
    mask = (np.arange(width) >= width - np.asarray(lengths)[:, None]).astype(np.int64)
    return prompts(model, len(lengths), width) * mask, mask


def turn_a_head(activation: np.ndarray, hook: Any) -> np.ndarray:
    """Head 1 at -2 times its value."""
    edited = activation.copy()
    edited[:, :, 1] *= -2
    return edited


# Greedy


@pytest.mark.parametrize("use_past_kv_cache", [True, False])
def test_greedy_tokens_are_hugging_faces(pair: Pair, use_past_kv_cache: bool) -> None:
    tokens = prompts(pair.ours, 1, 9)
    found = pair.ours.generate(tokens, NEW, use_past_kv_cache=use_past_kv_cache, **GREEDY)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, pair.expected(tokens))


@pytest.mark.parametrize("use_past_kv_cache", [True, False])
def test_greedy_tokens_of_left_padded_prompts_are_hugging_faces(pair: Pair, use_past_kv_cache: bool) -> None:
    tokens, mask = left_padded(pair.ours, [3, 11, 1, 7])
    options = {**GREEDY, "attention_mask": mask, "use_past_kv_cache": use_past_kv_cache}
    expected = pair.expected(tokens, mask)
    np.testing.assert_array_equal(pair.ours.generate(tokens, NEW, **options), expected)
    # Padding is no part of a prompt: alone, without it, each continues the same.
    for row, length in enumerate([3, 11, 1, 7]):
        alone = pair.ours.generate(tokens[row : row + 1, -length:], NEW, **GREEDY)
        np.testing.assert_array_equal(alone[0], expected[row, tokens.shape[1] - length :])


@pytest.mark.parametrize("use_past_kv_cache", [True, False])
@pytest.mark.parametrize("padded", [False, True])
def test_a_python_hook_acts_on_every_step_as_a_torch_hook_does(
    pair: Pair, padded: bool, use_past_kv_cache: bool
) -> None:
    tokens, mask = left_padded(pair.ours, [5, 8] if padded else [8, 8])
    heads = pair.ours.cfg.n_heads

    def theirs(module: Any, args: Any) -> Any:
        (z,) = args
        split = z.clone().view(*z.shape[:-1], heads, -1)
        split[..., 1, :] *= -2
        return (split.view(z.shape),)

    plain = pair.expected(tokens, mask)
    handle = pair.theirs.transformer.h[1].attn.c_proj.register_forward_pre_hook(theirs)
    try:
        expected = pair.expected(tokens, mask)
    finally:
        handle.remove()
    assert not np.array_equal(plain, expected), "this hook changes nothing, so it tests nothing"
    with pair.ours.hooks(fwd_hooks=[(HOOKED, turn_a_head)]):
        found = pair.ours.generate(tokens, NEW, attention_mask=mask, use_past_kv_cache=use_past_kv_cache, **GREEDY)
    np.testing.assert_array_equal(found, expected)


def test_text_prompts_of_different_lengths_are_padded_on_the_left(tiny: HookedTransformer) -> None:
    texts = ["When John and Mary went to the store, John gave a drink to", "The", "Once upon a time"]
    options = {**GREEDY, "return_type": "str"}
    together = tiny.generate(texts, 12, **options)
    assert together == [tiny.generate(text, 12, **options) for text in texts]
    assert all(full.startswith(text) for full, text in zip(together, texts, strict=True))


# The cache


@pytest.mark.parametrize("chunks", [[20], [7, 1, 12], [7, *[1] * 13], [19, 1], [12, 8], [9, 2, 5, 4]])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("hooked", [False, True])
def test_cached_logits_are_the_uncached_ones_whatever_the_chunks(
    pair: Pair, chunks: list[int], padded: bool, hooked: bool
) -> None:
    tokens, mask = left_padded(pair.ours, [20, 14] if padded else [20, 20])
    cache = KeyValueCache.init_cache(pair.ours.cfg, batch_size=2)
    pieces, at = [], 0
    with pair.ours.hooks(fwd_hooks=[(HOOKED, turn_a_head)] if hooked else []):
        whole = pair.ours.forward(tokens, attention_mask=mask)
        for size in chunks:
            piece = slice(at, at + size)
            pieces.append(pair.ours.forward(tokens[:, piece], attention_mask=mask[:, piece], past_kv_cache=cache))
            at += size
            assert cache.length == at
    assert at == 20
    np.testing.assert_array_equal(cache.mask, mask)
    cached, real = np.concatenate(pieces, 1), mask == 1
    assert np.abs(cached[real] - whole[real]).max() <= 5e-5 * max(1, np.abs(whole[real]).max())


def test_a_frozen_cache_is_read_and_not_extended(tiny: HookedTransformer) -> None:
    tokens = prompts(tiny, 2, 9)
    cache = KeyValueCache.init_cache(tiny.cfg, batch_size=2)
    tiny.forward(tokens[:, :5], past_kv_cache=cache)
    held = dict(cache.present)
    cache.freeze()
    first = tiny.forward(tokens[:, 5:], past_kv_cache=cache)
    again = tiny.forward(tokens[:, 5:], past_kv_cache=cache)
    np.testing.assert_array_equal(first, again)
    whole = tiny.forward(tokens)
    assert np.abs(first - whole[:, 5:]).max() <= 5e-5 * np.abs(whole).max()
    assert cache.length == 5
    assert list(cache.present) == list(held)
    assert all(cache.present[name] is value for name, value in held.items())
    cache.unfreeze()
    tiny.forward(tokens[:, 5:], past_kv_cache=cache)
    assert cache.length == 9


@pytest.mark.parametrize("hooks", [[], [(HOOKED, turn_a_head)]], ids=["plain", "hooked"])
def test_caches_stay_where_they_were_computed(
    hooks: Any, tiny: HookedTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []
    extend = KeyValueCache.extend

    def watched(self: KeyValueCache, present: dict[str, Any], mask: np.ndarray) -> None:
        extend(self, present, mask)
        seen.append(dict(self.present))

    monkeypatch.setattr(KeyValueCache, "extend", watched)
    with tiny.hooks(fwd_hooks=hooks):
        tiny.generate(prompts(tiny, 2, 4), 3, **GREEDY)
    assert len(seen) == 3
    layers = range(tiny.cfg.n_layers)
    for step, present in enumerate(seen):
        assert set(present) == {f"present.{layer}.{part}" for layer in layers for part in ("key", "value")}
        for value in present.values():
            assert type(value).__name__ == type(onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(1))).__name__
            assert not isinstance(value, np.ndarray)
            assert list(value.shape()) == [2, tiny.cfg.n_heads, 4 + step, tiny.cfg.d_head]


def test_hooks_see_the_prompt_once_and_then_one_position_at_a_time(tiny: HookedTransformer) -> None:
    tokens, seen = prompts(tiny, 2, 5), []

    def record(activation: np.ndarray, hook: Any) -> None:
        seen.append((hook.name, activation.shape[1:3] if "pattern" not in hook.name else activation.shape[2:]))

    names = ("hook_embed", "blocks.2.attn.hook_pattern")
    with tiny.hooks(fwd_hooks=[(name, record) for name in names]):
        tiny.generate(tokens, 4, **GREEDY)
    width = tiny.cfg.d_model
    assert [shape for name, shape in seen if name == names[0]] == [(5, width), (1, width), (1, width), (1, width)]
    assert [shape for name, shape in seen if name == names[1]] == [(5, 5), (1, 6), (1, 7), (1, 8)]
    seen.clear()
    with tiny.hooks(fwd_hooks=[(names[1], record)]):
        tiny.generate(tokens, 4, use_past_kv_cache=False, **GREEDY)
    assert [shape for _, shape in seen] == [(5, 5), (6, 6), (7, 7), (8, 8)]


# Sampling


def drawn(model: HookedTransformer, tokens: np.ndarray, **options: Any) -> np.ndarray:
    found = model.generate(tokens, 16, **{"stop_at_eos": False, "return_type": "tokens", "verbose": False, **options})
    assert isinstance(found, np.ndarray)
    return found


def test_a_seed_makes_the_draws_repeatable(tiny: HookedTransformer) -> None:
    tokens = prompts(tiny, 3, 4)
    first = drawn(tiny, tokens, seed=3)
    np.testing.assert_array_equal(first, drawn(tiny, tokens, seed=3))
    np.testing.assert_array_equal(first, drawn(tiny, tokens, seed=3, use_past_kv_cache=False))
    assert not np.array_equal(first, drawn(tiny, tokens, seed=4))


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 0.0}, {"do_sample": False}])
def test_one_choice_is_the_greedy_one(options: dict[str, Any], tiny: HookedTransformer) -> None:
    tokens = prompts(tiny, 3, 4)
    np.testing.assert_array_equal(drawn(tiny, tokens, seed=0, **options), tiny.generate(tokens, 16, **GREEDY))
    assert not np.array_equal(drawn(tiny, tokens, seed=0), drawn(tiny, tokens, seed=0, **options))


@pytest.mark.parametrize("freq_penalty", [0.0, 1.5, -0.7])
@pytest.mark.parametrize("use_past_kv_cache", [True, False])
def test_the_frequency_penalty_by_its_formula(
    freq_penalty: float, use_past_kv_cache: bool, tiny: HookedTransformer
) -> None:
    start = prompts(tiny, 2, 4)
    start[:, 1] = start[:, 3]  # a token that counts twice
    tokens = start
    for _ in range(16):
        scores = tiny.forward(tokens)[:, -1].astype(np.float64) / 2.0
        for row, ids in zip(scores, tokens, strict=True):
            for token in ids:
                row[token] -= freq_penalty
        tokens = np.concatenate([tokens, scores.argmax(-1)[:, None]], 1)
    options = {"top_k": 1, "temperature": 2.0, "freq_penalty": freq_penalty, "use_past_kv_cache": use_past_kv_cache}
    np.testing.assert_array_equal(drawn(tiny, start, **options), tokens)
    if freq_penalty >= 0:  # a bonus for repeating can leave a repeating model where it is
        assert (freq_penalty == 0) == np.array_equal(tokens, tiny.generate(start, 16, **GREEDY))


@pytest.mark.parametrize(
    ("options", "probabilities"),
    [
        ({}, lambda p: p),
        ({"temperature": 0.5}, lambda p: p**2),
        ({"top_k": 2}, lambda p: p * [0, 1, 1, 0, 0]),
        ({"top_p": 0.75}, lambda p: p * [0, 1, 1, 1, 0]),  # 0.4, 0.7, and 0.9 crosses
        ({"top_k": 3, "top_p": 0.4}, lambda p: p * [0, 1, 0, 0, 0]),  # 0.4 of 0.9 crosses at once
        ({"top_p": 1.0}, lambda p: p),
    ],
)
def test_draws_follow_the_distribution(options: dict[str, Any], probabilities: Callable[[Any], Any]) -> None:
    p, rows = np.asarray([0.05, 0.4, 0.3, 0.2, 0.05]), 20_000
    logits = np.broadcast_to(np.log(p).astype(np.float32) + 3, (rows, 5))
    chosen = sample(logits, np.zeros((rows, 0), np.int64), np.random.default_rng(0), Sampling(**options))
    expected = np.asarray(probabilities(p), np.float64)
    expected = expected / expected.sum()
    found = np.bincount(chosen, minlength=5) / rows
    assert (found[expected == 0] == 0).all()
    assert np.abs(found - expected).max() <= 4 * 0.5 / np.sqrt(rows)


# Stopping and streaming


@pytest.mark.parametrize("use_past_kv_cache", [True, False])
def test_an_end_token_stops_a_sequence_which_goes_on_with_end_tokens(
    use_past_kv_cache: bool, tiny: HookedTransformer
) -> None:
    tokens = prompts(tiny, 3, 4)
    draw: dict[str, Any] = {"stop_at_eos": False, "return_type": "tokens", "verbose": False, "seed": 1}
    free = tiny.generate(tokens, 32, **draw)
    new = free[:, 4:]
    ends = [int(new[0, 3]), int(new[1, 6]), int(new[2, 9])]
    first = [int(np.flatnonzero(np.isin(row, ends))[0]) for row in new]
    assert len(set(first)) > 1, "all sequences end at once, so nothing is filled up"
    options = {**draw, "stop_at_eos": True, "eos_token_id": ends, "use_past_kv_cache": use_past_kv_cache}
    found = tiny.generate(tokens, 32, **options)
    assert found.shape == (3, 4 + max(first) + 1)
    for row, ended, mine in zip(free, first, found, strict=True):
        np.testing.assert_array_equal(mine[: 4 + ended + 1], row[: 4 + ended + 1])
        assert (mine[4 + ended + 1 :] == tiny.tokenizer.eos_token_id).all()  # not one of those that were given
    np.testing.assert_array_equal(tiny.generate(tokens, 32, **{**options, "stop_at_eos": False}), free)


def test_the_end_token_is_the_tokenizers_own_by_default(
    tiny: HookedTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    eos, tokens = tiny.tokenizer.eos_token_id, prompts(tiny, 1, 4)

    def end_at_the_third(activation: np.ndarray, hook: Any) -> np.ndarray:
        hook.ctx["runs"] = hook.ctx.get("runs", 0) + 1
        edited = activation.copy()
        edited[..., eos] = 1e4 if hook.ctx["runs"] == 3 else -1e4
        return edited

    with tiny.hooks(fwd_hooks=[("unembed.hook_out", end_at_the_third)], clear_contexts=True):
        found = tiny.generate(tokens, 10, do_sample=False, return_type="tokens", verbose=False)
    assert found.shape == (1, 4 + 3)
    assert found[0, -1] == eos
    assert not (found[0, 4:-1] == eos).any()


def test_no_new_tokens_are_the_prompt(tiny: HookedTransformer) -> None:
    tokens = prompts(tiny, 2, 4)
    np.testing.assert_array_equal(tiny.generate(tokens, 0, **GREEDY), tokens)


@pytest.mark.parametrize("size", [1, 5, 14, 100])
def test_streamed_pieces_together_are_what_generate_returns(size: int, tiny: HookedTransformer) -> None:
    tokens = prompts(tiny, 2, 4)
    options: dict[str, Any] = {"stop_at_eos": False, "verbose": False, "seed": 5, "freq_penalty": 0.1}
    pieces = list(tiny.generate_stream(tokens, 14, size, **options))
    np.testing.assert_array_equal(np.concatenate(pieces, 1), tiny.generate(tokens, 14, **options))
    counts = [piece.shape[1] for piece in pieces]
    first = min(max(size, 4 + 1), 4 + 14)  # the prompt counts, and a token follows it
    rest = 4 + 14 - first
    assert counts == [first] + [size] * (rest // size) + ([rest % size] if rest % size else [])


@pytest.mark.parametrize("size", [1, 4, 100])
def test_streamed_text_together_is_what_generate_returns(size: int, tiny: HookedTransformer) -> None:
    text = "When John and Mary went to the store,"
    options: dict[str, Any] = {"stop_at_eos": False, "verbose": False, "seed": 5, "return_type": "str"}
    pieces = list(tiny.generate_stream(text, 20, size, **options))
    whole = tiny.generate(text, 20, **options)
    assert "".join(pieces) == whole
    assert whole.startswith(text)
    assert len(pieces) > 1 or size == 100
