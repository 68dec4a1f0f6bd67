"""Tokens and strings: BOS rules, padding, round trips, and the two file formats a GPT-2 tokenizer comes in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphlens import HookedTransformer, InputError, ModelFileError
from graphlens.file.tokenizer import Tokenizer, load_tokenizer

PROMPT = "When John and Mary went to the store"


def small(model: HookedTransformer) -> Tokenizer:
    """The model's tokenizer without transformers."""
    found = load_tokenizer(model.runner.engine.folder)
    assert found is not None
    return found


@pytest.fixture
def left(tiny: HookedTransformer) -> HookedTransformer:
    """A model of its own whose tokenizer pads on the left."""
    model = HookedTransformer(tiny.runner.engine)
    model.runner.text.default_padding_side = "left"
    return model


def test_strings_get_bos_unless_told_otherwise(tiny: HookedTransformer) -> None:
    tokens = tiny.to_tokens(PROMPT)
    assert tokens.dtype == np.int64
    assert tokens[0, 0] == tiny.tokenizer.bos_token_id
    np.testing.assert_array_equal(tokens[:, 1:], tiny.to_tokens(PROMPT, prepend_bos=False))
    without = HookedTransformer(tiny.runner.engine, default_prepend_bos=False)
    np.testing.assert_array_equal(without.to_tokens(PROMPT), tokens[:, 1:])
    assert tiny.cfg.default_prepend_bos
    assert tiny.cfg.tokenizer_prepends_bos  # as TransformerLens sets a tokenizer up


def test_prepend_bos_applies_to_strings_only(tiny: HookedTransformer) -> None:
    tokens = tiny.to_tokens(PROMPT, prepend_bos=False)
    np.testing.assert_array_equal(tiny(tokens), tiny(tokens, prepend_bos=True))
    np.testing.assert_array_equal(tiny(tokens), tiny(PROMPT, prepend_bos=False))
    assert tiny(PROMPT).shape[1] == tokens.shape[1] + 1


def test_text_ids_and_lists_are_the_same_input(tiny: HookedTransformer) -> None:
    tokens = tiny.to_tokens(PROMPT)
    for other in (PROMPT, [PROMPT], tokens.tolist(), tokens[0], tokens.astype(np.int32), tokens.astype(np.uint16)):
        np.testing.assert_array_equal(tiny(other), tiny(tokens))


def test_shorter_prompts_are_padded_on_the_right(tiny: HookedTransformer) -> None:
    tokens = tiny.to_tokens([PROMPT, "When John"])
    assert tokens[1, 3:].tolist() == [tiny.tokenizer.pad_token_id] * (tokens.shape[1] - 3)
    alone = tiny.to_tokens("When John")
    np.testing.assert_allclose(tiny(tokens)[1, :3], tiny(alone)[0], rtol=0, atol=1e-4)


def test_padding_on_the_left_puts_bos_right_before_the_text(tiny: HookedTransformer, left: HookedTransformer) -> None:
    texts = [PROMPT, "When John"]
    for tokens in (tiny.to_tokens(texts, padding_side="left"), left.to_tokens(texts)):
        alone = tiny.to_tokens("When John")[0]
        assert tokens[1, -3:].tolist() == alone.tolist()
        assert tokens[1, :-3].tolist() == [tiny.tokenizer.pad_token_id] * (tokens.shape[1] - 3)
        np.testing.assert_array_equal(tokens[0], tiny.to_tokens(PROMPT)[0])
    np.testing.assert_array_equal(left.to_tokens(texts, padding_side="right"), tiny.to_tokens(texts))
    assert left.tokenizer.padding_side == "left"
    assert tiny.tokenizer.padding_side == "right"


def test_the_mask_of_padded_text_comes_from_its_lengths(tiny: HookedTransformer) -> None:
    texts = ["<|endoftext|><|endoftext|> John", "When John and Mary"]
    tokens, mask, real = tiny.runner.text.tokens_and_mask(texts, None, "left")
    assert real is mask
    np.testing.assert_array_equal(tokens, tiny.to_tokens(texts, padding_side="left"))
    lengths = [tiny.to_tokens(text).shape[1] for text in texts]
    assert mask is not None
    assert mask.dtype == np.int64
    assert mask.sum(1).tolist() == lengths
    assert (np.diff(mask, axis=1) >= 0).all()
    unmasked = tiny.runner.text.tokens_and_mask(texts[::-1], None, "right")
    assert unmasked.mask is None
    assert unmasked.real is not None  # it is known all the same
    assert unmasked.real.tolist() == mask[::-1, ::-1].tolist()
    assert tiny.runner.text.tokens_and_mask(["When John", "When Mary"], None, "left")[1] is None
    # On the right it takes other tokens that follow to make a difference.
    assert (
        tiny.runner.text.tokens_and_mask(texts[::-1], None, "right", followed=True)[1].tolist()
        == mask[::-1, ::-1].tolist()
    )


def test_a_mask_for_ids_takes_leading_pads_for_padding(tiny: HookedTransformer, left: HookedTransformer) -> None:
    ids = np.asarray([[0, 0, 0, 5, 0], [1, 0, 2, 3, 4], [0, 0, 0, 0, 0]])
    assert tiny.tokenizer.pad_token_id == tiny.tokenizer.bos_token_id == 0
    with_bos = [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]]
    without = [[0, 0, 0, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]
    assert left.runner.text.tokens_and_mask(ids, None)[1].tolist() == with_bos
    assert left.runner.text.tokens_and_mask(ids, False)[1].tolist() == without
    assert left.runner.text.tokens_and_mask(ids[1:2], None)[1] is None
    assert tiny.runner.text.tokens_and_mask(ids, None)[1] is None
    assert tiny.runner.text.tokens_and_mask(ids, None, "left")[1].tolist() == with_bos
    trailing = [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]
    for bos in (None, False):
        assert tiny.runner.text.tokens_and_mask(ids, bos, "right", followed=True)[1].tolist() == trailing


def test_another_padding_side_is_refused(tiny: HookedTransformer) -> None:
    for call in (
        tiny.to_tokens,
        tiny.to_str_tokens,
        lambda text, padding_side: tiny.runner.text.tokens_and_mask(text, None, padding_side)[0],
    ):
        with pytest.raises(InputError, match="'middle'"):
            call(PROMPT, padding_side="middle")
    with pytest.raises(InputError, match="'up'"):
        tiny.runner.text.default_padding_side = "up"


def test_the_position_of_a_token(tiny: HookedTransformer) -> None:
    text = "When John met Mary, John"
    words = tiny.to_str_tokens(text)
    assert tiny.get_token_position(" John", text) == words.index(" John")
    assert tiny.get_token_position(" John", text, mode="last") == len(words) - 1
    assert tiny.get_token_position(" John", text, prepend_bos=False) == words.index(" John") - 1
    tokens = tiny.to_tokens(text)
    for ids in (tokens, tokens[0], tokens[0].tolist()):
        assert tiny.get_token_position(int(tokens[0, 2]), ids) == 2
    with pytest.raises(InputError, match=r"' store'.*does not occur"):
        tiny.get_token_position(" store", text)
    for absent in (-1, 2**40):
        with pytest.raises(InputError, match=f"token {absent} does not occur"):
            tiny.get_token_position(absent, text)
    with pytest.raises(InputError, match="one prompt, not 2"):
        tiny.get_token_position(1, np.zeros((2, 3), np.int64))
    with pytest.raises(InputError, match="'middle'"):
        tiny.get_token_position(" John", text, mode="middle")


def test_ids_outside_the_vocabulary_have_no_text(tiny: HookedTransformer) -> None:
    last = tiny.cfg.d_vocab - 1
    assert isinstance(tiny.to_single_str_token(last), str)
    assert tiny.to_single_str_token(tiny.to_single_token(" John")) == " John"
    for call in (tiny.to_string, tiny.to_str_tokens, tiny.to_single_str_token):
        for bad in (-1, last + 1):
            with pytest.raises(InputError, match=f"{bad} is outside the vocabulary"):
                call(np.asarray([bad]))
        with pytest.raises(InputError, match="integers"):
            call(np.asarray([1.5]))
    assert tiny.to_string(tiny.to_single_token(" John")) == " John"
    assert tiny.to_string([[1, 2], [3, 4]]) == [tiny.to_string([1, 2]), tiny.to_string([3, 4])]


def test_test_prompt_prints_ranks_logits_and_probabilities(
    tiny: HookedTransformer, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "When John and Mary went to the store, John gave a drink to"
    logits = tiny(text)[0, -1]
    order = np.argsort(-logits)
    tiny.test_prompt(text, "Mary", top_k=3)
    shown = capsys.readouterr().out
    mary = tiny.to_single_token(" Mary")
    rank = order.tolist().index(mary)
    assert f"Ranks of the answer tokens: [(' Mary', {rank})]" in shown
    assert f"Logit: {logits[mary]:6.2f}" in shown
    assert shown.count("Top ") == 3
    assert repr(tiny.to_single_str_token(int(order[2]))) in shown
    tiny.test_prompt(text, [" Mary", " John"], print_details=False)
    shown = capsys.readouterr().out
    john = order.tolist().index(tiny.to_single_token(" John"))
    assert shown == f"Ranks of the answer tokens: [[(' Mary', {rank}), (' John', {john})]]\n"
    tiny.test_prompt(text, " Mary gave", print_details=False)
    assert capsys.readouterr().out.count("(' ") == 2
    with pytest.raises(InputError, match="at least one token"):
        tiny.test_prompt(text, "", prepend_space_to_answer=False)


def test_str_tokens_join_to_the_text_and_follow_their_input(tiny: HookedTransformer) -> None:
    words = tiny.to_str_tokens(PROMPT)
    assert words[0] == tiny.tokenizer.bos_token
    assert "".join(words[1:]) == PROMPT
    tokens = tiny.to_tokens(PROMPT)
    assert tiny.to_str_tokens(tokens) == tiny.to_str_tokens(tokens[0]) == words
    assert tiny.to_str_tokens([PROMPT, "When"]) == [words, tiny.to_str_tokens("When")]
    assert tiny.to_string(tokens[0, 1:]) == PROMPT
    assert tiny.to_string(tokens[:, 1:]) == [PROMPT]
    assert [tiny.to_single_token(word) for word in words] == tokens[0].tolist()


@settings(deadline=None, max_examples=60)
@given(text=st.text(min_size=1, max_size=30))
def test_any_text_survives_the_round_trip(tiny: HookedTransformer, text: str) -> None:
    assert tiny.to_string(tiny.to_tokens(text, prepend_bos=False)[0]) == text


def test_truncation_at_n_ctx(tiny: HookedTransformer) -> None:
    text = " John" * 500
    assert tiny.to_tokens(text).shape == (1, tiny.cfg.n_ctx)
    assert tiny.to_tokens(text, truncate=False).shape == (1, 501)
    with pytest.warns(UserWarning, match="^373 tokens were cut"):
        assert tiny(text).shape == (1, tiny.cfg.n_ctx, tiny.cfg.d_vocab)


def test_the_older_pair_of_files_gives_the_same_tokens(
    tiny: HookedTransformer, tiny_folder: Path, tmp_path: Path
) -> None:
    model = json.loads((tiny_folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    shutil.copyfile(tiny_folder / "tokenizer_config.json", tmp_path / "tokenizer_config.json")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    for text in (PROMPT, "naïve — 3.5€<|endoftext|>again", "  two  spaces\n"):
        assert tokenizer.encode(text, add_special_tokens=False) == tiny.to_tokens(text, prepend_bos=False)[0].tolist()
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id) == (
        tiny.tokenizer.bos_token_id,
        tiny.tokenizer.pad_token_id,
    )


def test_special_tokens_come_from_the_model_config_when_the_tokenizer_names_none(
    tiny_folder: Path, tmp_path: Path
) -> None:
    shutil.copyfile(tiny_folder / "tokenizer.json", tmp_path / "tokenizer.json")
    bare = load_tokenizer(tmp_path)
    assert bare is not None
    assert bare.bos_token_id is None
    with pytest.raises(InputError, match="no BOS"):
        bare.require_bos()
    shutil.copyfile(tiny_folder / "config.json", tmp_path / "config.json")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    assert tokenizer.bos_token == tokenizer.pad_token == "<|endoftext|>"
    config = json.loads((tiny_folder / "config.json").read_text(encoding="utf-8"))
    several = [10**6, config["eos_token_id"], 5]  # a model may end a text by any of several tokens
    (tmp_path / "config.json").write_text(json.dumps({**config, "eos_token_id": several}), encoding="utf-8")
    listed = load_tokenizer(tmp_path)
    assert listed is not None
    assert listed.eos_token_id == config["eos_token_id"]


def test_the_padding_side_is_the_files(tiny_copy: Path) -> None:
    path = tiny_copy / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    for said, side in (("left", "left"), ("right", "right"), (None, "right")):
        path.write_text(json.dumps({**settings, "padding_side": said}), encoding="utf-8")
        model = HookedTransformer.from_onnx(tiny_copy, "cpu")
        assert model.tokenizer.padding_side == model.cfg.default_padding_side == side
        assert (model.to_tokens(["When John", "When"])[1, 0] == model.to_tokens(["When John", "When"])[1, 1]) == (
            side == "left"
        )
    assert HookedTransformer.from_onnx(tiny_copy, "cpu", default_padding_side="left").tokenizer.padding_side == "left"
    path.write_text(json.dumps({**settings, "padding_side": "top"}), encoding="utf-8")
    with pytest.raises(ModelFileError, match=r"padding_side is 'top'"):
        HookedTransformer.from_onnx(tiny_copy, "cpu")


def test_a_tokenizer_can_be_set(tiny: HookedTransformer) -> None:
    model = HookedTransformer(tiny.runner.engine)
    given = Tokenizer(small(tiny).fast, {"eos_token": "<|endoftext|>"})
    model.set_tokenizer(given, default_padding_side="left")
    assert model.tokenizer is given
    assert model.cfg.default_padding_side == "left"
    model.set_tokenizer(given)
    assert model.cfg.default_padding_side == "left"
    with pytest.raises(InputError, match="'up'"):
        model.set_tokenizer(given, "up")
    with pytest.raises(InputError, match="a dict is not a tokenizer of transformers"):
        model.set_tokenizer({})
    assert model.tokenizer is given


def test_a_broken_tokenizer_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelFileError, match="tokenizer files cannot be read"):
        load_tokenizer(tmp_path)


def test_padding_and_truncation_in_a_tokenizer_file_do_not_touch_prompts(tiny: HookedTransformer) -> None:
    from tokenizers import Tokenizer as FastTokenizer

    fast = FastTokenizer.from_str(small(tiny).fast.to_str())
    fast.enable_truncation(4)
    fast.enable_padding(length=6)
    tokenizer = Tokenizer(fast, {"eos_token": "<|endoftext|>"})
    assert tokenizer.encode(PROMPT) == small(tiny).encode(PROMPT)
