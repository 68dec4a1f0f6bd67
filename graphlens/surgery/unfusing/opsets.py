"""Raising a graph to a newer version of the standard operators: where an operator changed, how its old form is written anew.

ONNX's own converter gives up on files with operators of other domains, which is what optimised files have.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir

from graphlens.errors import ModelFileError
from graphlens.surgery.unfusing.building import Builder, Workshop, given, integer, real, taken, wanted
from graphlens.surgery.unfusing.filling import fill
from graphlens.surgery.unfusing.kinds import rank_of
from graphlens.surgery.unfusing.placing import install

LEAST = 20
_OLDEST = 7  # before it, operators broadcast by attributes
_IR_VERSION = 9  # the least that may hold opset 20

# Whose later versions take more types, or have further attributes and inputs that may be left out, and else mean the same.
_MEANS_THE_SAME = """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BitShift Cast CastLike Ceil Compress Concat
    Constant ConstantOfShape Conv Cos Cosh CumSum DepthToSpace DequantizeLinear Det Div Einsum Elu Equal Erf Exp Expand EyeLike
    Flatten Floor Gather GatherElements GatherND Gemm GlobalAveragePool GlobalMaxPool Greater GreaterOrEqual GRU HardSigmoid
    HardSwish Identity If InstanceNormalization IsInf IsNaN LayerNormalization LeakyRelu Less LessOrEqual Log Loop LSTM LRN
    MatMul MatMulInteger Max MaxPool Mean MeanVarianceNormalization Min Mod Mul Neg NonMaxSuppression NonZero Not OneHot Or PRelu
    Pow QuantizeLinear Range Reciprocal Relu Reshape ReverseSequence RNN Round ScatterElements ScatterND Selu Shape Shrink
    Sigmoid Sign Sin Sinh Size Softplus Softsign SpaceToDepth Sqrt Sub Sum Tan Tanh Tile Transpose Trilu Unique Where Xor
    DynamicQuantizeLinear QLinearConv QLinearMatMul ConvInteger Bernoulli RandomNormal RandomUniform RandomNormalLike
    RandomUniformLike Multinomial Celu ThresholdedRelu Mish Optional OptionalHasElement OptionalGetElement SequenceAt
    SequenceConstruct SequenceEmpty SequenceErase SequenceInsert SequenceLength SplitToSequence ConcatFromSequence
    GlobalLpPool LpNormalization
"""
_SAME = frozenset(_MEANS_THE_SAME.split())
Change = Callable[[Builder, ir.Node, int], list[ir.Value | None]]
"""Makes what takes the place of a node's outputs, from the node and the opset that it was written for."""
_CHANGES: dict[str, tuple[int, Change]] = {}


def _until(version: int, *operators: str) -> Callable[[Change], Change]:
    """Makes a function rewrite operators of opsets before a version."""

    def add(function: Change) -> Change:
        _CHANGES.update(dict.fromkeys(operators, (version, function)))
        return function

    return add


def raised(model: ir.Model, shop: Workshop) -> None:
    """Raises a model to opset 20 in place; a model of that opset or a later one stays as it is.

    Args:
        model: The model.
        shop: What the rules of its graph share.

    Raises:
        ModelFileError: An operator means something else in opset 20 and has no rule here.
    """
    version = model.opset_imports.get("", LEAST)
    if version >= LEAST:
        return
    if version < _OLDEST:
        raise ModelFileError(
            f"the file is of opset {version}, in which operators broadcast by attributes: graphlens reads opset {_OLDEST} and "
            "later. Convert it first: onnx.version_converter.convert_version(model, 17)."
        )
    for node in list(model.graph.all_nodes()):
        if node.domain not in ("", "ai.onnx") or _unchanged(node, version):
            fill(node, version)
            continue
        before, change = _CHANGES.get(node.op_type, (0, None))
        if change is None or version >= before:
            if node.op_type in _SAME or change is not None:
                fill(node, version)
                continue
            raise ModelFileError(
                f"{node.op_type} ({node.name!r}) of opset {version} means something else in opset {LEAST}, and graphlens "
                "does not know how to write it anew. Export the model with opset 18 or later."
            )
        builder = Builder(node, shop)
        install(node, builder, change(builder, node, version))
    model.opset_imports[""] = LEAST
    model.ir_version = max(model.ir_version, _IR_VERSION)


def rewritten() -> list[str]:
    """The names of the operators that are rewritten where their opset is an old one."""
    return sorted(_CHANGES)


def _unchanged(node: ir.Node, version: int) -> bool:
    """True if an operator did not change from one opset to the one that files are raised to."""
    try:
        then = onnx.defs.get_schema(node.op_type, version, "").since_version
        now = onnx.defs.get_schema(node.op_type, LEAST, "").since_version
    except onnx.defs.SchemaError:
        return _is_extra(node.op_type)
    return then == now


def _is_extra(operator: str) -> bool:
    """True for operators of ONNX Runtime that stand in ONNX's own domain."""
    return operator in ("SimplifiedLayerNormalization", "LayerNormalization")


# Changes of attributes into inputs


@_until(13, "ReduceSum")
@_until(
    18, "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd"
)
@_until(18, "ReduceSumSquare")
def _reduce(b: Builder, node: ir.Node, version: int) -> list[ir.Value | None]:
    axes = b.integers(list(node.attributes["axes"].as_ints())) if "axes" in node.attributes else None
    return [b.op(node.op_type, taken(node, 0), axes, keepdims=integer(node, "keepdims", 1))]


@_until(13, "Squeeze", "Unsqueeze")
def _squeeze(b: Builder, node: ir.Node, version: int) -> list[ir.Value | None]:
    axes = b.integers(list(node.attributes["axes"].as_ints())) if "axes" in node.attributes else None
    return [b.op(node.op_type, taken(node, 0), axes)]


@_until(18, "Split")
def _split(b: Builder, node: ir.Node, version: int) -> list[ir.Value | None]:
    axis, count, sizes = integer(node, "axis"), len(node.outputs), given(node, 1)
    if "split" in node.attributes:
        sizes = b.integers(list(node.attributes["split"].as_ints()))
    if sizes is not None:
        return list(b.several("Split", count, taken(node, 0), sizes, axis=axis))
    return list(b.several("Split", count, taken(node, 0), axis=axis, num_outputs=count))


@_until(11, "Clip")
def _clip(b: Builder, node: ir.Node, version: int) -> list[ir.Value | None]:
    x = taken(node, 0)
    least, most = (b.number(real(node, name), x) if name in node.attributes else None for name in ("min", "max"))
    return [b.op("Clip", x, least, most)]


@_until(12, "Dropout")
def _dropout(b: Builder, node: ir.Node, version: int) -> list[ir.Value | None]:
    x = taken(node, 0)
    if not wanted(node, 1):
        return [b.op("Identity", x), None]
    everything = b.op("Expand", b.constant(np.asarray(True)), b.op("Shape", x))
    return [b.op("Identity", x), everything if version >= 10 else b.cast(everything, b.dtype(x))]


@_until(11, "Pad")
def _pad(b: Builder, node: ir.Node, version: int) -> list[ir.Value | None]:
    x, pads = taken(node, 0), b.integers(list(node.attributes["pads"].as_ints()))
    mode = node.attributes["mode"].as_string() if "mode" in node.attributes else "constant"
    return [b.op("Pad", x, pads, b.number(real(node, "value"), x) if mode == "constant" else None, mode=mode)]


@_until(10, "Slice")
def _slice(b: Builder, node: ir.Node, version: int) -> list[ir.Value | None]:
    starts, ends = (list(node.attributes[name].as_ints()) for name in ("starts", "ends"))
    axes = list(node.attributes["axes"].as_ints()) if "axes" in node.attributes else list(range(len(starts)))
    return [b.op("Slice", taken(node, 0), *(b.integers(numbers) for numbers in (starts, ends, axes)))]


@_until(10, "TopK")
def _top_k(b: Builder, node: ir.Node, version: int) -> list[ir.Value | None]:
    count = b.integers([integer(node, "k")])
    return list(b.several("TopK", 2, taken(node, 0), count, axis=integer(node, "axis", -1)))


# Changes of meaning


@_until(13, "Softmax", "LogSoftmax", "Hardmax")
def _softmax(b: Builder, node: ir.Node, version: int) -> list[ir.Value | None]:
    """Over all axes from one on, taken as one; the same as over the last axis where that is the one."""
    x, axis = taken(node, 0), integer(node, "axis", 1)
    rank = rank_of(x)
    if axis == -1 or (rank is not None and axis % rank == rank - 1):
        return [b.op(node.op_type, x, axis=-1)]
    if rank is not None and axis < 0:
        axis %= rank
    flat = b.op("Flatten", x, axis=axis)
    return [b.op("Reshape", b.op(node.op_type, flat, axis=-1), b.op("Shape", x))]


@_until(10, "Upsample")
@_until(11, "Resize")
def _resize(b: Builder, node: ir.Node, version: int) -> list[ir.Value | None]:
    x, scales = taken(node, 0), given(node, 1)
    if "scales" in node.attributes:
        scales = b.constant(np.asarray(node.attributes["scales"].as_floats(), np.float32))
    mode = node.attributes["mode"].as_string() if "mode" in node.attributes else "nearest"
    said = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    return [b.op("Resize", x, None, scales, mode="linear" if mode == "bilinear" else mode, **said)]


@_until(11, "Scatter")
def _scatter(b: Builder, node: ir.Node, version: int) -> list[ir.Value | None]:
    return [b.op("ScatterElements", *(taken(node, place) for place in range(3)), axis=integer(node, "axis"))]


@_until(14, "BatchNormalization")
def _batch(b: Builder, node: ir.Node, version: int) -> list[ir.Value | None]:
    if len(node.outputs) > 1 or integer(node, "spatial", 1) != 1:
        raise ModelFileError(
            f"BatchNormalization ({node.name!r}) of opset {version} is in a form for training. Export the model for inference."
        )
    inputs = [taken(node, place) for place in range(5)]
    return [b.op("BatchNormalization", *inputs, epsilon=real(node, "epsilon", 1e-5))]


@_until(20, "GridSample")
def _grid(b: Builder, node: ir.Node, version: int) -> list[ir.Value | None]:
    names = {"bilinear": "linear", "bicubic": "cubic"}
    mode = node.attributes["mode"].as_string() if "mode" in node.attributes else "bilinear"
    padding = node.attributes["padding_mode"].as_string() if "padding_mode" in node.attributes else "zeros"
    inputs, corners = (taken(node, 0), taken(node, 1)), integer(node, "align_corners")
    return [b.op("GridSample", *inputs, mode=names.get(mode, mode), padding_mode=padding, align_corners=corners)]
