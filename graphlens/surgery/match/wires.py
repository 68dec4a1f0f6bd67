"""Which values of a graph are one activation, what reads it, and what it depends on.

Nodes that leave an activation as it is (Identity, Cast between floats, Dropout, QuantizeLinear and DequantizeLinear) are
looked through: the first value of such a chain stands for all of it. So a quantised file, one in
float16 and a plain one look alike.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from graphlens.surgery.known import Shape
from graphlens.surgery.match.shapes import Shapes

Use = tuple[ir.Node, int]
_SAME = frozenset({"Identity", "Dropout", "QuantizeLinear", "DequantizeLinear"})
_KEEPING = frozenset(
    {
        "Reshape",
        "Transpose",
        "Squeeze",
        "Unsqueeze",
        "Flatten",
        "Split",
        "Slice",
        "Gather",
        "Concat",
        "Expand",
        "Identity",
        "MaxPool",
    }
)
_OPAQUE = frozenset({"Shape", "Size"})  # what is computed from a shape does not depend on the content


class Wires:
    """A graph with its identities looked through.

    Args:
        model: A model whose graph is sorted.
        shapes: What is known of its values.

    Attributes:
        graph: The graph.
        shapes: What was given.
        place: Node -> its place in the graph.
    """

    def __init__(self, model: ir.Model, shapes: Shapes) -> None:
        self.graph, self.shapes = model.graph, shapes
        self.place: dict[ir.Node, int] = {}
        self._first: dict[ir.Value, ir.Value] = {}
        self._chain: dict[ir.Value, list[ir.Value]] = {}
        self._uses: dict[ir.Value, list[Use]] = {}
        self._fixed: set[ir.Value] = set(model.graph.initializers.values())
        self._live: set[ir.Value] = set()
        self._packed: set[ir.Value] = set()
        self._outputs = {id(value) for value in model.graph.outputs}
        for place, node in enumerate(model.graph):
            self.place[node] = place
            self._read(node)

    def _read(self, node: ir.Node) -> None:
        given = [value for value in node.inputs if value is not None]
        if all(value in self._fixed for value in given) and node.op_type not in _OPAQUE:
            self._fixed.update(node.outputs)
        elif node.op_type not in _OPAQUE and (self._begins(node) or any(value in self._live for value in given)):
            self._live.update(node.outputs)
        source = self._same_as(node)
        self._pack(node, given)
        if source is not None:
            first = self.first(source)
            self._first[node.outputs[0]] = first
            self._chain.setdefault(first, [first]).append(node.outputs[0])
            return
        for index, value in enumerate(node.inputs):
            if value is not None:
                self._uses.setdefault(self.first(value), []).append((node, index))

    def _begins(self, node: ir.Node) -> bool:
        """True for a product with a matrix of weights: all that depends on one is an activation."""
        if node.op_type in ("MatMul", "Gemm", "MatMulInteger", "MatMulNBits", "Conv", "ConvInteger"):
            weight, given = node.inputs[1], node.inputs[0]
            if weight in self._fixed and given not in self._fixed:
                return node.op_type not in ("MatMul", "MatMulInteger") or len(self.shapes.shape(weight) or ()) == 2
        return False

    def _same_as(self, node: ir.Node) -> ir.Value | None:
        """The value that a node's output is but for its type or rounding; None for any other node."""
        source = node.inputs[0] if node.inputs else None
        if source is None or source in self._fixed:
            return None
        if node.op_type in _SAME:
            return source
        if node.op_type == "Cast":
            whole = source.dtype is not None and not source.dtype.is_floating_point()
            to = ir.DataType(node.attributes["to"].as_int())
            return source if to.is_floating_point() and not whole and not self._is_whole(source) else None
        return None

    def _pack(self, node: ir.Node, given: list[ir.Value]) -> None:
        """Notes which values hold integers that stand for numbers: they cannot be hooked."""
        if node.op_type == "QuantizeLinear":
            self._packed.update(node.outputs)
        elif node.op_type == "DequantizeLinear":
            self._packed.update(given[:1])
        elif node.op_type in _KEEPING and given and given[0] in self._packed:
            self._packed.update(node.outputs)

    def _is_whole(self, value: ir.Value) -> bool:
        """True for integers, where a file does not state the type."""
        node = value.producer()
        return node is not None and node.op_type in (
            "MatMulInteger",
            "ConvInteger",
            "Shape",
            "Size",
            "DynamicQuantizeLinear",
        )

    def first(self, value: ir.Value) -> ir.Value:
        """The value that stands for all that are the same activation."""
        return self._first.get(value, value)

    def is_fixed(self, value: ir.Value | None) -> bool:
        """True for what is computed from initializers and constants alone, and for an input that is left out."""
        return value is None or value in self._fixed

    def is_live(self, value: ir.Value | None) -> bool:
        """True for what depends on the content of a product with weights: not a mask, positions or a rotation's angles."""
        return value is not None and value in self._live

    def producer(self, value: ir.Value) -> ir.Node | None:
        """The node that computes an activation."""
        return self.first(value).producer()

    def operand(self, node: ir.Node, index: int) -> ir.Value | None:
        """What a node reads, the identities before it looked through."""
        value = node.inputs[index] if index < len(node.inputs) else None
        return None if value is None else self.first(value)

    def live_operands(self, node: ir.Node) -> list[ir.Value]:
        """The activations that a node reads, each once for each time that it reads it."""
        return [self.first(value) for value in node.inputs if self.is_live(value) and value is not None]

    def loose_operands(self, node: ir.Node) -> list[ir.Value]:
        """All that a node reads and that is not fixed."""
        return [self.first(value) for value in node.inputs if value is not None and value not in self._fixed]

    def uses(self, value: ir.Value) -> list[Use]:
        """What reads an activation, each node with the place among its inputs; who looks at its shape does not."""
        return [use for use in self._uses.get(self.first(value), ()) if use[0].op_type not in _OPAQUE]

    def only_use(self, value: ir.Value) -> ir.Node | None:
        """The one node that reads an activation, which may be an output too; None where there are several or none."""
        readers = {node for node, _ in self.uses(value)}
        return next(iter(readers)) if len(readers) == 1 else None

    def chain(self, value: ir.Value) -> list[ir.Value]:
        """All values that are this activation, the first one first."""
        return self._chain.get(self.first(value), [self.first(value)])

    def is_output(self, value: ir.Value) -> bool:
        """True if an activation is an output of the graph."""
        return any(id(one) in self._outputs for one in self.chain(value))

    def shape(self, value: ir.Value | None) -> Shape | None:
        """The shape of a value; None if it is not known."""
        return self.shapes.shape(value)

    def number(self, value: ir.Value | None) -> float | None:
        """The number that a value is, where it follows from constants and shapes."""
        # What is rounded is read as it was computed: the scale of an attention counts, not the quantiser's nearest number.
        found = None if value is None else self.shapes.number(self.first(value))
        return self.shapes.number(value) if found is None else found

    def hooked(self, value: ir.Value) -> ir.Value | None:
        """The value to hook for an activation: in a QDQ file the one after its rounding, if all that reads it reads that.

        Args:
            value: An activation.

        Returns:
            A value of numbers through which all goes that reads the activation; None where there are only integers.
        """
        current = self.first(value)
        found = None if current in self._packed else current
        while id(current) not in self._outputs:
            readers = {node for node, _ in current.uses() if node.op_type not in _OPAQUE}
            node = next(iter(readers)) if len(readers) == 1 else None
            if node is None or self.first(node.outputs[0]) is not self.first(value):
                break
            current = node.outputs[0]
            if node.op_type == "DequantizeLinear" or (found is None and current not in self._packed):
                found = current
        return found

    def nodes(self) -> Iterator[ir.Node]:
        """The nodes in their order."""
        return iter(self.graph)
