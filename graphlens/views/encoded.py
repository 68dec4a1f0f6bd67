"""How arrays and text go into a page: exactly, and safe wherever they stand."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from graphlens.errors import InputError
from graphlens.views.labelled import Array

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
_KINDS = {"f4": "<f4", "f8": "<f8", "i4": "<i4"}
# What could end a script element, begin another one or a comment, or end a line of JavaScript.
_UNSAFE = {ord(character): f"\\u{ord(character):04x}" for character in "<>&'\u2028\u2029"}


def packed(array: npt.ArrayLike, kind: str = "f4") -> dict[str, Json]:
    """An array for a page, every number as it is.

    Args:
        array: Numbers.
        kind: "f4" (float32), "f8" (float64) or "i4" (int32), in which the numbers are kept.

    Returns:
        What core.js's ``decode`` reads: the kind, and base64 of the bytes, little-endian.
    """
    plain = np.ascontiguousarray(array, _KINDS[kind])
    return {"t": kind, "b": base64.b64encode(plain.tobytes()).decode("ascii")}


def packed_size(count: int, kind: str = "f4") -> int:
    """How many bytes of a page so many numbers take."""
    return 4 * -(-count * int(kind[1]) // 3)


def script_json(data: Json) -> str:
    """JSON that may stand inside a script element: ASCII, without any character that HTML could read.

    Args:
        data: What JSON can hold; no NaN and no infinity (see ``cell``).
    """
    return json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":")).translate(_UNSAFE)


def cell(value: object) -> Json:
    """A value as a cell of a table: numbers as numbers, also those that JSON has not; anything else as text."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool | np.bool_):
        return str(bool(value))
    if isinstance(value, int | np.integer):
        return int(value) if abs(int(value)) < 2**53 else str(int(value))
    if isinstance(value, float | np.floating):
        plain = float(value)
        return plain if math.isfinite(plain) else {"n": "nan" if math.isnan(plain) else "inf" if plain > 0 else "-inf"}
    return str(value)


def floats(value: object, what: str) -> Array:
    """An array, or a tensor of torch, as float32 or float64.

    Args:
        value: What a user gave.
        what: How an error calls it.

    Raises:
        InputError: For what holds no real numbers.
    """
    for step in ("detach", "cpu"):  # a tensor that has a gradient is no array by itself
        method = getattr(value, step, None)
        value = method() if callable(method) and hasattr(value, "requires_grad") else value
    try:
        array = np.asarray(
            value.float() if "bfloat16" in str(getattr(value, "dtype", "")) and hasattr(value, "float") else value
        )
        if array.dtype.kind == "c":
            raise TypeError("complex numbers have two parts, of which one is shown")
        return array.astype(np.float64 if array.dtype.kind in "fiu" and array.dtype.itemsize == 8 else np.float32)
    except (TypeError, ValueError) as error:
        raise InputError(f"{what} must be real numbers, not {type(value).__name__} ({error}).") from error


def shape_of(value: object) -> tuple[int, ...]:
    """The shape of an array or a tensor; that of a number for anything else."""
    return tuple(int(size) for size in getattr(value, "shape", ()))
