"""What each operator makes of shapes, and of small numbers where those become shapes.

ONNX's own inference is not asked: to follow numbers that become shapes it holds as many of them as a shape says, and so
takes all memory over the very files that sizes.py is to find.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphlens.surgery.known import UNKNOWN, Call, Data, Known, Shape, Unfit, axis_of, broadcast, made

Rule = Callable[[Call], list[Known]]
RULES: dict[str, Rule] = {}


def rule(*operators: str) -> Callable[[Rule], Rule]:
    """Makes a function the rule of operators.

    Args:
        operators: Their names.
    """

    def register(found: Rule) -> Rule:
        RULES.update(dict.fromkeys(operators, found))
        return found

    return register


def outputs_of(call: Call) -> list[Known]:
    """What is known of a node's outputs. NumPy's warnings are to be off.

    Args:
        call: The node.
    """
    found: list[Known] = []
    if call.operator in RULES:
        try:
            found = RULES[call.operator](call)
        except (
            ValueError,
            TypeError,
            IndexError,
            KeyError,
            ArithmeticError,
        ):  # ONNX Runtime refuses such a node itself
            found = []
    return [*found, *[UNKNOWN] * call.outputs][: call.outputs]


# Of the same shape as the first input

_SAME = """
    Abs Acos Acosh Asin Asinh Atan Atanh BatchNormalization Bernoulli BitwiseNot CastLike Ceil Celu Clip Cos Cosh
    CumSum DequantizeLinear Dropout Elu Erf Exp EyeLike Floor Gelu GroupNormalization HardSigmoid HardSwish Hardmax
    InstanceNormalization LayerNormalization LeakyRelu Log LogSoftmax LpNormalization MeanVarianceNormalization Mish
    PRelu QuantizeLinear RMSNormalization RandomNormalLike RandomUniformLike Reciprocal Relu ReverseSequence
    RotaryEmbedding Round ScatterElements ScatterND Selu Shrink Sigmoid Sign Sin Sinh Softmax Softplus Softsign Sqrt
    Swish Tan Tanh TensorScatter ThresholdedRelu Trilu
"""
for _name in _SAME.split():
    RULES[_name] = lambda call: made(call.shape(), max(4, call.width()))


@rule("Identity", "Neg", "Not", "IsNaN", "IsInf")
def _same(call: Call) -> list[Known]:
    works: Mapping[str, Callable[..., Data]] = {"Identity": np.array, "Neg": np.negative}
    work = works.get(call.operator)
    width = 1 if call.operator.startswith("Is") else call.width()
    return made(call.shape(), width, None if work is None else lambda: work(call.data(0)))


@rule("Cast")
def _cast(call: Call) -> list[Known]:
    to = ir.DataType(call.integer("to", 1))
    return made(call.shape(), to.itemsize, lambda: call.data(0).astype(to.numpy()))


@rule("DynamicQuantizeLinear")
def _quantised(call: Call) -> list[Known]:
    return [Known(call.shape(), 1), Known((), 4), Known((), 1)]


# Element by element

_BINARY: Mapping[str, Callable[..., Data]] = {
    **{"Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Mod": np.mod, "Pow": np.power},
    **{"Equal": np.equal, "Less": np.less, "LessOrEqual": np.less_equal, "Greater": np.greater},
    **{"GreaterOrEqual": np.greater_equal, "And": np.logical_and, "Or": np.logical_or, "Xor": np.logical_xor},
}
_FOLDED: Mapping[str, Callable[..., Data]] = {"Min": np.minimum, "Max": np.maximum, "Sum": np.add}
_FLAGS = frozenset({"Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "And", "Or", "Xor"})


@rule(*_BINARY, *_FOLDED, "Div", "Mean", "BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Where")
def _elementwise(call: Call) -> list[Known]:
    count = len(call.inputs)

    def data() -> Data:
        given = [call.data(index) for index in range(count)]
        if call.operator == "Where":
            return np.where(given[0], given[1], given[2])
        if call.operator == "Div":
            whole = given[0].dtype.kind in "iu"
            return (np.trunc(np.true_divide(*given)) if whole else np.true_divide(*given)).astype(given[0].dtype)
        if call.operator in _FOLDED:
            found = given[0]
            for other in given[1:]:
                found = _FOLDED[call.operator](found, other)
            return found
        if call.operator not in _BINARY:
            raise Unfit
        return _BINARY[call.operator](*given)

    first = 1 if call.operator == "Where" else 0
    width = 1 if call.operator in _FLAGS else max(call.width(index) for index in range(first, count))
    return made(broadcast(*(call.shape(index) for index in range(count))), width, data)


# Products


@rule("MatMul", "MatMulInteger")
def _product(call: Call) -> list[Known]:
    left, right = call.shape(0), call.shape(1)
    rows, columns = left[-2:-1], right[-1:] if len(right) > 1 else ()
    return made((*broadcast(left[:-2], right[:-2]), *rows, *columns), max(4, call.width()))


@rule("MatMulNBits")  # of com.microsoft, as the next
def _packed_product(call: Call) -> list[Known]:
    return made((*call.shape()[:-1], call.attributes["N"].as_int()), call.width())


@rule("GatherBlockQuantized")
def _packed_rows(call: Call) -> list[Known]:
    shape, axis = call.shape(), axis_of(call.integer("gather_axis", 0), len(call.shape()))
    packed = 8 // call.integer("bits", 4) if call.width() == 1 else 1
    whole = (*shape[:-1], shape[-1] * packed)
    return made((*whole[:axis], *call.shape(1), *whole[axis + 1 :]), max(4, call.width(2)))


@rule("Gemm")
def _gemm(call: Call) -> list[Known]:
    left, right = call.shape(0), call.shape(1)
    rows = left[1] if call.integer("transA", 0) else left[0]
    return made((rows, right[0] if call.integer("transB", 0) else right[1]), call.width())


@rule("Einsum")
def _einsum(call: Call) -> list[Known]:
    left, arrow, right = call.attributes["equation"].as_string().replace(" ", "").partition("->")
    if not arrow or "." in left:
        raise Unfit
    sizes: dict[str, int] = {}
    for letters, index in zip(left.split(","), range(len(call.inputs)), strict=True):
        sizes.update(zip(letters, call.shape(index), strict=True))
    # Of three and more it holds products of two on the way, as large as all axes together at the most.
    if len(call.inputs) > 2:
        call.at_most()
    return made([sizes[letter] for letter in (right if len(call.inputs) <= 2 else sizes)], call.width())


# Shapes of shapes


@rule("Shape")
def _shape(call: Call) -> list[Known]:
    shape = call.shape()
    end = call.attributes["end"].as_int() if "end" in call.attributes else len(shape)
    found = np.array(shape[call.integer("start", 0) : end], np.int64)
    return [Known(found.shape, 8, found)]


@rule("Size")
def _size(call: Call) -> list[Known]:
    return [Known((), 8, np.array(min(math.prod(call.shape()), 2**63 - 1), np.int64))]


@rule("Reshape")
def _reshape(call: Call) -> list[Known]:
    shape, wanted = call.shape(), call.numbers(1)
    if not call.integer("allowzero", 0):
        wanted = [shape[place] if size == 0 else size for place, size in enumerate(wanted)]
    if -1 in wanted:
        rest = math.prod(size for size in wanted if size != -1)
        wanted[wanted.index(-1)] = math.prod(shape) // rest if rest else 0
    return made(wanted, call.width(), lambda: call.data(0).reshape(wanted))


@rule("Flatten")
def _flatten(call: Call) -> list[Known]:
    shape, axis = call.shape(), call.integer("axis", 1)
    return made((math.prod(shape[:axis]), math.prod(shape[axis:])), call.width())


@rule("Squeeze")
def _squeeze(call: Call) -> list[Known]:
    shape = call.shape()
    ones = [place for place, size in enumerate(shape) if size == 1]
    axes = {axis_of(axis, len(shape)) for axis in call.numbers(1, "axes", ones)}
    kept = [size for place, size in enumerate(shape) if place not in axes]
    return made(kept, call.width(), lambda: call.data(0).reshape(kept))


@rule("Unsqueeze")
def _unsqueeze(call: Call) -> list[Known]:
    shape, axes = list(call.shape()), call.numbers(1, "axes")
    for axis in sorted(axis_of(axis, len(shape) + len(axes)) for axis in axes):
        shape.insert(axis, 1)
    return made(shape, call.width(), lambda: call.data(0).reshape(shape))


@rule("Transpose")
def _transpose(call: Call) -> list[Known]:
    shape = call.shape()
    order = list(call.attributes["perm"].as_ints()) if "perm" in call.attributes else list(range(len(shape)))[::-1]
    return made([shape[axis] for axis in order], call.width())


# Parts and compositions


@rule("Concat")
def _concat(call: Call) -> list[Known]:
    shapes = [call.shape(index) for index in range(len(call.inputs))]
    axis = axis_of(call.integer("axis", 0), len(shapes[0]))
    whole = list(shapes[0])
    whole[axis] = sum(shape[axis] for shape in shapes)
    return made(
        whole, call.width(), lambda: np.concatenate([call.data(index) for index in range(len(call.inputs))], axis=axis)
    )


@rule("Split")
def _split(call: Call) -> list[Known]:
    shape = list(call.shape())
    axis = axis_of(call.integer("axis", 0), len(shape))
    even = -(-shape[axis] // call.outputs)
    sizes = call.numbers(1, "split", [even] * (call.outputs - 1) + [shape[axis] - even * (call.outputs - 1)])
    return [Known((*shape[:axis], max(0, size), *shape[axis + 1 :]), call.width()) for size in sizes]


@rule("Slice")
def _slice(call: Call) -> list[Known]:
    shape = call.shape()
    try:
        starts, ends = call.numbers(1, "starts"), call.numbers(2, "ends")
        axes = call.numbers(3, "axes", list(range(len(starts))))
        steps = call.numbers(4, "", [1] * len(starts))
    except Unfit:  # the bounds are not known, but a part is no larger than the whole
        call.at_most()
        return [Known(shape, call.width())]
    cut = [slice(None)] * len(shape)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        # Beyond both ends ONNX means all; Python's own slices do so too, but for the end of a negative step.
        cut[axis_of(axis, len(shape))] = slice(start, None if step < 0 and end < -(1 << 31) else end, step)
    sizes = [len(range(*part.indices(size))) for part, size in zip(cut, shape, strict=True)]
    return made(sizes, call.width(), lambda: call.data(0)[tuple(cut)])


@rule("Gather")
def _gather(call: Call) -> list[Known]:
    shape, places = call.shape(), call.shape(1)
    axis = axis_of(call.integer("axis", 0), len(shape))
    return made(
        (*shape[:axis], *places, *shape[axis + 1 :]),
        call.width(),
        lambda: np.take(call.data(0), call.data(1).astype(np.int64), axis=axis),
    )


@rule("GatherElements")
def _gather_elements(call: Call) -> list[Known]:
    return made(call.shape(1), call.width())


@rule("GatherND")
def _gather_nd(call: Call) -> list[Known]:
    shape, places, batch = call.shape(), call.shape(1), call.integer("batch_dims", 0)
    return made((*places[:-1], *shape[batch + places[-1] :]), call.width())


@rule("TopK")
def _top(call: Call) -> list[Known]:
    shape = list(call.shape())
    shape[axis_of(call.integer("axis", -1), len(shape))] = call.numbers(1)[0]
    return [*made(shape, call.width()), *made(shape, 8)]


@rule("Compress", "Unique")
def _compressed(call: Call) -> list[Known]:
    call.at_most()
    return made(call.shape() if "axis" in call.attributes else (math.prod(call.shape()),), call.width())


@rule("NonZero")
def _non_zero(call: Call) -> list[Known]:
    call.at_most()
    return made((len(call.shape()), math.prod(call.shape())), 8)


# Larger than what they are given


@rule("Expand")
def _expand(call: Call) -> list[Known]:
    return made(broadcast(call.shape(), tuple(call.numbers(1))), call.width())


@rule("Tile")
def _tile(call: Call) -> list[Known]:
    repeats = call.numbers(1)
    return made([size * count for size, count in zip(call.shape(), repeats, strict=True)], call.width())


@rule("Pad")
def _pad(call: Call) -> list[Known]:
    shape, pads = list(call.shape()), call.numbers(1, "pads")
    axes = call.numbers(3, "", list(range(len(shape))))
    for before, after, axis in zip(pads[: len(axes)], pads[len(axes) :], axes, strict=True):
        shape[axis_of(axis, len(shape))] += before + after
    return made(shape, call.width())


@rule("ConstantOfShape")
def _constant_of_shape(call: Call) -> list[Known]:
    sizes = call.numbers(0)
    filled = (
        call.attributes["value"].as_tensor().numpy().reshape(-1)[:1]
        if "value" in call.attributes
        else np.zeros(1, "f4")
    )
    return made(sizes, filled.itemsize, lambda: np.full(sizes, filled[0]))


@rule("Range")
def _range(call: Call) -> list[Known]:
    start, limit, delta = (call.data(index).reshape(-1)[0] for index in range(3))
    count = max(0, math.ceil((float(limit) - float(start)) / float(delta)))
    return made((count,), call.width(), lambda: start + delta * np.arange(count, dtype=start.dtype))


@rule("OneHot")
def _one_hot(call: Call) -> list[Known]:
    shape, depth = list(call.shape()), int(call.data(1).reshape(-1)[0])
    shape.insert(axis_of(call.integer("axis", -1), len(shape) + 1), depth)
    return made(shape, call.width(2))


# Smaller


@rule(
    *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd"),
    *("ReduceSum", "ReduceSumSquare"),
)
def _reduced(call: Call) -> list[Known]:
    shape = call.shape()
    axes = call.numbers(1, "axes", [])
    if not axes and call.integer("noop_with_empty_axes", 0):
        return made(shape, call.width())
    return made(_without(shape, axes or range(len(shape)), call.integer("keepdims", 1)), call.width())


@rule("ArgMax", "ArgMin")
def _arg(call: Call) -> list[Known]:
    return made(_without(call.shape(), [call.integer("axis", 0)], call.integer("keepdims", 1)), 8)


def _without(shape: Shape, axes: Sequence[int], keep: int) -> list[int]:
    """A shape without some axes, or with 1 in their place."""
    gone = {axis_of(axis, len(shape)) for axis in axes}
    return [1 if place in gone else size for place, size in enumerate(shape) if keep or place not in gone]


@rule("Det")
def _det(call: Call) -> list[Known]:
    return made(call.shape()[:-2], call.width())


@rule("Conv", "ConvInteger")
def _conv(call: Call) -> list[Known]:
    shape, kernel = call.shape(), call.shape(1)
    places = len(shape) - 2
    ones = [1] * places
    steps, gaps = call.numbers(9, "strides", ones), call.numbers(9, "dilations", ones)
    pads = call.numbers(9, "pads", [0] * 2 * places)
    if "auto_pad" in call.attributes and call.attributes["auto_pad"].as_string().startswith("SAME"):
        return made((shape[0], kernel[0], *(-(-n // step) for n, step in zip(shape[2:], steps, strict=True))), 4)
    ends = zip(shape[2:], kernel[2:], steps, gaps, pads[:places], pads[places:], strict=True)
    sizes = ((n + before + after - gap * (k - 1) - 1) // step + 1 for n, k, step, gap, before, after in ends)
    return made((shape[0], kernel[0], *sizes), 4)
