"""How operators on integers are written out: float operators between DequantizeLinear and QuantizeLinear, or integer products."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphlens.surgery.graph import let_read, replace_value
from graphlens.surgery.unfusing.attention import attended
from graphlens.surgery.unfusing.building import Builder, Kept, Workshop, given, integer, real, refuse, taken
from graphlens.surgery.unfusing.channels import window
from graphlens.surgery.unfusing.kinds import constant_of, rank_of, sizes_of
from graphlens.surgery.unfusing.table import SCHEMA, rule

_STEP = "to one step of the output's quantiser"


def _dequantised(b: Builder, node: ir.Node, place: int, axis: int | None = None) -> ir.Value:
    """An integer input as numbers; its scale and zero point are the inputs after it.

    Args:
        b: Takes the nodes.
        node: The node.
        place: The input's place.
        axis: The axis that several scales belong to; None where there is one scale.
    """
    value, scale, zero = taken(node, place), taken(node, place + 1), given(node, place + 2)
    sizes = sizes_of(scale)
    if sizes is None:
        raise Kept(f"is left as it is where the number of scales {scale.name!r} is not known.")
    if sizes in ((), (1,)):
        # One scale in an array of one means a scale for each of one row to the standard operator.
        scale, zero, axis = _single(b, scale), None if zero is None else _single(b, zero), None
    else:
        refuse(node, "several scales where it can have one", axis is None)
    key = (value, scale, zero, axis)
    if key not in b.shop.shared:
        # What several nodes read has one value as numbers: an edit of it reaches them all.
        attributes = {} if axis is None else {"axis": axis}
        later = next((other for other, _ in value.uses() if _numbers_of(other) == key), None)
        made = _moved(later, node) if later is not None and later not in b.shop.passed else None
        b.shop.shared[key] = made or b.op("DequantizeLinear", value, scale, zero, **attributes)
    return b.shop.shared[key]


def _numbers_of(node: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value | None, int | None] | None:
    """The integers that a standard DequantizeLinear reads, with scale, zero point and axis; None for any other node."""
    if node.op_type != "DequantizeLinear" or node.domain not in ("", "ai.onnx"):
        return None
    if integer(node, "block_size") or integer(node, "output_dtype"):
        return None
    value, scale = given(node, 0), given(node, 1)
    if value is None or scale is None:
        return None
    return value, scale, given(node, 2), None if rank_of(scale) == 0 else integer(node, "axis", 1)


def _moved(node: ir.Node, before: ir.Node) -> ir.Value | None:
    """The output of a node, once it comes before another; None if it cannot."""
    graph = node.graph
    made = [value.producer() for value in node.inputs[1:] if value is not None]
    if graph is None or graph is not before.graph or any(made):
        return None
    graph.remove(node)
    graph.insert_before(before, node)
    return node.outputs[0]


def joined(shop: Workshop, node: ir.Node) -> bool:
    """Lets what reads integers as numbers read one value, where the file has the same numbers several times.

    Args:
        shop: What the rules of its graph share.
        node: A node of the main graph.

    Returns:
        True if another node makes the same numbers, and this one was removed.
    """
    key = _numbers_of(node)
    if key is None:
        return False
    value = node.outputs[0]
    first = shop.shared.setdefault(key, value)
    if first is value or (first.is_graph_output() and value.is_graph_output()):
        return False
    if value.is_graph_output():
        replace_value(value, first)
    else:
        let_read(tuple(value.uses()), first, value)
    assert node.graph is not None
    node.graph.remove(node, safe=True)
    return True


def _single(b: Builder, value: ir.Value) -> ir.Value:
    """A scale or zero point without axes."""
    return value if rank_of(value) == 0 else b.op("Squeeze", value)


def _quantised(b: Builder, x: ir.Value, scale: ir.Value, zero: ir.Value | None, like: ir.Value) -> ir.Value:
    """Numbers as integers by one scale, of the type of the zero point; without one, of another value's type."""
    if zero is None:
        zero = b.constant(np.asarray(0, b.dtype(like).numpy()))
    return b.op("QuantizeLinear", x, _single(b, scale), _single(b, zero))


@rule("QLinearMatMul", variants=f"one scale, or one for each column, {_STEP}")
def _product(b: Builder, node: ir.Node) -> list[ir.Value | None]:
    columns = (rank_of(taken(node, 3)) or 2) - 1
    found = b.op("MatMul", _dequantised(b, node, 0), _dequantised(b, node, 3, columns))
    return [_quantised(b, found, taken(node, 6), given(node, 7), taken(node, 0))]


_PAIRS = {"QLinearAdd": "Add", "QLinearMul": "Mul"}


@rule("com.microsoft::QLinearAdd", "com.microsoft::QLinearMul", variants=f"all, {_STEP}")
def _pair(b: Builder, node: ir.Node) -> list[ir.Value | None]:
    found = b.op(_PAIRS[node.op_type], _dequantised(b, node, 0), _dequantised(b, node, 3))
    return [_quantised(b, found, taken(node, 6), given(node, 7), taken(node, 0))]


@rule("com.microsoft::QLinearSigmoid", "com.microsoft::QLinearLeakyRelu", variants=f"all, {_STEP}")
def _function(b: Builder, node: ir.Node) -> list[ir.Value | None]:
    x = _dequantised(b, node, 0)
    if node.op_type == "QLinearSigmoid":
        found = b.op("Sigmoid", x)
    else:
        found = b.op("LeakyRelu", x, alpha=real(node, "alpha", 0.01))
    return [_quantised(b, found, taken(node, 3), given(node, 4), taken(node, 0))]


@rule("com.microsoft::QLinearSoftmax", variants=f"over the last axis, {_STEP}")
def _softmax(b: Builder, node: ir.Node) -> list[ir.Value | None]:
    axis, rank = integer(node, "axis", -1), rank_of(taken(node, 0))
    refuse(node, "a Softmax that is not over the last axis", axis != -1 and (rank is None or axis % rank != rank - 1))
    found = b.op("Softmax", _dequantised(b, node, 0), axis=-1)
    # The kernel counts whole steps in 1: of a scale of 1 / 255, whose inverse in 32 bits is below 255, it makes 254.
    scale, known = taken(node, 3), constant_of(taken(node, 3))
    if known is not None:
        one = np.float32(1)
        whole = b.constant(np.asarray(one / np.floor(one / known.numpy().reshape(())), np.float32))
    else:
        whole = b.op("Reciprocal", b.op("Floor", b.op("Reciprocal", scale)))
    return [_quantised(b, found, whole, given(node, 4), taken(node, 0))]


@rule("com.microsoft::QLinearConcat", variants=f"all, {_STEP}")
def _concat(b: Builder, node: ir.Node) -> list[ir.Value | None]:
    parts = [_dequantised(b, node, place) for place in range(2, len(node.inputs), 3)]
    found = b.op("Concat", *parts, axis=integer(node, "axis"))
    return [_quantised(b, found, taken(node, 0), given(node, 1), taken(node, 2))]


@rule("com.microsoft::QLinearWhere", variants=f"all, {_STEP}")
def _where(b: Builder, node: ir.Node) -> list[ir.Value | None]:
    found = b.op("Where", taken(node, 0), _dequantised(b, node, 1), _dequantised(b, node, 4))
    return [_quantised(b, found, taken(node, 7), given(node, 8), taken(node, 1))]


@rule("com.microsoft::QLinearReduceMean", variants=f"all, {_STEP}", checked=SCHEMA)
def _mean(b: Builder, node: ir.Node) -> list[ir.Value | None]:
    axes = b.integers(list(node.attributes["axes"].as_ints())) if "axes" in node.attributes else None
    found = b.op("ReduceMean", _dequantised(b, node, 0), axes, keepdims=integer(node, "keepdims", 1))
    return [_quantised(b, found, taken(node, 3), given(node, 4), taken(node, 0))]


@rule("com.microsoft::QLinearGlobalAveragePool", variants=f"channels first, {_STEP}")
def _pool(b: Builder, node: ir.Node) -> list[ir.Value | None]:
    refuse(node, "channels on the last axis", bool(integer(node, "channels_last")))
    found = b.op("GlobalAveragePool", _dequantised(b, node, 0))
    return [_quantised(b, found, taken(node, 3), given(node, 4), taken(node, 0))]


@rule("QLinearConv", variants=f"one scale, or one for each channel of the output, bias, {_STEP}")
def _conv(b: Builder, node: ir.Node) -> list[ir.Value | None]:
    bias = _bias(b, node, 8)
    found = b.op("Conv", _dequantised(b, node, 0), _dequantised(b, node, 3, 0), bias, **window(node))
    return [_quantised(b, found, taken(node, 6), given(node, 7), taken(node, 0))]


def _bias(b: Builder, node: ir.Node, place: int) -> ir.Value | None:
    """A bias of integers as numbers: times the scale of the weights and that of the activation. None for no bias."""
    bias, scale = given(node, place), taken(node, 4)
    if bias is None:
        return None
    sizes = sizes_of(scale)
    several = sizes not in ((), (1,))
    if several and (sizes is None or len(sizes) != 1):
        raise Kept(f"is left as it is where the number of scales {scale.name!r} is not known.")
    # So written, a bias is read as a weight: its scale is an initializer, and the other one a number.
    numbers = (
        b.op("DequantizeLinear", bias, scale, axis=0) if several else b.op("DequantizeLinear", bias, _single(b, scale))
    )
    return b.op("Mul", numbers, _single(b, taken(node, 1)))


def _scaled(b: Builder, numbers: ir.Value, factors: Sequence[ir.Value]) -> ir.Value:
    """Sums of integer products as numbers: times the scales of both sides."""
    first, second = factors
    return b.op("Mul", b.cast(numbers, ir.DataType.FLOAT), b.op("Mul", first, second))


@rule("com.microsoft::QGemm", variants=f"one scale or one for each column, bias, alpha, float output, {_STEP}")
def _gemm(b: Builder, node: ir.Node) -> list[ir.Value | None]:
    alpha, transposed = real(node, "alpha", 1.0), integer(node, "transB")
    sides = _dequantised(b, node, 0), _dequantised(b, node, 3, 0 if transposed else 1)
    bias = _bias(b, node, 6)
    # The bias has alpha inside it, as the product has.
    found = b.op("Gemm", *sides, bias, alpha=alpha, beta=alpha, transA=integer(node, "transA"), transB=transposed)
    scale = given(node, 7)
    return [found if scale is None else _quantised(b, found, scale, given(node, 8), taken(node, 0))]


# Integer products with float results: the form that dynamic quantisation writes


def _integer_product(
    b: Builder, sides: Sequence[ir.Value], scales: Sequence[ir.Value], zeros: Sequence[ir.Value | None]
) -> ir.Value:
    """A product of integers as numbers."""
    return _scaled(b, b.op("MatMulInteger", *sides, *zeros), scales)


@rule("com.microsoft::MatMulIntegerToFloat", variants="one scale or one for each column, zero points, bias")
def _to_float(b: Builder, node: ir.Node) -> list[ir.Value | None]:
    sides, scales = [taken(node, 0), taken(node, 1)], [taken(node, 2), taken(node, 3)]
    found = _integer_product(b, sides, scales, [given(node, 4), given(node, 5)])
    bias = given(node, 6)
    return [found if bias is None else b.op("Add", found, bias)]


@rule("com.microsoft::DynamicQuantizeMatMul", variants="one scale or one for each column, zero points, bias")
def _dynamic(b: Builder, node: ir.Node) -> list[ir.Value | None]:
    integers, scale, zero = b.several("DynamicQuantizeLinear", 3, taken(node, 0))
    sides, scales = [integers, taken(node, 1)], [scale, taken(node, 2)]
    found = _integer_product(b, sides, scales, [zero, given(node, 3)])
    bias = given(node, 4)
    return [found if bias is None else b.op("Add", found, bias)]


@rule(
    "com.microsoft::QAttention",
    variants="one scale or one for each column, zero points, masks as Attention, unidirectional, past and present",
)
def _attention(b: Builder, node: ir.Node) -> list[ir.Value | None]:
    sides, scales = [taken(node, 0), taken(node, 1)], [taken(node, 3), taken(node, 4)]
    projected = _integer_product(b, sides, scales, [given(node, 6), given(node, 7)])
    return attended(b, node, b.op("Add", projected, taken(node, 2)), given(node, 5), given(node, 8), None)
