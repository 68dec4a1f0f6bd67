"""Gradient rules of operators that round: the gradient of the product with the dequantised weights, straight through.

Rounding has no useful derivative, so it counts as the identity (Bengio et al. 2013): a quantised product ``x @ W`` has the
gradient of ``x @ (the numbers that W's integers stand for)``. What lies beyond the range of a QuantizeLinear is cut off and
not rounded, so it gets 0, as in torch's fake_quantize. Scales that are computed from the activations are constants.
"""

from __future__ import annotations

import onnx_ir as ir

from graphlens.errors import InputError
from graphlens.surgery.rules.builder import Builder, Gradient, dims, rank
from graphlens.surgery.rules.products import matmul_gradients
from graphlens.surgery.rules.registry import (
    Found,
    Grads,
    Needs,
    constant,
    first_of,
    number,
    only,
    optional,
    rule,
    taken,
)

MICROSOFT = "com.microsoft"
# An embedding reads its rows by indices; a gradient goes no further.
constant("GatherBlockQuantized", domain=MICROSOFT)


@rule("MatMulInteger", straight_through=True)
def _product(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    g = b.whole(only(grads), node.outputs[0])
    factors = (_less_zero(b, node, 0, g, needs[1]), _less_zero(b, node, 1, g, needs[0]))
    return matmul_gradients(b, node, g, [*needs[:2], *[False] * (len(needs) - 2)], factors)


def _less_zero(b: Builder, node: ir.Node, place: int, g: ir.Value, wanted: bool) -> ir.Value:
    """A factor of a product of integers less its zero point, as numbers like the gradient; itself where it is not wanted."""
    value, zero = taken(node, place), optional(node, place + 2)
    if not wanted:
        return value
    found = b.op("CastLike", b.unfolded(value, g), g)
    if zero is None:
        return found
    offset = b.op("CastLike", zero, g)
    if rank(zero) == 1 and place == 0 and dims(zero)[0] != 1:  # one for each row
        offset = b.op("Unsqueeze", offset, b.constant([1]))
    return b.op("Sub", found, offset)


@rule("DynamicQuantizeLinear", reads_output=True, straight_through=True)
def _dynamically_rounded(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    """That of the integers over the scale; scale and zero point count as constants."""
    scale = node.outputs[1]
    return [None] if grads[0] is None else [Gradient(b.op("Div", grads[0].value, scale), grads[0].full)]


@rule("QuantizeLinear", straight_through=True)
def _rounded(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    """That of the integers over the scale, and 0 where a number is beyond their range."""
    x, scale, g = taken(node, 0), _scale(b, node), only(grads)
    zero, kind = optional(node, 2), node.outputs[0].dtype
    if kind is None or not kind.is_integer():
        raise InputError(f"{node.name!r} rounds to {kind}: only rounding to integers can be differentiated.")
    steps = b.op("Round", b.op("Div", x, scale))
    if zero is not None:
        steps = b.op("Add", steps, b.op("CastLike", _along(b, node, zero), steps))
    least, most = (b.constant(float(end), x) for end in (kind.min, kind.max))
    inside = b.op("And", b.op("GreaterOrEqual", steps, least), b.op("LessOrEqual", steps, most))
    return first_of(Gradient(b.op("Where", inside, b.op("Div", g.value, scale), b.constant(0.0, x))), needs)


@rule("DequantizeLinear", straight_through=True)
def _numbers(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    return first_of(Gradient(b.op("Mul", b.whole(only(grads), node.outputs[0]), _scale(b, node))), needs)


def _scale(b: Builder, node: ir.Node) -> ir.Value:
    """The scale of a node, so that it broadcasts to what it scales."""
    return _along(b, node, taken(node, 1))


def _along(b: Builder, node: ir.Node, value: ir.Value) -> ir.Value:
    """A scale or zero point [], [1] or [n], so that it broadcasts to what it belongs to."""
    if number(node, "block_size", 0):
        raise InputError(f"{node.name!r}: activations that are quantised in blocks cannot be differentiated.")
    count = rank(taken(node, 0))
    if rank(value) == 0 or dims(value)[0] == 1:
        return value
    axis = number(node, "axis", 1) % count
    return b.op("Reshape", value, b.constant([1] * axis + [-1] + [1] * (count - axis - 1)))


@rule("MatMulNBits", straight_through=True, domain=MICROSOFT)
def _packed_product(b: Builder, node: ir.Node, grads: Grads, needs: Needs) -> Found:
    g = b.whole(only(grads), node.outputs[0])
    weight = _unpacked(b, node, g)  # [n, k]
    rows = b.op("Gemm", b.op("Reshape", g, b.constant([-1, number(node, "N", 0)])), weight)
    return first_of(Gradient(b.op("Reshape", rows, b.shape_of(taken(node, 0)))), needs)


def _unpacked(b: Builder, node: ir.Node, g: ir.Value) -> ir.Value:
    """The weights [n, k] that the packed integers of a node stand for, as numbers like the gradient."""
    columns, count, block, bits = (number(node, name, 4) for name in ("K", "N", "block_size", "bits"))
    if optional(node, 4) is not None:
        raise InputError(
            f"{node.name!r}: a MatMulNBits whose rows are in another order (g_idx) cannot be differentiated."
        )
    blocks = -(-columns // block)
    packed = b.unfolded(taken(node, 1), g)  # [n, blocks, bytes]
    numbers = b.op("Reshape", _split(b, packed, bits, g), b.constant([count, blocks, block]))
    scales = b.op("Reshape", b.op("CastLike", taken(node, 2), g), b.constant([count, blocks, 1]))
    zero = optional(node, 3)
    middle = b.constant(float(2 ** (bits - 1)), g)
    if zero is not None and zero.dtype == ir.DataType.UINT8:  # a row's are packed together, and fill up whole bytes
        each = 8 // bits
        rows = b.op("Reshape", zero, b.constant([count, -(-blocks // each)]))
        apart = b.op("Reshape", _split(b, rows, bits, g), b.constant([count, -1]))
        middle = b.op("Slice", apart, b.constant([0]), b.constant([blocks]), b.constant([1]))
    elif zero is not None:
        middle = b.op("CastLike", zero, g)
    if zero is not None:
        middle = b.op("Reshape", middle, b.constant([count, blocks, 1]))
    whole = b.op("Reshape", b.op("Mul", b.op("Sub", numbers, middle), scales), b.constant([count, blocks * block]))
    if blocks * block == columns:
        return whole
    return b.op("Slice", whole, b.constant([0]), b.constant([columns]), b.constant([1]))


def _split(b: Builder, packed: ir.Value, bits: int, g: ir.Value) -> ir.Value:
    """The integers in bytes, the lowest bits first, as numbers like the gradient, along a new last axis."""
    if bits == 8:
        return b.op("CastLike", packed, g)
    mask = b.constant(2**bits - 1, kind=ir.DataType.UINT8)
    parts = []
    for shift in range(0, 8, bits):
        moved = (
            b.op("BitShift", packed, b.constant(shift, kind=ir.DataType.UINT8), direction="RIGHT") if shift else packed
        )
        parts.append(b.op("Unsqueeze", b.op("BitwiseAnd", moved, mask), b.constant([-1])))
    return b.op("CastLike", b.op("Concat", *parts, axis=-1), g)
