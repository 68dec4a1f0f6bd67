"""The derivative of each operator: from the gradient of what a node gives to the gradients of what it takes.

Sizes are known when a graph is built, by number or by name, so which axes a gradient is summed over is decided here and
never at run time. Formulas are textbook calculus; Gelu's is of its tanh form (Hendrycks and Gimpel 2016).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from graphlens.errors import InputError


@dataclass(frozen=True)
class Gradient:
    """A gradient of a value. ``full``: it has the value's shape; else it broadcasts to it (a mean's, say)."""

    value: ir.Value
    full: bool = True


class Builder:
    """Nodes of a backward pass under construction, and what is known of values."""

    def __init__(self, dtype: ir.DataType) -> None:
        self.tape = Tape()
        self._dtype = dtype  # of what it computes, where a value does not say
        self._constants: dict[tuple[str, str], ir.Value] = {}
        self._shapes: dict[ir.Value, ir.Value] = {}

    def op(self, kind: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """The output of a new node."""
        return self.tape.op(kind, list(inputs), attributes)

    def constant(self, value: Any, like: ir.Value | None = None) -> ir.Value:
        """A constant: int64, or of the dtype of ``like``. The same one for the same value."""
        kind = ir.DataType.INT64 if like is None else self._dtype if like.type is None else like.type.dtype
        dtype = kind.numpy()
        array = np.asarray(value, dtype)
        key = (str(dtype), f"{array.shape}{array.tolist()}")
        if key not in self._constants:
            name = f"gradient/constant_{len(self._constants)}"
            self._constants[key] = self.tape.initializer(ir.tensor(array, name=name), name=name)
        return self._constants[key]

    def shape_of(self, value: ir.Value) -> ir.Value:
        """The shape of a value, at run time."""
        if value not in self._shapes:
            self._shapes[value] = self.op("Shape", value)
        return self._shapes[value]

    def times(self, a: ir.Value, factor: float) -> ir.Value:
        """``a`` times a number."""
        return a if factor == 1 else self.op("Mul", a, self.constant(factor, a))

    def whole(self, gradient: Gradient, like: ir.Value) -> ir.Value:
        """The gradient in the full shape of ``like``."""
        return gradient.value if gradient.full else self.op("Expand", gradient.value, self.shape_of(like))

    def summed(self, gradient: Gradient, of: ir.Value, to: ir.Value) -> Gradient:
        """The gradient of ``of``, to which ``to`` was broadcast, summed to the shape of ``to``."""
        outer, inner = dims(of), dims(to)
        extra = len(outer) - len(inner)
        axes = [*range(extra), *(i for i in range(extra, len(outer)) if inner[i - extra] == 1 and outer[i] != 1)]
        if not axes:
            return gradient
        found = self.op("ReduceSum", self.whole(gradient, of), self.constant(axes), keepdims=1)
        return Gradient(found if not extra else self.op("Squeeze", found, self.constant(list(range(extra)))))


def dims(value: ir.Value) -> list[int | str]:
    """The sizes of a value, by number or name. Raises InputError where they are not known."""
    if value.shape is None or any(not isinstance(d, int) and d.value is None for d in value.shape):
        raise InputError(f"the shape of {value.name!r} is not known, so it cannot be differentiated.")
    return [d if isinstance(d, int) else str(d.value) for d in value.shape]


Rule = Callable[[Builder, ir.Node, Sequence[Gradient | None], Sequence[bool]], Sequence[Gradient | None]]
RULES: dict[str, Rule] = {}


def _rule(*kinds: str) -> Callable[[Rule], Rule]:
    def add(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(kinds, rule))
        return rule

    return add


def _taken(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _only(grads: Sequence[Gradient | None]) -> Gradient:
    assert grads[0] is not None
    return grads[0]


def _attribute(node: ir.Node, name: str, default: Any) -> Any:
    return node.attributes[name].value if name in node.attributes else default


def _numbers(value: ir.Value | None, what: str) -> list[int]:
    """The entries of a constant."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    if tensor is None:
        raise InputError(f"{what} is not a constant, so it cannot be differentiated.")
    return [int(i) for i in np.atleast_1d(tensor.numpy())]


# Arithmetic


@_rule("Add", "Sub")
def _sum(b: Builder, node: ir.Node, grads: Sequence[Gradient | None], needs: Sequence[bool]) -> list[Gradient | None]:
    out, g = node.outputs[0], _only(grads)
    found: list[Gradient | None] = []
    for index, needed in enumerate(needs):
        term = g if index == 0 or node.op_type == "Add" else Gradient(b.op("Neg", g.value), g.full)
        found.append(b.summed(term, out, _taken(node, index)) if needed else None)
    return found


def _scaled(b: Builder, g: Gradient, factor: ir.Value, out: ir.Value, to: ir.Value) -> Gradient:
    """g * factor, for an input ``to`` of an elementwise ``out``."""
    return b.summed(Gradient(b.op("Mul", g.value, factor), g.full or dims(factor) == dims(out)), out, to)


@_rule("Mul")
def _product(
    b: Builder, node: ir.Node, grads: Sequence[Gradient | None], needs: Sequence[bool]
) -> list[Gradient | None]:
    out, g = node.outputs[0], _only(grads)
    left, right = _taken(node, 0), _taken(node, 1)
    if left is right:
        return [Gradient(b.op("Mul", b.times(g.value, 2.0), left), True), None]
    return [
        _scaled(b, g, right, out, left) if needs[0] else None,
        _scaled(b, g, left, out, right) if needs[1] else None,
    ]


@_rule("Div")
def _quotient(
    b: Builder, node: ir.Node, grads: Sequence[Gradient | None], needs: Sequence[bool]
) -> list[Gradient | None]:
    out, g = node.outputs[0], _only(grads)
    left, right = _taken(node, 0), _taken(node, 1)
    part = Gradient(b.op("Div", g.value, right), g.full or dims(right) == dims(out))  # g / right
    found: list[Gradient | None] = [b.summed(part, out, left) if needs[0] else None, None]
    if needs[1]:
        found[1] = b.summed(Gradient(b.op("Neg", b.op("Mul", part.value, out))), out, right)
    return found


def _elementwise(
    slope: Callable[[Builder, ir.Value, ir.Value], ir.Value],
) -> Rule:
    """The rule of a function of one value, from ``slope(builder, x, y)``."""

    def rule(
        b: Builder, node: ir.Node, grads: Sequence[Gradient | None], needs: Sequence[bool]
    ) -> list[Gradient | None]:
        return [Gradient(b.op("Mul", _only(grads).value, slope(b, _taken(node, 0), node.outputs[0])))]

    return rule


def _one_minus(b: Builder, y: ir.Value) -> ir.Value:
    return b.op("Sub", b.constant(1.0, y), y)


RULES["Sqrt"] = _elementwise(lambda b, x, y: b.op("Div", b.constant(0.5, y), y))
RULES["Exp"] = _elementwise(lambda b, x, y: y)
RULES["Reciprocal"] = _elementwise(lambda b, x, y: b.op("Neg", b.op("Mul", y, y)))
RULES["Tanh"] = _elementwise(lambda b, x, y: _one_minus(b, b.op("Mul", y, y)))
RULES["Sigmoid"] = _elementwise(lambda b, x, y: b.op("Mul", y, _one_minus(b, y)))
RULES["Relu"] = _elementwise(
    lambda b, x, y: b.op("Where", b.op("Greater", y, b.constant(0.0, y)), b.constant(1.0, y), b.constant(0.0, y))
)
RULES["Erf"] = _elementwise(
    lambda b, x, y: b.times(b.op("Exp", b.op("Neg", b.op("Mul", x, x))), 2 / math.sqrt(math.pi))
)


@_rule("Neg")
def _negative(
    b: Builder, node: ir.Node, grads: Sequence[Gradient | None], needs: Sequence[bool]
) -> list[Gradient | None]:
    g = _only(grads)
    return [Gradient(b.op("Neg", g.value), g.full)]


@_rule("Pow")
def _power(b: Builder, node: ir.Node, grads: Sequence[Gradient | None], needs: Sequence[bool]) -> list[Gradient | None]:
    tensor = ir.convenience.get_const_tensor(_taken(node, 1))
    if needs[1] or tensor is None or tensor.size != 1:
        raise InputError(f"{node.name!r}: only a power with a constant exponent can be differentiated.")
    exponent = float(tensor.numpy().reshape(()))
    x = _taken(node, 0)
    slope = b.times(b.op("Pow", x, b.constant(exponent - 1, x)), exponent)
    return [Gradient(b.op("Mul", _only(grads).value, slope)), None]


@_rule("Gelu")
def _gelu(b: Builder, node: ir.Node, grads: Sequence[Gradient | None], needs: Sequence[bool]) -> list[Gradient | None]:
    x = _taken(node, 0)
    one, half = b.constant(1.0, x), b.constant(0.5, x)
    square = b.op("Mul", x, x)
    if _attribute(node, "approximate", "none") == "tanh":
        root, cube = math.sqrt(2 / math.pi), 0.044715 * math.sqrt(2 / math.pi)
        inner = b.op("Mul", x, b.op("Add", b.times(square, cube), b.constant(root, x)))
        tanh = b.op("Tanh", inner)
        inner_slope = b.op("Add", b.times(square, 3 * cube), b.constant(root, x))
        bend = b.op("Mul", b.op("Mul", x, inner_slope), b.op("Sub", one, b.op("Mul", tanh, tanh)))
        slope = b.op("Mul", half, b.op("Add", b.op("Add", tanh, one), bend))
    else:
        cdf = b.op("Mul", half, b.op("Add", one, b.op("Erf", b.times(x, 1 / math.sqrt(2)))))
        density = b.times(b.op("Exp", b.times(square, -0.5)), 1 / math.sqrt(2 * math.pi))
        slope = b.op("Add", cdf, b.op("Mul", x, density))
    return [Gradient(b.op("Mul", _only(grads).value, slope))]


# Sums


@_rule("ReduceMean", "ReduceSum")
def _reduced(
    b: Builder, node: ir.Node, grads: Sequence[Gradient | None], needs: Sequence[bool]
) -> list[Gradient | None]:
    x, g = _taken(node, 0), b.whole(_only(grads), node.outputs[0])
    given = node.inputs[1] if len(node.inputs) > 1 else None
    sizes = dims(x)
    axes = [a % len(sizes) for a in _numbers(given, f"the axes of {node.name!r}")] if given is not None else []
    axes = axes or list(range(len(sizes)))
    if not _attribute(node, "keepdims", 1):
        g = b.op("Unsqueeze", g, b.constant(axes))
    if node.op_type == "ReduceMean":
        count = 1
        for axis in axes:
            size = sizes[axis]
            if not isinstance(size, int):
                raise InputError(f"{node.name!r}: a mean over {size} tokens cannot be differentiated.")
            count *= size
        g = b.times(g, 1 / count)
    others = [None] * (len(node.inputs) - 1)
    return [Gradient(g, full=False), *others]


@_rule("Softmax")
def _softmax(
    b: Builder, node: ir.Node, grads: Sequence[Gradient | None], needs: Sequence[bool]
) -> list[Gradient | None]:
    axis = _attribute(node, "axis", -1)
    # A row that is masked throughout is NaN here, and is cleaned right after: 0 has the right gradient.
    y = _cleaned(node.outputs[0])
    weighted = b.op("Mul", b.whole(_only(grads), node.outputs[0]), y)
    total = b.op("ReduceSum", weighted, b.constant([axis]), keepdims=1)
    return [Gradient(b.op("Sub", weighted, b.op("Mul", y, total)))]


def _cleaned(pattern: ir.Value) -> ir.Value:
    """``Where(IsNaN(pattern), 0, pattern)`` where the graph has it, else the pattern."""
    for user, index in pattern.uses():
        condition = user.inputs[0]
        source = None if condition is None else condition.producer()
        if user.op_type == "Where" and index == 2 and source is not None and source.op_type == "IsNaN":
            return user.outputs[0]
    return pattern


# Matrices


@_rule("Gemm")
def _gemm(b: Builder, node: ir.Node, grads: Sequence[Gradient | None], needs: Sequence[bool]) -> list[Gradient | None]:
    if any(needs[1:]) or _attribute(node, "transA", 0):
        raise InputError(f"{node.name!r}: a Gemm is differentiated by its first input alone, a row of activations.")
    alpha, transposed = _attribute(node, "alpha", 1.0), _attribute(node, "transB", 0)
    g = b.whole(_only(grads), node.outputs[0])
    found = b.op("Gemm", g, _taken(node, 1), alpha=float(alpha), transB=1 - int(transposed))
    return [Gradient(found), *([None] * (len(node.inputs) - 1))]


@_rule("MatMul")
def _matmul(
    b: Builder, node: ir.Node, grads: Sequence[Gradient | None], needs: Sequence[bool]
) -> list[Gradient | None]:
    out, left, right = node.outputs[0], _taken(node, 0), _taken(node, 1)
    g = b.whole(_only(grads), out)
    many = (len(dims(left)), len(dims(right)))
    if 1 in many:
        raise InputError(f"{node.name!r}: a product with a vector cannot be differentiated.")
    found: list[Gradient | None] = [None, None]
    if needs[0] and many[1] == 2:  # a weight: as rows, so that ONNX Runtime needs no turned copy of it
        flat = b.op("Reshape", g, b.constant([-1, _width(out)]))
        rows = b.op("Gemm", flat, right, transB=1)
        found[0] = Gradient(b.op("Reshape", rows, b.shape_of(left)))
    elif needs[0]:
        found[0] = b.summed(Gradient(b.op("MatMul", g, _turned(b, right))), _like(out, left, right, 0), left)
    if needs[1]:
        found[1] = b.summed(Gradient(b.op("MatMul", _turned(b, left), g)), _like(out, left, right, 1), right)
    return found


def _width(value: ir.Value) -> int:
    width = dims(value)[-1]
    if not isinstance(width, int):
        raise InputError(f"the width of {value.name!r} is not known, so it cannot be differentiated.")
    return width


def _turned(b: Builder, value: ir.Value) -> ir.Value:
    order = list(range(len(dims(value))))
    return b.op("Transpose", value, perm=[*order[:-2], order[-1], order[-2]])


def _like(out: ir.Value, left: ir.Value, right: ir.Value, index: int) -> ir.Value:
    """A value of the shape that the gradient of an input has before it is summed over broadcast axes."""
    pair = (left, right)[index]
    return ir.Value(name="", shape=ir.Shape([*dims(out)[:-2], *dims(pair)[-2:]]), type=out.type)


# Choices and shapes


@_rule("Where")
def _chosen(
    b: Builder, node: ir.Node, grads: Sequence[Gradient | None], needs: Sequence[bool]
) -> list[Gradient | None]:
    condition, out, g = _taken(node, 0), node.outputs[0], _only(grads)
    zero = b.constant(0.0, out)
    full = g.full or dims(condition) == dims(out)
    found: list[Gradient | None] = [None, None, None]
    if needs[1]:
        found[1] = b.summed(Gradient(b.op("Where", condition, g.value, zero), full), out, _taken(node, 1))
    if needs[2]:
        found[2] = b.summed(Gradient(b.op("Where", condition, zero, g.value), full), out, _taken(node, 2))
    return found


@_rule("Identity")
def _same(b: Builder, node: ir.Node, grads: Sequence[Gradient | None], needs: Sequence[bool]) -> list[Gradient | None]:
    return [_only(grads)]


@_rule("Cast")
def _cast(b: Builder, node: ir.Node, grads: Sequence[Gradient | None], needs: Sequence[bool]) -> list[Gradient | None]:
    x, g = _taken(node, 0), _only(grads)
    assert x.type is not None
    return [Gradient(b.op("Cast", g.value, to=int(x.type.dtype)), g.full)]


@_rule("Reshape", "Squeeze", "Unsqueeze")
def _reshaped(
    b: Builder, node: ir.Node, grads: Sequence[Gradient | None], needs: Sequence[bool]
) -> list[Gradient | None]:
    x, g = _taken(node, 0), b.whole(_only(grads), node.outputs[0])
    return [Gradient(b.op("Reshape", g, b.shape_of(x))), *([None] * (len(node.inputs) - 1))]


@_rule("Expand")
def _expanded(
    b: Builder, node: ir.Node, grads: Sequence[Gradient | None], needs: Sequence[bool]
) -> list[Gradient | None]:
    return [b.summed(_only(grads), node.outputs[0], _taken(node, 0)), None]


@_rule("Transpose")
def _transposed(
    b: Builder, node: ir.Node, grads: Sequence[Gradient | None], needs: Sequence[bool]
) -> list[Gradient | None]:
    g = _only(grads)
    rank = len(dims(node.outputs[0]))
    order = list(_attribute(node, "perm", range(rank - 1, -1, -1)))
    return [Gradient(b.op("Transpose", g.value, perm=[order.index(i) for i in range(rank)]), g.full)]


@_rule("Split")
def _split(b: Builder, node: ir.Node, grads: Sequence[Gradient | None], needs: Sequence[bool]) -> list[Gradient | None]:
    parts = []
    for output, g in zip(node.outputs, grads, strict=True):
        zero = b.constant(0.0, output)
        parts.append(b.op("Expand", zero, b.shape_of(output)) if g is None else b.whole(g, output))
    found = b.op("Concat", *parts, axis=_attribute(node, "axis", 0))
    return [Gradient(found), *([None] * (len(node.inputs) - 1))]


@_rule("Concat")
def _joined(
    b: Builder, node: ir.Node, grads: Sequence[Gradient | None], needs: Sequence[bool]
) -> list[Gradient | None]:
    axis, g = _attribute(node, "axis", 0), b.whole(_only(grads), node.outputs[0])
    place = b.constant([axis])
    sizes = [b.op("Gather", b.shape_of(_taken(node, i)), place, axis=0) for i in range(len(node.inputs))]
    parts = b.tape.op_multi_out(
        "Split", [g, b.op("Concat", *sizes, axis=0)], {"axis": axis}, num_outputs=len(node.inputs)
    )
    return [Gradient(part) if needed else None for part, needed in zip(parts, needs, strict=True)]


# Rules that read what their node gave, beside what it took.
READS_ITS_OUTPUT = ("Sqrt", "Exp", "Reciprocal", "Tanh", "Sigmoid", "Relu", "Div", "Softmax", "Where")
# What does not change when an activation changes a little: no gradient passes.
CONSTANT = ("IsNaN", "Shape", "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "And", "Or", "Not")
