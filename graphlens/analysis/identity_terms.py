"""The arithmetic of identities: both sides of an equation, and how far apart rounding may leave them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from graphlens.analysis.arrays import Array

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

MASKED = -1e30  # attention scores below are masked: -inf, or the least number of a dtype
MASKED_HALF = -6e4  # the same in float16
NO_WEIGHT = (
    1e3  # a score that is less than its row's largest by this much has a pattern of 0, so it is masked or as good as
)
LEAST_TOKENS = 6  # that two unknown numbers for each feature are fitted to

_erf = np.frompyfunc(math.erf, 1, 1)


def _gelu(x: Floats) -> Floats:
    """GELU by the error function."""
    error: Floats = np.asarray(_erf(x / math.sqrt(2)), np.float64)
    return 0.5 * x * (1 + error)


def _tanh_gelu(x: Floats) -> Floats:
    """GELU by the tanh formula."""
    found: Floats = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return found


def _sigmoid(x: Floats) -> Floats:
    """1 / (1 + exp(-x)), without overflow."""
    found: Floats = 0.5 * (1 + np.tanh(0.5 * x))
    return found


def _softmax(x: Floats) -> Floats:
    """The softmax of the last axis."""
    e = np.exp(x - x.max(-1, keepdims=True))
    found: Floats = e / e.sum(-1, keepdims=True)
    return found


# By their names in transformers' configs; of several names for one function, the first.
ACTIVATIONS: dict[str, Callable[[Floats], Floats]] = {
    "gelu": _gelu,
    "gelu_new": _tanh_gelu,
    "silu": lambda x: x * _sigmoid(x),
    "relu": lambda x: np.maximum(x, 0.0),
    "quick_gelu": lambda x: x * _sigmoid(1.702 * x),
    "relu2": lambda x: np.maximum(x, 0.0) ** 2,
    "solu": lambda x: x * _softmax(x),
    "tanh": np.tanh,
    "sigmoid": _sigmoid,
}
SAME_ACTIVATION = {
    "gelu_python": "gelu",
    "gelu_fast": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "swish": "silu",
    "solu_ln": "solu",
}


def largest(difference: Floats, size: Floats | float, where: Bools | None = None) -> float | None:
    """The largest relative difference.

    Args:
        difference: Both sides' difference, [...].
        size: How large what was added up is, of the same shape or one that broadcasts to it.
        where: Which entries count, of a shape that broadcasts; None for all.

    Returns:
        The largest |difference| / size, infinite where an entry that counts is no number; None if none counts.
    """
    share = np.divide(np.abs(difference), size, out=np.zeros_like(difference), where=difference != 0)
    counted = share if where is None else share[np.broadcast_to(where, share.shape)]
    if not counted.size:
        return None
    value = float(counted.max())
    return value if math.isfinite(value) else math.inf


def typical(x: Floats, where: Bools | None = None) -> float:
    """The root of the mean square of the entries that count."""
    counted = x if where is None else x[np.broadcast_to(where, x.shape)]
    return float(np.sqrt(np.mean(np.square(counted)))) if counted.size else 0.0


def visible(scores: Array, counted: Bools | None) -> Bools:
    """Which attention scores are not masked, [b, head, query, key].

    Args:
        scores: The scores.
        counted: Which of them are between real tokens, [b, 1, query, key]; None for all.
    """
    least = MASKED_HALF if scores.dtype == np.float16 else MASKED
    seen: Bools = np.isfinite(scores) & (scores > least)
    if counted is not None:
        seen &= counted
    highest = np.where(seen, scores, -np.inf).max(-1, keepdims=True, initial=-np.inf)
    seen &= scores.astype(np.float64) > highest - NO_WEIGHT
    return seen


def softmax_over(scores: Floats, seen: Bools) -> Floats:
    """The softmax of the last axis over the entries seen; rows that see none are 0."""
    highest = np.where(seen, scores, -np.inf).max(-1, keepdims=True, initial=-np.inf)
    highest = np.where(np.isfinite(highest), highest, 0.0)
    e = np.where(seen, np.exp(np.where(seen, scores - highest, 0.0)), 0.0)
    total = e.sum(-1, keepdims=True)
    found: Floats = np.divide(e, total, out=np.zeros_like(e), where=total > 0)
    return found


def per_feature(x: Floats, y: Floats, where: Bools) -> tuple[Floats, Floats] | None:
    """The best factor and summand of each feature, x * factor + summand = y.

    Args:
        x: [b, p, f].
        y: [b, p, f].
        where: Which entries count, of a shape that broadcasts.

    Returns:
        Both [f]; None where too few tokens count to tell.
    """
    counts = np.broadcast_to(where, x.shape).reshape(-1, x.shape[-1])
    rows, wanted = (np.where(counts, each.reshape(counts.shape), 0.0) for each in (x, y))
    number = counts.sum(0)
    if number.max(initial=0) < LEAST_TOKENS:
        return None
    number = np.maximum(number, 1)
    mean, target = rows.sum(0) / number, wanted.sum(0) / number
    spread = np.where(counts, np.square(rows - mean), 0.0).sum(0)
    along = np.where(counts, (rows - mean) * (wanted - target), 0.0).sum(0)
    factor = np.divide(along, spread, out=np.zeros_like(spread), where=spread > 1e-24)
    return factor, target - factor * mean


def pairs_of(x: Floats, size: int, adjacent: bool) -> tuple[Floats, Floats]:
    """The two halves that rotary embeddings turn together, [..., size / 2] each, of [..., d_head]."""
    turning = x[..., :size]
    if adjacent:
        return turning[..., ::2], turning[..., 1::2]
    return turning[..., : size // 2], turning[..., size // 2 :]
