"""The induction loss: how well a model continues what it has just seen."""

from __future__ import annotations

from typing import Any

import numpy as np

from graphlens.analysis import numerics
from graphlens.analysis.arrays import Array
from graphlens.errors import InputError


def repeated_tokens(model: Any, batch_size: int, subseq_len: int, prepend_bos: bool, seed: int) -> Array:
    """Random tokens, twice over: int64 [batch_size, 2 * subseq_len]. BOS, where asked for, takes the first place."""
    vocabulary = model.cfg.d_vocab
    # The first and the last ids of a vocabulary are special or rare; a small one has none to spare.
    low, high = (100, min(20000, vocabulary)) if vocabulary >= 1000 else (0, vocabulary)
    half = np.random.default_rng(seed).integers(low, high, (batch_size, subseq_len))
    tokens = np.tile(half, (1, 2))
    if prepend_bos:
        if model.tokenizer is None:
            raise InputError("this model has no tokenizer to tell BOS: pass prepend_bos=False.")
        tokens[:, 0] = model.tokenizer.require_bos()
    return tokens


def induction_loss(
    model: Any,
    batch_size: int = 4,
    subseq_len: int | None = None,
    prepend_bos: bool | None = None,
    seed: int = 0,
) -> Any:
    """Mean next-token loss, in nats, on the second half of random tokens that repeat: low in a model with induction
    heads, about log(d_vocab) or more without. A scalar.

    ``subseq_len`` is the half's length, by default 384 or half the context; ``prepend_bos`` None means the model's
    default. Raises InputError for sizes that do not fit. TransformerLens: ``evals.induction_loss``.
    """
    longest = model.cfg.n_ctx // 2
    length = min(384, longest) if subseq_len is None else subseq_len
    if not 3 <= length <= longest:
        raise InputError(f"subseq_len {length}: it must be 3 to {longest}, half of this model's context.")
    if batch_size < 1:
        raise InputError(f"batch_size must be 1 or more, not {batch_size}.")
    bos = model.cfg.default_prepend_bos if prepend_bos is None else prepend_bos
    tokens = repeated_tokens(model, batch_size, length, bos, seed)
    # A prompt at a time: the logits of a whole batch are the largest thing here.
    losses = [
        numerics.lm_cross_entropy_loss(model._from_user(model(row[None])), row[None], per_token=True)[:, length + 1 :]
        for row in tokens
    ]
    return model._to_user(np.asarray(np.concatenate(losses).mean()))
