"""Gradient rules of operators that pick entries by their indices: each gradient goes back to where its entry came from."""

from __future__ import annotations

import onnx_ir as ir

from graphlens.errors import InputError
from graphlens.surgery.rules.builder import Builder, Gradient, dims, known, rank
from graphlens.surgery.rules.registry import (
    Found,
    Grads,
    Needs,
    axes_of,
    first_of,
    number,
    only,
    optional,
    rule,
    taken,
)


@rule("Slice")
def _sliced(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    x, g = taken(node, 0), b.whole(only(grads), node.outputs[0])
    count = rank(x)
    starts, ends, steps = taken(node, 1), taken(node, 2), optional(node, 4)
    strides = None if steps is None else known(steps)
    for index, axis in enumerate(_axes(node, count)):
        place, here = b.constant([index]), b.constant([axis])
        start, end = (b.op("Gather", bound, place, axis=0) for bound in (starts, ends))
        step = b.constant([1]) if steps is None else b.op("Gather", steps, place, axis=0)
        size = b.op("Gather", b.shape_of(x), here, axis=0)
        every = b.op("Range", b.constant(0), b.op("Squeeze", size), b.constant(1))
        chosen = b.op("Slice", every, start, end, b.constant([0]), step)
        if steps is None or (strides is not None and strides.reshape(-1)[index] == 1):
            g = _padded(b, g, every, chosen, axis, count)
        else:
            g = _scattered(b, g, chosen, _with_size(b, b.op("Shape", g), axis, count, size), axis, count)
    return first_of(Gradient(g), needs)


def _axes(node: ir.Node, count: int) -> list[int]:
    """The axes that a Slice cuts: those of its input, or the first ones."""
    if optional(node, 3) is not None:
        return axes_of(node, 3, count)
    starts = dims(taken(node, 1))[0]
    if not isinstance(starts, int):
        raise InputError(f"how many axes {node.name!r} cuts is not known, so it cannot be differentiated.")
    return list(range(starts))


def _padded(b: Builder, g: ir.Value, every: ir.Value, chosen: ir.Value, axis: int, count: int) -> ir.Value:
    """0 before and after ``g`` along an axis of which ``chosen``, a stretch of ``every``, was kept: cheaper than scattering."""
    # Where nothing was kept all zeros come after.
    first = b.op("ReduceMin", b.op("Concat", chosen, b.op("Shape", every), axis=0), b.constant([0]), keepdims=1)
    rest = b.op("Sub", b.op("Sub", b.op("Shape", every), first), b.op("Shape", chosen))
    return b.padded(g, count, {axis: (first, rest)})


def _with_size(b: Builder, shape: ir.Value, axis: int, count: int, size: ir.Value) -> ir.Value:
    """A shape with another size at one axis."""
    parts = [b.op("Slice", shape, b.constant([0]), b.constant([axis])), size]
    if axis + 1 < count:
        parts.append(b.op("Slice", shape, b.constant([axis + 1]), b.constant([count])))
    return b.op("Concat", *parts, axis=0)


def _scattered(b: Builder, g: ir.Value, chosen: ir.Value, shape: ir.Value, axis: int, count: int) -> ir.Value:
    """0 in a shape, and entry i of ``g`` along an axis added to where ``chosen`` [n] says."""
    column = b.op("Reshape", chosen, b.constant([1] * axis + [-1] + [1] * (count - axis - 1)))
    places = b.op("Expand", column, b.op("Shape", g))
    return _added(b, g, places, shape, axis)


def _added(b: Builder, g: ir.Value, places: ir.Value, shape: ir.Value, axis: int) -> ir.Value:
    """0 in a shape, and each entry of ``g`` added at its place along an axis."""
    # ONNX Runtime adds no float16 on a CPU.
    wide = b.op("Cast", g, to=int(ir.DataType.FLOAT)) if b.is_half(g) else g
    nothing = b.op("Expand", b.constant(0.0, wide), shape)
    found = b.op("ScatterElements", nothing, places, wide, axis=axis, reduction="add")
    return found if wide is g else b.op("CastLike", found, g)


@rule("Gather")
def _gathered(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    x, indices, out = taken(node, 0), taken(node, 1), node.outputs[0]
    count, many = rank(x), rank(indices)
    axis = number(node, "axis", 0) % count
    g = b.whole(only(grads), out)
    if many != 1:  # as one axis of indices
        shape = b.op("Shape", g)
        outer = [b.op("Slice", shape, b.constant([0]), b.constant([axis])), b.constant([-1])]
        if axis + 1 < count:
            outer.append(b.op("Slice", shape, b.constant([axis + many]), b.constant([count + many - 1])))
        g = b.op("Reshape", g, b.op("Concat", *outer, axis=0))
    flat = b.op("Reshape", indices, b.constant([-1]))
    return first_of(Gradient(_scattered(b, g, flat, b.shape_of(x), axis, count)), needs)


@rule("GatherElements")
def _picked(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    x, indices = taken(node, 0), taken(node, 1)
    g = b.whole(only(grads), node.outputs[0])
    return first_of(Gradient(_added(b, g, indices, b.shape_of(x), number(node, "axis", 0))), needs)


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


@rule("GatherND")
def _gathered_rows(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    if number(node, "batch_dims", 0):
        raise InputError(f"{node.name!r}: a GatherND with batch_dims cannot be differentiated.")
    x, indices, g = taken(node, 0), taken(node, 1), b.whole(only(grads), node.outputs[0])
    wide = b.op("Cast", g, to=int(ir.DataType.FLOAT)) if b.is_half(g) else g
    nothing = b.op("Expand", b.constant(0.0, wide), b.shape_of(x))
    found = b.op("ScatterND", nothing, indices, wide, reduction="add")
    return first_of(Gradient(found if wide is g else b.op("CastLike", found, g)), needs)


@rule("Tile")
def _repeated(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    x, repeats = taken(node, 0), taken(node, 1)
    count, g = rank(x), b.whole(only(grads), node.outputs[0])
    column = b.constant([1])
    pairs = b.op("Concat", *(b.op("Unsqueeze", sizes, column) for sizes in (repeats, b.shape_of(x))), axis=1)
    apart = b.op("Reshape", g, b.op("Reshape", pairs, b.constant([-1])))  # [times, size] for each axis
    return first_of(Gradient(b.op("ReduceSum", apart, b.constant(list(range(0, 2 * count, 2))), keepdims=0)), needs)
