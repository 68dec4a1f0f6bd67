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
from graphlens.tokenizer import load_tokenizer

PROMPT = "When John and Mary went to the store"


def test_strings_get_bos_unless_told_otherwise(tiny: HookedTransformer) -> None:
    tokens = tiny.to_tokens(PROMPT)
    assert tokens.dtype == np.int64
    assert tokens[0, 0] == tiny.tokenizer.bos_token_id
    np.testing.assert_array_equal(tokens[:, 1:], tiny.to_tokens(PROMPT, prepend_bos=False))
    without = HookedTransformer(tiny._engine, default_prepend_bos=False)
    np.testing.assert_array_equal(without.to_tokens(PROMPT), tokens[:, 1:])
    assert tiny.cfg.default_prepend_bos
    assert tiny.cfg.tokenizer_prepends_bos is False


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
    with pytest.raises(InputError, match="at most 128"):
        tiny(text)


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
        assert tokenizer.encode(text) == tiny.tokenizer.encode(text)
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


def test_a_broken_tokenizer_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelFileError, match="tokenizer files cannot be read"):
        load_tokenizer(tmp_path)
