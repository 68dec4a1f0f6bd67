"""How far the quantisers inside a graph (QDQ) may move its hook points away from the arithmetic between them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from graphlens.analysis.identities import Quantiser

if TYPE_CHECKING:
    from graphlens.file.safetensors import Array
    from graphlens.surgery.match.records import View

_LEVELS = 255  # of an 8-bit quantiser


def quantisers(model: ir.Model, hooks: Mapping[str, View], values: Mapping[str, Array]) -> dict[str, Quantiser]:
    """The hook points behind which or before which a graph rounds activations, with the steps of that.

    A step is that of the hook point's own quantiser, times one more for each quantiser between it and the hook points that it
    is computed from: an activation function that is written out has one at each of its nodes.

    Args:
        model: The matched graph.
        hooks: Hook point -> where it is.
        values: What the hook points hold in a run.

    Returns:
        Hook point -> how it is rounded; those that nothing rounds are left out.
    """
    if not any(node.op_type == "QuantizeLinear" for node in model.graph):
        return {}
    named = {view.value for view in hooks.values()}
    at = {str(value.name): value for node in model.graph for value in node.outputs}
    found = {}
    for name, view in hooks.items():
        value = at.get(view.value)
        if value is None or values[name].dtype.kind != "f":
            continue
        own, between = _own(value), _between(value, named)
        if own is not None:
            found[name] = Quantiser(own.step * max(1, between), own.low, own.high)
        elif between:
            low, high = float(np.min(values[name])), float(np.max(values[name]))
            room = (high - low) / 2 or 1.0
            found[name] = Quantiser(between * (high - low) / _LEVELS or 1e-6, low - room, high + room)
    return found


def _own(value: ir.Value) -> Quantiser | None:
    """The quantiser that a value is read off; None where it is read as it was computed."""
    node = value.producer()
    before = None if node is None or node.op_type != "DequantizeLinear" else node.inputs[0]
    rounding = None if before is None else before.producer()
    if before is None or rounding is None or rounding.op_type != "QuantizeLinear":
        return None
    zero_point = rounding.inputs[2] if len(rounding.inputs) > 2 else None
    step, zero = _number(rounding.inputs[1]), 0.0 if zero_point is None else _number(zero_point)
    kind = before.dtype or (None if zero_point is None else zero_point.dtype)
    if step is None or zero is None:
        return None
    limits = np.iinfo(np.uint8 if kind is None else kind.numpy())
    return Quantiser(step, (limits.min - zero) * step, (limits.max - zero) * step)


def _between(value: ir.Value, named: set[str]) -> int:
    """How many quantisers lie between a value and the hook points that it is computed from, its own included."""
    waiting, seen, count = [value], set[ir.Node](), 0
    while waiting:
        node = waiting.pop().producer()
        if node is None or node in seen:
            continue
        seen.add(node)
        count += node.op_type == "QuantizeLinear"
        waiting += [given for given in node.inputs if given is not None and given.name not in named]
    return count


def _number(value: ir.Value | None) -> float | None:
    """The number that a constant holds; None for any other value."""
    tensor = None if value is None else value.const_value
    return None if tensor is None or tensor.size != 1 else float(tensor.numpy().reshape(()))
