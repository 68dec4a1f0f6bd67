"""Text on the command line as tokens and back; token ids where a model has no tokenizer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias, cast

import numpy as np

from graphlens.errors import InputError

if TYPE_CHECKING:
    from graphlens.analysis.arrays import Array
    from graphlens.model.hooked_encoder import HookedEncoder
    from graphlens.model.hooked_transformer import HookedTransformer

    TextModel: TypeAlias = "HookedTransformer | HookedEncoder"

_IDS = re.compile(r"\s*\d+(?:[\s,]+\d+)*\s*")


def tokens_of(model: TextModel, what: str, text: str, bos: bool | None, ids: bool = False) -> Array:
    """A text as tokens [1, p]; for a model without tokenizer the ids that it spells.

    Args:
        model: The model.
        what: How a message calls the text: "the prompt", "--clean".
        text: The text.
        bos: Whether it gets a BOS token; None for what the model does. Ids get none.
        ids: True reads ids though there is a tokenizer.

    Raises:
        InputError: For a text that spells no ids where it must, and for ``bos`` with ids.
    """
    if model.tokenizer is not None and not ids:
        if not model.runner.config.is_encoder:
            return np.asarray(model.runner.text.padded(text, bos, truncate=False))
        if bos is not None:
            raise InputError(
                f"--{'bos' if bos else 'no-bos'}: an encoder's tokenizer puts special tokens of its own around a text. Leave "
                "it out, or give ids (--ids)."
            )
        return np.asarray([model.runner.text.encode(text, None, truncate=False)], np.int64)
    if not _IDS.fullmatch(text):
        if ids:
            raise InputError(
                f"--ids: {what} is {text!r:.60}, and not token ids with spaces or commas between them: '0 5 6 7'."
            )
        raise InputError(
            f"{model.runner.engine.folder} has no tokenizer: give token ids in place of {what}, with spaces or commas between "
            f'them: "0 5 6 7". Or name a tokenizer: --tokenizer FOLDER.'
        )
    if bos:
        raise InputError(f"--bos: {what} is token ids, which run as they are. Put the id of the BOS token first.")
    return np.asarray([[int(part) for part in re.findall(r"\d+", text)]], np.int64)


def texts_of(model: TextModel, ids: Sequence[int] | Array) -> list[str]:
    """The text of each token; its id for a model without tokenizer.

    Args:
        model: The model.
        ids: Token ids [p].
    """
    if model.tokenizer is None:
        return [str(int(token)) for token in ids]
    return cast("list[str]", model.to_str_tokens(np.asarray(ids)))


def text_of(model: TextModel, ids: Sequence[int] | Array) -> str:
    """The text of tokens together; their ids for a model without tokenizer.

    Args:
        model: The model.
        ids: Token ids [p].
    """
    return " ".join(texts_of(model, ids)) if model.tokenizer is None else str(model.to_string(ids))


def answer_of(model: TextModel, what: str, token: str, ids: bool = False) -> str | int:
    """An answer as a metric takes it: its text, or its id for a model without tokenizer.

    Args:
        model: The model.
        what: The option that gives it.
        token: What was given.
        ids: True reads an id though there is a tokenizer.

    Raises:
        InputError: For what is no id where it must be one.
    """
    if model.tokenizer is not None and not ids:
        return token
    if not token.strip().isdecimal():
        why = "--ids" if ids else f"{model.runner.engine.folder} has no tokenizer"
        raise InputError(f"{why}: {what} takes a token id, not {token!r}.")
    return int(token)
