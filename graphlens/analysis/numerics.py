"""The numerics that analysis shares: softmax family, layer norm, next-token loss and accuracy, composition scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from graphlens.analysis.arrays import as_array, like, working
from graphlens.analysis.factored_matrix import FactoredMatrix
from graphlens.analysis.slices import Slice as Slice
from graphlens.errors import InputError

Array = npt.NDArray[Any]


def log_softmax(x: Array, axis: int = -1) -> Array:
    """log(softmax(x)) along ``axis``; same shape."""
    shifted = x - x.max(axis=axis, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True))  # type: ignore[no-any-return]


def softmax(x: Array, axis: int = -1) -> Array:
    """softmax(x) along ``axis``; same shape, sums to 1."""
    return np.exp(log_softmax(x, axis))


def layer_norm(x: Array, weight: Array | None, bias: Array | None, eps: float, centre: bool = True) -> Array:
    """LayerNorm (or RMSNorm with ``centre=False``) over the last axis, biased variance; same shape."""
    if centre:
        x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + np.asarray(eps, x.dtype))
    if weight is not None:
        x = x * weight
    return x if bias is None else x + bias


def _fitting(logits: Any, tokens: Any) -> tuple[Array, Array]:
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


def counted_pairs(attention_mask: Array | None, shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """Which pairs of neighbouring tokens count in a loss: those of two real tokens.

    Args:
        attention_mask: int [..., p], 1 at real tokens; None where all are.
        shape: The tokens' shape, [..., p].

    Returns:
        bool [..., p-1].
    """
    if attention_mask is None:
        return np.ones((*shape[:-1], shape[-1] - 1), np.bool_)
    found: npt.NDArray[np.bool_] = (attention_mask[..., :-1] != 0) & (attention_mask[..., 1:] != 0)
    return found


def lm_cross_entropy_loss(logits: Any, tokens: Any, attention_mask: Any = None, per_token: bool = False) -> Any:
    """Cross-entropy of each next token, in nats: a scalar mean, or [b, p-1] with ``per_token``.

    logits [b, p, V] float, tokens [b, p] int, or both without the batch axis; ``attention_mask``, of the tokens' shape,
    is 1 at real tokens: a pair with a 0 in it counts for nothing and is 0 per token. Same dtype as the logits, tensors
    for tensors. Raises InputError for shapes that do not fit, and for a mean over nothing. TransformerLens:
    ``utils.lm_cross_entropy_loss``.
    """
    scores, ids = _fitting(logits, tokens)
    scores = scores[..., :-1, :]
    highest = scores.max(-1, keepdims=True)
    shifted = working(scores - highest)
    picked = np.take_along_axis(shifted, ids[..., 1:, None].astype(np.int64, copy=False), axis=-1)[..., 0]
    losses = np.log(np.exp(shifted, out=shifted).sum(-1)) - picked
    count = losses.size
    if attention_mask is not None:
        mask = as_array(attention_mask)
        if mask.shape != ids.shape:
            raise InputError(f"attention_mask has shape {list(mask.shape)}; the tokens have {list(ids.shape)}.")
        counted = (mask[..., :-1] != 0) & (mask[..., 1:] != 0)
        losses, count = np.where(counted, losses, 0), int(counted.sum())
    if per_token:
        return like(logits, losses.astype(as_array(logits).dtype, copy=False))
    if count == 0:
        raise InputError("attention_mask leaves no pair of neighbouring tokens to take a mean over.")
    return like(logits, (losses.sum() / count).astype(as_array(logits).dtype))


def lm_accuracy(logits: Any, tokens: Any, per_token: bool = False) -> Any:
    """How often the top logit is the next token: a float32 fraction, or bool [b, p-1] with ``per_token``.

    logits [b, p, V], tokens [b, p] int, or both without the batch axis; tensors for tensors. Raises InputError for
    shapes that do not fit.
    TransformerLens: ``utils.lm_accuracy``.
    """
    scores, ids = _fitting(logits, tokens)
    correct = scores[..., :-1, :].argmax(-1) == ids[..., 1:]
    return like(logits, correct if per_token else correct.mean(dtype=np.float32))


def composition_scores(left: Any, right: Any, broadcast_dims: bool = True) -> Any:
    """How much ``right`` reads what ``left`` writes: |LR| / (|L| |R|), Frobenius norms of two FactoredMatrix.

    [*left leading, *right leading] with ``broadcast_dims``, else their common leading axes. Raises InputError unless
    left.rdim == right.ldim. TransformerLens: ``utils.composition_scores``.
    """
    kind, left, right = left.A, FactoredMatrix(*left.pair), FactoredMatrix(*right.pair)
    if left.rdim != right.ldim:
        raise InputError(f"{left!r} and {right!r} do not compose: left.rdim must be right.ldim.")
    if broadcast_dims:
        many_left, many_right = left.ndim - 2, right.ndim - 2
        for axis in range(many_left):
            right = right.unsqueeze(axis)
        for axis in range(many_right):
            left = left.unsqueeze(many_left + axis)
    # The orthogonal outer factors change no norm, so what is multiplied is small.
    composed = left.collapse_l() @ right.collapse_r()
    return like(kind, np.sqrt((composed**2).sum((-2, -1))) / left.norm() / right.norm())
