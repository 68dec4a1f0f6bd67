"""Gradient rules of operators that pick entries by their indices: each gradient goes back to where its entry came from."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphlens.errors import InputError
from graphlens.surgery.rules.builder import Builder, Gradient, dims
from graphlens.surgery.rules.registry import Found, Grads, Needs, first_of, number, only, rule, taken


@rule("Slice")
def _sliced(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    x, g = taken(node, 0), b.whole(only(grads), node.outputs[0])
    rank = len(dims(x))
    starts, ends, axes, steps = (node.inputs[index] if len(node.inputs) > index else None for index in (1, 2, 3, 4))
    for index, axis in enumerate(_axes(node, axes, rank)):
        place, here = b.constant([index]), b.constant([axis])
        start, end = (b.op("Gather", bound, place, axis=0) for bound in (starts, ends))
        step = b.constant([1]) if steps is None else b.op("Gather", steps, place, axis=0)
        size = b.op("Gather", b.shape_of(x), here, axis=0)
        every = b.op("Range", b.constant(0), b.op("Squeeze", size), b.constant(1))
        chosen = b.op("Slice", every, start, end, b.constant([0]), step)
        g = _scattered(b, g, chosen, _with_size(b, b.op("Shape", g), axis, rank, size), axis, rank)
    return first_of(Gradient(g), needs)


def _axes(node: ir.Node, axes: ir.Value | None, rank: int) -> list[int]:
    """The axes that a Slice cuts: those of its input, or the first ones."""
    if axes is None:
        return list(range(int(dims(taken(node, 1))[0])))
    tensor = ir.convenience.get_const_tensor(axes)
    if tensor is None:
        raise InputError(f"the axes of {node.name!r} are not a constant, so it cannot be differentiated.")
    return [int(axis) % rank for axis in np.atleast_1d(tensor.numpy())]


def _with_size(b: Builder, shape: ir.Value, axis: int, rank: int, size: ir.Value) -> ir.Value:
    """A shape with another size at one axis."""
    parts = [b.op("Slice", shape, b.constant([0]), b.constant([axis])), size]
    if axis + 1 < rank:
        parts.append(b.op("Slice", shape, b.constant([axis + 1]), b.constant([rank])))
    return b.op("Concat", *parts, axis=0)


def _scattered(b: Builder, g: ir.Value, chosen: ir.Value, shape: ir.Value, axis: int, rank: int) -> ir.Value:
    """0 in a shape, and entry i of ``g`` along an axis added to where ``chosen`` [n] says."""
    column = b.op("Reshape", chosen, b.constant([1] * axis + [-1] + [1] * (rank - axis - 1)))
    places = b.op("Expand", column, b.op("Shape", g))
    nothing = b.op("Expand", b.constant(0.0, g), shape)
    return b.op("ScatterElements", nothing, places, g, axis=axis, reduction="add")


@rule("Gather")
def _gathered(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    x, indices, out = taken(node, 0), taken(node, 1), node.outputs[0]
    rank, many = len(dims(x)), len(dims(indices))
    axis = number(node, "axis", 0) % rank
    g = b.whole(only(grads), out)
    if many != 1:  # as one axis of indices
        shape = b.op("Shape", g)
        outer = [b.op("Slice", shape, b.constant([0]), b.constant([axis])), b.constant([-1])]
        if axis + 1 < rank:
            outer.append(b.op("Slice", shape, b.constant([axis + many]), b.constant([rank + many - 1])))
        g = b.op("Reshape", g, b.op("Concat", *outer, axis=0))
    flat = b.op("Reshape", indices, b.constant([-1]))
    return first_of(Gradient(_scattered(b, g, flat, b.shape_of(x), axis, rank)), needs)


@rule("GatherElements")
def _picked(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    x, indices = taken(node, 0), taken(node, 1)
    g = b.whole(only(grads), node.outputs[0])
    nothing = b.op("Expand", b.constant(0.0, x), b.shape_of(x))
    axis = number(node, "axis", 0)
    return first_of(Gradient(b.op("ScatterElements", nothing, indices, g, axis=axis, reduction="add")), needs)


@rule("ScatterElements")
def _placed(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    if "reduction" in node.attributes and node.attributes["reduction"].as_string() != "none":
        raise InputError(f"{node.name!r}: a ScatterElements that reduces cannot be differentiated.")
    indices, axis = taken(node, 1), number(node, "axis", 0)
    g = b.whole(only(grads), node.outputs[0])
    found: Found = [None, None, None]
    if needs[0]:
        nothing = b.op("Expand", b.constant(0.0, g), b.op("Shape", indices))
        found[0] = Gradient(b.op("ScatterElements", g, indices, nothing, axis=axis))
    if needs[2]:
        found[2] = Gradient(b.op("GatherElements", g, indices, axis=axis))
    return found


@rule("TopK", reads_output=True)
def _largest(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    x, values, chosen = taken(node, 0), node.outputs[0], node.outputs[1]
    if grads[0] is None:  # of the indices, which no small change of an input changes
        return [None] * len(needs)
    nothing = b.op("Expand", b.constant(0.0, x), b.shape_of(x))
    axis = number(node, "axis", -1)
    return first_of(Gradient(b.op("ScatterElements", nothing, chosen, b.whole(grads[0], values), axis=axis)), needs)


@rule("Tile")
def _repeated(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    x, repeats = taken(node, 0), taken(node, 1)
    rank, g = len(dims(x)), b.whole(only(grads), node.outputs[0])
    column = b.constant([1])
    pairs = b.op("Concat", *(b.op("Unsqueeze", sizes, column) for sizes in (repeats, b.shape_of(x))), axis=1)
    apart = b.op("Reshape", g, b.op("Reshape", pairs, b.constant([-1])))  # [times, size] for each axis
    return first_of(Gradient(b.op("ReduceSum", apart, b.constant(list(range(0, 2 * rank, 2))), keepdims=0)), needs)
