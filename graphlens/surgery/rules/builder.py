"""What a gradient rule builds with: nodes of the backward pass, and what is known of the values of the forward one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from graphlens.errors import InputError
from graphlens.surgery.graph import Attribute


@dataclass(frozen=True)
class Gradient:
    """A gradient of a value. ``full``: it has the value's shape; else it broadcasts to it (a mean's, say)."""

    value: ir.Value
    full: bool = True


class Builder:
    """Nodes of a backward pass under construction.

    Sizes are known when a graph is built, by number or by name, so which axes a gradient is summed over is decided here
    and never at run time.

    Args:
        dtype: The dtype of constants that are like a value without a type.
    """

    def __init__(self, dtype: ir.DataType) -> None:
        self.tape = Tape()
        self._dtype = dtype
        self._constants: dict[tuple[str, str], ir.Value] = {}
        self._shapes: dict[ir.Value, ir.Value] = {}
        self._floating: dict[ir.Value, ir.DataType] = {}  # of what was built, as far as it is known

    def op(self, kind: str, *inputs: ir.Value | None, **attributes: Attribute) -> ir.Value:
        """The output of a new node.

        Args:
            kind: The operator.
            *inputs: What the node reads; None for an optional input that is left out.
            **attributes: The node's attributes.

        Returns:
            The output.
        """
        found = self.tape.op(kind, list(inputs), attributes)
        read = [self._kind(value) for value in inputs if value is not None]
        kinds = [ir.DataType(int(str(attributes["to"])))] if kind == "Cast" else [each for each in read if each]
        if kinds and kinds[0].is_floating_point():
            self._floating[found] = kinds[0]
        return found

    def _kind(self, value: ir.Value) -> ir.DataType | None:
        """The floating-point dtype of a value of either pass, if it has one that is known."""
        kind = self._floating.get(value) if value.type is None else value.type.dtype
        return kind if kind is not None and kind.is_floating_point() else None

    def constant(self, value: float | Sequence[int], like: ir.Value | None = None) -> ir.Value:
        """A constant, the same one for the same content.

        Args:
            value: A number, or several.
            like: The constant has the dtype of this value; None makes it int64.

        Returns:
            The constant: a scalar for one number, else one axis.
        """
        if like is None:
            kind = ir.DataType.INT64
        else:
            kind = self._floating.get(like, self._dtype) if like.type is None else like.type.dtype
        dtype = kind.numpy()
        array = np.asarray(value, dtype)
        key = (str(dtype), f"{array.shape}{array.tolist()}")
        if key not in self._constants:
            name = f"gradient/constant_{len(self._constants)}"
            self._constants[key] = self.tape.initializer(ir.tensor(array, name=name), name=name)
        return self._constants[key]

    def shape_of(self, value: ir.Value) -> ir.Value:
        """The shape of a value at run time.

        Args:
            value: A value of either pass.

        Returns:
            int64 [rank], computed once.
        """
        if value not in self._shapes:
            self._shapes[value] = self.op("Shape", value)
        return self._shapes[value]

    def times(self, a: ir.Value, factor: float) -> ir.Value:
        """A value times a number.

        Args:
            a: The value.
            factor: The number; 1 makes no node.

        Returns:
            The product.
        """
        return a if factor == 1 else self.op("Mul", a, self.constant(factor, a))

    def whole(self, gradient: Gradient, like: ir.Value) -> ir.Value:
        """A gradient in its full shape.

        Args:
            gradient: A gradient.
            like: The value that it is the gradient of.

        Returns:
            The gradient, shaped like ``like``.
        """
        return gradient.value if gradient.full else self.op("Expand", gradient.value, self.shape_of(like))

    def summed(self, gradient: Gradient, of: ir.Value, to: ir.Value) -> Gradient:
        """The gradient of an operator's result, summed over the axes along which an input was broadcast to it.

        Args:
            gradient: A gradient of ``of``.
            of: The result.
            to: The input.

        Returns:
            A gradient of ``to``.
        """
        outer, inner = dims(of), dims(to)
        extra = len(outer) - len(inner)
        axes = [*range(extra), *(i for i in range(extra, len(outer)) if inner[i - extra] == 1 and outer[i] != 1)]
        if not axes:
            return gradient
        found = self.op("ReduceSum", self.whole(gradient, of), self.constant(axes), keepdims=1)
        return Gradient(found if not extra else self.op("Squeeze", found, self.constant(list(range(extra)))))


def dims(value: ir.Value) -> list[int | str]:
    """The sizes of a value, each a number or the name of a size that is known at run time.

    Args:
        value: A value of the forward pass.

    Returns:
        A size for each axis.

    Raises:
        InputError: They are not known.
    """
    if value.shape is None or any(not isinstance(d, int) and d.value is None for d in value.shape):
        raise InputError(f"the shape of {value.name!r} is not known, so it cannot be differentiated.")
    return [d if isinstance(d, int) else str(d.value) for d in value.shape]


def width(value: ir.Value) -> int:
    """The size of a value's last axis.

    Args:
        value: A value of the forward pass.

    Returns:
        The size.

    Raises:
        InputError: It is not known before a run.
    """
    size = dims(value)[-1]
    if not isinstance(size, int):
        raise InputError(f"the width of {value.name!r} is not known, so it cannot be differentiated.")
    return size
