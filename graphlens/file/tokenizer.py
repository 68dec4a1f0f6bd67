"""Tokenizing: a folder's tokenizer files, and the BOS, EOS and PAD rules that they state. No transformers needed."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Concatenate, ParamSpec, Protocol, Self, TypeVar, overload

import numpy as np
import numpy.typing as npt

from graphlens.errors import InputError, ModelFileError
from graphlens.file.folder import CONFIG_FILE
from graphlens.file.io_names import INPUT_IDS
from graphlens.file.settings import read_settings
from graphlens.file.tokenizer_check import (
    MAX_TOKENS,
    asking,
    check_tokenizer,
    read_checked,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer as FastTokenizer

    from graphlens.file.manifest import Json

_ROLES = ("bos_token", "eos_token", "pad_token", "mask_token")
_SETTINGS = "tokenizer_config.json"
TOKENIZER_FILE, VOCAB_FILE, MERGES_FILE = "tokenizer.json", "vocab.json", "merges.txt"
_LARGEST_ID = 2**32 - 1  # that the tokenizers package takes
Taken = ParamSpec("Taken")
Given = TypeVar("Given")


def _asking(method: Callable[Concatenate[Tokenizer, Taken], Given]) -> Callable[Concatenate[Tokenizer, Taken], Given]:
    """A method in which a panic of the tokenizers package becomes an error that names the tokenizer's file."""

    @functools.wraps(method)
    def wrapped(self: Tokenizer, /, *args: Taken.args, **kwargs: Taken.kwargs) -> Given:
        with asking(self.source):
            return method(self, *args, **kwargs)

    return wrapped


class TransformersTokenizer(Protocol):
    """What is asked of a tokenizer of transformers."""

    @property
    def backend_tokenizer(self) -> FastTokenizer:
        """The tokenizer of the tokenizers package that it is made of."""


class Tokenizer:
    """A tokenizer, with methods named as transformers' are. It needs no transformers.

    Attributes:
        fast: The tokenizer of the tokenizers package.
        padding_side: "right" or "left": where the model pads prompts of different lengths. It may be set.
        bos_token_id: The id of the BOS token, or None; where the files name none, EOS's, as in TransformerLens.
        eos_token_id: The id of the EOS token, or None.
        pad_token_id: The id of the PAD token; where the files name none, EOS's, as in TransformerLens.
        mask_token_id: The id of the token that stands for a masked one, or None.
        prepends_bos: True if encoding with special tokens puts BOS before a text.
        source: The file that it was loaded from, or what it is called in messages.
    """

    def __init__(
        self,
        fast: FastTokenizer,
        special: Mapping[str, str],
        padding_side: str = "right",
        source: Path | str = "the tokenizer",
    ) -> None:
        """Takes a tokenizer of the tokenizers package.

        Args:
            fast: That tokenizer; its own padding and truncation are switched off.
            special: "bos_token", "eos_token", "pad_token" and "mask_token" -> their texts, as far as there are any.
            padding_side: Where the model pads prompts of different lengths.
            source: The file that it was loaded from, or what it is called in messages.

        Raises:
            ModelFileError: The tokenizers package cannot encode with it.
        """
        self.source = source
        fast.no_padding()  # tokenizer files may ask for both, and encode would then pad and cut unasked
        fast.no_truncation()
        self.fast = fast
        self.padding_side = padding_side
        self._special = special
        self.eos_token_id = self._id("eos_token")
        self.bos_token_id = self._id("bos_token") if "bos_token" in special else self.eos_token_id
        self.pad_token_id = self._id("pad_token") if "pad_token" in special else self.eos_token_id
        self.mask_token_id = self._id("mask_token")
        plain = self.encode("a", add_special_tokens=True)
        self.prepends_bos = bool(plain) and self.bos_token_id is not None and plain[0] == self.bos_token_id

    @classmethod
    def from_transformers(cls, tokenizer: TransformersTokenizer) -> Self:
        """A copy of a transformers tokenizer.

        Args:
            tokenizer: A fast one, that is, one made of the tokenizers package.

        Raises:
            InputError: It is not a fast tokenizer.
        """
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
        """The id of a special token, or None."""
        token = self._special.get(role)
        return None if token is None else self.fast.token_to_id(token)

    @property
    def vocab_size(self) -> int:
        """The number of tokens, added ones included."""
        return int(self.fast.get_vocab_size(with_added_tokens=True))

    @property
    def bos_token(self) -> str | None:
        """The text of the BOS token; EOS's where the files name none."""
        return self._special.get("bos_token", self.eos_token)

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

    @_asking
    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """The token ids of a text.

        Args:
            text: The text.
            add_special_tokens: Put special tokens around it as the tokenizer's files say; transformers does so unasked.

        Raises:
            InputError: It is no text, or holds what is no character.
        """
        return list(self.fast.encode(checked_text(text), add_special_tokens=add_special_tokens).ids)

    @_asking
    def decode(self, tokens: npt.ArrayLike, skip_special_tokens: bool = False) -> str:
        """The text of token ids.

        Args:
            tokens: Integers [p], or one.
            skip_special_tokens: Leave out special tokens.

        Raises:
            InputError: For what is no id of a token.
        """
        ids = _ids(tokens)
        return str(self.fast.decode(ids, skip_special_tokens=skip_special_tokens))

    def batch_decode(self, tokens: Iterable[npt.ArrayLike], skip_special_tokens: bool = False) -> list[str]:
        """The text of each row of token ids.

        Args:
            tokens: Integers [b, p], or rows of different lengths.
            skip_special_tokens: Leave out special tokens.
        """
        if not isinstance(tokens, Iterable):
            raise InputError(f"rows of token ids are wanted, not {tokens!r:.60}.")
        return [self.decode(row, skip_special_tokens) for row in tokens]

    @overload
    def __call__(self, text: str, add_special_tokens: bool = False) -> dict[str, list[int]]: ...  # type: ignore[overload-overlap]

    @overload
    def __call__(self, text: Sequence[str], add_special_tokens: bool = False) -> dict[str, list[list[int]]]: ...

    def __call__(
        self, text: str | Sequence[str], add_special_tokens: bool = False
    ) -> dict[str, list[int]] | dict[str, list[list[int]]]:
        """The token ids of a text or of several, as ``{"input_ids": ids}``; ``model.to_tokens`` also pads and adds BOS.

        Args:
            text: A text, for a list of ids, or a list of texts, for a list of lists.
            add_special_tokens: Put special tokens around each as the tokenizer's files say.
        """
        if isinstance(text, (str, bytes)) or not isinstance(text, Iterable):
            return {INPUT_IDS: self.encode(text, add_special_tokens)}
        return {INPUT_IDS: [self.encode(each, add_special_tokens) for each in text]}

    def require_bos(self) -> int:
        """The id of the BOS token.

        Raises:
            InputError: The tokenizer has none.
        """
        if self.bos_token_id is None:
            raise InputError("this tokenizer has no BOS token: pass prepend_bos=False.")
        return self.bos_token_id


def checked_text(text: object) -> str:
    """The text as it is, if it is text.

    Args:
        text: What a user gave.

    Raises:
        InputError: It is something else, or holds half a surrogate pair, which is no character.
    """
    if not isinstance(text, str):
        hint = ": decode it first, with text.decode()" if isinstance(text, bytes) else ""
        raise InputError(f"{text!r:.60} is no text but {type(text).__name__}{hint}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the text {text!a:.60} holds {text[error.start]!a} at index {error.start}, which is no character but half of a "
            "pair, or a byte that was not UTF-8 where the text was read. Read it with errors='replace', or in its own encoding."
        ) from error
    return text


def _ids(tokens: npt.ArrayLike) -> list[int]:
    """Token ids as a list."""
    try:
        array = np.atleast_1d(np.asarray(tokens))
    except ValueError as error:
        raise InputError("token ids [p] are wanted, not ragged lists.") from error
    whole = array.dtype.kind in "iu" or not array.size
    if not whole or array.ndim != 1 or (array.size and (array.min() < 0 or array.max() > _LARGEST_ID)):
        raise InputError(f"token ids [p], integers from 0, are wanted, not {tokens!r:.60}.")
    return [int(token) for token in array]


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a model folder.

    Args:
        folder: A checkpoint or hooked folder.

    Returns:
        The tokenizer, or None if the folder holds no tokenizer files.

    Raises:
        ModelFileError: The files are malformed.
    """
    from tokenizers import Tokenizer as FastTokenizer

    file = next((folder / name for name in (TOKENIZER_FILE, VOCAB_FILE) if (folder / name).is_file()), None)
    if file is None or (file.name == VOCAB_FILE and not (folder / MERGES_FILE).is_file()):
        return None
    try:
        with asking(file):
            if file.name == TOKENIZER_FILE:
                data = read_checked(file)
                check_tokenizer(data, file)
                fast = FastTokenizer.from_buffer(data)  # the bytes that were checked, and no other file of that name
            else:
                fast = _byte_level(folder)
            return Tokenizer(fast, _special_tokens(folder, fast), _padding_side(folder), file)
    except ModelFileError:
        raise
    except Exception as error:  # tokenizers raises bare Exception for a malformed file
        raise ModelFileError(f"{folder}: its tokenizer files cannot be read ({error}).") from error


def _byte_level(folder: Path) -> FastTokenizer:
    """The byte-level BPE of the older pair of files, vocab.json and merges.txt, which GPT-2's checkpoints hold."""
    from tokenizers import AddedToken, decoders, pre_tokenizers
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers.models import BPE

    vocab = json.loads(read_checked(folder / VOCAB_FILE))
    lines = read_checked(folder / MERGES_FILE).decode().replace("\r\n", "\n").removesuffix("\n").split("\n")
    merges = [(left, right) for line in lines if not line.startswith("#version") for left, right in [line.split(" ")]]
    if not isinstance(vocab, dict) or max(len(vocab), len(merges)) > MAX_TOKENS:
        raise ValueError(f"{VOCAB_FILE} is no vocabulary, or has more than {MAX_TOKENS:,} tokens")
    fast = FastTokenizer(BPE(vocab, merges))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    special = [name for name in ("<|endoftext|>",) if fast.token_to_id(name) is not None]
    fast.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    return fast


def _padding_side(folder: Path) -> str:
    """The padding side that a folder's tokenizer settings name, else "right"."""
    side = read_settings(folder / _SETTINGS).get("padding_side") or "right"
    if side not in ("left", "right"):
        raise ValueError(f"padding_side is {side!r}, neither 'left' nor 'right'")
    return str(side)


def _special_tokens(folder: Path, fast: FastTokenizer) -> dict[str, str]:
    """Role -> text of the special tokens that a folder's files name, the tokenizer's settings before the model's."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", _SETTINGS):
        data = read_settings(folder / name)
        for role in _ROLES:
            token = data.get(role)
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str) and fast.token_to_id(text) is not None:
                found[role] = text
    config = read_settings(folder / CONFIG_FILE)
    for role in ("bos_token", "eos_token"):
        if role not in found and (text := _first_token(config.get(f"{role}_id"), fast)) is not None:
            found[role] = text
    return found


def _first_token(ids: Json, fast: FastTokenizer) -> str | None:
    """The text of a token id, or of the first that the tokenizer knows of a list of ids."""
    texts = (fast.id_to_token(index) for index in (ids if isinstance(ids, list) else [ids]) if isinstance(index, int))
    return next((text for text in texts if text is not None), None)
