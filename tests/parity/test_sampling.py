"""Seeds, and what else ``generate`` takes and gives, beside TransformerLens 3.9 and transformers."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformer_lens import HookedTransformer as LensTransformer
from transformer_lens import utilities as lens_utils

import graphlens
from graphlens import InputError
from graphlens.model.sampling import GenerateOutput, sample_logits
from graphlens.torch import HookedTransformer

PROMPT = "When John and Mary went to the store, John gave a drink to"
TEXTS = [PROMPT, "When John", "The cat sat on the"]
QUIET: dict[str, Any] = {"verbose": False, "max_new_tokens": 20}
GREEDY: dict[str, Any] = {"do_sample": False, "verbose": False, "max_new_tokens": 8}
HOW: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 10_000},
    {"top_p": 0.9},
    {"top_p": 0.3, "temperature": 1.5},
    {"top_p": 1.0},
    {"freq_penalty": 0.8},
    {"freq_penalty": 2.0, "top_k": 20, "temperature": 1.3},
    {"temperature": 0.0},
]


def same(found: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        assert isinstance(found, torch.Tensor)
        assert torch.equal(found, expected)
    else:
        assert found == expected


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert float((found - expected).abs().max()) <= 5e-5 * max(1.0, float(expected.abs().max()))


# Signatures


@pytest.mark.parametrize("method", ["generate", "generate_stream", "to_tokens", "to_string", "to_str_tokens", "to_single_token",
                                    "to_single_str_token", "get_token_position", "tokens_to_residual_directions",
                                    "set_tokenizer", "input_to_embed", "sample_datapoint"])  # fmt: skip
def test_arguments_are_transformerlens_in_their_order(method: str) -> None:
    def taken(owner: type) -> list[tuple[str, Any, Any]]:
        parameters = inspect.signature(getattr(owner, method)).parameters.values()
        return [(each.name, each.default, each.kind) for each in parameters if each.kind is not each.VAR_KEYWORD]

    theirs = taken(LensTransformer)
    assert taken(HookedTransformer)[: len(theirs)] == theirs


# Seeds


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("given", [PROMPT, TEXTS], ids=["one", "three"])
def test_a_seed_of_torch_draws_transformerlens_tokens(how: dict[str, Any], given: Any, model: Any, lens: Any) -> None:
    found = []
    for either in (model, lens):
        torch.manual_seed(11)
        first = either.generate(given, return_type="tokens", **QUIET, **how)
        found.append((first, either.generate(given, return_type="tokens", **QUIET, **how), torch.rand(1)))
    for mine, theirs in zip(*found, strict=True):
        same(mine, theirs)


def never_the_end(logits: torch.Tensor, hook: Any) -> torch.Tensor:
    logits[..., 0] = -1e4
    return logits


def test_a_seed_draws_the_same_with_and_without_a_cache_and_in_a_stream(model: Any, lens: Any) -> None:
    found, warm = [], {"return_type": "tokens", "temperature": 1.7, "stop_at_eos": False, **QUIET}
    # TransformerLens's stream takes an end token that it has generated for padding.
    hooks = [("unembed.hook_out", never_the_end)]
    with model.hooks(fwd_hooks=hooks), lens.hooks(fwd_hooks=hooks):
        for options in ({}, {"use_past_kv_cache": False}):
            torch.manual_seed(3)
            found.append(model.generate(PROMPT, **warm, **options))
        for either in (model, lens):
            torch.manual_seed(3)
            found.append(torch.cat(list(either.generate_stream(PROMPT, **warm)), 1))
        for other in found[1:]:
            same(other, found[0])
        torch.manual_seed(5)
        assert not torch.equal(model.generate(PROMPT, **warm), found[0])


def test_a_seed_that_is_an_argument_leaves_torchs_alone(model: Any) -> None:
    torch.manual_seed(5)
    expected = model.generate(PROMPT, **QUIET)
    torch.manual_seed(8)
    after = torch.rand(1)
    torch.manual_seed(8)
    assert model.generate(PROMPT, seed=5, **QUIET) == expected
    assert torch.equal(torch.rand(1), after)


def test_a_seed_of_numpy_governs_arrays(tiny: graphlens.HookedTransformer) -> None:
    found = []
    for seed in (0, 0, 1):
        np.random.seed(seed)
        found.append(tiny.generate(PROMPT, return_type="tokens", **QUIET))
    np.testing.assert_array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])
    np.random.seed(0)
    logits = np.asarray(tiny(PROMPT))[:, -1]
    drawn = sample_logits(logits)
    np.random.seed(0)
    assert drawn == (logits.astype(np.float64) + np.random.gumbel(size=logits.shape)).argmax(-1)


# Single draws


@pytest.mark.parametrize("penalty", [1.0, 1.7, 0.5])
@pytest.mark.parametrize("how", HOW, ids=str)
def test_sample_logits_is_transformerlens(how: dict[str, Any], penalty: float) -> None:
    torch.manual_seed(0)
    logits, tokens = torch.randn(64, 101) * 3, torch.randint(0, 101, (64, 7))
    found = []
    for function in (sample_logits, lens_utils.sample_logits):
        torch.manual_seed(1)
        found.append(function(logits.clone(), tokens=tokens, repetition_penalty=penalty, **how))
    same(*found)


def test_the_repetition_penalty_is_hugging_faces() -> None:
    torch.manual_seed(0)
    logits, tokens = torch.randn(64, 101) * 3, torch.randint(0, 101, (64, 30))
    tokens[:, 3] = tokens[:, 9]  # it counts once
    processor = transformers.RepetitionPenaltyLogitsProcessor(1.3)
    expected = processor(tokens, logits.clone()).argmax(-1)
    assert (expected != logits.argmax(-1)).any()
    same(sample_logits(logits, temperature=0, repetition_penalty=1.3, tokens=tokens), expected)
    mine = sample_logits(logits.numpy(), temperature=0, repetition_penalty=1.3, tokens=tokens.numpy())
    np.testing.assert_array_equal(mine, expected.numpy())


def test_generating_with_a_repetition_penalty_is_hugging_faces(model: Any) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(graphlens.embedded_model(), attn_implementation="eager")
    tokens = model.to_tokens(PROMPT)
    plain = model.generate(tokens, stop_at_eos=False, **GREEDY)
    for penalty in (1.4, 0.7):
        theirs.generation_config.eos_token_id = None
        expected = theirs.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=8, repetition_penalty=penalty,
            pad_token_id=0,
        )  # fmt: skip
        for cached in (True, False):
            options = {"repetition_penalty": penalty, "stop_at_eos": False, "use_past_kv_cache": cached}
            same(model.generate(tokens, **options, **GREEDY), expected)
            pieces = list(model.generate_stream(tokens, **options, **GREEDY))
            same(torch.cat(pieces, 1), expected)
        assert not torch.equal(expected, plain)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"repetition_penalty": 0}, "more than 0"),
        ({"repetition_penalty": float("nan")}, "finite"),
        ({"freq_penalty": 1.0}, "needs the tokens so far"),
        ({"repetition_penalty": 2.0}, "needs the tokens so far"),
        ({"repetition_penalty": 2.0, "tokens": np.asarray([[1, 99]])}, "from 0 to 4"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], said: str) -> None:
    for logits in (np.zeros((1, 5), np.float32), torch.zeros(1, 5)):
        with pytest.raises(InputError, match=said):
            sample_logits(logits, **options)
    with pytest.raises(InputError, match=r"\[batch, vocabulary\]"):
        sample_logits(np.zeros(5))


# Embeddings


def shortened(value: torch.Tensor, hook: Any) -> torch.Tensor:
    return value * 0.7


@pytest.mark.parametrize("hooked", [False, True], ids=["plain", "hooked"])
@pytest.mark.parametrize("use_past_kv_cache", [True, False])
@pytest.mark.parametrize("return_type", ["input", "embeds", "tokens", "str"])
def test_embeddings_are_continued(
    return_type: str, use_past_kv_cache: bool, hooked: bool, model: Any, lens: Any
) -> None:
    tokens = lens.to_tokens([PROMPT, f"{PROMPT} John"])[:, :9]
    given = lens.embed(tokens) + 0.3 * torch.randn(tokens.shape[0], tokens.shape[1], lens.cfg.d_model)
    options = {**GREEDY, "use_past_kv_cache": use_past_kv_cache, "return_type": return_type, "stop_at_eos": False}
    found = []
    for either in (model, lens):
        with either.hooks(fwd_hooks=[("blocks.1.attn.hook_z", shortened)] if hooked else []):
            found.append(either.generate(given, **options))
            # With a cache TransformerLens adds other positions than the tokens have: see docs/parity.md.
            options["use_past_kv_cache"] = False
    mine, theirs = found
    if return_type in ("input", "embeds"):
        close(mine, theirs)
        assert mine.shape == (2, 9 + 8, lens.cfg.d_model)
    else:
        same(mine, theirs)


def test_embeddings_of_tokens_are_continued_as_the_tokens(model: Any, tiny: graphlens.HookedTransformer) -> None:
    tokens = model.to_tokens(PROMPT)
    expected = model.generate(tokens, **GREEDY)
    torch.manual_seed(0)
    drawn = model.generate(tokens, **QUIET)
    torch.manual_seed(0)
    same(model.generate(model.embed(tokens), return_type="tokens", **QUIET), drawn[:, tokens.shape[1] :])
    same(model.generate(model.embed(tokens), return_type="tokens", **GREEDY), expected[:, tokens.shape[1] :])
    arrays = tiny.generate(tiny.embed(tokens.numpy()), return_type="tokens", **GREEDY)
    np.testing.assert_array_equal(arrays, expected[:, tokens.shape[1] :])


@pytest.mark.parametrize("given", [PROMPT, TEXTS, "ids"], ids=["one", "three", "ids"])
def test_tokens_come_as_embeddings(given: Any, model: Any, lens: Any) -> None:
    given = lens.to_tokens(PROMPT) if given == "ids" else given
    close(*(either.generate(given, return_type="embeds", **GREEDY) for either in (model, lens)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"freq_penalty": 1.0}, "count tokens"),
        ({"repetition_penalty": 1.5}, "count tokens"),
        ({"attention_mask": [[0, 1, 1]]}, "cannot be padded"),
        ({"max_new_tokens": 1000}, "too many"),
    ],
)
def test_what_embeddings_do_not_tell_is_refused(options: dict[str, Any], said: str, model: Any) -> None:
    given = torch.zeros(1, 3, model.cfg.d_model)
    with pytest.raises(InputError, match=said):
        model.generate(given, **{**QUIET, **options})
    with pytest.raises(InputError, match=r"embeddings are numbers \[batch, pos, "):
        model.generate(torch.zeros(1, 3, model.cfg.d_model + 1), **QUIET)
    with pytest.raises(InputError, match="a stream gives tokens or text"):
        next(model.generate_stream(given, **QUIET))


# The rest of what is taken and given


@pytest.mark.parametrize("return_type", ["str", "tokens", "embeds"])
@pytest.mark.parametrize("given", [PROMPT, TEXTS], ids=["one", "three"])
def test_logits_come_along(given: Any, return_type: str, model: Any, lens: Any) -> None:
    options = {"output_logits": True, "return_dict_in_generate": True, "return_type": return_type, **GREEDY}
    mine, theirs = (either.generate(given, **options) for either in (model, lens))
    assert type(mine) is type(theirs)
    same(mine.sequences, theirs.sequences)
    assert len(mine.logits) == len(theirs.logits)
    for one, other in zip(mine.logits, theirs.logits, strict=True):
        close(one, other)


def test_logits_of_embeddings_and_of_draws(model: Any, lens: Any, tiny: graphlens.HookedTransformer) -> None:
    given = lens.embed(lens.to_tokens(PROMPT))
    found = []
    for either in (model, lens):
        torch.manual_seed(2)
        options = {"output_logits": True, "temperature": 2.0, "use_past_kv_cache": either is model}
        found.append(either.generate(given, **options, **QUIET))
    same(found[0].sequences, found[1].sequences)
    for one, other in zip(found[0].logits, found[1].logits, strict=True):
        close(one, other)
    arrays = tiny.generate(PROMPT, output_logits=True, **GREEDY)
    assert isinstance(arrays, GenerateOutput)
    assert arrays["sequences"] is arrays.sequences is arrays[0]
    whole = tiny(arrays.sequences[:, :-1])[:, -len(arrays.logits) :]
    assert np.abs(np.stack(arrays.logits, 1) - whole).max() <= 5e-5 * np.abs(whole).max()
    with pytest.raises(AttributeError, match="scores"):
        arrays.scores  # noqa: B018


def test_unknown_arguments_are_ignored_with_a_warning(model: Any, lens: Any) -> None:
    options = {"num_beams": 3, "typical_p": 0.5, **GREEDY}
    with pytest.warns(UserWarning, match=r"ignored: generate\(\) has no num_beams, typical_p") as caught:
        mine = model.generate(PROMPT, **options)
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="ignoring"):
        theirs = lens.generate(PROMPT, **options)
    same(mine, theirs)
    with pytest.warns(UserWarning, match=r"max_new_token \(did you mean max_new_tokens\?\)"):
        model.generate(PROMPT, max_new_token=3, **GREEDY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(PROMPT, return_dict_in_generate=True, **GREEDY)
    with pytest.raises(TypeError):
        next(model.generate_stream(PROMPT, num_beams=3, **GREEDY))


# Text and tokens


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("bos", [None, False])
def test_what_a_run_begins_with(side: str, bos: bool | None, model: Any, lens: Any) -> None:
    for either in (model, lens):
        either.tokenizer.padding_side = side
    try:
        for given in (PROMPT, TEXTS, lens.to_tokens(TEXTS)):
            mine, theirs = (either.input_to_embed(given, prepend_bos=bos) for either in (model, lens))
            close(mine[0], theirs[0])
            same(mine[1], theirs[1])
            assert mine[2] is theirs[2] is None
            same(mine[3], theirs[3])
    finally:
        for either in (model, lens):
            either.tokenizer.padding_side = "right"


def test_what_a_masked_and_a_cached_run_begins_with(model: Any, lens: Any) -> None:
    from transformer_lens import TransformerLensKeyValueCache

    tokens = lens.to_tokens(PROMPT)
    mask = torch.ones_like(tokens)
    mask[:, :3] = 0
    for mine, theirs in zip(
        *(either.input_to_embed(tokens, attention_mask=mask) for either in (model, lens)), strict=True
    ):
        (close if isinstance(theirs, torch.Tensor) and theirs.is_floating_point() else same)(mine, theirs)
    found = []
    for either, kind in ((model, graphlens.KeyValueCache), (lens, TransformerLensKeyValueCache)):
        cache = kind.init_cache(either.cfg, either.cfg.device, 1)
        either(tokens[:, :5], past_kv_cache=cache)
        found.append(either.input_to_embed(tokens[:, 5:], past_kv_cache=cache))
    close(found[0][0], found[1][0])
    same(found[0][3], found[1][3])


def whole(value: Any) -> Any:
    return value.float()


@pytest.mark.parametrize("as_given", [whole, lambda ids: ids.numpy(), lambda ids: ids.float().numpy(), lambda ids: ids],
                         ids=["floats", "arrays", "arrays of floats", "ids"])  # fmt: skip
def test_ids_are_shown_whatever_their_dtype(as_given: Callable[[Any], Any], model: Any, lens: Any) -> None:
    ids = lens.to_tokens(PROMPT)
    for given in (as_given(ids), as_given(ids)[None], as_given(ids[0]), [as_given(ids[0]), as_given(ids[0, :3])]):
        assert model.to_str_tokens(given) == lens.to_str_tokens(given)
    if torch.is_tensor(as_given(ids)):
        token = lens.to_single_token(" John")
        for one in (token, torch.tensor(token), torch.tensor([token])):
            assert model.get_token_position(one, as_given(ids)) == lens.get_token_position(one, as_given(ids))


def test_a_data_set_of_ones_own_is_drawn_from(model: Any, lens: Any) -> None:
    found = []
    for either in (model, lens):
        either.dataset = [{"text": text} for text in TEXTS]
        np.random.seed(0)
        drawn = [either.sample_datapoint() for _ in range(6)]
        found.append((drawn, either.sample_datapoint(tokenize=True), either.sample_datapoint(True, prepend_bos=False)))
    assert found[0][0] == found[1][0]
    same(found[0][1], found[1][1])
    same(found[0][2], found[1][2])
    fresh = HookedTransformer.from_onnx(graphlens.embedded_model(), "cpu")
    with pytest.raises(InputError, match=r"set model\.dataset"):
        fresh.sample_datapoint()
