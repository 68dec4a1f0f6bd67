"""``model.tokenizer`` beside TransformerLens's, and graphlens's small one, which stands in for it, beside transformers' own."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from lens_oracle import oracle
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerBase

import graphlens
import graphlens.torch
from graphlens import InputError
from graphlens.file.tokenizer import Tokenizer, load_tokenizer
from graphlens.model.held_tokenizer import HeldTokenizer

FOLDER = graphlens.embedded_model()
PROMPT = "When John and Mary went to the store"
TEXTS = [PROMPT, "When John", "naïve — 3.5€<|endoftext|>again", "  two  spaces\n", ""]
GREEDY: dict[str, Any] = {"do_sample": False, "verbose": False, "max_new_tokens": 5}

Call = Callable[[Any], Any]
CALLS: dict[str, Call] = {
    "a text": lambda t: t(PROMPT)["input_ids"],
    "its mask": lambda t: t(PROMPT)["attention_mask"],
    "attributes": lambda t: t(PROMPT).input_ids,
    "several": lambda t: t(TEXTS)["input_ids"],
    "without special tokens": lambda t: t(TEXTS, add_special_tokens=False)["input_ids"],
    "padded": lambda t: dict(t(TEXTS, padding=True)),
    "padded on the left": lambda t: dict(t(TEXTS, padding=True, padding_side="left")),
    "padded to a length": lambda t: dict(t(TEXTS, padding="max_length", max_length=20)),
    "cut": lambda t: dict(t(TEXTS, truncation=True, max_length=4)),
    "arrays": lambda t: t(TEXTS, padding=True, return_tensors="np")["input_ids"].tolist(),
    "an array": lambda t: t(PROMPT, return_tensors="np")["input_ids"].tolist(),
    "no mask": lambda t: list(t(PROMPT, return_attention_mask=False)),
    "encode": lambda t: [t.encode(text) for text in TEXTS],
    "encode without special tokens": lambda t: [t.encode(text, add_special_tokens=False) for text in TEXTS],
    "decode": lambda t: t.decode(t.encode(PROMPT)),
    "decode one": lambda t: t.decode(7),
    "decode an array": lambda t: t.decode(np.asarray([7, 8])),
    "decode without special tokens": lambda t: t.decode(t.encode(PROMPT), skip_special_tokens=True),
    "batch_decode": lambda t: t.batch_decode([t.encode(text) for text in TEXTS], clean_up_tokenization_spaces=False),
    "batch_decode one row": lambda t: t.batch_decode([5, 6, 7]),
    "tokenize": lambda t: [t.tokenize(text) for text in TEXTS],
    "convert_tokens_to_ids": lambda t: t.convert_tokens_to_ids(t.tokenize(PROMPT)),
    "the id of a token": lambda t: t.convert_tokens_to_ids("the"),
    "of no token": lambda t: t.convert_tokens_to_ids("no such token"),
    "convert_ids_to_tokens": lambda t: t.convert_ids_to_tokens([0, 5, 6]),
    "the token of an id": lambda t: t.convert_ids_to_tokens(5),
    "skipping": lambda t: t.convert_ids_to_tokens([0, 5, 6], skip_special_tokens=True),
    "convert_tokens_to_string": lambda t: t.convert_tokens_to_string(t.tokenize(PROMPT)),
    "vocab": lambda t: t.vocab == t.get_vocab() and sorted(t.vocab.items()),
    "sizes": lambda t: (t.vocab_size, len(t)),
    "tokens": lambda t: (t.bos_token, t.eos_token, t.pad_token, t.unk_token, t.mask_token, t.sep_token, t.cls_token),
    "ids": lambda t: (t.bos_token_id, t.eos_token_id, t.pad_token_id, t.unk_token_id, t.mask_token_id),
    "all special": lambda t: (t.all_special_tokens, t.all_special_ids),
    "the map": lambda t: dict(t.special_tokens_map),
    "sides": lambda t: (t.padding_side, t.truncation_side),
    "the longest": lambda t: t.model_max_length,
    "fast": lambda t: t.is_fast,
}


def opened(face: Any = graphlens.torch, **options: Any) -> Any:
    return face.HookedTransformer.from_onnx(FOLDER, "cpu", **options)


def words(**roles: str) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of words, with a few special tokens or none."""
    vocab = {word: index for index, word in enumerate(["<s>", "</s>", "<p>", "<u>", *"abcdefgh"])}
    fast = FastTokenizer(WordLevel(vocab, unk_token="<u>"))
    fast.pre_tokenizer = Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=fast, **roles)


# What it is


@pytest.mark.parametrize("face", [graphlens, graphlens.torch], ids=lambda face: face.__name__)
def test_it_is_one_of_transformers(face: Any) -> None:
    model = opened(face)
    found = model.tokenizer
    assert isinstance(found, PreTrainedTokenizerBase)
    assert model.tokenizer is found
    assert found.name_or_path == model.cfg.tokenizer_name
    assert model.cfg.tokenizer_prepends_bos
    model.tokenizer = None
    assert model.tokenizer is None
    del model.tokenizer
    assert model.tokenizer is found


@pytest.mark.parametrize("call", CALLS)
def test_it_answers_as_transformerlens_does(call: str, lens: Any, model: Any) -> None:
    assert CALLS[call](model.tokenizer) == CALLS[call](lens.tokenizer)


def test_tensors_are_transformerlens(lens: Any, model: Any) -> None:
    mine, theirs = (
        either.tokenizer(TEXTS, padding=True, truncation=True, max_length=6, return_tensors="pt")
        for either in (model, lens)
    )
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(mine[name], value)
    assert model.tokenizer.batch_decode(mine["input_ids"]) == lens.tokenizer.batch_decode(theirs["input_ids"])


def test_the_model_asks_it_as_before(model: Any) -> None:
    before = opened()
    assert "real" not in vars(before.runner.text.tokenizer)
    model.tokenizer(TEXTS, padding="max_length", truncation=True, max_length=3)  # which it keeps inside
    for text in (PROMPT, TEXTS):
        for bos in (True, False):
            assert torch.equal(model.to_tokens(text, prepend_bos=bos), before.to_tokens(text, prepend_bos=bos))
        assert model.to_str_tokens(text) == before.to_str_tokens(text)
    tokens = before.to_tokens(TEXTS)
    assert model.to_string(tokens) == before.to_string(tokens)
    assert model.to_single_token(" John") == before.to_single_token(" John")


# What is set on it


def set_side(tokenizer: Any) -> None:
    tokenizer.padding_side = "left"


def set_pad(tokenizer: Any) -> None:
    tokenizer.pad_token = " the" if " the" in tokenizer.get_vocab() else "Ġthe"


def set_pad_id(tokenizer: Any) -> None:
    tokenizer.pad_token_id = 11
    tokenizer.padding_side = "left"


def set_bos(tokenizer: Any) -> None:
    tokenizer.bos_token = "a"
    tokenizer.add_bos_token = True


def set_cut(tokenizer: Any) -> None:
    tokenizer.truncation_side = "left"


@pytest.mark.parametrize("change", [set_side, set_pad, set_pad_id, set_bos, set_cut])
def test_what_is_set_on_it_holds_as_there(change: Callable[[Any], None]) -> None:
    found = []
    for either in (opened(), oracle(FOLDER, tokenizer=True)):
        change(either.tokenizer)
        texts = [PROMPT, "When John", "John John " * 80]
        tokens = either.to_tokens(texts)
        pair = either.to_tokens(texts[:2])
        given = either.to_tokens(texts[:2], padding_side="left")
        found.append(
            (tokens, pair, either(pair), either.generate(texts[:2], **GREEDY), either.generate(given, **GREEDY))
        )
    for mine, theirs in zip(*found, strict=True):
        if not isinstance(theirs, torch.Tensor):
            assert mine == theirs
        elif theirs.is_floating_point():
            torch.testing.assert_close(mine, theirs, rtol=0, atol=5e-4)
        else:
            assert torch.equal(mine, theirs)


def test_an_end_token_that_is_set_ends_a_generation() -> None:
    found = []
    for either in (opened(), oracle(FOLDER, tokenizer=True)):
        free = either.generate(PROMPT, return_type="tokens", stop_at_eos=False, **GREEDY)
        either.tokenizer.eos_token = either.tokenizer.convert_ids_to_tokens(int(free[0, -3]))
        found.append(either.generate(PROMPT, return_type="tokens", **GREEDY))
        assert found[-1].shape[1] < free.shape[1]
    assert torch.equal(*found)


def test_a_token_that_is_added_is_outside_the_model() -> None:
    model = opened()
    assert model.tokenizer.add_special_tokens({"pad_token": "[PAD]"}) == 1
    assert model.to_tokens(["When John", "When"])[1, -1] == model.cfg.d_vocab
    with pytest.raises(InputError, match=f"token id {model.cfg.d_vocab} is outside the vocabulary"):
        model(["When John", "When"])


# One that is given


@pytest.mark.parametrize("how", ["set", "opened with"])
def test_one_that_puts_bos_first_is_the_models_own(how: str) -> None:
    given = transformers.AutoTokenizer.from_pretrained(FOLDER, add_bos_token=True)
    model = opened(tokenizer=given if how == "opened with" else None)
    if how == "set":
        model.set_tokenizer(given)
    assert model.tokenizer is given
    model.tokenizer = None
    del model.tokenizer
    assert (model.tokenizer is given) == (how == "opened with")


def test_one_that_does_not_is_copied_and_left_alone(lens: Any) -> None:
    given = transformers.AutoTokenizer.from_pretrained(FOLDER)
    plain = given(PROMPT)["input_ids"]
    model = opened()
    model.set_tokenizer(given, default_padding_side="left")
    assert model.tokenizer(PROMPT)["input_ids"] == lens.tokenizer(PROMPT)["input_ids"] == [0, *plain]
    assert given(PROMPT)["input_ids"] == plain
    assert (given.padding_side, model.tokenizer.padding_side) == ("right", "left")
    model.tokenizer = given  # as an attribute it stays as it is
    assert model.tokenizer is given
    assert not model.cfg.tokenizer_prepends_bos
    assert torch.equal(model.to_tokens(PROMPT), lens.to_tokens(PROMPT))


@pytest.mark.parametrize(
    "roles",
    [
        {},
        {"eos_token": "</s>"},
        {"bos_token": "<s>", "eos_token": "</s>"},
        {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<p>", "padding_side": "left"},
    ],
    ids=str,
)
def test_missing_special_tokens_are_transformerlens(roles: dict[str, str], lens: Any, tmp_path: Path) -> None:
    words(**roles).save_pretrained(tmp_path)  # TransformerLens loads it again
    model, theirs = opened(), copy.copy(lens)
    theirs.cfg = copy.copy(lens.cfg)
    for either in (model, theirs):
        either.set_tokenizer(transformers.AutoTokenizer.from_pretrained(tmp_path))
    for name in ("bos_token", "eos_token", "pad_token"):
        assert getattr(model.tokenizer, name) == getattr(theirs.tokenizer, name), name
    assert model.tokenizer.padding_side == theirs.tokenizer.padding_side
    texts = ["a b c", "d", "b a"]
    if not roles:  # TransformerLens breaks down inside transformers
        with pytest.raises(TypeError):
            theirs.to_tokens("a", prepend_bos=False)
        with pytest.raises(InputError, match="no BOS token"):
            model.to_tokens("a")
        with pytest.raises(InputError, match="need a PAD token"):
            model.to_tokens(texts, prepend_bos=False)
        assert model.to_tokens("a b c", prepend_bos=False).tolist() == [[4, 5, 6]]
        return
    for bos in (False, True):
        assert torch.equal(model.to_tokens(texts, prepend_bos=bos), theirs.to_tokens(texts, prepend_bos=bos))


def test_one_without_the_tokenizers_package_is_asked_too() -> None:
    given = transformers.ByT5Tokenizer()
    model = opened(tokenizer=given)
    assert model.tokenizer is given
    texts = ["a b", "naïve"]
    expected = [given.encode(text, add_special_tokens=False) for text in texts]
    assert [model.to_tokens(text, prepend_bos=False)[0].tolist() for text in texts] == expected
    padded = given(texts, add_special_tokens=False, padding=True, return_tensors="pt")["input_ids"]
    assert torch.equal(model.to_tokens(texts, prepend_bos=False), padded)
    assert model.to_string(model.to_tokens(texts[1], prepend_bos=False)[0]) == texts[1]


def test_what_is_none_is_refused() -> None:
    model = opened()
    own = model.tokenizer
    for call in (model.set_tokenizer, lambda given: setattr(model, "tokenizer", given)):
        with pytest.raises(InputError, match="a dict is not a tokenizer of transformers"):
            call({})
    with pytest.raises(InputError, match=r"model\.tokenizer = None"):
        model.set_tokenizer(None)
    assert model.tokenizer is own


@pytest.mark.parametrize("copied", [lambda value: pickle.loads(pickle.dumps(value)), copy.deepcopy])
def test_a_copy_of_the_model_has_its_own(copied: Any, lens: Any) -> None:
    model = opened()
    model.tokenizer.padding_side = "left"
    other = copied(model)
    assert isinstance(other.tokenizer, PreTrainedTokenizerBase)
    assert torch.equal(other.to_tokens(TEXTS[:2]), lens.to_tokens(TEXTS[:2], padding_side="left"))
    other.tokenizer.padding_side = "right"
    assert model.tokenizer.padding_side == "left"


# The small one


@pytest.fixture
def small() -> Tokenizer:
    found = load_tokenizer(FOLDER)
    assert found is not None
    found.put_bos_first()
    return found


@pytest.mark.parametrize("call", CALLS)
def test_the_small_one_answers_as_transformers_does(call: str, small: Tokenizer, model: Any) -> None:
    assert CALLS[call](small) == CALLS[call](model.tokenizer)


def test_the_small_one_cuts_on_the_left_as_transformers_does(small: Tokenizer) -> None:
    real = opened().tokenizer
    for tokenizer in (small, real):
        tokenizer.truncation_side = tokenizer.padding_side = "left"
    options = {"padding": True, "truncation": True, "max_length": 4}
    assert dict(small(TEXTS, **options)) == dict(real(TEXTS, **options))


def test_its_name_is_the_one_that_the_hub_knows() -> None:
    """AutoTokenizer.from_pretrained(model.tokenizer.name_or_path) finds it again, as in TransformerLens."""
    engine = opened().runner.engine
    manifest = dataclasses.replace(engine.manifest, source="someone/theirs")
    for held in (
        HeldTokenizer(SimpleNamespace(manifest=manifest), load_tokenizer(FOLDER)).tokenizer,  # type: ignore[arg-type]
        HeldTokenizer(SimpleNamespace(manifest=manifest), load_tokenizer(FOLDER)).exposed,  # type: ignore[arg-type]
    ):
        assert held is not None
        assert held.name_or_path == "someone/theirs"


def test_without_transformers_the_small_one_stands_in(monkeypatch: pytest.MonkeyPatch, lens: Any) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not installed
    model = opened()
    small = model.tokenizer
    assert isinstance(small, Tokenizer)
    assert small.name_or_path == model.cfg.tokenizer_name
    assert small(PROMPT)["input_ids"] == lens.tokenizer(PROMPT)["input_ids"]
    with pytest.raises(AttributeError, match=r"small tokenizer has no 'apply_chat_template'.*pip install transformers"):
        small.apply_chat_template([])
    with pytest.raises(InputError, match="'pt': this is graphlens's small tokenizer"):
        small(PROMPT, return_tensors="pt")
    with pytest.raises(InputError, match="no such token"):
        small.pad_token = "[PAD]"
    small.padding_side = "left"
    assert torch.equal(model.to_tokens(TEXTS[:2]), lens.to_tokens(TEXTS[:2], padding_side="left"))
    monkeypatch.undo()
    assert isinstance(model.tokenizer, PreTrainedTokenizerBase)
    assert model.tokenizer.padding_side == "left"


def test_settings_that_transformers_cannot_take_leave_the_small_one(tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**settings, "model_input_names": [["no name"]], "chat_template": "{{ bad"}), "utf-8")
    model = graphlens.HookedTransformer.from_onnx(tmp_path / "model", "cpu")
    found = model.tokenizer
    assert found(PROMPT)["input_ids"] == opened().tokenizer(PROMPT)["input_ids"]
