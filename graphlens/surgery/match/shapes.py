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
_PIXELS = frozenset(
    {"Conv", "ConvInteger", "Cast", "Sub", "Mul", "Div", "DynamicQuantizeLinear", "QuantizeLinear", "Pad"}
)

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
                shape = self._given.get(str(value.name))
                self._known[value] = Known(_imagined(value, side) if shape is None else tuple(shape), 8)
        self._fitted = False
        self._open = [value for value in model.graph.inputs if value.const_value is None and self.shape(value) is None]
        with np.errstate(all="ignore"):
            for node in model.graph:
                self._follow(node)
            if self._fitted:  # sizes of inputs that were found late: what was read of them before is not known yet
                for node in model.graph:
                    self._follow(node)

    def _follow(self, node: ir.Node) -> None:
        """Finds out what a node gives."""
        if node.op_type == "Constant":
            found = [_constant(node.attributes)]
        else:
            if node.op_type == "Concat":
                self._fit_past(node)
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

    def _fit_past(self, node: ir.Node) -> None:
        """Gives an input of earlier keys or values whose sizes a file leaves open those of what it is put before."""
        shapes = [None if one is None else self.shape(one) for one in node.inputs]
        known = next((shape for shape in shapes if shape is not None), None)
        if known is None or None not in shapes:
            return
        axis = node.attributes["axis"].as_int() % len(known)
        for value, shape in zip(node.inputs, shapes, strict=True):
            if shape is None and value is not None and value.is_graph_input():
                self._fitted = True
                found = tuple(0 if place == axis else size for place, size in enumerate(known))
                self._known |= {one: Known(_stated(one, found), 8) for one in self._open}
                self._open = []

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
        if data is None or data.size != 1:
            return None
        one = data.reshape(())[()]
        # The shortest decimal that a float16 or float32 is: an eps of 1e-6 is read as that.
        return float(str(one)) if data.dtype.kind == "f" else float(one)

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


def _stated(value: ir.Value, found: Shape) -> Shape:
    """The sizes that a file states for an input of earlier tokens, and those of another one where it states none."""
    stated = list(value.shape if value.shape is not None else ())
    if len(stated) != len(found):
        return found
    return tuple(one if isinstance(one, int) else size for one, size in zip(stated, found, strict=True))


def _static(value: ir.Value) -> Shape | None:
    """The shape that a file states for a value, where it is all numbers."""
    if value.shape is None or not all(isinstance(size, int) for size in value.shape):
        return None
    return tuple(int(str(size)) for size in value.shape)


def _imagined(value: ir.Value, side: int) -> Shape | None:
    """The shape of an input in the imagined run; None for one of earlier tokens whose sizes are left open."""
    sizes = list(value.shape if value.shape is not None else ())
    if len(sizes) == _IMAGE and not any(node.op_type in _PIXELS for node, _ in value.uses()):
        known = isinstance(sizes[1], int) and isinstance(sizes[3], int)
        batch = sizes[0] if isinstance(sizes[0], int) else BATCH
        tokens = sizes[2] if isinstance(sizes[2], int) else 0
        return (batch, int(str(sizes[1])), tokens, int(str(sizes[3]))) if known else None
    found = []
    for axis, size in enumerate(sizes):
        if isinstance(size, int):
            found.append(size)
        elif axis == 0 and len(sizes) > 1:
            found.append(BATCH)
        elif len(sizes) == _IMAGE:
            found.append(side if axis > 1 else 3)
        else:
            found.append(TOKENS)
    return tuple(found)


def _side(graph: ir.Graph) -> int:
    """How many pixels high and wide an image is whose patches fit a graph's table of positions."""
    patch = next(
        (
            node.attributes["strides"].as_ints()[0]
            for node in graph
            if "Conv" in node.op_type and "strides" in node.attributes
        ),
        1,
    )
    rows = [
        int(str(value.const_value.shape[1]))
        for value in graph.initializers.values()
        if value.const_value is not None
        and len(value.const_value.shape) == 3
        and str(value.const_value.shape[0]) == "1"
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


@_more("Split")
def _split(call: Call) -> list[Known]:
    # Sizes that are read off shapes are split by optimisers.
    found = outputs_of(call)
    whole = call.inputs[0]
    if whole is None or whole.data is None or whole.data.ndim != 1:
        return found
    ends = np.cumsum([1 if one.shape is None else one.shape[0] for one in found])
    parts = np.split(whole.data, ends[:-1])
    return [Known(one.shape, one.width, part) for one, part in zip(found, parts, strict=True)]


@_more("DequantizeLinear")
def _dequantised(call: Call) -> list[Known]:
    # Numbers that scores are scaled by are quantised too.
    def data() -> Data:
        zero = call.data(2).astype(np.float32) if call.given(2) else np.float32(0)
        return np.asarray((call.data(0).astype(np.float32) - zero) * call.data(1).astype(np.float32), np.float32)

    small = call.given(1) and call.inputs[1] is not None and call.inputs[1].shape == ()
    return made(call.shape(), 4, data if small else None)


@_more("QuantizeLinear")
def _quantised(call: Call) -> list[Known]:
    # Some quantisers leave their constants in float, and round them in the graph.
    def data() -> Data:
        zero = call.data(2) if call.given(2) else np.zeros((), np.uint8)
        limits = np.iinfo(str(zero.dtype))
        found = np.round(call.data(0).astype(np.float32) / call.data(1).astype(np.float32)) + zero.astype(np.float32)
        return np.asarray(np.clip(found, limits.min, limits.max), zero.dtype)

    whole = not call.given(2) or (call.inputs[2] is not None and call.inputs[2].width in (1, 2))
    return made(call.shape(), call.width(2) if call.given(2) else 1, data if whole else None)


@_more("Resize")
def _resized(call: Call) -> list[Known]:
    shape = call.shape()
    if call.given(3):
        sizes = call.numbers(3)
        return made((*shape[: len(shape) - len(sizes)], *sizes), call.width())
    scales = [float(one) for one in call.data(2).reshape(-1)]
    return made([int(size * scale) for size, scale in zip(shape, scales, strict=True)], call.width())


@_more("Conv", "ConvInteger")
def _convolved(call: Call) -> list[Known]:
    image, kernel = call.shape(0), call.shape(1)
    count = len(image) - 2
    strides = call.numbers(9, "strides", [1] * count)
    dilations = call.numbers(9, "dilations", [1] * count)
    pads = call.numbers(9, "pads", [0] * (2 * count))
    sides = [
        (image[2 + axis] + pads[axis] + pads[count + axis] - dilations[axis] * (kernel[2 + axis] - 1) - 1)
        // strides[axis]
        + 1
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
