"""How a graph is quantised, told from its operators: dynamic int8, int4 in blocks, QDQ, QOperator, half precision."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

# What takes the scale of a tensor's numbers from all of them, while it runs.
ROUNDING_TOGETHER = frozenset({"DynamicQuantizeLinear", "DynamicQuantizeLSTM", "DynamicQuantizeMatMul"})
_SHOWN = 3  # products that stay in floating point and are named
_PRODUCTS = frozenset({"Conv", "FusedMatMul", "Gemm", "MatMul"})
_FOLLOWED = frozenset({"Cast", "DequantizeLinear", "Identity", "Reshape", "Squeeze", "Transpose"})
_HALF = {ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16"}
_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.DOUBLE, *_HALF})
_WEIGHT_SCALE = {
    "DynamicQuantizeMatMul": 2,
    "MatMulIntegerToFloat": 3,
    "QGemm": 4,
    "QLinearConv": 4,
    "QLinearMatMul": 4,
}
_WEIGHT_ZERO = {"ConvInteger": 3, "MatMulInteger": 3}
_QOPERATORS = ("QLinear", "QGemm", "QAttention", "QOrdered", "QMoE")


@dataclass(frozen=True)
class Quantisation:
    """How the matrix products of a graph are quantised.

    Attributes:
        kinds: A sentence for each way, "dynamic int8, one scale a channel: 21 products (MatMulInteger)"; none for a float file.
        floats: The names of the products by a weight that stay in floating point.
    """

    kinds: tuple[str, ...]
    floats: tuple[str, ...]

    def lines(self) -> list[str]:
        """The same in lines for people: those products are named where there are few and others are quantised."""
        if not self.floats or all(kind.split()[0] in _HALF.values() for kind in self.kinds):
            return list(self.kinds)
        named = ", ".join(self.floats[:_SHOWN]) + (", ..." if len(self.floats) > _SHOWN else "")
        count = len(self.floats)
        return [*self.kinds, f"{count:,} product{'s' if count > 1 else ''} in floating point: {named}"]


def quantisation(model: ir.Model) -> Quantisation:
    """How a model is quantised.

    Args:
        model: Any model; its weights are not read.
    """
    ways: dict[str, Counter[str]] = defaultdict(Counter)
    floats: list[str] = []
    rounded = 0
    for node in model.graph:
        kind = _way(node)
        if kind is not None:
            ways[kind][node.op_type] += 1
        elif node.op_type in _PRODUCTS and (way := _of_weight(node)) is not None:
            if way:
                ways[way][node.op_type] += 1
            else:
                floats.append(str(node.name or node.op_type))
        rounded += node.op_type == "QuantizeLinear"
    kinds = [_sentence(way, counts) for way, counts in ways.items()]
    if rounded:
        kinds.append(f"QDQ: {rounded:,} activations are rounded (QuantizeLinear and DequantizeLinear)")
    kinds += _halves(model)
    return Quantisation(tuple(kinds), tuple(floats))


def _sentence(way: str, counts: Mapping[str, int]) -> str:
    total = sum(counts.values())
    return f"{way}: {total:,} product{'s' if total > 1 else ''} ({', '.join(counts)})"


def _way(node: ir.Node) -> str | None:
    """How a quantised product is quantised; None for any other node."""
    operator = node.op_type
    if operator in ("MatMulNBits", "MatMulBnb4", "GatherBlockQuantized"):
        bits, block = _integer(node, "bits", 4), _integer(node, "block_size", 0)
        zero = len(node.inputs) > 3 and node.inputs[3] is not None
        points = "zero points" if zero else "symmetric"
        return f"int{bits} weights in blocks of {block}, {points}"
    if operator in ("MatMulInteger", "ConvInteger", "DynamicQuantizeMatMul"):
        weight = node.inputs[1] if len(node.inputs) > 1 else None
        if weight is None or not _is_constant(weight):
            return "int8, of two activations"
        place = _WEIGHT_SCALE.get(operator, _WEIGHT_ZERO.get(operator, 3))
        return f"dynamic {_dtype(weight)}, {_scales(node, place)}"
    if operator == "MatMulIntegerToFloat" or operator.startswith(_QOPERATORS):
        scales = f", {_scales(node, _WEIGHT_SCALE[operator])}" if operator in _WEIGHT_SCALE else ""
        return f"{'QOperator' if operator.startswith(_QOPERATORS) else 'dynamic'} int8{scales}"
    return None


def _of_weight(node: ir.Node) -> str | None:
    """How the weight of a float product is stored: "" for plain numbers, None for a product of two activations."""
    if len(node.inputs) < 2 or node.inputs[1] is None:
        return None
    value: ir.Value = node.inputs[1]
    for _ in range(6):
        maker = value.producer()
        if maker is not None and maker.op_type == "Mul":
            for index in (0, 1):
                integers = _cast_integers(maker.inputs[index])
                if integers is not None:
                    return f"{_dtype(integers)} weights, {_scales(maker, 1 - index)}"
        if maker is None or maker.op_type not in _FOLLOWED or not maker.inputs or maker.inputs[0] is None:
            break
        source = maker.inputs[0]
        if maker.op_type == "DequantizeLinear":
            origin = source.producer()
            if (
                origin is not None
                and origin.op_type == "QuantizeLinear"
                and origin.inputs
                and origin.inputs[0] is not None
            ):
                source = origin.inputs[0]  # a weight that is rounded again in each run
            if not _is_constant(source):
                return None
            block = _integer(maker, "block_size", 0)
            scales = f"in blocks of {block}" if block else _scales(maker, 1)
            return f"{_dtype(maker.inputs[0])} weights, {scales}"
        value = source
    return "" if _is_constant(value) else None


def _cast_integers(value: ir.Value | None) -> ir.Value | None:
    """The stored integers that a value is a Cast of, perhaps less a zero point; None for any other value."""
    maker, cast = None if value is None else value.producer(), False
    for _ in range(6):
        if maker is None or maker.op_type not in ("Cast", "Sub", "Transpose") or not maker.inputs:
            return None
        source = maker.inputs[0]
        cast = cast or maker.op_type == "Cast"
        if source is not None and _is_constant(source):
            whole = source.dtype is not None and source.dtype.is_integer()
            return source if cast and whole else None
        maker = None if source is None else source.producer()
    return None


def _is_constant(value: ir.Value) -> bool:
    """True for a weight: an initializer, or what a Constant gives."""
    maker = value.producer()
    return value.is_initializer() or (maker is not None and maker.op_type == "Constant")


def _dtype(value: ir.Value) -> str:
    """The dtype of a quantised tensor, in small letters; "int8" where it is not stated."""
    return "int8" if value.dtype is None else value.dtype.name.lower()


def _scales(node: ir.Node, place: int) -> str:
    """How many scales the weights of a node have, from its input of scales or of zero points."""
    given = node.inputs[place] if place < len(node.inputs) else None
    shape = None if given is None else given.shape
    if shape is None:
        return "one scale a tensor"
    sizes = [size for size in shape if isinstance(size, int)]
    return "one scale a channel" if int(np.prod(sizes, dtype=np.int64)) > 1 else "one scale a tensor"


def _integer(node: ir.Node, name: str, default: int) -> int:
    """An attribute that is an integer."""
    found = node.attributes.get(name)
    return found.as_int() if found is not None and found.type == ir.AttributeType.INT else default


def tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    """The constant tensors of the main graph: initializers, and what Constant nodes hold.

    Args:
        model: Any model.
    """
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            yield value.const_value
    for node in model.graph:
        if node.op_type == "Constant":
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.TENSOR:
                    yield attribute.as_tensor()


def _halves(model: ir.Model) -> list[str]:
    """What is stored in half precision, where that is most of the floating-point weights."""
    sizes: Counter[ir.DataType] = Counter()
    for tensor in tensors(model):
        if tensor.dtype in _FLOATS:
            sizes[tensor.dtype] += tensor.size
    most = max(sizes, key=lambda dtype: sizes[dtype], default=None)
    return [f"{_HALF[most]} weights"] if most in _HALF else []
