"""The norms of a graph, written out: how each is centred and scaled, and the weights that follow."""

from __future__ import annotations

import onnx_ir as ir

from graphlens.surgery.match.parts import Affine, Norm, Normed
from graphlens.surgery.match.wires import Wires


class Norms:
    """All norms of a graph.

    Args:
        wires: The graph.
    """

    def __init__(self, wires: Wires) -> None:
        self._wires = wires
        self._by_out: dict[ir.Value, Normed] = {}
        self._by_x: dict[ir.Value, list[Norm]] = {}
        self._nodes: dict[ir.Node, Norm] = {}
        for node in wires.nodes():
            if node.op_type in ("Sqrt", "Pow"):
                self._add(self._written_out(node))

    def _add(self, norm: Norm | None) -> None:
        if norm is None:
            return
        self._by_x.setdefault(norm.x, []).append(norm)
        for affine in norm.affines:
            self._by_out[affine.out] = Normed(norm, affine)

    def of(self, x: ir.Value) -> list[Norm]:
        """The norms of an activation."""
        return self._by_x.get(self._wires.first(x), [])

    def giving(self, out: ir.Value) -> Normed | None:
        """The norm that an activation is the result of."""
        return self._by_out.get(self._wires.first(out))

    def reads(self, node: ir.Node, x: ir.Value) -> bool:
        """True if a node belongs to a norm of an activation."""
        return any(node in self._parts(norm) for norm in self.of(x))

    def _parts(self, norm: Norm) -> set[ir.Node]:
        """The nodes that read what a norm normalises."""
        ends = {value for value in (norm.scale, norm.normalized) if value is not None}
        found = set[ir.Node]()
        for node, _ in self._wires.uses(norm.x):
            if self._leads(node, ends, 8):
                found.add(node)
        return found

    def _leads(self, node: ir.Node, ends: set[ir.Value], steps: int) -> bool:
        """True if all that a node gives ends in some values, a few nodes further on."""
        wires = self._wires
        out = wires.first(node.outputs[0])
        if out in ends:
            return True
        if steps == 0 or node.op_type not in (
            "Mul",
            "Pow",
            "Sub",
            "ReduceMean",
            "Add",
            "Sqrt",
            "Div",
            "Reciprocal",
            "Max",
        ):
            return False
        readers = {reader for reader, _ in wires.uses(out)}
        return bool(readers) and all(self._leads(reader, ends, steps - 1) for reader in readers)

    def _written_out(self, node: ir.Node) -> Norm | None:
        """The norm that a Sqrt, or a Pow in its place, belongs to."""
        wires = self._wires
        inverse = False
        if node.op_type == "Pow":
            exponent = wires.number(node.inputs[1])
            if exponent not in (0.5, -0.5):
                return None
            inverse = exponent == -0.5
        shifted = None if node.inputs[0] is None else wires.producer(node.inputs[0])
        if shifted is None or shifted.op_type not in ("Add", "Max", "Clip"):
            return None
        mean, eps = self._shifted(shifted)
        averaged = None if mean is None else wires.producer(mean)
        if averaged is None or averaged.op_type != "ReduceMean" or eps is None or not self._of_last_axis(averaged):
            return None
        square = None if averaged.inputs[0] is None else wires.producer(averaged.inputs[0])
        deviation = None if square is None else self._squared(square)
        if deviation is None:
            return None
        x, centred = self._centred(deviation)
        root = wires.first(node.outputs[0])
        normalized = self._divided(root, x, centred, inverse)
        if normalized is None:
            return None
        return Norm(x, centred, eps, None if inverse else root, normalized, self._affines(normalized))

    def _shifted(self, node: ir.Node) -> tuple[ir.Value | None, float | None]:
        """(the variance, eps) of a sum of both."""
        wires = self._wires
        for index in (0, 1):
            eps = wires.number(node.inputs[1 - index]) if len(node.inputs) > 1 else None
            if eps is not None and wires.is_fixed(node.inputs[1 - index]):
                return wires.operand(node, index), eps
        return None, None

    def _of_last_axis(self, node: ir.Node) -> bool:
        wires = self._wires
        axes = wires.shapes.integers(node.inputs[1]) if len(node.inputs) > 1 else None
        if axes is None and "axes" in node.attributes:
            axes = list(node.attributes["axes"].as_ints())
        shape = None if node.inputs[0] is None else wires.shape(node.inputs[0])
        return axes == [-1] or (axes is not None and shape is not None and axes == [len(shape) - 1])

    def _squared(self, node: ir.Node) -> ir.Value | None:
        """What a node squares."""
        wires = self._wires
        if node.op_type == "Mul" and wires.operand(node, 0) is wires.operand(node, 1):
            return wires.operand(node, 0)
        if node.op_type == "Pow" and wires.number(node.inputs[1]) == 2:
            return wires.operand(node, 0)
        return None

    def _centred(self, deviation: ir.Value) -> tuple[ir.Value, bool]:
        """(what a deviation is of, True if from its mean)."""
        wires = self._wires
        node = deviation.producer()
        if node is not None and node.op_type == "Sub":
            x, mean = wires.operand(node, 0), wires.operand(node, 1)
            maker = None if mean is None else mean.producer()
            if maker is not None and maker.op_type == "ReduceMean" and x is not None and wires.operand(maker, 0) is x:
                return x, True
        return deviation, False

    def _divided(self, root: ir.Value, x: ir.Value, centred: bool, inverse: bool) -> ir.Value | None:
        """What a norm's deviation is after the division."""
        wires = self._wires
        inverses = [root] if inverse else []
        for node, index in wires.uses(root):
            if node.op_type == "Div" and index == 1 and not inverse:
                top = wires.operand(node, 0)
                if top is not None and self._is_deviation(top, x, centred):
                    return wires.first(node.outputs[0])
                if wires.number(node.inputs[0]) == 1:
                    inverses.append(wires.first(node.outputs[0]))
            elif node.op_type == "Reciprocal":
                inverses.append(wires.first(node.outputs[0]))
        for value in inverses:
            for node, index in wires.uses(value):
                other = wires.operand(node, 1 - index) if node.op_type == "Mul" else None
                if other is not None and self._is_deviation(other, x, centred):
                    return wires.first(node.outputs[0])
        return None

    def _is_deviation(self, value: ir.Value, x: ir.Value, centred: bool) -> bool:
        return self._centred(value) == (x, centred)

    def _affines(self, normalized: ir.Value) -> tuple[Affine, ...]:
        """What follows a norm: a weight and a bias, each perhaps; of two merged norms both."""
        wires, found = self._wires, list[Affine]()
        readers = wires.uses(normalized)
        for node, index in readers:
            weight = node.inputs[1 - index] if node.op_type == "Mul" else None
            if weight is None or not wires.is_fixed(weight) or not self._is_vector(weight, normalized):
                continue
            out = wires.first(node.outputs[0])
            bias, out = self._bias(out, normalized)
            found.append(Affine(weight, bias, out))
        if len(found) < len(readers) or wires.is_output(normalized) or not found:
            bias, out = (None, normalized) if found else self._bias(normalized, normalized)
            found.append(Affine(None, bias, out))
        return tuple(found)

    def _bias(self, value: ir.Value, normalized: ir.Value) -> tuple[ir.Value | None, ir.Value]:
        wires = self._wires
        after = wires.only_use(value)
        if after is not None and after.op_type == "Add":
            for one in after.inputs:
                if one is not None and wires.is_fixed(one) and self._is_vector(one, normalized):
                    return one, wires.first(after.outputs[0])
        return None, value

    def _is_vector(self, weight: ir.Value, normalized: ir.Value) -> bool:
        """True for a weight that has an entry for each of the last axis of what it multiplies."""
        shape, whole = self._wires.shape(weight), self._wires.shape(normalized)
        return (
            shape is not None
            and whole is not None
            and len(shape) > 0
            and shape[-1] == whole[-1]
            and all(size == 1 for size in shape[:-1])
        )
