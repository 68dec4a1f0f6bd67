"""What is known of each value of a foreign graph before any run: its shape, and its content where it is small.

Shapes are of one imagined run of a few tokens; a caller that ran the graph gives those of its own run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from graphlens.surgery.known import SMALL, UNKNOWN, Call, Data, Known, Shape, made
from graphlens.surgery.shape_rules import outputs_of

BATCH, TOKENS = 2, 7  # of the imagined run; nothing lies in a cache of earlier tokens, so totals are the tokens
_IMAGE = 4  # axes of an input of pixels, and of one of earlier keys or values

Attributes = Mapping[str, ir.Attr]
_MORE: dict[str, Callable[[Call], list[Known]]] = {}  # operator -> what it gives, besides shape_rules.py


class Shapes:
    """Shapes and small contents of the values of a graph.

    Args:
        model: A model with standard operators; its graph is sorted.
        given: Name of a value -> its shape in a run of the caller's, for any values.
    """

    def __init__(self, model: ir.Model, given: Mapping[str, Shape] | None = None) -> None:
        self._given = dict(given or {})
        side = _side(model.graph)
        self._known: dict[ir.Value, Known] = {}
        for value in model.graph.inputs:
            if value.const_value is None:
                shape = self._given.get(str(value.name)) or _imagined(value, side)
                self._known[value] = Known(shape, 8)
        with np.errstate(all="ignore"):
            for node in model.graph:
                self._follow(node)

    def _follow(self, node: ir.Node) -> None:
        """Finds out what a node gives."""
        if node.op_type == "Constant":
            found = [_constant(node.attributes)]
        else:
            call = Call(
                node.op_type,
                [None if one is None else self.known(one) for one in node.inputs],
                node.attributes,
                len(node.outputs),
            )
            found = _outputs(call)
        for value, known in zip(node.outputs, found, strict=False):
            shape = self._given.get(str(value.name))
            if shape is None and known.shape is None:
                shape = _static(value)
            self._known[value] = known if shape is None else Known(tuple(shape), known.width, known.data)

    def known(self, value: ir.Value) -> Known:
        """What is known of a value."""
        if value not in self._known:
            self._known[value] = UNKNOWN if value.const_value is None else _tensor(value.const_value)
        return self._known[value]

    def shape(self, value: ir.Value | None) -> Shape | None:
        """The shape of a value; None if it is not known."""
        return None if value is None else self.known(value).shape

    def number(self, value: ir.Value | None) -> float | None:
        """The number that a value of one element is, where it follows from constants and shapes."""
        data = None if value is None else self.known(value).data
        return float(data.reshape(())) if data is not None and data.size == 1 else None

    def integers(self, value: ir.Value | None) -> list[int] | None:
        """The integers that a small value holds; None if they are not known."""
        data = None if value is None else self.known(value).data
        return None if data is None or data.dtype.kind not in "iu" else [int(one) for one in data.reshape(-1)]


def _outputs(call: Call) -> list[Known]:
    if call.operator in _MORE:
        try:
            found = _MORE[call.operator](call)
        except (ValueError, TypeError, IndexError, KeyError, ArithmeticError):  # too little is known of its inputs
            found = []
        return [*found, *[UNKNOWN] * call.outputs][: call.outputs]
    return outputs_of(call)


def _static(value: ir.Value) -> Shape | None:
    """The shape that a file states for a value, where it is all numbers."""
    if value.shape is None or not all(isinstance(size, int) for size in value.shape):
        return None
    return tuple(int(str(size)) for size in value.shape)


def _imagined(value: ir.Value, side: int) -> Shape:
    """The shape of an input in the imagined run."""
    sizes = list(value.shape if value.shape is not None else ())
    pixels = len(sizes) == _IMAGE and not isinstance(sizes[-1], int)
    found = []
    for axis, size in enumerate(sizes):
        if isinstance(size, int):
            found.append(size)
        elif axis == 0 and len(sizes) > 1:
            found.append(BATCH)
        elif len(sizes) == _IMAGE:
            found.append((side if axis > 1 else 3) if pixels else 0)
        else:
            found.append(TOKENS)
    return tuple(found)


def _side(graph: ir.Graph) -> int:
    """How many pixels high and wide an image is whose patches fit a graph's table of positions."""
    patch = next(
        (node.attributes["strides"].as_ints()[0] for node in graph if "Conv" in node.op_type and "strides" in node.attributes),
        1,
    )
    rows = [
        int(str(value.const_value.shape[1]))
        for value in graph.initializers.values()
        if value.const_value is not None and len(value.const_value.shape) == 3 and str(value.const_value.shape[0]) == "1"
    ]
    count = max(rows, default=0)
    root = int(count**0.5)
    return patch * max(1, root)


def _tensor(tensor: ir.TensorProtocol) -> Known:
    """What is known of a constant tensor."""
    shape = tuple(int(str(size)) for size in tensor.shape)
    data: Data | None = None
    if int(np.prod(shape, dtype=np.int64)) <= SMALL and tensor.dtype.numpy().kind in "biuf":
        data = tensor.numpy()
    return Known(shape, tensor.dtype.itemsize, data)


def _constant(attributes: Attributes) -> Known:
    """What is known of a Constant's output."""
    for attribute in attributes.values():
        if attribute.type == ir.AttributeType.TENSOR:
            return _tensor(attribute.as_tensor())
        if attribute.type in (ir.AttributeType.INT, ir.AttributeType.INTS):
            ints = np.asarray(attribute.value, np.int64)
            return Known(ints.shape, 8, ints)
        if attribute.type in (ir.AttributeType.FLOAT, ir.AttributeType.FLOATS):
            floats = np.asarray(attribute.value, np.float32)
            return Known(floats.shape, 4, floats)
    return UNKNOWN


def _more(*operators: str) -> Callable[[Callable[[Call], list[Known]]], Callable[[Call], list[Known]]]:
    def register(found: Callable[[Call], list[Known]]) -> Callable[[Call], list[Known]]:
        _MORE.update(dict.fromkeys(operators, found))
        return found

    return register


_UNARY: Mapping[str, Callable[[Data], Data]] = {"Sqrt": np.sqrt, "Reciprocal": np.reciprocal, "CastLike": np.array}


@_more(*_UNARY)
def _unary(call: Call) -> list[Known]:
    # Scores are divided by the root of a width that is often read off a shape.
    def data() -> Data:
        found = _UNARY[call.operator](call.data(0))
        return found.astype(np.float32) if call.operator == "CastLike" else found

    return made(call.shape(), max(4, call.width()), data)


@_more("Conv", "ConvInteger")
def _convolved(call: Call) -> list[Known]:
    image, kernel = call.shape(0), call.shape(1)
    count = len(image) - 2
    strides = call.numbers(9, "strides", [1] * count)
    dilations = call.numbers(9, "dilations", [1] * count)
    pads = call.numbers(9, "pads", [0] * (2 * count))
    sides = [
        (image[2 + axis] + pads[axis] + pads[count + axis] - dilations[axis] * (kernel[2 + axis] - 1) - 1) // strides[axis] + 1
        for axis in range(count)
    ]
    return made((image[0], kernel[0], *sides), 4)


@_more("MatMulNBits")
def _packed_product(call: Call) -> list[Known]:
    return made((*call.shape(0)[:-1], call.integer("N", 0)), call.width())


@_more("GatherBlockQuantized")
def _packed_rows(call: Call) -> list[Known]:
    table, places = call.shape(0), call.shape(1)
    held = 8 // call.integer("bits", 4) if call.width(0) == 1 else 1  # numbers in a byte
    return made((*places, *table[1:-1], table[-1] * held), call.width(2))
