"""Generation and its KV cache on the torch face, beside TransformerLens 3.9: padding, end tokens, streams, hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformer_lens import TransformerLensKeyValueCache

import graphlens
import graphlens.torch
from graphlens import InputError
from graphlens.torch import HookedTransformer, KeyValueCache

PROMPT = "When John and Mary went to the store, John gave a drink to"
TEXTS = [PROMPT, "When John", "The cat sat on the"]
GREEDY: dict[str, Any] = {"do_sample": False, "verbose": False, "max_new_tokens": 8}
FLAGS = ("use_attn_result", "use_split_qkv_input", "use_attn_in", "use_hook_mlp_in")


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return HookedTransformer.from_onnx(graphlens.embedded_model(), "cpu")


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert float((found - expected).abs().max()) <= 5e-5 * max(1.0, float(expected.abs().max()))


def same(found: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        assert isinstance(found, torch.Tensor)
        assert torch.equal(found, expected)
    else:
        assert found == expected


# The cache


def cache_of(either: Any, batch: int) -> Any:
    kind = KeyValueCache if isinstance(either, HookedTransformer) else TransformerLensKeyValueCache
    return kind.init_cache(either.cfg, either.cfg.device, batch)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cuts", [(), (5,), (2, 3, 9), tuple(range(1, 12))], ids=str)
def test_cached_logits_of_padded_ids(model: HookedTransformer, lens: Any, side: str, cuts: tuple[int, ...]) -> None:
    tokens = lens.to_tokens(TEXTS, padding_side=side)
    found = []
    for either in (model, lens):
        cache = cache_of(either, 3)
        pieces = [either(piece, past_kv_cache=cache, padding_side=side) for piece in tokens.tensor_split(cuts, 1)]
        found.append(torch.cat(pieces, 1))
    close(*found)


@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_of_unequal_lengths_continued(model: HookedTransformer, lens: Any, side: str) -> None:
    found = []
    for either in (model, lens):
        cache = cache_of(either, 3)
        first = either(["When John and Mary went", "The cat", "A"], past_kv_cache=cache, padding_side=side)
        second = either([" and", " to", " the"], past_kv_cache=cache, padding_side=side, prepend_bos=False)
        found.append((first, second))
    close(found[0][0], found[1][0])
    close(found[0][1], found[1][1])
    close(found[0][1][1, -1], lens("The cat to")[0, -1])


def test_a_frozen_cache_and_a_device(model: HookedTransformer, lens: Any) -> None:
    tokens = lens.to_tokens(PROMPT)
    found = []
    for either in (model, lens):
        cache = cache_of(either, 1)
        either(tokens[:, :6], past_kv_cache=cache)
        cache.freeze()
        pieces = [either(tokens[:, 6:at], past_kv_cache=cache) for at in (9, 8)]
        cache.unfreeze()
        found.append([*pieces, either(tokens[:, 6:], past_kv_cache=cache)])
    for mine, theirs in zip(*found, strict=True):
        close(mine, theirs)


# Which tokens


@pytest.mark.parametrize("use_past_kv_cache", [True, False])
@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("given", [PROMPT, [PROMPT], TEXTS, "ids"], ids=["one", "a list of one", "three", "ids"])
def test_generated_text_and_tokens(
    model: HookedTransformer, lens: Any, given: Any, side: str | None, use_past_kv_cache: bool
) -> None:
    options = {**GREEDY, "use_past_kv_cache": use_past_kv_cache, **({} if side is None else {"padding_side": side})}
    found = [
        either.generate(lens.to_tokens(PROMPT) if given == "ids" else given, **options) for either in (model, lens)
    ]
    same(*found)


@pytest.mark.parametrize("return_type", ["str", "tokens"])
def test_what_generating_returns(model: HookedTransformer, lens: Any, return_type: str) -> None:
    for given in (PROMPT, TEXTS, lens.to_tokens(PROMPT)):
        mine, theirs = (either.generate(given, return_type=return_type, **GREEDY) for either in (model, lens))
        same(mine, theirs)


def test_a_list_is_padded_on_the_left_whatever_the_side(model: HookedTransformer) -> None:
    for side in ("right", "left"):
        found = model.generate(["When John", PROMPT], padding_side=side, **GREEDY)
        assert found == [model.generate(text, **GREEDY) for text in ("When John", PROMPT)]


@pytest.mark.parametrize("bos", [True, False])
def test_a_bos_of_ids_is_seen(model: HookedTransformer, lens: Any, bos: bool) -> None:
    tokens = lens.to_tokens(PROMPT)
    mine, theirs = (either.generate(tokens, prepend_bos=bos, **GREEDY) for either in (model, lens))
    same(mine, theirs)
    seen: list[int] = []
    with model.hooks(
        fwd_hooks=[("blocks.0.attn.hook_pattern", lambda x, hook: seen.append(float(x[0, :, 1, 0].min())))]
    ):
        model.generate(tokens, max_new_tokens=1, prepend_bos=bos, verbose=False)
    assert seen[0] > 0  # the second token attends to the first


@pytest.mark.parametrize("bos", [True, False])
def test_padding_of_ids_is_where_the_side_says(model: HookedTransformer, lens: Any, bos: bool) -> None:
    left = lens.to_tokens(TEXTS, padding_side="left", prepend_bos=bos)
    for side in ({}, {"padding_side": "left"}):
        mine, theirs = (either.generate(left, prepend_bos=bos, **side, **GREEDY) for either in (model, lens))
        same(mine, theirs)
    assert model.to_string(mine[1]).endswith(model.generate(TEXTS[1], prepend_bos=bos, **GREEDY))


def test_ids_padded_on_the_right_are_refused(model: HookedTransformer) -> None:
    right = model.to_tokens(TEXTS)
    with pytest.raises(InputError, match=r"last token of a prompt is padding: .*attention_mask"):
        model.generate(right, **GREEDY)
    ended = torch.cat([right[:1], torch.zeros(1, 1, dtype=torch.int64)], 1)  # alone it has nothing to be padded to
    same(model.generate(ended, **GREEDY), model.generate(ended, attention_mask=torch.ones_like(ended), **GREEDY))


@pytest.mark.parametrize("kind", [list, tuple, int], ids=lambda kind: kind.__name__)
def test_end_tokens(model: HookedTransformer, lens: Any, kind: Any) -> None:
    free = model.generate(TEXTS, stop_at_eos=False, return_type="tokens", **GREEDY)
    new = free[:, -GREEDY["max_new_tokens"] :]
    ends = [int(new[0, 2]), int(new[1, 4])]  # ids that do come up, whatever the model was trained on
    options = {**GREEDY, "eos_token_id": ends[0] if kind is int else kind(ends), "return_type": "tokens"}
    mine, theirs = (either.generate(TEXTS, **options) for either in (model, lens))
    same(mine, theirs)
    assert bool((mine != free[:, : mine.shape[1]]).any()), "nothing was filled up"


def test_without_an_end_token_of_its_own_the_first_fills_up() -> None:
    bare = HookedTransformer.from_onnx(graphlens.embedded_model(), "cpu")
    tokens = torch.arange(1, 9).view(2, 4)
    free = bare.generate(tokens, stop_at_eos=False, **GREEDY)
    row = 0 if free[0, 4] != free[1, 4] else 1
    ends = [int(free[row, 4]), int(free[row, 4]), int(free[1 - row, 7])]
    bare.tokenizer.eos_token_id = None
    found = bare.generate(tokens, eos_token_id=ends, **GREEDY)
    assert (found[row, 5:] == ends[0]).all()


@pytest.mark.parametrize("size", [1, 5, 16, 18, 100])
def test_streams_have_transformerlens_pieces(model: HookedTransformer, lens: Any, size: int) -> None:
    for given in (PROMPT, lens.to_tokens(PROMPT)):
        for more in ({}, {"max_new_tokens": 0}, {"max_new_tokens": 1}):
            options = {**GREEDY, "max_tokens_per_yield": size, **more}
            mine, theirs = (list(either.generate_stream(given, **options)) for either in (model, lens))
            assert len(mine) == len(theirs)
            for one, other in zip(mine, theirs, strict=True):
                same(one, other)


# Hooks


def act(value: torch.Tensor, hook: Any) -> torch.Tensor:
    return value * 0.9


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("use_past_kv_cache", [True, False])
def test_flagged_hooks_while_generating(
    model: HookedTransformer, lens: Any, flag: str, use_past_kv_cache: bool
) -> None:
    names = ("hook_q_input", "hook_attn_in", "hook_result", "hook_mlp_in")
    found = []
    for either in (model, lens):
        getattr(either, f"set_{flag}")(True)
        try:
            seen: list[tuple[int, ...]] = []

            def edit(value: torch.Tensor, hook: Any, seen: list[Any] = seen) -> torch.Tensor:
                seen.append(tuple(value.shape))
                return act(value, hook)

            with either.hooks(fwd_hooks=[(lambda name: name.endswith(names), edit)]):
                text = either.generate(TEXTS, use_past_kv_cache=use_past_kv_cache, stop_at_eos=False, **GREEDY)
        finally:
            getattr(either, f"set_{flag}")(False)
        found.append((text, seen))
    assert found[0] == found[1]
    assert len(found[0][1]) == model.cfg.n_layers * GREEDY["max_new_tokens"]


@pytest.mark.parametrize("flag", FLAGS)
def test_flagged_hooks_under_left_padding_with_a_cache(model: HookedTransformer, lens: Any, flag: str) -> None:
    tokens = lens.to_tokens(TEXTS, padding_side="left")
    found = []
    for either in (model, lens):
        getattr(either, f"set_{flag}")(True)
        try:
            cache = cache_of(either, 3)
            with either.hooks(fwd_hooks=[(lambda name: name.endswith(("_input", "attn_in", "result", "mlp_in")), act)]):
                pieces = [
                    either.run_with_cache(piece, past_kv_cache=cache, padding_side="left")
                    for piece in tokens.tensor_split((9, 10), 1)
                ]
        finally:
            getattr(either, f"set_{flag}")(False)
        found.append(pieces)
    for (mine, activations), (theirs, reference) in zip(*found, strict=True):
        close(mine, theirs)
        assert list(activations) == list(reference)
        for name, value in reference.items():
            finite = torch.isfinite(value)
            assert torch.equal(torch.isfinite(activations[name]), finite), name
            close(activations[name][finite], value[finite])


@pytest.mark.parametrize("part", ["k", "v"])
def test_an_edited_key_or_value_stays_in_the_cache(model: HookedTransformer, lens: Any, part: str) -> None:
    tokens = lens.to_tokens(PROMPT)
    found = []
    for either in (model, lens):
        cache = cache_of(either, 1)
        either.run_with_hooks(
            tokens[:, :7], fwd_hooks=[(f"blocks.1.attn.hook_{part}", lambda x, hook: -x)], past_kv_cache=cache
        )
        found.append(either(tokens[:, 7:], past_kv_cache=cache))
    close(*found)
    assert float((found[0] - model(tokens)[:, 7:]).abs().max()) > 1e-2


def test_the_torch_face_has_the_names() -> None:
    assert graphlens.torch.ActivationCache is graphlens.ActivationCache
    assert graphlens.torch.KeyValueCache is graphlens.torch.HookedTransformerKeyValueCache is graphlens.KeyValueCache
    assert graphlens.torch.TransformerLensKeyValueCache is graphlens.KeyValueCache
