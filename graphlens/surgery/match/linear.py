"""The products of a graph with a matrix of weights: one kind, whether plain, quantised in either way, or packed."""

from __future__ import annotations

import onnx_ir as ir

from graphlens.surgery.match.layout import RESHAPES
from graphlens.surgery.match.parts import Linear
from graphlens.surgery.match.wires import Wires


class Linears:
    """All products with weights of a graph.

    Args:
        wires: The graph.

    Attributes:
        by_out: The result of one -> it; also the result before the bias.
    """

    def __init__(self, wires: Wires) -> None:
        self._wires = wires
        self.by_out: dict[ir.Value, Linear] = {}
        self._by_source: dict[ir.Value, list[Linear]] = {}
        for node in wires.nodes():
            found = self._linear(node)
            if found is not None:
                self.by_out[found.out] = found
                self._by_source.setdefault(found.source, []).append(found)

    def reading(self, source: ir.Value) -> list[Linear]:
        """The products that multiply an activation, in the order of the graph."""
        return self._by_source.get(self._wires.first(source), [])

    def made(self, value: ir.Value) -> Linear | None:
        """The product that gives an activation, tokens perhaps put into an axis of their own again; None if none does."""
        wires = self._wires
        found = wires.first(value)
        while found not in self.by_out:
            node = found.producer()
            if node is None or node.op_type not in RESHAPES or not wires.is_live(found):
                return None
            source = wires.operand(node, 0)
            width = _width(wires, found)
            if source is None or width is None or _width(wires, source) != width:
                return None
            found = source
        return self.by_out[found]

    def _linear(self, node: ir.Node) -> Linear | None:
        wires = self._wires
        if len(node.inputs) < 2 or node.inputs[1] is None or not wires.is_fixed(node.inputs[1]):
            return None
        x = wires.operand(node, 0)
        if x is None or wires.is_fixed(x):
            return None
        weight, out = node.inputs[1], wires.first(node.outputs[0])
        transposed, scale, bias, scales = False, 1.0, None, None
        if node.op_type == "MatMul":
            if len(wires.shape(weight) or ()) != 2:
                return None
        elif node.op_type == "Gemm":
            if _int(node, "transA"):
                return None
            transposed, scale = bool(_int(node, "transB")), _float(node, "alpha")
            bias = node.inputs[2] if len(node.inputs) > 2 else None
            if bias is not None and (not wires.is_fixed(bias) or _float(node, "beta") != 1):
                return None
        elif node.op_type == "MatMulNBits":
            transposed = True
            bias = node.inputs[5] if len(node.inputs) > 5 else None
        elif node.op_type == "MatMulInteger":
            found = self._of_integers(node)
            if found is None:
                return None
            x, scales, out = found
        else:
            return None
        if bias is None:
            bias, out = self._biased(out)
        return Linear(node, x, self._tokens_apart(x), weight, transposed, bias, out, scale, scales)

    def _of_integers(self, node: ir.Node) -> tuple[ir.Value, ir.Value | None, ir.Value] | None:
        """What a product of integers multiplies as numbers, the scales of its matrix, and the result as numbers."""
        found = integer_product(self._wires, node)
        if found is None:
            return None
        sources, scales, out = found
        return (sources[0], scales[1], out) if sources[0] is not None else None

    def _biased(self, out: ir.Value) -> tuple[ir.Value | None, ir.Value]:
        """The bias that is added to a product, and the sum."""
        wires = self._wires
        node = wires.only_use(out)
        if node is None or node.op_type != "Add":
            return None, out
        others = [value for value in node.inputs if value is not None and wires.first(value) is not out]
        if len(others) != 1 or not wires.is_fixed(others[0]):
            return None, out
        shape, width = wires.shape(others[0]), _width(wires, out)
        if not shape or shape[-1] != width or any(size != 1 for size in shape[:-1]):
            return None, out
        return others[0], wires.first(node.outputs[0])

    def _tokens_apart(self, x: ir.Value) -> ir.Value:
        """An activation before its tokens were put into one axis."""
        wires = self._wires
        while True:
            node = x.producer()
            if node is None or node.op_type not in RESHAPES:
                return x
            source = wires.operand(node, 0)
            width = _width(wires, x)
            if source is None or wires.is_fixed(source) or width is None or _width(wires, source) != width:
                return x
            if len(wires.shape(source) or ()) <= len(wires.shape(x) or ()):
                return x
            x = source


def integer_product(
    wires: Wires, node: ir.Node
) -> tuple[tuple[ir.Value | None, ir.Value | None], tuple[ir.Value | None, ir.Value | None], ir.Value] | None:
    """A MatMulInteger as a product of numbers.

    Args:
        wires: The graph.
        node: The node.

    Returns:
        ((both operands before DynamicQuantizeLinear; None for what no such node gave), (the scales of both), the result
        multiplied by both scales); None if what follows is something else.
    """
    cast = _only_reader(node.outputs[0], "Cast")
    last = None if cast is None else _only_reader(cast.outputs[0], "Mul")
    if cast is None or last is None:
        return None
    sources: list[ir.Value | None] = []
    scales: list[ir.Value | None] = []
    for given in node.inputs[:2]:
        quantiser = None if given is None else given.producer()
        dynamic = quantiser is not None and quantiser.op_type == "DynamicQuantizeLinear"
        sources.append(wires.operand(quantiser, 0) if dynamic and quantiser is not None else None)
        scales.append(quantiser.outputs[1] if dynamic and quantiser is not None else None)
    product = next((one for one in last.inputs if one is not None and one is not cast.outputs[0]), None)
    maker = None if product is None else product.producer()
    if maker is None or maker.op_type != "Mul":
        return None
    for index in (0, 1):
        others = [one for one in maker.inputs if one is not scales[1 - index]]
        if scales[index] is None and len(others) == 1:
            scales[index] = others[0]
    return (sources[0], sources[1]), (scales[0], scales[1]), wires.first(last.outputs[0])


def _only_reader(value: ir.Value, operator: str) -> ir.Node | None:
    readers = {node for node, _ in value.uses()}
    node = next(iter(readers)) if len(readers) == 1 else None
    return node if node is not None and node.op_type == operator else None


def _width(wires: Wires, value: ir.Value) -> int | None:
    shape = wires.shape(value)
    return shape[-1] if shape else None


def _int(node: ir.Node, name: str) -> int:
    return node.attributes[name].as_int() if name in node.attributes else 0


def _float(node: ir.Node, name: str) -> float:
    return node.attributes[name].as_float() if name in node.attributes else 1.0
