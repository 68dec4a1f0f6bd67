"""The base of a rotation's frequencies, read off the constants that its angles are computed from."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphlens.surgery.match.parts import Rotation
from graphlens.surgery.match.wires import Wires

_NODES = 60
_NEAR, _HALF = 1e-4, 2e-3  # how far the logarithm of a frequency may be off, in float32 and float16
Floats = npt.NDArray[np.float64]


def base_of(wires: Wires, rotation: Rotation) -> float | None:
    """The base whose powers the frequencies are; None where they are none (scaled frequencies), or cannot be read.

    Args:
        wires: The graph.
        rotation: The rotation.
    """
    found = [base for numbers, near in _frequencies(wires, rotation) if (base := _base(numbers, near)) is not None]
    return found[0] if found and all(math.isclose(one, found[0], rel_tol=1e-3) for one in found) else None


def trained_tokens(wires: Wires, rotation: Rotation) -> int | None:
    """How many positions a rotation's table has; None where angles are computed.

    Args:
        wires: The graph.
        rotation: The rotation.
    """
    half = rotation.dimensions // 2
    rows = [
        shape[0]
        for value in _fixed_behind(wires, rotation)
        if len(shape := wires.shape(value) or ()) == 2 and shape[1] in (half, 2 * half) and shape[0] > 1
    ]
    return min(rows, default=None)


def _frequencies(wires: Wires, rotation: Rotation) -> list[tuple[Floats, float]]:
    """(frequencies, how far they may be off) that stand in constants, or follow from the row of position 1 of tables of sines."""
    half, found = rotation.dimensions // 2, list[tuple[Floats, float]]()
    tables = list[Floats]()
    for value in _fixed_behind(wires, rotation):
        shape = wires.shape(value)
        if shape is None or (value.const_value is None and value.producer() is None):
            continue
        numbers = _content(wires, value)
        if numbers is None or numbers.dtype.kind != "f":
            continue
        wide = numbers.astype(np.float64)
        if wide.size == half:
            found.append((wide.reshape(-1), _HALF if numbers.dtype.itemsize == 2 else _NEAR))
        elif wide.ndim >= 2 and wide.shape[-1] in (half, 2 * half) and wide.shape[-2] > 1:
            tables.append(wide.reshape(-1, wide.shape[-2], wide.shape[-1])[0, :2, :half])
    # cos is 1 and sin 0 at position 0.
    cosines = [table for table in tables if np.allclose(table[0], table[0, 0]) and table[0, 0] > 0]
    sines = [table for table in tables if np.allclose(table[0], 0)]
    for cosine, sine in zip(cosines, sines, strict=False):
        found.append((np.arctan2(sine[1], cosine[1]), _NEAR))
    return found


def _content(wires: Wires, value: ir.Value) -> npt.NDArray[np.generic] | None:
    known = wires.shapes.known(value).data
    if known is not None:
        return known
    return None if value.const_value is None else np.asarray(value.const_value.numpy())


def _base(frequencies: Floats, near: float = _NEAR) -> float | None:
    """The base of frequencies base^(-2i/d); None if they are no such powers.

    Args:
        frequencies: The frequencies.
        near: How far the logarithm of one may be off.
    """
    half = len(frequencies)
    if half < 2 or not math.isclose(frequencies[0], 1, rel_tol=_NEAR) or np.any(frequencies <= 0):
        return None
    steps = np.arange(1, half)
    logs = np.log(frequencies[1:])
    slope = float((logs * steps).sum() / (steps * steps).sum())
    if not np.allclose(logs, slope * steps, rtol=0, atol=near * max(1.0, abs(slope) * half)):
        return None
    base = math.exp(-slope * half)
    plain = float(f"{base:.2g}")  # bases are round numbers
    return plain if math.isclose(base, plain, rel_tol=20 * near) else float(f"{base:.6g}")


def _fixed_behind(wires: Wires, rotation: Rotation) -> list[ir.Value]:
    """The constants that a rotation's angles are computed from, the nearest ones."""
    waiting, seen, found = list(rotation.angles), set[ir.Value](), dict[ir.Value, None]()
    while waiting and len(seen) < _NODES:
        value = waiting.pop()
        if value in seen or wires.is_live(value):
            continue
        seen.add(value)
        if wires.is_fixed(value):
            found[value] = None
        node = value.producer()
        if node is not None and node.op_type not in ("Shape", "Size"):
            waiting += [one for one in node.inputs if one is not None]
    return list(found)
