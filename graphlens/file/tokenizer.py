"""Tokenizing: a folder's tokenizer files, and the BOS, EOS and PAD rules that they state. No transformers needed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from graphlens.errors import InputError, ModelFileError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as FastTokenizer

_ROLES = ("bos_token", "eos_token", "pad_token")


class Tokenizer:
    """A tokenizer read from a model folder.

    ``bos_token_id``, ``eos_token_id`` and ``pad_token_id`` are token ids or None; PAD falls back on EOS, as in
    TransformerLens. ``prepends_bos`` says whether encoding adds BOS by itself. ``padding_side``, "right" or "left", is
    where the model pads prompts of different lengths; set it to change that. Methods are named as transformers'.
    """

    def __init__(self, fast: FastTokenizer, special: Mapping[str, str], padding_side: str = "right") -> None:
        fast.no_padding()  # tokenizer files may ask for both, and encode would then pad and cut unasked
        fast.no_truncation()
        self.fast = fast
        self.padding_side = padding_side
        self._special = special
        self.bos_token_id = self._id("bos_token")
        self.eos_token_id = self._id("eos_token")
        self.pad_token_id = self._id("pad_token") if "pad_token" in special else self.eos_token_id
        plain = fast.encode("a", add_special_tokens=True).ids
        self.prepends_bos = bool(plain) and self.bos_token_id is not None and plain[0] == self.bos_token_id

    @classmethod
    def from_transformers(cls, tokenizer: Any) -> Self:
        """A copy of a transformers tokenizer. Raises InputError for one that is not backed by ``tokenizers``."""
        from tokenizers import Tokenizer as FastTokenizer

        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, FastTokenizer):
            raise InputError(
                f"a {type(tokenizer).__name__} is not a fast tokenizer: load it with AutoTokenizer and use_fast=True."
            )
        roles = {role: getattr(tokenizer, role, None) for role in _ROLES}
        special = {role: str(token) for role, token in roles.items() if token is not None}
        return cls(FastTokenizer.from_str(backend.to_str()), special, getattr(tokenizer, "padding_side", "right"))

    def _id(self, role: str) -> int | None:
        token = self._special.get(role)
        return None if token is None else self.fast.token_to_id(token)

    @property
    def vocab_size(self) -> int:
        """The number of tokens, added ones included."""
        return int(self.fast.get_vocab_size(with_added_tokens=True))

    @property
    def bos_token(self) -> str | None:
        """The text of the BOS token."""
        return self._special.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        """The text of the EOS token."""
        return self._special.get("eos_token")

    @property
    def pad_token(self) -> str | None:
        """The text of the PAD token; EOS's where the files name none."""
        return self._special.get("pad_token", self.eos_token)

    def __len__(self) -> int:
        return self.vocab_size

    def get_vocab(self) -> dict[str, int]:
        """Every token as the tokenizer writes it, and its id."""
        return dict(self.fast.get_vocab(with_added_tokens=True))

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of ``text``; without special tokens around it, unlike transformers, unless they are asked for."""
        return list(self.fast.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, tokens: Any, skip_special_tokens: bool = False) -> str:
        """The text of token ids [p] (or of one id), special tokens included unless told otherwise."""
        ids = np.atleast_1d(np.asarray(tokens, np.int64)).tolist()
        return str(self.fast.decode(ids, skip_special_tokens=skip_special_tokens))

    def batch_decode(self, tokens: Any, skip_special_tokens: bool = False) -> list[str]:
        """The text of each row of token ids."""
        return [self.decode(row, skip_special_tokens) for row in tokens]

    def __call__(self, text: str | Sequence[str], add_special_tokens: bool = False) -> dict[str, Any]:
        """{"input_ids": ids} of a text, or a list of them per text; ``model.to_tokens`` also pads and adds BOS."""
        if isinstance(text, str):
            return {"input_ids": self.encode(text, add_special_tokens)}
        return {"input_ids": [self.encode(each, add_special_tokens) for each in text]}

    def require_bos(self) -> int:
        """The BOS id. Raises InputError when the tokenizer has none."""
        if self.bos_token_id is None:
            raise InputError("this tokenizer has no BOS token: pass prepend_bos=False.")
        return self.bos_token_id


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a model folder, or None when it holds no tokenizer files. Raises ModelFileError for bad ones."""
    from tokenizers import Tokenizer as FastTokenizer

    try:
        if (folder / "tokenizer.json").is_file():
            fast = FastTokenizer.from_file(str(folder / "tokenizer.json"))
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            fast = _byte_level(folder)
        else:
            return None
        return Tokenizer(fast, _special_tokens(folder, fast), _padding_side(folder))
    except Exception as error:  # tokenizers raises bare Exception for a malformed file
        raise ModelFileError(f"{folder}: its tokenizer files cannot be read ({error}).") from error


def _byte_level(folder: Path) -> FastTokenizer:
    """GPT-2's byte-level BPE from the older pair of files, vocab.json and merges.txt."""
    from tokenizers import AddedToken, decoders, pre_tokenizers
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers.models import BPE

    fast = FastTokenizer(BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    special = [name for name in ("<|endoftext|>",) if fast.token_to_id(name) is not None]
    fast.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    return fast


def _padding_side(folder: Path) -> str:
    path = folder / "tokenizer_config.json"
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    side = data.get("padding_side") or "right"
    if side not in ("left", "right"):
        raise ValueError(f"padding_side is {side!r}, neither 'left' nor 'right'")
    return str(side)


def _special_tokens(folder: Path, fast: FastTokenizer) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / name
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for role in _ROLES:
            token = data.get(role)
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str) and fast.token_to_id(text) is not None:
                found[role] = text
    if (folder / "config.json").is_file():
        ids = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        for role in ("bos_token", "eos_token"):
            index = ids.get(f"{role}_id")
            if role not in found and isinstance(index, int) and (text := fast.id_to_token(index)) is not None:
                found[role] = text
    return found
