"""The element types and sizes of values where a file does not say them: what each operator makes of those of its inputs.

Only what decides how an operator is expanded is followed: types, ranks, and sizes that are numbers or names. Nothing is
allocated by what a file says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import onnx
import onnx_ir as ir

Size = int | str | None
"""A size: a number, the name of one that a run decides, or not known."""
Sizes = tuple[Size, ...]

MICROSOFT = "com.microsoft"
_BROADCASTING = """
    Add And BitShift BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min Mod Mul
    Or Pow Sub Sum Where Xor PRelu
"""
_KEEPING = """
    Abs Acos Asin Atan Cast CastLike Ceil Celu Clip Cos Cosh CumSum DequantizeLinear Dropout Elu Erf Exp Floor Gelu
    HardSigmoid HardSwish Hardmax Identity IsInf IsNaN LayerNormalization LeakyRelu Log LogSoftmax LpNormalization Mish Neg Not
    QuantizeLinear RMSNormalization Reciprocal Relu RotaryEmbedding Round ScatterElements ScatterND Selu Sigmoid Sign Sin Sinh
    Softmax Softplus Softsign Sqrt Tan Tanh ThresholdedRelu Trilu BatchNormalization InstanceNormalization
    GroupNormalization Swish
"""
_BROADCAST, _SAME = frozenset(_BROADCASTING.split()), frozenset(_KEEPING.split())
# Operators of com.microsoft whose results are integers: the inputs whose type they have, the first that is there.
_INTEGERS = {"QuantizeLinear": (2,), "QGemm": (8,), "QLinearConcat": (1, 2), "QLinearWhere": (1,), "QLinear": (0,)}
_ALL_ALIKE = ("Attention", "MultiHeadAttention", "GroupQueryAttention", "QAttention")
_REDUCE = "Reduce"


def dtype_of(value: ir.Value | None) -> ir.DataType | None:
    """The element type of a value; None if not known."""
    if value is None:
        return None
    if value.type is not None:
        return value.type.dtype
    return None if value.const_value is None else value.const_value.dtype


def sizes_of(value: ir.Value | None) -> Sizes | None:
    """The sizes of a value; None if not even their number is known."""
    if value is None:
        return None
    shape = value.shape
    if shape is None and value.const_value is not None:
        shape = ir.Shape(value.const_value.shape.numpy())
    if shape is None:
        return None
    return tuple(size if isinstance(size, int) else size.value for size in shape)


def rank_of(value: ir.Value | None) -> int | None:
    """How many axes a value has; None if not known."""
    sizes = sizes_of(value)
    return None if sizes is None else len(sizes)


def last_size(value: ir.Value | None) -> int | None:
    """The size of a value's last axis; None where only a run knows it."""
    sizes = sizes_of(value)
    return sizes[-1] if sizes and isinstance(sizes[-1], int) else None


def numbers_of(value: ir.Value | None) -> list[int] | None:
    """The content of a small integer constant; None for anything else."""
    tensor = None if value is None else constant_of(value)
    if tensor is None or tensor.dtype not in (ir.DataType.INT64, ir.DataType.INT32) or tensor.size > 64:
        return None
    return [int(number) for number in tensor.numpy().reshape(-1)]


def constant_of(value: ir.Value) -> ir.TensorProtocol | None:
    """The content of an initializer that no run may replace, or of a Constant node."""
    if value.const_value is not None and not value.is_graph_input():
        return value.const_value
    node = value.producer()
    if node is None or node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
        return None
    attributes = node.attributes
    if "value" in attributes:
        return cast(
            "ir.TensorProtocol", attributes["value"].value
        )  # as_tensor asks whether it is one, which takes long
    if "value_int" in attributes:
        return ir.tensor(attributes["value_int"].as_int(), ir.DataType.INT64)
    if "value_ints" in attributes:
        return ir.tensor(list(attributes["value_ints"].as_ints()), ir.DataType.INT64)
    if "value_float" in attributes:
        return ir.tensor(attributes["value_float"].as_float(), ir.DataType.FLOAT)
    if "value_floats" in attributes:
        return ir.tensor(list(attributes["value_floats"].as_floats()), ir.DataType.FLOAT)
    return None


def fill(node: ir.Node, opset: int) -> None:
    """Gives the outputs of a node their types and sizes, where they have none and those of its inputs decide.

    Args:
        node: A node whose inputs were filled.
        opset: The version of standard operators.
    """
    for place, output in enumerate(node.outputs):
        if output.type is None:
            dtype = _dtype(node, place, opset)
            output.type = None if dtype is None else ir.TensorType(dtype)
        if output.shape is None:
            sizes = _sizes(node, place)
            output.shape = None if sizes is None else ir.Shape(sizes)


# Types


def _dtype(node: ir.Node, place: int, opset: int) -> ir.DataType | None:
    attributes, kind = node.attributes, node.op_type
    if node.domain == MICROSOFT:
        return _microsoft(node, place)
    if node.domain not in ("", "ai.onnx"):
        return None
    if kind == "Cast":
        return ir.DataType(attributes["to"].as_int())
    if kind == "Constant":
        tensor = constant_of(node.outputs[0])
        return None if tensor is None else tensor.dtype
    if kind == "ConstantOfShape":
        return attributes["value"].as_tensor().dtype if "value" in attributes else ir.DataType.FLOAT
    stated = next((attributes[name].as_int() for name in ("dtype", "output_dtype") if name in attributes), 0)
    if stated:
        return ir.DataType(stated)
    try:
        schema = onnx.defs.get_schema(kind, opset, "")
    except onnx.defs.SchemaError:
        return dtype_of(node.inputs[0]) if kind == "SimplifiedLayerNormalization" else None
    said = schema.outputs[min(place, len(schema.outputs) - 1)].type_str
    for index, value in enumerate(node.inputs):
        if value is not None and schema.inputs[min(index, len(schema.inputs) - 1)].type_str == said:
            return dtype_of(value)
    allowed = next((c.allowed_type_strs for c in schema.type_constraints if c.type_param_str == said), [said])
    plain = said if said.startswith("tensor(") else allowed[0]
    if len(allowed) == 1 and plain.startswith("tensor("):
        return _by_name(plain[len("tensor(") : -1])
    return ir.DataType.UINT8 if kind == "QuantizeLinear" else None


def _microsoft(node: ir.Node, place: int) -> ir.DataType | None:
    """The type of an output of ONNX Runtime's own operators: integers as said above, else that of the first numbers."""
    integers = _INTEGERS.get(node.op_type, _INTEGERS["QLinear"] if node.op_type.startswith("QLinear") else ())
    known = [dtype_of(node.inputs[index]) for index in integers if index < len(node.inputs)]
    if place == 0 and integers and any(known):
        return next(dtype for dtype in known if dtype is not None)
    if place > 0 and not node.op_type.endswith(_ALL_ALIKE):
        return None
    if integers and node.op_type != "QGemm":
        return None
    floating = (dtype for dtype in map(dtype_of, node.inputs) if dtype is not None and dtype.is_floating_point())
    return next(floating, None)


def _by_name(name: str) -> ir.DataType | None:
    return {
        "bool": ir.DataType.BOOL,
        "int64": ir.DataType.INT64,
        "int32": ir.DataType.INT32,
        "uint8": ir.DataType.UINT8,
        "float": ir.DataType.FLOAT,
    }.get(name)


# Sizes


def _sizes(node: ir.Node, place: int) -> Sizes | None:
    kind = node.op_type
    inputs = [sizes_of(value) for value in node.inputs]
    first = inputs[0] if inputs else None
    if node.domain == MICROSOFT and kind in (
        "MatMulNBits",
        "FusedMatMul",
        "MatMulIntegerToFloat",
        "DynamicQuantizeMatMul",
    ):
        width = node.attributes["N"].as_int() if "N" in node.attributes else None
        return None if first is None or kind == "FusedMatMul" else (*first[:-1], width)
    if node.domain == MICROSOFT and kind == "GatherBlockQuantized" and inputs[1] is not None:
        return (*inputs[1], None)
    if node.domain not in ("", "ai.onnx"):
        return None
    if kind in _BROADCAST:
        return _broadcast(inputs)
    if kind in _SAME or kind == "SimplifiedLayerNormalization":
        return first if place == 0 else None
    if kind == "MatMul" or kind == "MatMulInteger":
        return _product(first, inputs[1])
    if kind == "Gemm" and first is not None and inputs[1] is not None:
        rows = first[1 if _flag(node, "transA") else 0]
        return (rows, inputs[1][0 if _flag(node, "transB") else 1])
    if kind == "Shape":
        start = node.attributes["start"].as_int() if "start" in node.attributes else 0
        end = node.attributes["end"].as_int() if "end" in node.attributes else None
        return (None,) if first is None else (len(first[start:end]),)
    if kind == "Transpose" and first is not None:
        order = node.attributes["perm"].as_ints() if "perm" in node.attributes else range(len(first))[::-1]
        return tuple(first[axis] for axis in order)
    if kind == "Constant":
        tensor = constant_of(node.outputs[0])
        return None if tensor is None else tuple(int(size) for size in tensor.shape.numpy())
    if kind == "Range":
        return (None,)
    if kind == "DynamicQuantizeLinear":
        return first if place == 0 else ()
    if kind in ("Conv", "GlobalAveragePool", "MaxPool", "AveragePool"):
        return None if first is None else (first[0], *(None,) * (len(first) - 1))
    if kind in ("Reshape", "Expand", "ConstantOfShape"):
        return _shaped(node, first)
    if kind in ("Unsqueeze", "Squeeze"):
        return _squeezed(node, first)
    if kind.startswith(_REDUCE):
        return _reduced(node, first)
    if kind == "GatherND":
        return _picked(node, first, inputs[1])
    if kind in ("Gather", "GatherElements"):
        return _gathered(node, first, inputs[1])
    if kind in ("Concat", "Split", "Slice", "Pad", "Tile"):
        return _along(node, place, inputs)
    if kind == "Flatten":
        return (None, None)
    return None


def _flag(node: ir.Node, name: str) -> bool:
    return name in node.attributes and node.attributes[name].as_int() != 0


def _broadcast(all_sizes: Sequence[Sizes | None]) -> Sizes | None:
    known = [sizes for sizes in all_sizes if sizes is not None]
    if len(known) != len(all_sizes):
        return None
    rank = max(len(sizes) for sizes in known)
    columns = zip(*((1,) * (rank - len(sizes)) + sizes for sizes in known), strict=True)
    return tuple(_wider(column) for column in columns)


def _wider(column: Sequence[Size]) -> Size:
    others = {size for size in column if size != 1}
    if not others:
        return 1
    numbers = [size for size in others if isinstance(size, int)]
    return numbers[0] if numbers else others.pop() if len(others) == 1 else None


def _product(left: Sizes | None, right: Sizes | None) -> Sizes | None:
    if left is None or right is None or len(left) < 2 or len(right) < 2:
        return None
    batch = _broadcast([left[:-2], right[:-2]])
    return None if batch is None else (*batch, left[-2], right[-1])


def _shaped(node: ir.Node, first: Sizes | None) -> Sizes | None:
    """The sizes that an input says: of a reshape, an expansion or a constant."""
    said = node.inputs[1] if node.op_type != "ConstantOfShape" else node.inputs[0]
    wanted = numbers_of(said)
    if wanted is None:
        count = sizes_of(said)
        if count is None or not isinstance(count[0], int):
            return None
        return (None,) * max(count[0], len(first or ()) if node.op_type == "Expand" else 0)
    if node.op_type == "ConstantOfShape":
        return tuple(wanted)
    if node.op_type == "Expand":
        return None if first is None else _broadcast([first, tuple(wanted)])
    if first is None:
        return tuple(size if size > 0 else None for size in wanted)
    found: list[Size] = [
        (first[axis] if axis < len(first) else None) if size == 0 else size for axis, size in enumerate(wanted)
    ]
    if -1 in wanted:
        copied = {axis for axis, size in enumerate(wanted) if size == 0}
        left = [size for axis, size in enumerate(first) if axis not in copied]
        others = [size for size in wanted if size > 0]
        whole = all(isinstance(size, int) for size in left)
        total = math.prod(size for size in left if isinstance(size, int))
        found[wanted.index(-1)] = total // math.prod(others) if whole and all(others) else None
    return tuple(found)


def _axes(node: ir.Node) -> list[int] | None:
    if "axes" in node.attributes:
        return list(node.attributes["axes"].as_ints())
    return numbers_of(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else []


def _squeezed(node: ir.Node, first: Sizes | None) -> Sizes | None:
    axes = _axes(node)
    if first is None or axes is None:
        return None
    if node.op_type == "Unsqueeze":
        rank = len(first) + len(axes)
        new, rest = {axis % rank for axis in axes}, iter(first)
        return tuple(1 if axis in new else next(rest) for axis in range(rank))
    gone = {axis % len(first) for axis in axes} if axes else {i for i, size in enumerate(first) if size == 1}
    if not axes and any(not isinstance(size, int) for size in first) and len(first) > 1:
        return None
    return tuple(size for axis, size in enumerate(first) if axis not in (gone or set(range(len(first)))))


def _reduced(node: ir.Node, first: Sizes | None) -> Sizes | None:
    axes = _axes(node)
    if first is None or axes is None:
        return None
    gone = {axis % len(first) for axis in axes} or set(range(len(first)))
    if "keepdims" not in node.attributes or node.attributes["keepdims"].as_int():
        return tuple(1 if axis in gone else size for axis, size in enumerate(first))
    return tuple(size for axis, size in enumerate(first) if axis not in gone)


def _gathered(node: ir.Node, data: Sizes | None, places: Sizes | None) -> Sizes | None:
    if data is None or places is None:
        return None
    if node.op_type == "GatherElements":
        return places
    axis = (node.attributes["axis"].as_int() if "axis" in node.attributes else 0) % len(data)
    return (*data[:axis], *places, *data[axis + 1 :])


def _picked(node: ir.Node, data: Sizes | None, places: Sizes | None) -> Sizes | None:
    if data is None or places is None or not isinstance(places[-1], int):
        return None
    batch = node.attributes["batch_dims"].as_int() if "batch_dims" in node.attributes else 0
    return (*places[:-1], *data[batch + places[-1] :])


def _along(node: ir.Node, place: int, inputs: Sequence[Sizes | None]) -> Sizes | None:
    """The sizes where one axis is joined or cut; of cuts that are not followed only the number of axes."""
    first = next((sizes for sizes in inputs if sizes is not None), None) if node.op_type == "Concat" else inputs[0]
    if first is None:
        return None
    if node.op_type not in ("Concat", "Split"):
        return (None,) * len(first)
    axis = (node.attributes["axis"].as_int() if "axis" in node.attributes else 0) % len(first)
    size: Size = None
    if node.op_type == "Concat":
        parts = [sizes[axis] if sizes is not None else None for sizes in inputs]
        size = sum(part for part in parts if isinstance(part, int)) if all(isinstance(p, int) for p in parts) else None
    else:
        cut = numbers_of(node.inputs[1]) if len(node.inputs) > 1 else None
        if "split" in node.attributes:
            cut = list(node.attributes["split"].as_ints())
        whole = first[axis]
        if cut is not None:
            size = cut[place]
        elif isinstance(whole, int) and whole % len(node.outputs) == 0:
            size = whole // len(node.outputs)
    return (*first[:axis], size, *first[axis + 1 :])
