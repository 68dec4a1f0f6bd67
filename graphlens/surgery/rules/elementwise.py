"""Gradient rules of arithmetic and of functions of one number; formulas are textbook calculus."""

from __future__ import annotations

import math

import onnx_ir as ir

from graphlens.errors import InputError
from graphlens.surgery.rules.builder import Builder, Gradient, dims, known
from graphlens.surgery.rules.registry import Found, Grads, Needs, first_of, only, rule, taken

# Arithmetic


@rule("Add", "Sub")
def _sum(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    out, g = node.outputs[0], only(grads)
    found: Found = []
    for index, needed in enumerate(needs):
        term = g if index == 0 or node.op_type == "Add" else Gradient(b.op("Neg", g.value), g.full)
        found.append(b.summed(term, out, taken(node, index)) if needed else None)
    return found


@rule("Sum", "Mean")
def _sum_of_several(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    out, g = node.outputs[0], only(grads)
    term = g if node.op_type == "Sum" else Gradient(b.times(g.value, 1 / len(needs)), g.full)
    return [b.summed(term, out, taken(node, i)) if needed else None for i, needed in enumerate(needs)]


@rule("Mul")
def _product(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    out, g = node.outputs[0], only(grads)
    left, right = taken(node, 0), taken(node, 1)
    if left is right:
        return [Gradient(b.op("Mul", b.times(g.value, 2.0), left), True), None]
    return [
        _scaled(b, g, right, out, left) if needs[0] else None,
        _scaled(b, g, left, out, right) if needs[1] else None,
    ]


def _scaled(b: Builder, g: Gradient, factor: ir.Value, out: ir.Value, to: ir.Value) -> Gradient:
    """g * factor, for an input ``to`` of an elementwise ``out``."""
    return b.summed(Gradient(b.op("Mul", g.value, factor), g.full or dims(factor) == dims(out)), out, to)


@rule("Div", reads_output=True)
def _quotient(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    out, g = node.outputs[0], only(grads)
    left, right = taken(node, 0), taken(node, 1)
    part = Gradient(b.op("Div", g.value, right), g.full or dims(right) == dims(out))  # g / right
    found: Found = [b.summed(part, out, left) if needs[0] else None, None]
    if needs[1]:
        found[1] = b.summed(Gradient(b.op("Neg", b.op("Mul", part.value, out))), out, right)
    return found


@rule("Neg")
def _negative(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    g = only(grads)
    return [Gradient(b.op("Neg", g.value), g.full)]


@rule("Pow")
def _power(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    content = known(taken(node, 1))
    if needs[1] or content is None or content.size != 1:
        raise InputError(f"{node.name!r}: only a power with one constant exponent can be differentiated.")
    exponent = float(content.reshape(()))
    x = taken(node, 0)
    if exponent == 0:
        return [None, None]
    slope = b.times(b.op("Pow", x, b.constant(exponent - 1, x)), exponent)
    return [_along(b, grads, slope), None]


@rule("Clip")
def _clipped(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    """That of the argument where it is within the bounds, as torch has it, and 0 beyond them."""
    if any(needs[1:]):
        raise InputError(f"{node.name!r}: a Clip is differentiated by its first input alone, not by its bounds.")
    x, g = taken(node, 0), only(grads)
    inside: ir.Value | None = None
    for bound, compared in zip(node.inputs[1:], ("GreaterOrEqual", "LessOrEqual"), strict=False):
        if bound is not None:
            here = b.op(compared, x, bound)
            inside = here if inside is None else b.op("And", inside, here)
    gradient = g if inside is None else Gradient(b.op("Where", inside, g.value, b.constant(0.0, x)))
    return first_of(gradient, needs)


@rule("Min", "Max", reads_output=True)
def _extreme(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    """That of the input which is the result; an equal share where several are."""
    out, g = node.outputs[0], only(grads)
    hits = [b.op("CastLike", b.op("Equal", taken(node, i), out), g.value) for i in range(len(needs))]
    count = hits[0]
    for hit in hits[1:]:
        count = b.op("Add", count, hit)
    share = b.op("Div", g.value, count)
    return [
        b.summed(Gradient(b.op("Mul", hit, share)), out, taken(node, i)) if needs[i] else None
        for i, hit in enumerate(hits)
    ]


# Functions of one number, by their slopes


def _along(b: Builder, grads: Grads, slope: ir.Value) -> Gradient:
    """The gradient of the argument of a function with this slope."""
    return Gradient(b.op("Mul", only(grads).value, slope))


def _one_minus(b: Builder, y: ir.Value) -> ir.Value:
    return b.op("Sub", b.constant(1.0, y), y)


@rule("Sqrt", reads_output=True)
def _square_root(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    y = node.outputs[0]
    return [_along(b, grads, b.op("Div", b.constant(0.5, y), y))]


@rule("Log")
def _logarithm(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    return [Gradient(b.op("Div", only(grads).value, taken(node, 0)))]


@rule("Abs")
def _absolute(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    return [_along(b, grads, b.op("Sign", taken(node, 0)))]


@rule("Exp", reads_output=True)
def _exponential(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    return [_along(b, grads, node.outputs[0])]


@rule("Sin")
def _sine(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    return [_along(b, grads, b.op("Cos", taken(node, 0)))]


@rule("Cos")
def _cosine(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    return [_along(b, grads, b.op("Neg", b.op("Sin", taken(node, 0))))]


@rule("Reciprocal", reads_output=True)
def _reciprocal(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    y = node.outputs[0]
    return [_along(b, grads, b.op("Neg", b.op("Mul", y, y)))]


@rule("Tanh", reads_output=True)
def _tanh(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    y = node.outputs[0]
    return [_along(b, grads, _one_minus(b, b.op("Mul", y, y)))]


@rule("Sigmoid", reads_output=True)
def _sigmoid(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    y = node.outputs[0]
    return [_along(b, grads, b.op("Mul", y, _one_minus(b, y)))]


@rule("Softplus")
def _softplus(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    return [_along(b, grads, b.op("Sigmoid", taken(node, 0)))]


@rule("Swish")
def _swish(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    """x times sigmoid(alpha x)."""
    x, alpha = taken(node, 0), _factor(node, "alpha", 1.0)
    share = b.op("Sigmoid", b.times(x, alpha))
    bend = b.op("Mul", b.times(x, alpha), _one_minus(b, share))
    return [_along(b, grads, b.op("Mul", share, b.op("Add", b.constant(1.0, x), bend)))]


@rule("HardSigmoid", "HardSwish")
def _hard_sigmoid(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    """A ramp from 0 to 1, and x times that one."""
    x, plain = taken(node, 0), node.op_type == "HardSigmoid"
    alpha, beta = (_factor(node, "alpha", 0.2), _factor(node, "beta", 0.5)) if plain else (1 / 6, 0.5)
    ramp = b.op("Add", b.times(x, alpha), b.constant(beta, x))
    above, below = b.op("Greater", ramp, b.constant(0.0, x)), b.op("Less", ramp, b.constant(1.0, x))
    inside, zero, one = b.op("And", above, below), b.constant(0.0, x), b.constant(1.0, x)
    if plain:
        return [_along(b, grads, b.op("Where", inside, b.constant(alpha, x), zero))]
    bent = b.op("Add", ramp, b.times(x, alpha))
    return [_along(b, grads, b.op("Where", inside, bent, b.op("Where", above, one, zero)))]


@rule("LeakyRelu", "Elu")
def _leaky(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    """1 above 0; below it a number, or that times exp(x)."""
    x, leaks = taken(node, 0), node.op_type == "LeakyRelu"
    alpha = _factor(node, "alpha", 0.01 if leaks else 1.0)
    below = b.constant(alpha, x) if leaks else b.times(b.op("Exp", x), alpha)
    return [_along(b, grads, b.op("Where", b.op("Greater", x, b.constant(0.0, x)), b.constant(1.0, x), below))]


def _factor(node: ir.Node, name: str, default: float) -> float:
    """An attribute that is a number."""
    return node.attributes[name].as_float() if name in node.attributes else default


@rule("Relu", reads_output=True)
def _relu(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    y = node.outputs[0]
    positive = b.op("Greater", y, b.constant(0.0, y))
    return [_along(b, grads, b.op("Where", positive, b.constant(1.0, y), b.constant(0.0, y)))]


@rule("Erf")
def _error_function(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    x = taken(node, 0)
    return [_along(b, grads, b.times(b.op("Exp", b.op("Neg", b.op("Mul", x, x))), 2 / math.sqrt(math.pi)))]


@rule("Gelu")
def _gelu(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    """Of either form: x times the normal distribution, or the one with tanh (Hendrycks and Gimpel 2016)."""
    x = taken(node, 0)
    one, half = b.constant(1.0, x), b.constant(0.5, x)
    square = b.op("Mul", x, x)
    approximate = node.attributes.get("approximate")
    if approximate is not None and approximate.as_string() == "tanh":
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
    return [_along(b, grads, slope)]
