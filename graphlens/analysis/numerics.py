"""The numerics that analysis shares: softmax family, layer norm, next-token loss and accuracy, composition scores."""

from __future__ import annotations

from typing import overload

import numpy as np
import numpy.typing as npt

from graphlens.analysis.arrays import Array, ArrayInput, ArrayT, as_array, like, working
from graphlens.errors import InputError


def log_softmax(x: Array, axis: int = -1) -> Array:
    """log(softmax(x)) along ``axis``; same shape."""
    shifted: Array = x - x.max(axis=axis, keepdims=True)
    found: Array = shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True))
    return found


def softmax(x: Array, axis: int = -1) -> Array:
    """softmax(x) along ``axis``; same shape, sums to 1."""
    return np.exp(log_softmax(x, axis))


def layer_norm(x: Array, weight: Array | None, bias: Array | None, eps: float, centre: bool = True) -> Array:
    """LayerNorm over the last axis, with the biased variance.

    Args:
        x: [..., D].
        weight: [D], or None for a norm without one.
        bias: [D], or None.
        eps: Added to the variance.
        centre: False for RMSNorm, which does not subtract the mean.

    Returns:
        [..., D], in the dtype of ``x`` where the weights have it too.
    """
    if centre:
        x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + np.asarray(eps, x.dtype))
    if weight is not None:
        x = x * weight
    return x if bias is None else x + bias


def counted_pairs(mask: ArrayInput | None, shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """Which pairs of neighbouring tokens count in a next-token loss: those in which both are real.

    Args:
        mask: The attention mask of the tokens, 0 at padding; None where all tokens are real.
        shape: The shape of the tokens, [b, p] or [p].

    Returns:
        bool [b, p-1] or [p-1]; entry i is the prediction of token i + 1 from token i.

    Raises:
        InputError: For a mask of another shape.
    """
    real = np.ones(shape, np.bool_) if mask is None else as_array(mask) != 0
    if real.shape != shape:
        raise InputError(f"attention_mask has shape {list(real.shape)}; the tokens have {list(shape)}.")
    counted: npt.NDArray[np.bool_] = real[..., :-1] & real[..., 1:]
    return counted


def _fitting(logits: ArrayInput, tokens: ArrayInput) -> tuple[Array, Array]:
    """Logits and the tokens they are of, as arrays. Raises InputError where they do not fit each other."""
    scores, ids = as_array(logits), as_array(tokens)
    if scores.ndim not in (2, 3) or ids.shape != scores.shape[:-1]:
        raise InputError(
            f"logits {list(scores.shape)} and tokens {list(ids.shape)} are not [b, p, V] and [b, p], nor [p, V] and [p]."
        )
    if ids.shape[-1] < 2:
        raise InputError("at least 2 tokens are needed: what is measured is each next token.")
    if not np.issubdtype(ids.dtype, np.integer) or ids.size == 0 or ids.min() < 0 or ids.max() >= scores.shape[-1]:
        raise InputError(f"tokens must be ids from 0 to {scores.shape[-1] - 1}.")
    return scores, ids


def lm_cross_entropy_loss(
    logits: ArrayT, tokens: ArrayInput, attention_mask: ArrayInput | None = None, per_token: bool = False
) -> ArrayT:
    """Cross-entropy of each next token, in nats (TransformerLens: ``utils.lm_cross_entropy_loss``).

    Args:
        logits: float [b, p, V], or [p, V].
        tokens: int [b, p], or [p].
        attention_mask: Of the tokens' shape, 1 at real tokens; a pair of neighbours with a 0 in it counts for nothing.
        per_token: The loss of each next token instead of their mean.

    Returns:
        A scalar, the mean over the pairs that count; with ``per_token`` [b, p-1] (or [p-1]), 0 at pairs that do not
        count. Of the logits' dtype; a tensor for a tensor.

    Raises:
        InputError: For shapes that do not fit, and for a mean over no pair at all.
    """
    scores, ids = _fitting(logits, tokens)
    dtype = scores.dtype
    scores = scores[..., :-1, :]
    highest = scores.max(-1, keepdims=True)
    shifted = working(scores - highest)
    picked = np.take_along_axis(shifted, ids[..., 1:, None].astype(np.int64, copy=False), axis=-1)[..., 0]
    counted = counted_pairs(attention_mask, ids.shape)
    losses = np.where(counted, np.log(np.exp(shifted, out=shifted).sum(-1)) - picked, 0)
    if per_token:
        return like(logits, losses.astype(dtype, copy=False))
    count = int(counted.sum())
    if count == 0:
        raise InputError("attention_mask leaves no pair of neighbouring tokens to take a mean over.")
    return like(logits, (losses.sum() / count).astype(dtype))


@overload
def lm_accuracy(logits: Array, tokens: ArrayInput, per_token: bool = False) -> Array: ...
@overload
def lm_accuracy(logits: ArrayT, tokens: ArrayInput, per_token: bool = False) -> ArrayT: ...
def lm_accuracy(logits: Array | ArrayT, tokens: ArrayInput, per_token: bool = False) -> Array | ArrayT:
    """How often the top logit is the next token (TransformerLens: ``utils.lm_accuracy``).

    Args:
        logits: float [b, p, V], or [p, V].
        tokens: int [b, p], or [p].
        per_token: Whether each next token was the top one, instead of how often.

    Returns:
        A float32 fraction, or bool [b, p-1] with ``per_token``; a tensor for a tensor.

    Raises:
        InputError: For shapes that do not fit.
    """
    scores, ids = _fitting(logits, tokens)
    correct = scores[..., :-1, :].argmax(-1) == ids[..., 1:]
    return like(logits, correct if per_token else correct.mean(dtype=np.float32))
