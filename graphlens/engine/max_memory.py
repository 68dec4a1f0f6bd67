"""How much memory a model may take: what a user asks for, and which models are then run block by block."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from graphlens.engine.opener import Opener
from graphlens.errors import InputError
from graphlens.runtime.providers import Providers
from graphlens.runtime.types import Array

if TYPE_CHECKING:
    import onnx_ir as ir

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_COPIES = 2  # a session that packs its weights holds them once, and maps the file's while it opens


def checked_memory(given: str | float | None) -> int | None:
    """A ``max_memory`` in bytes.

    >>> checked_memory("1.5GB")
    1500000000

    Args:
        given: A number of bytes, or text such as "4GB", "600 MB" or "2GiB"; None for no limit.

    Raises:
        InputError: It is neither, or not above 0.
    """
    if given is None:
        return None
    size = math.nan
    if isinstance(given, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)\s*", given.lower())
        if found is not None and found[2] in _UNITS:
            size = float(found[1]) * _UNITS[found[2]]
    elif isinstance(given, (int, float)) and not isinstance(given, bool):
        size = float(given)
    if not (size >= 1 and math.isfinite(size)):
        raise InputError(f"max_memory={given!r}: give a number of bytes, or text such as '4GB' or '600MB'.")
    return int(size)


def opener(
    path: Path,
    model: ir.Model,
    providers: Providers,
    weights: int,
    contents: Mapping[str, Array],
    max_memory: int | None,
) -> Opener:
    """What opens the sessions of a model.

    Args:
        path: See ``Opener``, as for what follows.
        model: See there.
        providers: See there.
        weights: See there.
        contents: See there.
        max_memory: Bytes that its weights may take in memory; None for no limit.

    Returns:
        One whose sessions run stage by stage where the weights would take more than that, else one that opens them whole.

    Raises:
        InputError: A GPU was asked for, or the model has operators or weights that cannot be fed.
        RuntimeUnavailable: A provider that was asked for is not there.
    """
    if max_memory is None or _COPIES * weights * (2 if _is_bfloat16(model) else 1) <= max_memory:
        return Opener(path, model, providers, weights, contents)
    from graphlens.engine.streaming import StreamingOpener

    return StreamingOpener(path, model, providers, weights, contents, max_memory)


def _is_bfloat16(model: ir.Model) -> bool:
    """True for weights that are computed with in float32, which takes twice the bytes."""
    return any(
        value.dtype is not None and value.dtype.name == "BFLOAT16" for value in model.graph.initializers.values()
    )
