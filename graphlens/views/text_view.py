"""Text as a view, each token coloured by a number: its loss, an attribution, a neuron, a direction."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from graphlens.errors import InputError
from graphlens.views.encoded import floats, packed
from graphlens.views.pages import View
from graphlens.views.words import Tokenizing, sent, words

MOST = 10_000  # tokens of a page


def text(
    tokens: object,
    values: object,
    *,
    model: Tokenizing | None = None,
    name: str = "value",
    title: str = "Text",
    says: str = "",
) -> View:
    """Colours each token by a number: ``views.text(tokens, {"loss": loss, "neuron 3.17": cache["post", 3][0, :, 17]})``.

    Args:
        tokens: The text of each token, or with ``model`` the prompt or ids [p].
        values: Numbers [p], or a dictionary of such by name, to choose from. p - 1 numbers are those of the tokens from the
            second on: the loss per token, which the first has none of.
        model: The model whose tokenizer splits or names the tokens.
        name: What the numbers are, with their unit, where there is one row of them.
        title: The line above it.
        says: What a reader should know of them.

    Returns:
        The view. Red is above 0, blue below it; numbers that are never negative go from nothing to blue.

    Raises:
        InputError: For numbers that are not one for each token, and for more tokens than a page shows.
    """
    rows = values if isinstance(values, Mapping) else {name: values}
    if not rows:
        raise InputError("values is empty: give a number for each token.")
    arrays = {str(key): floats(value, f"values[{key!r}]") for key, value in rows.items()}
    for key, row in arrays.items():
        if row.ndim == 2 and len(row) == 1:
            arrays[key] = row[0]
        elif row.ndim != 1:
            raise InputError(f"values[{key!r}] has shape {list(row.shape)}: it is one number for each token, [p].")
    length = max(len(row) for row in arrays.values())
    try:
        texts = words(tokens, length, model)
    except InputError:
        texts = words(tokens, length + 1, model)  # all rows are of the tokens from the second on
    if len(texts) > MOST:
        raise InputError(f"{len(texts):,} tokens are more than a page shows ({MOST:,}): give a part of them.")
    filled = {}
    for key, row in arrays.items():
        if len(row) not in (len(texts), len(texts) - 1):
            raise InputError(f"values[{key!r}] has {len(row)} numbers for {len(texts)} tokens.")
        filled[key] = np.concatenate([np.full(len(texts) - len(row), np.nan), row])
    return View(
        "text",
        title,
        {"tokens": sent(texts), "values": {key: packed(row, "f8") for key, row in filled.items()}},
        (says,) if says else (),
        140 + 44 * (1 + sum(map(len, sent_lengths(texts))) // 110),
    )


def sent_lengths(texts: list[str]) -> list[str]:
    """The tokens as wide as they are drawn, to guess how high the view is."""
    return [f"{text[:120]}   " for text in texts]
