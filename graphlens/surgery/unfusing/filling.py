"""The element types and sizes of values where a file does not say them: what each operator makes of those of its inputs.

Only what decides how an operator is expanded is followed: types, ranks, and sizes that are numbers or names. Nothing is
allocated by what a file says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx
import onnx_ir as ir

from graphlens.surgery.unfusing.kinds import MICROSOFT, Size, Sizes, constant_of, dtype_of, numbers_of, sizes_of

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
    if kind == "Slice":
        return _cut(node, first)
    if kind in ("Concat", "Split", "Pad", "Tile"):
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
    """The size that several broadcast to: one that is not known is 1, or the same as the others."""
    numbers = [size for size in column if isinstance(size, int) and size != 1]
    names = {size for size in column if isinstance(size, str)}
    if numbers or (None not in column and not names):
        return numbers[0] if numbers else 1
    return names.pop() if len(names) == 1 else None


def _product(left: Sizes | None, right: Sizes | None) -> Sizes | None:
    if left is None or right is None or len(left) < 2 or len(right) < 2:
        return None
    batch = _broadcast([left[:-2], right[:-2]])
    return None if batch is None else (*batch, left[-2], right[-1])


def _shaped(node: ir.Node, first: Sizes | None) -> Sizes | None:
    """The sizes that an input says: of a reshape, an expansion or a constant."""
    wanted = content_of(node.inputs[1] if node.op_type != "ConstantOfShape" else node.inputs[0])
    if wanted is None:
        return None
    if node.op_type == "ConstantOfShape":
        return tuple(wanted)
    if node.op_type == "Expand":
        return None if first is None else _broadcast([first, tuple(wanted)])
    if first is None:
        return tuple(size if isinstance(size, str) or (size or 0) > 0 else None for size in wanted)
    found: list[Size] = [
        (first[axis] if axis < len(first) else None) if size == 0 else size for axis, size in enumerate(wanted)
    ]
    if -1 in wanted:
        copied = {axis for axis, size in enumerate(wanted) if size == 0}
        others = [size for size in wanted if size not in (0, -1)]
        found[wanted.index(-1)] = _left([size for axis, size in enumerate(first) if axis not in copied], others)
    return tuple(found)


def _left(sizes: list[Size], others: list[Size]) -> Size:
    """What is left of sizes when others are divided out of them; None where only a run knows it."""
    for name in [size for size in others if isinstance(size, str) and size in sizes]:
        sizes.remove(name)
        others.remove(name)
    above, below = ([size for size in some if isinstance(size, int)] for some in (sizes, others))
    if len(above) < len(sizes) or len(below) < len(others) or 0 in below:
        return None
    return math.prod(above) // math.prod(below)


_STEPS = 12  # how far back the content of a shape is followed


def content_of(value: ir.Value | None, steps: int = _STEPS) -> list[Size] | None:
    """The numbers of a vector that becomes a shape, as far as they are known; None if not even how many there are.

    Args:
        value: An int64 value with at most one axis.
        steps: How many nodes are looked back at.
    """
    numbers = numbers_of(value)
    if value is None or numbers is not None:
        return None if numbers is None else list(numbers)
    node, sizes = value.producer(), sizes_of(value)
    count = 1 if sizes == () else sizes[0] if sizes is not None and len(sizes) == 1 else None
    found = None if node is None or steps == 0 else _followed(node, steps - 1)
    if found is not None:
        return found
    return [None] * count if isinstance(count, int) and count < 64 else None


def _followed(node: ir.Node, steps: int) -> list[Size] | None:
    """What a node makes of the content of its inputs, for those nodes that shapes are made with."""
    kind, first = node.op_type, node.inputs[0] if node.inputs else None
    if kind == "Shape":
        sizes = sizes_of(first)
        start = node.attributes["start"].as_int() if "start" in node.attributes else 0
        end = node.attributes["end"].as_int() if "end" in node.attributes else None
        return None if sizes is None else list(sizes[start:end])
    if kind == "Concat":
        parts = [content_of(part, steps) for part in node.inputs]
        return None if None in parts else [size for part in parts if part is not None for size in part]
    if kind in ("Identity", "Cast", "Unsqueeze", "Squeeze", "Reshape"):
        return content_of(first, steps)
    if kind == "Gather":
        data, places = content_of(first, steps), numbers_of(node.inputs[1])
        if data is None or places is None or any(not -len(data) <= place < len(data) for place in places):
            return None
        return [data[place] for place in places]
    if kind == "Slice" and len(node.inputs) < 5:
        data, start_at, stop_at = content_of(first, steps), numbers_of(node.inputs[1]), numbers_of(node.inputs[2])
        return None if data is None or not start_at or not stop_at else data[start_at[0] : stop_at[0]]
    return None


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


def _cut(node: ir.Node, first: Sizes | None) -> Sizes | None:
    """The sizes of a slice; those of axes that are not cut stay."""
    if first is None:
        return None
    starts, ends, axes, steps = (
        [] if len(node.inputs) <= place else numbers_of(node.inputs[place]) for place in range(1, 5)
    )
    if "starts" in node.attributes:
        starts, ends = (list(node.attributes[name].as_ints()) for name in ("starts", "ends"))
        axes = list(node.attributes["axes"].as_ints()) if "axes" in node.attributes else []
    if axes is None:
        return (None,) * len(first)
    found = list(first)
    for place, axis in enumerate(axes or range(len(starts or first))):
        whole = first[axis]
        found[axis] = None
        if starts and ends and steps is not None and len(starts) == len(ends) == len(axes or starts):
            cut = slice(starts[place], ends[place], steps[place] if steps else 1)
            if isinstance(whole, int) and cut.step:
                found[axis] = len(range(*cut.indices(whole)))
            elif cut.start == 0 and cut.stop >= 2**31 - 1 and cut.step == 1:
                found[axis] = whole
    return tuple(found)


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
