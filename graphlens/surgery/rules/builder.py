"""What a gradient rule builds with: nodes of the backward pass, and what is known of the values of the forward one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
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

    Which axes a gradient is summed over is decided here where sizes are known, by number or by name, and in a run where
    they are not: a graph from elsewhere tells the sizes of few of its values.

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
        kinds = kinds[::-1] if kind == "CastLike" else kinds
        if kinds and kinds[0].is_floating_point():
            self._floating[found] = kinds[0]
        return found

    def _kind(self, value: ir.Value) -> ir.DataType | None:
        """The floating-point dtype of a value of either pass, if it has one that is known."""
        kind = self._floating.get(value) if value.type is None else value.type.dtype
        return kind if kind is not None and kind.is_floating_point() else None

    def is_half(self, value: ir.Value) -> bool:
        """True for numbers of two bytes, which ONNX Runtime has fewer kernels for.

        Args:
            value: A value of either pass.
        """
        return (self._kind(value) or self._dtype) in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)

    def constant(
        self, value: float | Sequence[int], like: ir.Value | None = None, kind: ir.DataType = ir.DataType.INT64
    ) -> ir.Value:
        """A constant, the same one for the same content.

        Args:
            value: A number, or several.
            like: The constant has the dtype of this value.
            kind: The constant's dtype, where it is like no value.

        Returns:
            The constant: a scalar for one number, else one axis.
        """
        if like is not None:
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

    def unfolded(self, value: ir.Value, run: ir.Value) -> ir.Value:
        """Integers of a weight, so that they become numbers in a run and not before it.

        ONNX Runtime computes ahead what depends on nothing, and keeps it: a weight of 4 bits would take eight times its
        memory from the first run on.

        Args:
            value: The integers, of one byte each.
            run: Some value that only a run knows, with one entry at least.

        Returns:
            The same integers.
        """
        entry = self.op("Gather", self.op("Reshape", run, self.constant([-1])), self.constant(0), axis=0)
        nothing = self.op("Less", entry, entry)  # False, whatever it is
        return self.op("BitwiseOr", value, self.op("CastLike", nothing, value))

    def padded(self, value: ir.Value, count: int, ends: Mapping[int, tuple[ir.Value, ir.Value]]) -> ir.Value:
        """A value with zeros around it, or, for negative numbers, less of it.

        Args:
            value: The value.
            count: How many axes it has.
            ends: Axis -> how many entries come before and behind, int64 [1] each.

        Returns:
            The longer value.
        """
        # For every axis, and not as the operator's axes: ONNX Runtime 1.32 moves transpositions past a Pad as if it had none.
        nothing = self.constant([0])
        pads = [ends[axis][end] if axis in ends else nothing for end in (0, 1) for axis in range(count)]
        return self.op("Pad", value, self.op("Concat", *pads, axis=0))

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
        pairs = list(enumerate(zip(outer[extra:], inner, strict=True), extra))
        # A size that has another name, or none, may be 1 in a run.
        if any(small != large and not isinstance(small, int) for _, (large, small) in pairs):
            return self._summed_in_a_run(self.whole(gradient, of), to, extra)
        axes = [*range(extra), *(i for i, (large, small) in pairs if small == 1 and large != 1)]
        if not axes:
            return gradient
        found = self.op("ReduceSum", self.whole(gradient, of), self.constant(axes), keepdims=1)
        return Gradient(found if not extra else self.op("Squeeze", found, self.constant(list(range(extra)))))

    def _summed_in_a_run(self, whole: ir.Value, to: ir.Value, extra: int) -> Gradient:
        """A gradient summed over the axes that ``to`` lacks, ``extra`` of them, and over those where it has a size of 1."""
        sizes = self.shape_of(to)
        outer = sizes if not extra else self.op("Concat", self.constant([1] * extra), sizes, axis=0)
        stretched = self.op("Not", self.op("Equal", outer, self.shape_of(whole)))
        axes = self.op("Reshape", self.op("NonZero", stretched), self.constant([-1]))
        found = self.op("ReduceSum", whole, axes, keepdims=1, noop_with_empty_axes=1)
        return Gradient(self.op("Reshape", found, sizes))


def dims(value: ir.Value) -> list[int | str]:
    """The sizes of a value, each a number or the name of a size that is known at run time.

    Args:
        value: A value of the forward pass.

    Returns:
        A size for each axis. One of which nothing is known has a name that no other size has.

    Raises:
        InputError: Not even the number of axes is known.
    """
    if value.shape is None:
        raise InputError(
            f"how many axes {value.name!r} has is not known, so it cannot be differentiated: write the shapes into the file."
        )
    return [
        size if isinstance(size, int) else f"{value.name}:{axis}?" if size.value is None else str(size.value)
        for axis, size in enumerate(value.shape)
    ]


def rank(value: ir.Value) -> int:
    """How many axes a value has.

    Args:
        value: A value of the forward pass.

    Returns:
        The number of axes.

    Raises:
        InputError: It is not known.
    """
    return len(dims(value))


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


def known(value: ir.Value | None) -> npt.NDArray[np.generic] | None:
    """What a value always is, whatever a run is fed: a constant, perhaps cast.

    Args:
        value: A value of the forward pass, or None for an input that is left out.

    Returns:
        Its content; None where only a run knows it.
    """
    if value is None:
        return None
    node = value.producer()
    if node is not None and node.op_type in ("Identity", "Cast"):
        inner = known(node.inputs[0])
        if inner is None or node.op_type == "Identity":
            return inner
        return inner.astype(ir.DataType(node.attributes["to"].as_int()).numpy())
    if value.is_graph_input():  # an optional one: what is in the file is only its default
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


_MOVES = frozenset(
    {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Slice", "Split", "Concat", "Gather"}
)


def is_product_of_integers(value: ir.Value) -> bool:
    """True for integers that a quantised product adds up, perhaps moved about since.

    Args:
        value: A value of the forward pass.
    """
    seen: set[ir.Value] = set()
    waiting = [value]
    while waiting:
        at = waiting.pop()
        node = at.producer()
        if node is None or at in seen:
            continue
        seen.add(at)
        if node.op_type == "MatMulInteger":
            return True
        if node.op_type in _MOVES and at.dtype == value.dtype:
            waiting.extend(given for given in node.inputs if given is not None)
    return False
