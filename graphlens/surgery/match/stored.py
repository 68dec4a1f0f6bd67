"""The initializer behind a fixed value: what was done to it on the way, as steps of a MatchedWeight."""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx_ir as ir

from graphlens.surgery.match.parts import Linear
from graphlens.surgery.match.records import Quantised
from graphlens.surgery.match.wires import Wires

_STEPS = 12
_MOVED = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten"})


@dataclass(frozen=True)
class Stored:
    """An initializer, and how a value is computed from it.

    Attributes:
        tensor: Its name.
        shape: Its shape as numbers: of packed ones that of what they become.
        quantised: How its integers become numbers.
        transposed: True if its axes are swapped.
        times: What it is multiplied by.
        plus: What is added to it.
        reshaped: True if axes of size 1 were put in or taken out.
    """

    tensor: str
    shape: tuple[int, ...]
    quantised: Quantised | None = None
    transposed: bool = False
    times: float | None = None
    plus: float | None = None
    reshaped: bool = False


def stored(wires: Wires, value: ir.Value | None) -> Stored | None:
    """The initializer behind a value; None where it is computed in another way, from several or from numbers.

    Args:
        wires: The graph.
        value: The value; None for none.
    """
    transposed, reshaped, times, plus = False, False, None, None
    quantised: Quantised | None = None
    for _ in range(_STEPS):
        if value is None:
            return None
        node = value.producer()
        if node is None:
            shape = wires.shape(value)
            if value.const_value is None or shape is None:
                return None
            return Stored(str(value.name), shape, quantised, transposed, times, plus, reshaped)
        operator, source = node.op_type, node.inputs[0] if node.inputs else None
        if quantised is not None and operator not in ("Transpose", "Identity"):
            return None
        if operator == "Transpose":
            perm = list(node.attributes["perm"].as_ints()) if "perm" in node.attributes else [1, 0]
            if perm != [1, 0]:
                return None
            transposed = not transposed
            if quantised is not None:  # its integers lie the other way around
                if quantised.block is not None:
                    return None
                quantised = replace(quantised, axis=None if quantised.axis is None else 1 - quantised.axis)
        elif operator in _MOVED:
            reshaped = True
        elif operator == "Mul" and (scaled := _scaled_integers(wires, node)) is not None:
            quantised, source = scaled
        elif operator in ("Add", "Mul"):
            found = _number_beside(wires, node)
            if found is None:
                return None
            number, source = found
            # (w + plus) * times: a product that is met after a sum on the way back comes before it.
            if operator == "Add":
                plus = (plus or 0.0) + number * (times if times is not None else 1.0)
            elif plus is not None:
                return None
            else:
                times = (times if times is not None else 1.0) * number
        elif operator == "DequantizeLinear":
            quantised = _dequantised(wires, node, transposed)
            if quantised is None:
                return None
        elif operator not in ("Identity", "Cast"):
            return None
        value = source
    return None


def _number_beside(wires: Wires, node: ir.Node) -> tuple[float, ir.Value] | None:
    for index in (0, 1):
        number, other = wires.number(node.inputs[index]), node.inputs[1 - index]
        if number is not None and other is not None and wires.number(other) is None:
            return number, other
    return None


def _initializer(value: ir.Value | None) -> str | None:
    """The name of an initializer, perhaps cast or reshaped; None for what is none."""
    for _ in range(_STEPS):
        node = None if value is None else value.producer()
        if value is None or node is None:
            break
        if node.op_type not in _MOVED | {"Identity", "Cast"}:
            return None
        value = node.inputs[0]
    return None if value is None or value.const_value is None else str(value.name)


def _dequantised(wires: Wires, node: ir.Node, transposed: bool) -> Quantised | None:
    """How a DequantizeLinear makes numbers of an initializer's integers."""
    scale = _initializer(node.inputs[1])
    if scale is None:
        return None
    zero = _initializer(node.inputs[2]) if len(node.inputs) > 2 else None
    sizes = wires.shape(node.inputs[1]) or ()
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
    block = node.attributes["block_size"].as_int() if "block_size" in node.attributes else 0
    dtype = None if node.inputs[0] is None else node.inputs[0].dtype
    bits = 8 if dtype is None else max(1, dtype.bitwidth)
    rank = len(wires.shape(node.inputs[0]) or ())
    axis = axis % rank if rank else 0
    return Quantised(scale, zero, axis if sizes not in ((), (1,)) else None, bits, block or None)


def _scaled_integers(wires: Wires, node: ir.Node) -> tuple[Quantised, ir.Value] | None:
    """How a product of cast integers and their scales makes numbers, as exporters write it that know no DequantizeLinear.

    Args:
        wires: The graph.
        node: A Mul.

    Returns:
        What the integers of an initializer mean, and the integers; None for any other product.
    """
    for index in (0, 1):
        scale, found = _initializer(node.inputs[1 - index]), _cast_integers(node.inputs[index])
        if scale is None or found is None:
            continue
        integers, zero = found
        sizes, shape = wires.shape(node.inputs[1 - index]), wires.shape(integers)
        if sizes is None or shape is None or len(sizes) > len(shape):
            return None
        several = [axis for axis, size in enumerate(sizes, len(shape) - len(sizes)) if size != 1]
        if len(several) > 1 or any(shape[axis] != sizes[axis - len(shape)] for axis in several):
            return None
        if zero is not None and wires.shape(zero) not in ((), (1,), sizes):
            return None
        bits = 8 if integers.dtype is None else max(1, integers.dtype.bitwidth)
        name = None if zero is None else _initializer(zero)
        return Quantised(scale, name, several[0] if several else None, bits), integers
    return None


def _cast_integers(value: ir.Value | None) -> tuple[ir.Value, ir.Value | None] | None:
    """The integers of an initializer behind a Cast, and the zero point that is taken from them; None for anything else."""
    node, zero = None if value is None else value.producer(), None
    if node is not None and node.op_type == "Sub":
        value, zero = node.inputs
        if _initializer(zero) is None:
            return None
        node = None if value is None else value.producer()
    if node is None or node.op_type != "Cast":
        return None
    integers = node.inputs[0]
    if integers is None or integers.dtype is None or not integers.dtype.is_integer():
        return None
    return integers, zero


def stored_matrix(wires: Wires, linear: Linear) -> Stored | None:
    """The initializer of a product's matrix; ``transposed`` then says that it is [out, in].

    Args:
        wires: The graph.
        linear: The product.
    """
    node = linear.node
    if node.op_type == "MatMulNBits":
        return _packed(wires, node)
    found = stored(wires, linear.weight)
    if found is None:
        return None
    quantised = found.quantised
    if node.op_type == "MatMulInteger":
        scale = _initializer(linear.scales)
        if scale is None or quantised is not None:
            return None
        zero = _initializer(node.inputs[3]) if len(node.inputs) > 3 else None
        sizes = wires.shape(linear.scales) or ()
        axis = None if sizes in ((), (1,)) else 0 if found.transposed else 1
        quantised = Quantised(scale, zero, axis)
    times = found.times
    if linear.scale != 1:
        times = (1.0 if times is None else times) * linear.scale
    # transposed so far: the initializer is the other way around than the operand.
    return Stored(
        found.tensor, found.shape, quantised, found.transposed != linear.transposed, times, found.plus, found.reshaped
    )


def _packed(wires: Wires, node: ir.Node) -> Stored | None:
    scale, tensor = _initializer(node.inputs[2]), _initializer(node.inputs[1])
    if scale is None or tensor is None:
        return None
    if len(node.inputs) > 4 and node.inputs[4] is not None:  # rows in another order
        return None
    zero = _initializer(node.inputs[3]) if len(node.inputs) > 3 else None
    attributes = node.attributes
    bits = attributes["bits"].as_int() if "bits" in attributes else 4
    sizes = (attributes["N"].as_int(), attributes["K"].as_int())
    return Stored(tensor, sizes, Quantised(scale, zero, 0, bits, attributes["block_size"].as_int()), True)
