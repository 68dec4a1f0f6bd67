"""Gradient rules of sums, means and extremes over axes, and of softmax."""

from __future__ import annotations

import onnx_ir as ir

from graphlens.surgery.rules.builder import Builder, Gradient, dims, rank
from graphlens.surgery.rules.registry import Found, Grads, Needs, axes_of, first_of, number, only, rule, taken


def _spread(b: Builder, node: ir.Node, value: ir.Value) -> ir.Value:
    """What a node gave, or the gradient of that, with the reduced axes in place as axes of size 1."""
    axes = axes_of(node, 1, rank(taken(node, 0)))
    return value if number(node, "keepdims", 1) or not axes else b.op("Unsqueeze", value, b.constant(sorted(axes)))


@rule("ReduceMean", "ReduceSum")
def _reduced(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    x, g = taken(node, 0), b.whole(only(grads), node.outputs[0])
    sizes = dims(x)
    axes = axes_of(node, 1, len(sizes))
    g = _spread(b, node, g)
    if node.op_type == "ReduceMean":
        counts, constant = [sizes[axis] for axis in axes], 1
        for count in counts:
            constant *= count if isinstance(count, int) else 1
        g = b.times(g, 1 / constant)
        several = [axis for axis, count in zip(axes, counts, strict=True) if not isinstance(count, int)]
        if several:  # sizes that only a run knows
            found = b.op("ReduceProd", b.op("Gather", b.shape_of(x), b.constant(several), axis=0), keepdims=0)
            g = b.op("Div", g, b.op("CastLike", found, g))
    return first_of(Gradient(g, full=False), needs)


@rule("ReduceMax", "ReduceMin", reads_output=True)
def _extreme(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    """That of the entry which is the result; an equal share where several are, as torch's amax has it."""
    x, out = taken(node, 0), node.outputs[0]
    g = _spread(b, node, b.whole(only(grads), out))
    hits = b.op("CastLike", b.op("Equal", x, _spread(b, node, out)), g)
    count = b.op("ReduceSum", hits, b.constant(axes_of(node, 1, rank(x))), keepdims=1)
    return first_of(Gradient(b.op("Mul", hits, b.op("Div", g, count))), needs)


@rule("ReduceL2", reads_output=True)
def _norm(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    x, out = taken(node, 0), node.outputs[0]
    share = b.op("Div", _spread(b, node, b.whole(only(grads), out)), _spread(b, node, out))
    return first_of(Gradient(b.op("Mul", x, share)), needs)


@rule("ReduceSumSquare")
def _squares(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    x, g = taken(node, 0), _spread(b, node, b.whole(only(grads), node.outputs[0]))
    return first_of(Gradient(b.op("Mul", x, b.times(g, 2.0))), needs)


@rule("ReduceLogSumExp", reads_output=True)
def _log_sum_exp(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    x, out = taken(node, 0), node.outputs[0]
    share = b.op("Exp", b.op("Sub", x, _spread(b, node, out)))
    return first_of(Gradient(b.op("Mul", share, _spread(b, node, b.whole(only(grads), out)))), needs)


@rule("Softmax", reads_output=True)
def _softmax(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    # A row that is masked throughout is NaN here, and is cleaned right after: 0 has the right gradient.
    y = _cleaned(node.outputs[0])
    weighted = b.op("Mul", b.whole(only(grads), node.outputs[0]), y)
    total = b.op("ReduceSum", weighted, b.constant([number(node, "axis", -1)]), keepdims=1)
    return [Gradient(b.op("Sub", weighted, b.op("Mul", y, total)))]


@rule("LogSoftmax", reads_output=True)
def _log_softmax(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    y, g = node.outputs[0], b.whole(only(grads), node.outputs[0])
    total = b.op("ReduceSum", g, b.constant([number(node, "axis", -1)]), keepdims=1)
    return [Gradient(b.op("Sub", g, b.op("Mul", b.op("Exp", y), total)))]


def _cleaned(pattern: ir.Value) -> ir.Value:
    """``Where(IsNaN(pattern), 0, pattern)`` where the graph has it, else the pattern.

    Hook points between the two, which other tools' files may have, are looked through.
    """
    seen, waiting = {pattern}, [pattern]
    while waiting:
        value = waiting.pop()
        for user, index in value.uses():
            condition = user.inputs[0]
            source = None if condition is None else condition.producer()
            if user.op_type == "Where" and index == 2 and source is not None and source.op_type == "IsNaN":
                return user.outputs[0]
            if user.op_type == "Identity" and user.outputs[0] not in seen:
                seen.add(user.outputs[0])
                waiting.append(user.outputs[0])
    return pattern
