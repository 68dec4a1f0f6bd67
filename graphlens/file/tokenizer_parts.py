"""What a tokenizer is asked with and answers with: checked texts and ids, special tokens, what a call gives, and panics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from graphlens.errors import InputError, ModelFileError

# The special tokens that transformers knows by name.
ROLES = ("bos_token", "eos_token", "pad_token", "mask_token", "unk_token", "sep_token", "cls_token")
_LARGEST_ID = 2**32 - 1  # that the tokenizers package takes


@contextmanager
def asking(path: Path | str) -> Iterator[None]:
    """A block that calls the tokenizers package: an error of it becomes one that names the tokenizer's file.

    Args:
        path: The file that the tokenizer came from, or what it is called.

    Raises:
        ModelFileError: The package panicked (its exception is no ``Exception``, so that nothing else would catch it), or
            refused the text: a vocabulary that lacks the token for unknown words, say.
    """
    try:
        yield
    except BaseException as error:
        # The class of a panic has no public name; all other errors of the package are plain exceptions of no class of their own.
        if type(error).__name__ != "PanicException" and type(error) is not Exception:
            raise
        raise ModelFileError(
            f"{path}: the tokenizers package broke down over this tokenizer and text ({error}). Use the files that the "
            "model's authors published, or a shorter text."
        ) from error


class _HasRoles(Protocol):
    """What the attributes of special tokens are read from and written to."""

    def role(self, name: str) -> str | None: ...

    def role_id(self, name: str) -> int | None: ...

    def set_role(self, name: str, token: str | int | None) -> None: ...


class Role:
    """A special token as an attribute that may be set: its text."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, tokenizer: _HasRoles | None, owner: type) -> str | None:
        return None if tokenizer is None else tokenizer.role(self.name)

    def __set__(self, tokenizer: _HasRoles, token: str | None) -> None:
        tokenizer.set_role(self.name, token)


class RoleId:
    """A special token as an attribute that may be set: its id."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name.removesuffix("_id")

    def __get__(self, tokenizer: _HasRoles | None, owner: type) -> int | None:
        return None if tokenizer is None else tokenizer.role_id(self.name)

    def __set__(self, tokenizer: _HasRoles, token: int | None) -> None:
        tokenizer.set_role(self.name, token)


class Encoded(dict[str, object]):
    """What a call of a tokenizer gives: ``input_ids`` and ``attention_mask``, as keys and as attributes."""

    def __getattr__(self, name: str) -> object:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"there is no {name!r}: there is {', '.join(self)}.") from None


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


def checked_ids(tokens: npt.ArrayLike) -> list[int]:
    """Token ids as a list.

    Args:
        tokens: Integers [p], or one.

    Raises:
        InputError: For what is no id of a token.
    """
    try:
        array = np.atleast_1d(np.asarray(tokens))
    except ValueError as error:
        raise InputError("token ids [p] are wanted, not ragged lists.") from error
    whole = array.dtype.kind in "iu" or not array.size
    if not whole or array.ndim != 1 or (array.size and (array.min() < 0 or array.max() > _LARGEST_ID)):
        raise InputError(f"token ids [p], integers from 0, are wanted, not {tokens!r:.60}.")
    return [int(token) for token in array]


def is_one(tokens: object) -> bool:
    """True for a single token id."""
    return isinstance(tokens, int | float) or getattr(tokens, "ndim", None) == 0
