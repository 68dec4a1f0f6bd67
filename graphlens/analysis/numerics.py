"""The numerics that analysis shares: softmax family, layer norm, next-token loss. Stable, in the input's dtype."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

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


def next_token_loss(logits: Array, tokens: Array, per_token: bool = False) -> Array:
    """Cross-entropy of each next token, in nats: a scalar mean, or [b, p-1] with ``per_token``.

    logits [b, p, V], tokens int [b, p]. TransformerLens: ``lm_cross_entropy_loss``.
    """
    picked = np.take_along_axis(log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)[..., 0]
    return -picked if per_token else np.asarray(-picked.mean(), logits.dtype)
