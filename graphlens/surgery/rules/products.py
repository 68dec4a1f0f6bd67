"""Gradient rules of matrix products."""

from __future__ import annotations

import onnx_ir as ir

from graphlens.errors import InputError
from graphlens.surgery.rules.builder import Builder, Gradient, dims, width
from graphlens.surgery.rules.registry import Found, Grads, Needs, first_of, number, only, rule, taken


@rule("Gemm")
def _gemm(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    if any(needs[1:]) or number(node, "transA", 0):
        raise InputError(f"{node.name!r}: a Gemm is differentiated by its first input alone, a row of activations.")
    alpha = node.attributes["alpha"].as_float() if "alpha" in node.attributes else 1.0
    g = b.whole(only(grads), node.outputs[0])
    turned = b.op("Gemm", g, taken(node, 1), alpha=alpha, transB=1 - number(node, "transB", 0))
    return first_of(Gradient(turned), needs)


@rule("MatMul")
def _matmul(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    out, left, right = node.outputs[0], taken(node, 0), taken(node, 1)
    g = b.whole(only(grads), out)
    many = (len(dims(left)), len(dims(right)))
    if 1 in many:
        raise InputError(f"{node.name!r}: a product with a vector cannot be differentiated.")
    found: Found = [None, None]
    if needs[0] and many[1] == 2:  # a weight: as rows, so that ONNX Runtime needs no turned copy of it
        flat = b.op("Reshape", g, b.constant([-1, width(out)]))
        rows = b.op("Gemm", flat, right, transB=1)
        found[0] = Gradient(b.op("Reshape", rows, b.shape_of(left)))
    elif needs[0]:
        found[0] = b.summed(Gradient(b.op("MatMul", g, _turned(b, right))), _unsummed(out, left), left)
    if needs[1]:
        found[1] = b.summed(Gradient(b.op("MatMul", _turned(b, left), g)), _unsummed(out, right), right)
    return found


def _turned(b: Builder, value: ir.Value) -> ir.Value:
    """A stack of matrices, each transposed."""
    order = list(range(len(dims(value))))
    return b.op("Transpose", value, perm=[*order[:-2], order[-1], order[-2]])


def _unsummed(out: ir.Value, factor: ir.Value) -> ir.Value:
    """A value of the shape that the gradient of a factor has before it is summed over broadcast axes."""
    return ir.Value(name="", shape=ir.Shape([*dims(out)[:-2], *dims(factor)[-2:]]), type=out.type)
