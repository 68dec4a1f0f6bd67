"""Gradient rules of sums and means over axes, and of softmax."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphlens.errors import InputError
from graphlens.surgery.rules.builder import Builder, Gradient, dims
from graphlens.surgery.rules.registry import Found, Grads, Needs, first_of, number, only, rule, taken


@rule("ReduceMean", "ReduceSum")
def _reduced(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    x, g = taken(node, 0), b.whole(only(grads), node.outputs[0])
    sizes = dims(x)
    axes = _axes(node, len(sizes))
    if not number(node, "keepdims", 1):
        g = b.op("Unsqueeze", g, b.constant(axes))
    if node.op_type == "ReduceMean":
        count = 1
        for axis in axes:
            size = sizes[axis]
            if not isinstance(size, int):
                raise InputError(f"{node.name!r}: a mean over {size} tokens cannot be differentiated.")
            count *= size
        g = b.times(g, 1 / count)
    return first_of(Gradient(g, full=False), needs)


def _axes(node: ir.Node, rank: int) -> list[int]:
    """The axes that a node reduces: those of its second input, or all."""
    given = node.inputs[1] if len(node.inputs) > 1 else None
    if given is None:
        return list(range(rank))
    tensor = ir.convenience.get_const_tensor(given)
    if tensor is None:
        raise InputError(f"the axes of {node.name!r} is not a constant, so it cannot be differentiated.")
    return [int(axis) % rank for axis in np.atleast_1d(tensor.numpy())] or list(range(rank))


@rule("Softmax", reads_output=True)
def _softmax(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    # A row that is masked throughout is NaN here, and is cleaned right after: 0 has the right gradient.
    y = _cleaned(node.outputs[0])
    weighted = b.op("Mul", b.whole(only(grads), node.outputs[0]), y)
    total = b.op("ReduceSum", weighted, b.constant([number(node, "axis", -1)]), keepdims=1)
    return [Gradient(b.op("Sub", weighted, b.op("Mul", y, total)))]


def _cleaned(pattern: ir.Value) -> ir.Value:
    """``Where(IsNaN(pattern), 0, pattern)`` where the graph has it, else the pattern."""
    for user, index in pattern.uses():
        condition = user.inputs[0]
        source = None if condition is None else condition.producer()
        if user.op_type == "Where" and index == 2 and source is not None and source.op_type == "IsNaN":
            return user.outputs[0]
    return pattern
