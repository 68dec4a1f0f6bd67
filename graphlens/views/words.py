"""The tokens of a run as text to show, and which of its positions are tokens and not padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from graphlens.errors import InputError, checked_number
from graphlens.views.encoded import Json
from graphlens.views.labelled import Array

LONGEST = 90  # characters of a token that go into a page, which shows 120 with those that say how many there were


@runtime_checkable
class Tokenizing(Protocol):
    """A model that turns text and ids into the text of each token."""

    @property
    def tokenizer(self) -> object:
        """Its tokenizer; None where it has none."""

    def to_str_tokens(self, input: Array, /) -> object:
        """The text of each token."""

    def to_tokens(self, input: str, /) -> object:
        """The ids of a text, [1, p]."""

    def to_single_token(self, string: str, /) -> int:
        """The id of a text that is one token."""


def model_of(cache: object) -> Tokenizing | None:
    """The model whose run a cache is of; None where the cache knows of none.

    Args:
        cache: An ActivationCache, or a dictionary.
    """
    found = getattr(cache, "model", None)
    return found if isinstance(found, Tokenizing) else None


def words(tokens: object, length: int, model: Tokenizing | None = None, real: Array | None = None) -> list[str]:
    """The text of each position.

    Args:
        tokens: The text of each token, the prompt, or ids [p] or [1, p].
        length: How many positions there are.
        model: The model that ran, for a prompt and for ids; ids of a model without tokenizer are shown as numbers.
        real: Which positions are no padding; tokens may be those of them alone. None for all.

    Returns:
        The text of each real position.

    Raises:
        InputError: For another number of tokens, and for a prompt where there is no tokenizer.
    """
    found = _texts(tokens, model)
    if real is not None and len(found) == length:
        return [found[i] for i in real]
    if len(found) != (length if real is None else len(real)):
        hint = " Give the tokens that ran: a BOS token may be missing." if isinstance(tokens, str) else ""
        raise InputError(f"there are {len(found)} tokens for a run of {length} positions.{hint}")
    return found


def _texts(tokens: object, model: Tokenizing | None) -> list[str]:
    """The text of each token, however many there are."""
    ids = ids_of(tokens, model)
    if ids is not None:
        return text_of_ids(ids, model)
    assert isinstance(tokens, list | tuple)
    return [str(token) for token in tokens]


def ids_of(tokens: object, model: Tokenizing | None) -> list[int] | None:
    """The id of each token; None where tokens are given as texts.

    Args:
        tokens: See ``words``.
        model: See there.

    Raises:
        InputError: For a prompt where there is no tokenizer, and for what is neither texts nor ids of one prompt.
    """
    if isinstance(tokens, list | tuple) and tokens and all(isinstance(token, str) for token in tokens):
        return None
    if isinstance(tokens, str):
        tokenizing = model if model is not None and model.tokenizer is not None else None
        if tokenizing is None:
            raise InputError("there is no tokenizer to split the prompt: give the text of each token, or their ids.")
        tokens = tokenizing.to_tokens(tokens)
    ids = np.asarray(tokens)
    if ids.ndim == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or not ids.size:
        raise InputError("tokens are the text of each token, the prompt, or ids [p]; of several prompts give one.")
    return [int(token) for token in ids]


def id_of(token: int | str, model: Tokenizing | None) -> int:
    """The id of one token that a user named.

    Args:
        token: An id, or a text of one token.
        model: The model that knows.

    Raises:
        InputError: For a text where there is no tokenizer, and for one of several tokens.
    """
    if not isinstance(token, str):
        return checked_number(token, "answer", least=0)
    tokenizing = model if model is not None and model.tokenizer is not None else None
    if tokenizing is None:
        raise InputError(f"there is no tokenizer that knows {token!r}: give the token's id.")
    return tokenizing.to_single_token(token)


def text_of_ids(ids: Sequence[int], model: Tokenizing | None) -> list[str]:
    """The text of each id; the ids themselves where there is no tokenizer.

    Args:
        ids: Token ids.
        model: The model that knows.
    """
    tokenizing = model if model is not None and model.tokenizer is not None else None
    found = None if tokenizing is None else tokenizing.to_str_tokens(np.asarray(ids, np.int64))
    return [str(text) for text in found] if isinstance(found, list) else [str(token) for token in ids]


def sent(texts: Sequence[str]) -> list[Json]:
    """Tokens as they go into a page: cut, where they are very long, with their length said."""
    return [text if len(text) <= LONGEST else f"{text[:LONGEST]}… ({len(text)} characters)" for text in texts]


def one_prompt(array: Array, axes: int, prompt: int, what: str) -> Array:
    """The part of an activation that is of one prompt.

    Args:
        array: [*b, ...].
        axes: How many axes it has without that of prompts.
        prompt: Which prompt.
        what: How an error calls it.

    Raises:
        InputError: For a prompt that is not there, and for an array of another number of axes.
    """
    if array.ndim == axes:
        return array
    if array.ndim != axes + 1:
        raise InputError(f"{what} has shape {list(array.shape)}: it is of {axes} axes, and one of prompts before them.")
    at = checked_number(prompt, "prompt", least=-len(array), most=len(array) - 1)
    chosen: Array = array[at]
    return chosen


def real_positions(cache: Mapping[str, object], prompt: int, length: int) -> Array:
    """The positions of a prompt that are no padding, as far as its cache knows of padding; all of them otherwise.

    Args:
        cache: The run's cache.
        prompt: Which prompt.
        length: How many positions there are.
    """
    mask = getattr(cache, "mask", None)
    if mask is not None:
        rows = np.asarray(mask).reshape(-1, np.asarray(mask).shape[-1])
        if rows.shape[-1] == length and -len(rows) <= prompt < len(rows):
            return np.flatnonzero(rows[prompt])
    return np.arange(length)


def chosen(asked: Sequence[int] | slice | None, count: int, what: str) -> Array:
    """Indices that a user chose of so many.

    Args:
        asked: Indices, a slice, or None for all.
        count: How many there are.
        what: The argument's name.

    Raises:
        InputError: For an index that is not there, and for none.
    """
    if asked is None:
        return np.arange(count)
    if isinstance(asked, slice):
        found = np.arange(count)[asked]
    else:
        found = np.asarray([checked_number(i, what, least=-count, most=count - 1) % count for i in asked], np.int64)
    if not found.size:
        raise InputError(f"{what}={asked!r} chooses none of {count}.")
    return found
