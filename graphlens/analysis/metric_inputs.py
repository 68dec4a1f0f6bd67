"""Checks the arrays and token ids that metrics are given, and reads single tokens out of logits."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from graphlens.analysis.arrays import Array, ArrayInput, as_array
from graphlens.edits.record import Record
from graphlens.errors import InputError

# Token ids of some prompts: one for all of them, int64 [b], or int64 [b, n] for n positions each.
Ids = int | npt.NDArray[np.int64]
_LARGEST = np.iinfo(np.int64).max


@dataclass(frozen=True, eq=False, repr=False)
class Needs(Record):
    """What a metric reads of the logits [b, p, V].

    Attributes:
        positions: int64 [n] or, where prompts differ, [b, n], counted from 0; None for every position.
        tokens: int64 [b, k], the vocabulary columns of each prompt; None for the whole vocabulary.
    """

    positions: Array | None = None
    tokens: Array | None = None

    def gather(self, logits: Array) -> Array:
        """The part of logits that the metric reads.

        Args:
            logits: Float [..., b, p, V].

        Returns:
            [..., b, n, k or V]: a view where all is needed.
        """
        if self.positions is not None:  # [n] and [b, n] alike, against rows [b, 1]
            logits = logits[..., np.arange(logits.shape[-3])[:, None], self.positions, :]
        return logits if self.tokens is None else picked(logits, self.tokens[:, None])


def checked(value: npt.ArrayLike, what: str, kinds: str, axes: Container[int], wanted: str, size: int = 1) -> Array:
    """What a user hands in, as an array.

    Args:
        value: An array, a number, a list, or a tensor of torch.
        what: How an error calls it.
        kinds: The kinds of dtype that are allowed, as NumPy's letters: "f" floating point, "i" and "u" integers.
        axes: The numbers of axes that are allowed.
        wanted: What an error says that it must be.
        size: The least number of elements.

    Returns:
        The array; bfloat16 as float32.

    Raises:
        InputError: If it is no such array.
    """
    try:
        array = as_array(value)
    except (ValueError, TypeError) as error:
        raise InputError(f"{what} must be {wanted}; it cannot be read as an array ({error}).") from error
    if array.dtype.name == "bfloat16":  # of ml_dtypes: to NumPy it is no float
        array = array.astype(np.float32)
    if array.dtype.kind not in kinds or array.ndim not in axes or array.size < size:
        raise InputError(f"{what} must be {wanted}, not {array.dtype}{list(array.shape)}.")
    return array


def kept(array: Array, dtype: npt.DTypeLike) -> Array | float:
    """An array as a record keeps it: a read-only copy in ``dtype``, or a Python number where it has no axes.

    Raises:
        InputError: For an unsigned integer that int64 does not hold: it would become a negative one.
    """
    if array.dtype.kind == "u" and np.dtype(dtype) == np.int64 and array.max() > _LARGEST:
        raise InputError(f"{array.max()} is too large for a token id or a position.")
    copy = array.astype(dtype)
    copy.flags.writeable = False
    return copy if copy.ndim else float(copy) if copy.dtype.kind == "f" else int(copy)


def ids_of(value: npt.ArrayLike, what: str, every: bool) -> Array | float | str | tuple[str, ...]:
    """Token ids, or texts that are tokens, as a record keeps them.

    Args:
        value: A token id, ids [b], a text, or a list of texts; with ``every`` ids [b, p].
        what: How an error calls it.
        every: True if there is an id for every position.

    Returns:
        An int, int64 [b], a str, or a tuple of str; with ``every`` int64 [b, p].

    Raises:
        InputError: If it is none of these, an id is negative, or with ``every`` a prompt has fewer than 2.
    """
    if isinstance(value, str) and not every:
        return value
    if isinstance(value, list | tuple) and value and not every and all(isinstance(item, str) for item in value):
        return tuple(item for item in value if isinstance(item, str))
    wanted = "token ids [b, p]" if every else "a token id, ids [b], a text, or a list of texts"
    ids = checked(value, what, "iu", (2,) if every else (0, 1), wanted)
    if ids.min() < 0 or (every and ids.shape[1] < 2):
        raise InputError(f"{what} must be ids from 0" + (", 2 or more for each prompt." if every else "."))
    return kept(ids, np.int64)


def picked(array: Array, indices: Array) -> Array:
    """Some elements along the last axis, others for each position.

    Args:
        array: [..., b, n, V].
        indices: int64 [b, n or 1, k].

    Returns:
        [..., b, n, k].
    """
    return np.take_along_axis(array, indices.reshape((1,) * (array.ndim - 3) + indices.shape), axis=-1)


def log_probability(scores: Array, ids: Ids) -> Array:
    """The logarithm of the probability of tokens under logits.

    Args:
        scores: Logits [..., b, n, V].
        ids: The tokens.

    Returns:
        In nats, [..., b, n].
    """
    wanted = (
        ids if isinstance(ids, np.ndarray) and ids.ndim == 2 else np.broadcast_to(ids, scores.shape[-3:-2])[:, None]
    )
    highest = scores.max(-1, keepdims=True)
    found: Array = (picked(scores, wanted[..., None]) - highest)[..., 0] - np.log(np.exp(scores - highest).sum(-1))
    return found


def one_hot(ids: Ids, scores: Array) -> Array:
    """1 at tokens and 0 elsewhere.

    Args:
        ids: The tokens.
        scores: Logits [b, n, V], which give the shape.

    Returns:
        float64 [b, n, V].
    """
    wanted = ids if isinstance(ids, np.ndarray) and ids.ndim == 2 else np.broadcast_to(ids, scores.shape[:1])[:, None]
    found = np.zeros(scores.shape)
    np.put_along_axis(found, np.broadcast_to(wanted, scores.shape[:2])[..., None].astype(np.int64), 1.0, -1)
    return found


def real_tokens(mask: ArrayInput, what: str) -> Array:
    """An attention mask as bools.

    Args:
        mask: [b, p], 1 (True) at real tokens, 0 (False) at padding.
        what: How an error calls it.

    Returns:
        bool [b, p], read-only.

    Raises:
        InputError: For anything else, and for a prompt without a real token.
    """
    array = checked(mask, what, "biuf", (2,), "1 at real tokens and 0 at padding, [b, p]")
    if not np.isin(array, (0, 1)).all() or not array.any(-1).all():
        raise InputError(f"{what} must be 1 at real tokens and 0 at padding, with a real token in each prompt.")
    real = array.astype(bool)
    real.flags.writeable = False
    return real


def spanned(real: Array) -> Array:
    """The places from the first real token of each prompt to its last: what is not among them is padding.

    Args:
        real: bool [b, p], True at real tokens.

    Returns:
        bool [b, p], True also at masked tokens between real ones.
    """
    begun = np.logical_or.accumulate(real, 1)
    return np.asarray(begun & np.logical_or.accumulate(real[:, ::-1], 1)[:, ::-1])
