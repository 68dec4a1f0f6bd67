"""The attention cores of a graph: around each Softmax, from the product of queries and keys to that with values."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from graphlens.errors import ModelFileError
from graphlens.surgery.match.linear import integer_product
from graphlens.surgery.match.parts import Core
from graphlens.surgery.match.wires import Wires

_STEPS = 16  # nodes between a Softmax and either product
_TO_VALUES = frozenset({"Where", "Reshape", "Slice", "Squeeze", "Unsqueeze", "Mul"})


def cores_of(wires: Wires) -> list[Core]:
    """The attention cores of a graph, in its order.

    Args:
        wires: The graph.

    Raises:
        ModelFileError: A Softmax chooses experts of an MLP, or its scores are the sum of several products.
    """
    return [core for node in wires.nodes() if node.op_type == "Softmax" and (core := _core(wires, node)) is not None]


def _core(wires: Wires, softmax: ir.Node) -> Core | None:
    if not wires.is_live(softmax.outputs[0]):
        return None
    ahead = _to_values(wires, softmax)
    if ahead is None:
        return None
    pattern, v, z = ahead
    return _to_queries(wires, softmax, pattern, v, z)


def product_operands(wires: Wires, node: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """(both operands, the result) of a product of two activations; None for any other node.

    Args:
        wires: The graph.
        node: The node.
    """
    if node.op_type == "MatMul":
        left, right = wires.operand(node, 0), wires.operand(node, 1)
        if left is None or right is None or wires.is_fixed(left) or wires.is_fixed(right):
            return None
        return left, right, wires.first(node.outputs[0])
    if node.op_type == "MatMulInteger":
        found = integer_product(wires, node)
        if found is not None and found[0][0] is not None and found[0][1] is not None:
            return found[0][0], found[0][1], found[2]
    return None


def _to_values(wires: Wires, softmax: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """(pattern, values, result) of the product with the values that a Softmax leads to."""
    value = wires.first(softmax.outputs[0])
    trail = [value]
    for _ in range(_STEPS):
        onward = None
        for node, index in wires.uses(value):
            if node.op_type == "DynamicQuantizeLinear":
                readers = {reader for reader, place in node.outputs[0].uses() if place == 0}
                found = [product for reader in readers if (product := product_operands(wires, reader)) is not None]
            else:
                product = product_operands(wires, node) if index == 0 else None
                found = [] if product is None else [product]
            for left, right, result in found:
                if left is value and wires.is_live(right):
                    return _of_four_axes(wires, trail), right, result
            if node.op_type in _TO_VALUES and onward is None:
                # Where a row sees nothing, another node chooses 0: it looks at the scores, or at the pattern itself.
                chosen = node.inputs[1:] if node.op_type == "Where" else node.inputs
                others = [one for one in chosen if one is not None and wires.first(one) is not value]
                if not any(_own(wires, one, value) for one in others if wires.is_live(one)):
                    onward = wires.first(node.outputs[0])
        if onward is None:
            return None
        value = onward
        trail.append(value)
    return None


def _of_four_axes(wires: Wires, trail: list[ir.Value]) -> ir.Value:
    """The pattern as [b, h, q, k], where prompts and heads are put into one axis for the product."""
    last = trail[-1]
    for value in reversed(trail):
        if len(wires.shape(value) or ()) == 4:
            return value
        node = value.producer()
        if node is None or node.op_type != "Reshape":
            break
    return last


def _own(wires: Wires, other: ir.Value, value: ir.Value) -> bool:
    """True if an activation is not computed from another one alone (as a test for NaN is)."""
    node = wires.producer(other)
    return node is None or any(one is not value for one in wires.live_operands(node))


@dataclass
class _Way:
    """What was met between the scores and the product of queries and keys."""

    scale: float = 1.0
    soft_cap: float | None = None
    sinks: ir.Value | None = None


def _to_queries(wires: Wires, softmax: ir.Node, pattern: ir.Value, v: ir.Value, z: ir.Value) -> Core | None:
    scores = wires.operand(softmax, 0)
    if scores is None:
        return None
    way, added = _Way(), list[ir.Value]()
    value = scores
    while (
        len(wires.shape(scores) or ()) == 3 and (maker := scores.producer()) is not None and maker.op_type == "Reshape"
    ):
        earlier = wires.operand(maker, 0)
        if earlier is None or len(wires.shape(earlier) or ()) != 4:
            break
        scores = value = earlier
    for _ in range(_STEPS):
        node = value.producer()
        if node is None:
            return None
        product = product_operands(wires, node) or _dequantised(wires, node)
        if product is not None:
            q, k, _result = product
            if not wires.is_live(q) or not wires.is_live(k):
                return None
            return Core(
                softmax,
                _scores(wires, scores, way),
                pattern,
                q,
                k,
                v,
                z,
                way.scale * (way.soft_cap or 1.0),
                way.soft_cap,
                tuple(added),
                way.sinks,
            )
        onward = _back(wires, node, way, added)
        if onward is None:
            return None
        value = onward
    return None


def _scores(wires: Wires, scores: ir.Value, way: _Way) -> ir.Value:
    """The scores without a sink beside them."""
    node = scores.producer()
    while way.sinks is not None and node is not None and node.op_type != "Concat":
        source = wires.live_operands(node)[0]
        node = source.producer()
    return wires.live_operands(node)[0] if way.sinks is not None and node is not None else scores


def _dequantised(wires: Wires, node: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """The product of integers whose dequantised result a node gives."""
    if node.op_type != "Mul":
        return None
    for given in node.inputs:
        cast = None if given is None else given.producer()
        source = cast.inputs[0] if cast is not None and cast.op_type == "Cast" else None
        maker = None if source is None else source.producer()
        if maker is not None and maker.op_type == "MatMulInteger":
            return product_operands(wires, maker)
    return None


def _back(wires: Wires, node: ir.Node, way: _Way, added: list[ir.Value]) -> ir.Value | None:
    """One step from the scores towards their product; None where the way ends."""
    live = wires.live_operands(node)
    operator = node.op_type
    if operator == "Where":
        live = [one for index in (1, 2) if (one := wires.operand(node, index)) is not None and wires.is_live(one)]
    if operator in ("Add", "Sub") and len(live) == 2:
        products = [one for one in live if _is_from_product(wires, one)]
        if len(products) > 1:
            raise ModelFileError(
                f"the scores of the attention at {node.name!r} are a sum of several products of activations (DeBERTa's "
                "attention is): its hook points have no names. graphlens expose adds any values of it as outputs."
            )
        return None
    if len(live) != 1:
        return None
    others = [wires.first(one) for one in node.inputs if one is not None and wires.first(one) is not live[0]]
    if operator in ("Add", "Sub", "Where", "Max", "Min"):
        added += others
        return live[0]
    if operator in ("Mul", "Div") and len(others) == 1:
        number = wires.number(others[0])
        if number is None:  # a mask of ones and zeros, as in GPT-1, whose other half is added
            added += others
            return live[0] if operator == "Mul" else None
        return _scaled(wires, node, live[0], number, way)
    if operator == "Tanh":
        way.soft_cap = way.scale
        way.scale = 1.0
        return live[0]
    if operator == "Concat":
        way.sinks = others[0] if others else None
        return live[0]
    if operator in ("Reshape", "Squeeze", "Unsqueeze", "Clip"):
        return live[0]
    return None


def _scaled(wires: Wires, node: ir.Node, live: ir.Value, number: float, way: _Way) -> ir.Value | None:
    if node.op_type == "Div":
        if wires.operand(node, 0) is not live:
            return None
        way.scale /= number
    else:
        way.scale *= number
    return live


def _is_from_product(wires: Wires, value: ir.Value) -> bool:
    """True for a product of two activations, scaled or gathered perhaps."""
    for _ in range(_STEPS):
        node = value.producer()
        if node is None:
            return False
        if product_operands(wires, node) is not None:
            return True
        live = wires.live_operands(node)
        if len(live) != 1:
            return False
        value = live[0]
    return False
