"""Embeddings beside a run: those of tokens, and the residual stream that embeddings begin."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from graphlens.analysis import numerics
from graphlens.analysis.arrays import Array, ArrayT
from graphlens.errors import InputError

if TYPE_CHECKING:
    from graphlens.model.runner import Runner
    from graphlens.model.text import Tokens


def embedded(runner: Runner[ArrayT], tokens: Tokens) -> Array:
    """The embeddings of tokens as the model computes them, without hooks and interventions.

    Args:
        runner: Of the model.
        tokens: Ids [b, p].

    Returns:
        [b, p, d_model], a copy, in the dtype that the model computes in.
    """
    config, stored = runner.config, runner.weights.stored
    found = np.array(runner.weights["embed.W_E"][tokens])
    if config.post_embedding_ln:
        wide = found.astype(np.result_type(found, np.float32), copy=False)
        found = numerics.layer_norm(wide, stored.get("embed.ln.w"), stored.get("embed.ln.b"), config.eps, centre=True)
    return found.astype(config.dtype, copy=False)


def checked_embeddings(runner: Runner[ArrayT], given: object) -> Array | None:
    """What a user gave to be continued, if it is embeddings.

    Args:
        runner: Of the model.
        given: Text, token ids, or embeddings.

    Returns:
        [b, p, d_model] in the dtype that the model computes in; None for anything but an array with three axes.

    Raises:
        InputError: For embeddings of another size or of whole numbers, and for a model that cannot begin with them.
    """
    if len(getattr(given, "shape", ())) != 3:
        return None
    array, config = runner.border.from_user(given), runner.config
    if array.shape[2] != config.d_model or array.dtype.kind != "f" or 0 in array.shape:
        raise InputError(
            f"embeddings are numbers [batch, pos, {config.d_model}] (d_model), before positions are added, not {array.dtype} "
            f"{list(array.shape)}."
        )
    if config.positional_embedding_type == "shortformer":
        raise InputError("this model adds positions to queries and keys, not to embeddings: pass token ids.")
    return array.astype(config.dtype, copy=False)


def residual_of(runner: Runner[ArrayT], embeddings: Array) -> Array:
    """The residual stream that embeddings begin: with position embeddings, where the model adds any there.

    Args:
        runner: Of the model.
        embeddings: [b, p, d_model].

    Returns:
        [b, p, d_model].
    """
    if runner.config.positional_embedding_type != "standard":
        return embeddings
    positions = runner.weights["pos_embed.W_pos"][: embeddings.shape[1]]
    return np.asarray(embeddings + positions).astype(embeddings.dtype, copy=False)
