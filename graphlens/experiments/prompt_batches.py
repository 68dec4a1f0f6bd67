"""Prompts of any lengths as token ids, and which of them are run together: those of one length, so that nothing is padded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeAlias, cast

from graphlens.analysis.arrays import Array, ArrayInput, ArrayT, as_array
from graphlens.errors import InputError, InputTypeError
from graphlens.model.text import is_text

if TYPE_CHECKING:
    from graphlens.model.hooked_transformer import HookedTransformer

# Texts, or the token ids of each prompt, as a list of them or an array [n, p].
Prompts: TypeAlias = str | Sequence[str] | Sequence[Sequence[int]] | Sequence[ArrayInput] | ArrayInput


def prompts_of(model: HookedTransformer[ArrayT], prompts: Prompts, prepend_bos: bool | None) -> list[Array]:
    """Each prompt's token ids.

    Args:
        model: The model, whose tokenizer reads text.
        prompts: Texts, or the token ids of each prompt.
        prepend_bos: Whether texts get a BOS token; None for the model's default.

    Returns:
        int [p] of each.

    Raises:
        InputError: There is none, or one is neither.
    """
    if isinstance(prompts, str):
        prompts = [prompts]
    try:
        rows = list(cast("Iterable[ArrayInput]", prompts))
    except TypeError as error:
        raise InputTypeError(f"prompts are texts or rows of token ids, not {type(prompts).__name__}.") from error
    if not rows:
        raise InputError("the list of prompts is empty.")
    if is_text(rows):
        return [as_array(model.to_tokens(text, prepend_bos, truncate=False))[0] for text in rows]
    found = [as_array(row) for row in rows]
    for index, row in enumerate(found):
        if row.ndim != 1 or row.dtype.kind not in "iu" or not row.size:
            raise InputError(
                f"prompt {index} is {row.dtype}{list(row.shape)}: a prompt is text or a list of token ids, and all are of one "
                "kind."
            )
    return found


def alike(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Prompts of one length together.

    Args:
        lengths: The tokens of each prompt.
        most: How many prompts there are in a batch, at most.

    Yields:
        The prompts of a batch, by their places.
    """
    found: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        found.setdefault(length, []).append(row)
    for rows in found.values():
        yield from (rows[start : start + most] for start in range(0, len(rows), most))
