"""The base of records whose fields may hold arrays: how two of them compare, hash and print."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False, repr=False)
class Record:
    """The base of frozen dataclasses whose fields may hold arrays, which dataclasses alone cannot compare.

    Two records are equal if they are of the same class and all their fields are, arrays by dtype, shape and bytes. The
    repr shows the class and the fields that are not at their default; of an array it shows dtype and shape only.
    A subclass is decorated with ``@dataclass(frozen=True, eq=False, repr=False)``.
    """

    _unnamed: ClassVar[tuple[str, ...]] = ()  # the fields that the repr shows without their name

    def as_key(self) -> tuple[Hashable, ...]:
        """All that the record holds, in plain hashable values: (class name, one entry for each field).

        Returns:
            A tuple that is equal for equal records and different for different ones, also where they differ only in
            what an array holds. Made for sets, dicts and digests.
        """
        return (type(self).__name__, *(hashable(value) for value in self._state().values()))

    def _state(self) -> dict[str, object]:
        """Field name -> value, in the order of the fields."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def _set(self, name: str, value: object) -> None:
        """Sets a field of this frozen record; for ``__post_init__`` alone."""
        object.__setattr__(self, name, value)

    def _is_shown(self, name: str, value: object, default: object) -> bool:
        """True if the repr shows the field ``name``."""
        return isinstance(value, np.ndarray) or value != default

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Record) and type(self) is type(other) and self.as_key() == other.as_key()

    def __hash__(self) -> int:
        return hash(self.as_key())

    def __repr__(self) -> str:
        parts = []
        for field in fields(self):
            value = getattr(self, field.name)
            if self._is_shown(field.name, value, field.default):
                text = f"{value.dtype}{list(value.shape)}" if isinstance(value, np.ndarray) else repr(value)
                parts.append(text if field.name in self._unnamed else f"{field.name}={text}")
        return f"{type(self).__name__}({', '.join(parts)})"


def hashable(value: object) -> Hashable:
    """A field's value in a form that hashes and that equals itself.

    Args:
        value: A plain value, an array, a slice, or a record.

    Returns:
        An array as (dtype, shape, bytes), a slice as a tuple, a record as its key, NaN as text, anything else as it is.
    """
    if isinstance(value, slice):
        return ("slice", value.start, value.stop, value.step)
    if isinstance(value, np.ndarray):
        return (str(value.dtype), value.shape, value.tobytes())
    if isinstance(value, Record):
        return value.as_key()
    if isinstance(value, float) and math.isnan(value):
        return "nan"  # which equals itself
    return value
