"""The dtypes that models compute in, however they are given."""

from __future__ import annotations

from graphlens.errors import InputError

DTYPES = ("float32", "float64", "float16", "bfloat16")
_SHORT = {"fp32": "float32", "fp64": "float64", "fp16": "float16", "bf16": "bfloat16", "double": "float64"}


def dtype_name(dtype: object) -> str:
    """The name of a dtype.

    Args:
        dtype: Its name, a NumPy or a torch dtype; None for float32.

    Raises:
        InputError: Models do not compute in it.
    """
    if dtype is None:
        return "float32"
    text = getattr(dtype, "__name__", None) if isinstance(dtype, type) else str(dtype)
    name = str(text).removeprefix("torch.")
    name = _SHORT.get(name, name)
    if name not in DTYPES:
        raise InputError(f"dtype {dtype!r}: choose one of {', '.join(DTYPES)}.")
    return name
