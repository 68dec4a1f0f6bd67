"""What a rule builds with: nodes and constants that take a fused node's place, and what it may ask of that node."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.tape import Tape

from graphlens.surgery.graph import Attribute
from graphlens.surgery.unfusing.filling import fill
from graphlens.surgery.unfusing.kinds import dtype_of

HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


class Kept(ValueError):
    """A node that a rule does not expand: why, as the end of a sentence about its operator."""


class Workshop:
    """What the rules of one graph share.

    Args:
        graph: The main graph of a model, each of whose nodes has a name.
        opset: The version of standard operators that rules write.
        block: How many channels ONNX Runtime takes at once on this machine; 0 where it is not known.

    Attributes:
        graph: The main graph; constants go into it, and branches see them from there.
        opset: The version of standard operators.
        block: See above.
        origin: The name of each new node -> the name of the node that it comes from.
        passed: The nodes of the main graph that come before what is built now, and stay.
        shared: What rules made that later ones may read too, by what it was made from.
    """

    def __init__(self, graph: ir.Graph, opset: int, block: int = 0) -> None:
        self.graph, self.opset, self.block = graph, opset, block
        self.origin: dict[str, str] = {}
        self.passed: set[ir.Node] = set()
        self.shared: dict[tuple[ir.Value | int | None, ...], ir.Value] = {}
        self._constants: dict[tuple[str, bytes], ir.Value] = {}
        values = (value for node in graph.all_nodes() for value in node.outputs)
        inner = (inner for node in graph.all_nodes() for inner in _branches(node))
        held = (value for each in (graph, *inner) for value in (*each.inputs, *each.initializers.values()))
        self._names = {name for name in (value.name for value in (*values, *held)) if name}
        self._names |= {str(node.name) for node in graph.all_nodes()}

    def name(self, wish: str) -> str:
        """A name that nothing in the graph has: the one that is wished for, or it with a number behind.

        Args:
            wish: The name.
        """
        found, number = wish, 1
        while found in self._names:
            found, number = f"{wish}_{number}", number + 1
        self._names.add(found)
        return found

    def constant(self, array: npt.NDArray[np.generic]) -> ir.Value:
        """A constant of the main graph: the same one for the same content.

        Args:
            array: Its content.
        """
        key = (f"{array.dtype}{array.shape}", array.tobytes())
        if key not in self._constants:
            name = self.name(f"unfused/constant_{len(self._constants)}")
            tensor = ir.tensor(array, name=name)
            value = ir.Value(
                name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            self._constants[key] = self.graph.initializers[name] = value
        return self._constants[key]


def _branches(node: ir.Node) -> list[ir.Graph]:
    """The graphs in a node's attributes."""
    found = [attr.as_graph() for attr in node.attributes.values() if attr.type == ir.AttributeType.GRAPH]
    many = [attr.as_graphs() for attr in node.attributes.values() if attr.type == ir.AttributeType.GRAPHS]
    return [*found, *(graph for graphs in many for graph in graphs)]


class Builder:
    """The nodes that take the place of one fused node, in the order in which they run.

    Args:
        node: The fused node; the names of new nodes and values begin with its name.
        shop: What the rules of its graph share.

    Attributes:
        tape: The new nodes.
        shop: What the rules of the graph share.
    """

    def __init__(self, node: ir.Node, shop: Workshop) -> None:
        self.tape = Tape()
        self.shop, self._prefix, self._count = shop, str(node.name), 0

    def op(self, kind: str, *inputs: ir.Value | None, **attributes: Attribute) -> ir.Value:
        """The output of a new node.

        Args:
            kind: The operator.
            *inputs: What it reads; None for an optional input that is left out.
            **attributes: Its attributes.
        """
        return self.several(kind, 1, *inputs, **attributes)[0]

    def several(self, kind: str, count: int, *inputs: ir.Value | None, **attributes: Attribute) -> Sequence[ir.Value]:
        """The outputs of a new node that has several.

        Args:
            kind: The operator.
            count: How many outputs it has.
            *inputs: What it reads.
            **attributes: Its attributes.
        """
        found = self.tape.op_multi_out(kind, list(inputs), attributes, num_outputs=count)
        node = found[0].producer()
        assert node is not None
        node.name = self.shop.name(f"{self._prefix}/{kind}_{self._count}")
        self.shop.origin[node.name] = self._prefix
        for place, value in enumerate(found):
            value.name = node.name if count == 1 else self.shop.name(f"{node.name}:{place}")
        self._count += 1
        fill(node, self.shop.opset)
        return found

    def discard(self) -> None:
        """Lets what was built read nothing: a node that stays after all has the readers that it had."""
        for node in self.tape.nodes:
            for place in range(len(node.inputs)):
                node.replace_input_with(place, None)
        made = {value for node in self.tape.nodes for value in node.outputs}
        self.shop.shared = {key: value for key, value in self.shop.shared.items() if value not in made}

    def integers(self, numbers: int | Sequence[int]) -> ir.Value:
        """An int64 constant: a scalar for one number, else one axis."""
        return self.constant(np.asarray(numbers, np.int64))

    def number(self, number: float, like: ir.Value) -> ir.Value:
        """A scalar of the element type of a value.

        Args:
            number: The number.
            like: The value.

        Raises:
            Kept: Its type is not known.
        """
        return self.constant(np.asarray(number, self.dtype(like).numpy()))

    def lowest(self, like: ir.Value) -> ir.Value:
        """The least finite number of the element type of a value: what masked scores are."""
        return self.constant(np.asarray(self.dtype(like).min, self.dtype(like).numpy()))

    def constant(self, array: npt.NDArray[np.generic]) -> ir.Value:
        """A constant: the same one for the same content everywhere in the graph."""
        return self.shop.constant(array)

    def dtype(self, value: ir.Value) -> ir.DataType:
        """The element type of a value.

        Raises:
            Kept: It is not known.
        """
        found = dtype_of(value)
        if found is None:
            raise Kept(f"is left as it is where the file does not say the element type of {value.name!r}.")
        return found

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """A value in another element type; itself if it has that one."""
        return value if dtype_of(value) == dtype else self.op("Cast", value, to=int(dtype))

    def size(self, value: ir.Value, axis: int) -> ir.Value:
        """The size of one axis of a value at run time, int64 [1]."""
        return self.op("Shape", value, start=axis, end=axis + 1)

    def scalar(self, value: ir.Value) -> ir.Value:
        """A value of one element without its axes."""
        return self.op("Squeeze", value)

    def count(self, start: ir.Value | None, stop: ir.Value) -> ir.Value:
        """The whole numbers from one, or from 0, to another, int64 [n].

        Args:
            start: The first, int64 [1]; None for 0.
            stop: What they stop before, int64 [1].
        """
        first = self.integers(0) if start is None else self.scalar(start)
        return self.op("Range", first, self.scalar(stop), self.integers(1))

    def unsqueeze(self, value: ir.Value, *axes: int) -> ir.Value:
        """A value with further axes of size 1."""
        return self.op("Unsqueeze", value, self.integers(list(axes)))

    def reshape(self, value: ir.Value, *sizes: int) -> ir.Value:
        """A value in another shape; 0 keeps the size at its place."""
        return self.op("Reshape", value, self.integers(list(sizes)))

    def transpose(self, value: ir.Value, *order: int) -> ir.Value:
        """A value with its axes in another order."""
        return self.op("Transpose", value, perm=list(order))


# What a rule asks of the fused node


def given(node: ir.Node, index: int) -> ir.Value | None:
    """An input of a node; None for one that is left out."""
    value = node.inputs[index] if index < len(node.inputs) else None
    return None if value is None or value.name == "" else value


def taken(node: ir.Node, index: int) -> ir.Value:
    """An input of a node that it cannot be without.

    Raises:
        Kept: It is left out.
    """
    value = given(node, index)
    if value is None:
        raise Kept(f"is left as it is where its input {index} is missing ({node.name!r}).")
    return value


def wanted(node: ir.Node, index: int) -> bool:
    """True if something reads an output of a node."""
    if index >= len(node.outputs) or not node.outputs[index].name:
        return False
    return bool(node.outputs[index].uses()) or node.outputs[index].is_graph_output()


def integer(node: ir.Node, name: str, default: int = 0) -> int:
    """An attribute that is an integer."""
    return node.attributes[name].as_int() if name in node.attributes else default


def real(node: ir.Node, name: str, default: float = 0.0) -> float:
    """An attribute that is a number."""
    return node.attributes[name].as_float() if name in node.attributes else default


def refuse_inputs(node: ir.Node, *inputs: tuple[int, str]) -> None:
    """Keeps a node that has an input which its rule does not know.

    Args:
        node: The node.
        *inputs: (place, what it is) of each such input.

    Raises:
        Kept: The node has one of them.
    """
    for index, what in inputs:
        if given(node, index) is not None:
            raise Kept(f"is left as it is where it reads {what} ({node.name!r}).")


def refuse(node: ir.Node, what: str, found: bool) -> None:
    """Keeps a node of a kind that its rule does not know.

    Args:
        node: The node.
        what: What is not expanded ("a ragged batch").
        found: True if the node has it.

    Raises:
        Kept: ``found`` is true.
    """
    if found:
        raise Kept(f"is left as it is where it has {what} ({node.name!r}).")
