"""How normalisations are written out: the mean, the scale (the root) and the normalised value are values of the graph."""

from __future__ import annotations

import onnx_ir as ir

from graphlens.surgery.unfusing.building import HALVES, Builder, Kept, given, integer, real, taken, wanted
from graphlens.surgery.unfusing.kinds import rank_of, sizes_of
from graphlens.surgery.unfusing.table import rule

_ON_THE_WAY = ("Mul", "Cast", "Reshape", "Identity", "DequantizeLinear", "QuantizeLinear", "Transpose")
_PRODUCTS = ("MatMul", "Gemm", "MatMulInteger", "MatMulNBits", "MatMulIntegerToFloat", "QLinearMatMul", "QGemm")


def normalised(
    b: Builder,
    x: ir.Value,
    weight: ir.Value | None,
    bias: ir.Value | None,
    epsilon: float,
    simple: bool,
    axes: list[int] | None = None,
    precise: bool = True,
    result: ir.DataType | None = None,
) -> tuple[ir.Value, ir.Value | None, ir.Value]:
    """A normalisation, written out.

    Args:
        b: Takes the nodes.
        x: What is normalised.
        weight: What the normalised value is multiplied by.
        bias: What is added to that.
        epsilon: What is added to the variance.
        simple: True for a norm by the root of the mean square, whose mean is not taken away.
        axes: The axes that it is over; the last one by default.
        precise: True if numbers of 16 bits are normalised in 32.
        result: The element type of the result; that of x by default.

    Returns:
        (the result, the mean or None, the scale).
    """
    dtype, over = b.dtype(x), b.integers(axes or [-1])
    wide = b.cast(x, ir.DataType.FLOAT) if precise and dtype in HALVES else x
    mean = None if simple else b.op("ReduceMean", wide, over, keepdims=1)
    centred = wide if mean is None else b.op("Sub", wide, mean)
    square = b.op("ReduceMean", b.op("Mul", centred, centred), over, keepdims=1)
    scale = b.op("Sqrt", b.op("Add", square, b.number(epsilon, square)))
    dtype = dtype if result is None else result
    found = b.cast(b.op("Div", centred, scale), dtype)
    if weight is not None:
        found = b.op("Mul", found, b.cast(weight, dtype))
    if bias is not None:
        found = b.op("Add", found, b.cast(bias, dtype))
    return found, mean, scale


def _axes(node: ir.Node, x: ir.Value) -> list[int]:
    """The axes of a norm: from its axis to the last."""
    axis, rank = integer(node, "axis", -1), rank_of(x)
    if axis < 0:
        return list(range(axis, 0))
    if rank is None:
        raise Kept(f"is left as it is where the number of axes of {x.name!r} is not known.")
    return list(range(axis - rank, 0))


def _precise(node: ir.Node) -> bool:
    return integer(node, "stash_type", 1) == 1


@rule(
    "LayerNormalization",
    variants="any axis, without bias, Mean and InvStdDev, 16-bit numbers in 32",
)
def _layer(b: Builder, node: ir.Node) -> list[ir.Value | None]:
    x = taken(node, 0)
    axes, precise = _axes(node, x), _precise(node)
    epsilon = real(node, "epsilon", 1e-5)
    found, mean, scale = normalised(b, x, taken(node, 1), given(node, 2), epsilon, False, axes, precise)
    inverse = b.op("Reciprocal", scale) if wanted(node, 2) else None
    return [found, mean if wanted(node, 1) else None, inverse]


@rule(
    "RMSNormalization",
    "SimplifiedLayerNormalization",
    variants="any axis, the inverse scale, 16-bit numbers in 32",
)
def _rms(b: Builder, node: ir.Node) -> list[ir.Value | None]:
    x = taken(node, 0)
    axes, precise = _axes(node, x), _precise(node)
    weight, epsilon = taken(node, 1), real(node, "epsilon", 1e-5)
    result = b.dtype(weight) if node.op_type == "SimplifiedLayerNormalization" else None
    found, _, scale = normalised(b, x, weight, None, epsilon, True, axes, precise, result)
    # An older form has a mean that it never computes between the two.
    inverse = [b.op("Reciprocal", scale) if wanted(node, place) else None for place in range(1, len(node.outputs))]
    return [found, *inverse]


def _is_product(value: ir.Value) -> bool:
    """True if a matrix product made a value: a bias belongs to such a one, and not to what passes by."""
    node = value.producer()
    while node is not None and node.op_type in _ON_THE_WAY and node.inputs and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node is not None and node.op_type in _PRODUCTS


@rule(
    "com.microsoft::SkipLayerNormalization",
    "com.microsoft::SkipSimplifiedLayerNormalization",
    variants="with and without beta and bias, a skip that is broadcast, the sum as output",
)
def _skip(b: Builder, node: ir.Node) -> list[ir.Value | None]:
    simple = "Simplified" in node.op_type
    x, skip, weight = (taken(node, place) for place in range(3))
    beta = None if simple else given(node, 3)
    bias = given(node, 3 if simple else 4)
    if bias is not None:
        if _is_product(skip) and not _is_product(x):
            skip = b.op("Add", skip, bias)
        else:
            x = b.op("Add", x, bias)
    if sizes_of(skip) == () or sizes_of(x) == ():
        raise Kept(f"is left as it is where what it adds has no axes ({node.name!r}).")
    total = b.op("Add", x, skip)
    found, mean, scale = normalised(b, total, weight, beta, real(node, "epsilon", 1e-12), simple)
    return [
        found,
        mean if wanted(node, 1) else None,
        b.op("Reciprocal", scale) if wanted(node, 2) else None,
        total if wanted(node, 3) else None,
    ]
