"""How far two activations of one hook point are apart: relative error, cosine and signal-to-noise ratio."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from graphlens.analysis.arrays import Array
from graphlens.analysis.identity_terms import MASKED, MASKED_HALF
from graphlens.file.names import JOINT_AXES, SCORES, split_name

Bools = npt.NDArray[np.bool_]
_AT_ONCE = 1 << 18  # numbers that are compared at once, so that they stay in the processor's cache


@dataclass(frozen=True)
class Apart:
    """How far an activation is from its reference.

    Attributes:
        relative: The root mean square of the difference, relative to that of the reference; infinite where the reference is 0
            and the other is not, and where the other holds what is no number. Of integers: the share of those that differ.
        cosine: The cosine of the angle between both, as vectors of all entries that count; NaN where one of them is 0 or holds
            what is no number, and of integers.
        heads: ``relative`` of each head alone; empty without an axis of heads.
    """

    relative: float
    cosine: float
    heads: tuple[float, ...] = ()

    @property
    def snr(self) -> float:
        """The signal-to-noise ratio in decibels, 20 log10(1 / relative); infinite for equal activations."""
        return signal_to_noise(self.relative)


def signal_to_noise(relative: float) -> float:
    """The signal-to-noise ratio in decibels of a relative error.

    >>> signal_to_noise(0.01)
    40.0
    """
    if relative == 0:
        return math.inf
    return -20 * math.log10(relative) if math.isfinite(relative) else -math.inf


def counted(name: str, axes: Sequence[str], reference: Array, real: Bools | None, causal: bool) -> Bools | None:
    """Which entries of an activation count: those of real tokens, and scores and patterns that are not masked.

    Args:
        name: The hook point.
        axes: The activation's axes.
        reference: The activation in the reference.
        real: bool [b, p], True at real tokens; None where all are.
        causal: True if queries see no later keys.

    Returns:
        bool, of a shape that broadcasts to the activation's; None where all count.
    """
    if axes[-2:] == ("query_pos", "key_pos"):
        queries, keys = reference.shape[-2:]
        seen: Bools | None = None
        if real is not None:
            seen = real[:, None, -queries:, None] & real[:, None, None, -keys:]
        if split_name(name)[1] == SCORES:
            least = MASKED_HALF if reference.dtype == np.float16 else MASKED
            open_ = np.isfinite(reference) & (reference > least)
            seen = open_ if seen is None else open_ & seen
            if causal:
                seen = seen & (np.arange(keys) <= np.arange(queries)[:, None] + keys - queries)
        return seen
    if real is None:
        return None
    if axes[0] in JOINT_AXES:
        tokens = real.reshape(-1)
        each = reference.shape[0] // tokens.size
        return np.repeat(tokens, each).reshape(-1, *[1] * (reference.ndim - 1))
    if axes[:2] == ("batch", "pos"):
        return real.reshape(*real.shape, *[1] * (reference.ndim - 2))
    return None


@dataclass(frozen=True, eq=False)
class Sums:
    """What the figures of an activation are made of. Those of several batches add up.

    Attributes:
        products: float64 [3, heads], or one column without heads: sums over squares of the reference, over its products with
            the error, and over squares of the error. Of integers none.
        differing: Of integers, how many differ.
        compared: Of integers, how many there are.
        by_head: Whether there are heads.
    """

    products: Array
    differing: int = 0
    compared: int = 0
    by_head: bool = False

    def __add__(self, other: Sums) -> Sums:
        """The sums of both."""
        products = self.products + other.products
        return Sums(products, self.differing + other.differing, self.compared + other.compared, self.by_head)

    @property
    def apart(self) -> Apart:
        """The figures. Nothing counting, both activations are taken to be equal."""
        if not self.products.size:
            return Apart(self.differing / self.compared if self.compared else 0.0, math.nan)
        square, error = self.products[0], self.products[2]
        total, along, off = (float(each.sum()) for each in self.products)
        heads = zip(error, square, strict=True) if self.by_head else ()
        return Apart(
            _relative(off, total),
            _cosine(total, along, off),
            tuple(_relative(float(e), float(s)) for e, s in heads),
        )


def apart(reference: Array, other: Array, where: Bools | None = None, heads: int | None = None) -> Apart:
    """How far an activation is from its reference: the figures of ``sums``.

    Args:
        reference: The reference.
        other: The activation, of the same shape.
        where: Which entries count; see ``sums``.
        heads: The axis of heads; see there.
    """
    return sums(reference, other, where, heads).apart


def sums(reference: Array, other: Array, where: Bools | None = None, heads: int | None = None) -> Sums:
    """How far an activation is from its reference, as sums.

    Args:
        reference: The reference.
        other: The activation, of the same shape.
        where: Which entries count, of a shape that broadcasts; None for all.
        heads: The axis of heads, which is not the first; None without one.

    Returns:
        The sums.
    """
    if reference.dtype.kind in "iub":
        differs = np.asarray(reference != other)
        seen = differs if where is None else differs[np.broadcast_to(where, differs.shape)]
        return Sums(np.zeros((3, 0)), int(seen.sum()), seen.size)
    count = 1 if heads is None else reference.shape[heads]
    total = np.zeros((3, count))
    for part in _parts(reference):
        mine, theirs = reference[part], other[part]
        here: Bools | None = None if where is None else np.broadcast_to(where, reference.shape)[part]
        found = _sums(mine, theirs, here, heads, np.float64 if mine.dtype == np.float64 else np.float32)
        if not np.isfinite(found).all():  # squares beyond float32: masked scores that one model does not mask, say
            found = _sums(mine, theirs, here, heads, np.float64)
        total += found
    return Sums(total, by_head=heads is not None)


def _parts(array: Array) -> Iterator[slice]:
    """Slices of the first axis that hold few enough numbers each."""
    rows = array.shape[0]
    step = max(1, _AT_ONCE * rows // max(array.size, 1))
    for start in range(0, rows, step):
        yield slice(start, start + step)


def _sums(mine: Array, theirs: Array, seen: Bools | None, heads: int | None, dtype: npt.DTypeLike) -> Array:
    """Sums over squares of the reference, its products with the error, and squares of the error: [3, heads]."""
    x, y = mine.astype(dtype, copy=False), theirs.astype(dtype, copy=False)
    if seen is not None:
        x, y = np.where(seen, x, 0), np.where(seen, y, 0)
    with np.errstate(all="ignore"):
        error = y - x
        if heads is None:
            x, error = x.reshape(-1), error.reshape(-1)
            return np.asarray([[np.dot(x, x)], [np.dot(x, error)], [np.dot(error, error)]], np.float64)
        axes = "bphd" if heads == 2 else "bhqk"
        kept = f"{axes},{axes}->h"
        pairs = ((x, x), (x, error), (error, error))
        return np.stack([np.einsum(kept, first, second) for first, second in pairs]).astype(np.float64)


def _relative(error: float, square: float) -> float:
    """The relative error of sums of squares."""
    if not math.isfinite(error):
        return math.inf
    if square == 0:
        return 0.0 if error == 0 else math.inf
    return math.sqrt(error / square)


def _cosine(square: float, along: float, error: float) -> float:
    """The cosine of the reference and the reference plus the error."""
    other = square + 2 * along + error
    if not math.isfinite(other) or square <= 0 or other <= 0:
        return math.nan
    return max(-1.0, min(1.0, (square + along) / math.sqrt(square * other)))
