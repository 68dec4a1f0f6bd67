"""Gradient rules of operators that choose, move or join entries, and of those that no gradient passes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphlens.errors import InputError
from graphlens.surgery.rules.builder import Builder, Gradient, dims, is_product_of_integers, known, rank
from graphlens.surgery.rules.registry import (
    Found,
    Grads,
    Needs,
    axes_of,
    constant,
    first_of,
    number,
    only,
    optional,
    rule,
    taken,
)

constant("IsNaN", "IsInf", "Shape", "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "And", "Or", "Not")
constant("ArgMax", "ArgMin", "OneHot", "Sign", "Floor", "Ceil", "Round", "Xor", "Size", "NonZero", "Hardmax", "EyeLike")


@rule("Where", reads_output=True)  # the rule of Softmax reads what a Where made of the pattern
def _chosen(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    condition, out, g = taken(node, 0), node.outputs[0], only(grads)
    zero = b.constant(0.0, out)
    full = g.full or dims(condition) == dims(out)
    found: Found = [None, None, None]
    if needs[1]:
        found[1] = b.summed(Gradient(b.op("Where", condition, g.value, zero), full), out, taken(node, 1))
    if needs[2]:
        found[2] = b.summed(Gradient(b.op("Where", condition, zero, g.value), full), out, taken(node, 2))
    return found


@rule("Identity")
def _same(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    return [only(grads)]


@rule("Cast", "CastLike")
def _cast(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    x, g = taken(node, 0), only(grads)
    if x.type is None:
        raise InputError(f"the dtype of {x.name!r} is not known, so it cannot be differentiated.")
    if not x.type.dtype.is_floating_point():  # a count or an index; or what a quantised product adds up
        return first_of(g, needs) if is_product_of_integers(x) else [None] * len(needs)
    return first_of(Gradient(b.op("Cast", g.value, to=int(x.type.dtype)), g.full), needs)


@rule("Reshape", "Squeeze", "Unsqueeze", "Flatten")
def _reshaped(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    x, g = taken(node, 0), b.whole(only(grads), node.outputs[0])
    return first_of(Gradient(b.op("Reshape", g, b.shape_of(x))), needs)


@rule("Expand")
def _expanded(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    return first_of(b.summed(only(grads), node.outputs[0], taken(node, 0)), needs)


@rule("Transpose")
def _transposed(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    g = only(grads)
    count = rank(node.outputs[0])
    order = list(node.attributes["perm"].as_ints()) if "perm" in node.attributes else list(range(count))[::-1]
    return [Gradient(b.op("Transpose", g.value, perm=[order.index(i) for i in range(count)]), g.full)]


@rule("Trilu")
def _triangle(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    g = b.whole(only(grads), node.outputs[0])
    kept = b.op("Trilu", g, *node.inputs[1:], upper=number(node, "upper", 1))
    return first_of(Gradient(kept), needs)


@rule("Pad")
def _cropped(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    if "mode" in node.attributes and node.attributes["mode"].as_string() != "constant":
        raise InputError(f"{node.name!r}: a Pad that repeats entries cannot be differentiated.")
    x = taken(node, 0)
    axes, pads = axes_of(node, 3, rank(x)), b.op("Neg", taken(node, 1))
    ends = {
        axis: (
            b.op("Gather", pads, b.constant([place]), axis=0),
            b.op("Gather", pads, b.constant([place + len(axes)]), axis=0),
        )
        for place, axis in enumerate(axes)
    }
    return first_of(Gradient(b.padded(b.whole(only(grads), node.outputs[0]), rank(x), ends)), needs)


@rule("Dropout")
def _kept(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    if optional(node, 2) is not None and bool(np.any(np.asarray(known(optional(node, 2)), bool))):
        raise InputError(f"{node.name!r}: a Dropout in training cannot be differentiated.")
    return first_of(only(grads), needs)


@rule("Split")
def _split(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    parts = []
    for index, g in enumerate(grads):
        output = node.outputs[index]
        zero = b.constant(0.0, output)
        parts.append(b.op("Expand", zero, b.shape_of(output)) if g is None else b.whole(g, output))
    return first_of(Gradient(b.op("Concat", *parts, axis=number(node, "axis", 0))), needs)


@rule("Concat")
def _joined(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    axis, g = number(node, "axis", 0), b.whole(only(grads), node.outputs[0])
    place = b.constant([axis])
    sizes = [b.op("Gather", b.shape_of(taken(node, i)), place, axis=0) for i in range(len(node.inputs))]
    parts = b.tape.op_multi_out(
        "Split", [g, b.op("Concat", *sizes, axis=0)], {"axis": axis}, num_outputs=len(node.inputs)
    )
    return [Gradient(part) if needed else None for part, needed in zip(parts, needs, strict=True)]
