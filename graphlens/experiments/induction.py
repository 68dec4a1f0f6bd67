"""The induction loss: how well a model continues what it has just seen."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from graphlens.analysis import numerics
from graphlens.analysis.arrays import Array, ArrayT
from graphlens.errors import InputError, checked_number

if TYPE_CHECKING:
    from graphlens.model.hooked_transformer import HookedTransformer


def repeated_tokens(
    model: HookedTransformer[ArrayT], batch_size: int, subseq_len: int, prepend_bos: bool, seed: int
) -> Array:
    """Random tokens, then the same tokens again.

    Args:
        model: The model, whose vocabulary they are from.
        batch_size: The number of sequences.
        subseq_len: How many tokens there are before they repeat.
        prepend_bos: True puts BOS in the first place.
        seed: Makes the draw repeatable.

    Returns:
        int64 [batch_size, 2 * subseq_len].

    Raises:
        InputError: For BOS without a tokenizer to give it.
    """
    vocabulary = model.cfg.d_vocab
    # The first and the last ids of a vocabulary are special or rare; a small one has none to spare.
    low, high = (100, min(20000, vocabulary)) if vocabulary >= 1000 else (0, vocabulary)
    half = np.random.default_rng(seed).integers(low, high, (batch_size, subseq_len))
    tokens = np.tile(half, (1, 2))
    if prepend_bos:
        tokenizer = model.runner.text.tokenizer
        if tokenizer is None:
            raise InputError("this model has no tokenizer to tell BOS: pass prepend_bos=False.")
        tokens[:, 0] = tokenizer.require_bos()
    return tokens


def induction_loss(
    model: HookedTransformer[ArrayT],
    batch_size: int = 4,
    subseq_len: int | None = None,
    prepend_bos: bool | None = None,
    seed: int = 0,
) -> ArrayT:
    """The mean next-token loss on the second half of random tokens that repeat. TransformerLens: ``evals.induction_loss``.

    It is low in a model with induction heads, and about log(d_vocab) or more in one without.

    Args:
        model: The model.
        batch_size: The number of sequences.
        subseq_len: The length of a half; None for 384, or half the context where that is less.
        prepend_bos: Whether BOS takes the first place; None for the model's default.
        seed: Makes the draw repeatable.

    Returns:
        A scalar, in nats.

    Raises:
        InputError: For sizes that do not fit, and for BOS without a tokenizer.
    """
    for what, number, least in (("batch_size", batch_size, 1), ("seed", seed, 0)):
        checked_number(number, what, least=least)
    longest = model.cfg.n_ctx // 2
    length = min(384, longest) if subseq_len is None else checked_number(subseq_len, "subseq_len")
    if not 3 <= length <= longest:
        raise InputError(f"subseq_len {length}: it must be 3 to {longest}, half of this model's context.")
    bos = model.cfg.default_prepend_bos if prepend_bos is None else prepend_bos
    tokens = repeated_tokens(model, batch_size, length, bos, seed)
    # A prompt at a time: the logits of a whole batch are the largest thing here.
    losses = [
        numerics.lm_cross_entropy_loss(model.border.from_user(model(row[None])), row[None], per_token=True)[
            :, length + 1 :
        ]
        for row in tokens
    ]
    return model.border.to_user(np.asarray(np.concatenate(losses).mean()))
