"""What metrics are handed: records of it that compare and print, checked arrays and token ids, and picks from logits."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import numpy.typing as npt

from graphlens.analysis.arrays import as_array
from graphlens.errors import InputError

Array = npt.NDArray[Any]


class Record:
    """Equality, hash and repr of frozen dataclasses whose fields may hold arrays."""

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _state(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]

    def _key(self) -> tuple[Any, ...]:
        """All that it is, in plain values; unlike its repr, with what its arrays hold."""
        return (type(self).__name__, *map(_plain, self._state().values()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Record) and type(self) is type(other) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        shown = {
            name: f"{value.dtype}{list(value.shape)}" if isinstance(value, np.ndarray) else repr(value)
            for name, value in self._state().items()
            if isinstance(value, np.ndarray) or value != getattr(type(self), name, ...)
        }
        return f"{type(self).__name__}({', '.join(f'{name}={text}' for name, text in shown.items())})"


def checked(value: Any, what: str, kinds: str, axes: Any, wanted: str, size: int = 1) -> Array:
    """What a user hands in, as an array of such kinds and axes and at least ``size`` elements; else InputError."""
    try:
        array = as_array(value)
    except (ValueError, TypeError) as error:
        raise InputError(f"{what} must be {wanted}; it cannot be read as an array ({error}).") from error
    if array.dtype.name == "bfloat16":  # of ml_dtypes: to NumPy it is no float
        array = array.astype(np.float32)
    if array.dtype.kind not in kinds or array.ndim not in axes or array.size < size:
        raise InputError(f"{what} must be {wanted}, not {array.dtype}{list(array.shape)}.")
    return array


def kept(array: Array, dtype: Any) -> Any:
    """A read-only copy, or a Python number."""
    copy = array.astype(dtype)
    copy.flags.writeable = False
    return copy if copy.ndim else copy.item()


def ids_of(value: Any, what: str, every: bool) -> Any:
    """Token ids or text in plain form: an int, int64 [b], a str, a tuple of str; for ``every`` position int64 [b, p]."""
    if isinstance(value, str) and not every:
        return value
    if isinstance(value, list | tuple) and value and not every and all(isinstance(item, str) for item in value):
        return tuple(value)
    wanted = "token ids [b, p]" if every else "a token id, ids [b], a text, or a list of texts"
    ids = checked(value, what, "iu", (2,) if every else (0, 1), wanted)
    if ids.min() < 0 or (every and ids.shape[1] < 2):
        raise InputError(f"{what} must be ids from 0" + (", 2 or more for each prompt." if every else "."))
    return kept(ids, np.int64)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    return value._key() if isinstance(value, Record) else value


def picked(array: Array, indices: Array) -> Array:
    """Elements [..., b, n, k] along the last axis of [..., b, n, V]; indices [b, n or 1, k]."""
    return np.take_along_axis(array, indices.reshape((1,) * (array.ndim - 3) + indices.shape), axis=-1)


def log_probability(scores: Array, ids: Any) -> Array:
    """log p [..., b, n] of token ids, an int, [b] or [b, n], under logits [..., b, n, V]."""
    wanted = ids if np.ndim(ids) == 2 else np.broadcast_to(ids, scores.shape[-3:-2])[:, None]
    highest = scores.max(-1, keepdims=True)
    return (picked(scores, wanted[..., None]) - highest)[..., 0] - np.log(np.exp(scores - highest).sum(-1))  # type: ignore[no-any-return]


def one_hot(ids: Any, scores: Array) -> Array:
    """1 at token ids, an int, [b] or [b, n], of logits [b, n, V], else 0."""
    wanted = ids if np.ndim(ids) == 2 else np.broadcast_to(ids, scores.shape[:1])[:, None]
    found = np.zeros(scores.shape)
    np.put_along_axis(found, np.broadcast_to(wanted, scores.shape[:2])[..., None].astype(np.int64), 1.0, -1)
    return found
