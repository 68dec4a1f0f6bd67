"""Knows which ReLUs a static quantiser left out, since its range begins at 0, and puts them back."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphlens.surgery.graph import let_read
from graphlens.surgery.unfusing.building import Builder, Workshop
from graphlens.surgery.unfusing.kinds import constant_of

_MOVES = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Transpose"})
_PRODUCTS = frozenset({"MatMul", "Gemm"})
_READERS = _PRODUCTS | {"Mul", "Pow"}  # what reads activations of neurons: a product, a gate, a square
_STEPS = 6


def restore_relus(shop: Workshop) -> None:
    """Puts a ReLU before each quantiser that takes the place of one, in place.

    ONNX Runtime's quantiser leaves out a ReLU whose result it rounds to integers that begin at 0: numbers below become 0 all the
    same. So does the graph with the ReLU. Only what a product with weights gives and neurons' readers read counts.

    Args:
        shop: What is shared in a graph of standard operators.
    """
    for node in list(shop.graph):
        x = node.inputs[0] if node.inputs else None
        if node.op_type != "QuantizeLinear" or x is None or not _begins_at_zero(node):
            continue
        if _of_weights(x) and _read_as_neurons(node.outputs[0]):
            builder = Builder(node, shop)
            made = builder.op("Relu", x)
            (new,) = builder.tape.nodes
            shop.origin[str(new.name)] = shop.origin.get(str(node.name), str(node.name))
            shop.graph.insert_before(node, builder.tape.nodes)
            let_read([(node, 0)], made, x)


def _begins_at_zero(node: ir.Node) -> bool:
    """True if 0 is the least number that a quantiser makes."""
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    tensor = None if zero is None else constant_of(zero)
    if tensor is None or not tensor.dtype.is_integer():
        return False
    numbers = tensor.numpy()
    return bool((numbers == np.asarray(tensor.dtype.min, numbers.dtype)).all())


def _is_fixed(value: ir.Value | None, steps: int = _STEPS) -> bool:
    """True for a weight, whatever was made of it."""
    if value is None or constant_of(value) is not None:
        return True
    node = value.producer()
    return node is not None and steps > 0 and all(_is_fixed(one, steps - 1) for one in node.inputs)


def _of_weights(value: ir.Value) -> bool:
    """True for what a product of an activation with weights gives, a bias added and tokens moved perhaps."""
    for _ in range(_STEPS):
        node = value.producer()
        if node is None:
            return False
        if node.op_type in _PRODUCTS:
            return _is_fixed(node.inputs[1])
        if node.op_type == "Add":
            others = [one for one in node.inputs if one is not None and not _is_fixed(one)]
        else:
            others = [
                one for one in node.inputs[:1] if one is not None and node.op_type in _MOVES | {"DequantizeLinear"}
            ]
            if node.op_type == "QuantizeLinear":
                others = [one for one in node.inputs[:1] if one is not None and not _begins_at_zero(node)]
        if len(others) != 1:
            return False
        value = others[0]
    return False


def _read_as_neurons(value: ir.Value) -> bool:
    """True if all that reads a value, rounded and moved perhaps, reads it as neurons are read."""
    waiting, found = [value], False
    for _ in range(4 * _STEPS):
        if not waiting:
            return found
        one = waiting.pop()
        if one.is_graph_output():
            return False
        for node, place in one.uses():
            if node.op_type in _READERS and (
                node.op_type not in _PRODUCTS or (place == 0 and _is_fixed(node.inputs[1]))
            ):
                found = True
            elif place == 0 and node.op_type in _MOVES | {"DequantizeLinear", "QuantizeLinear"}:
                waiting += node.outputs
            elif node.op_type != "Shape":
                return False
    return False
