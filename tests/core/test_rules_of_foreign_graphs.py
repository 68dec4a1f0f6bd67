"""Gradient rules of what stands in graphs that other tools exported, against finite differences, whatever sizes they tell."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.one_operator import FIXED, NAMED, NAMELESS, Array, Operator

DRAW = np.random.default_rng(11)


def floats(*shape: int) -> Array:
    return DRAW.uniform(0.5, 2.0, shape)


def signed(*shape: int) -> Array:
    return DRAW.standard_normal(shape)


def ints(*numbers: int) -> Array:
    return np.array(numbers, np.int64)


# kind, inputs, places of the inputs that are differentiated, attributes
CASES: list[tuple[str, list[Array | None], tuple[int, ...], dict[str, Any]]] = [
    ("Cos", [signed(2, 3, 5)], (0,), {}),
    ("Sin", [signed(2, 3, 5)], (0,), {}),
    ("Sum", [signed(3, 5), signed(5), signed(3, 1)], (0, 1, 2), {}),
    ("Add", [signed(2, 1, 5), signed(3, 1)], (0, 1), {}),
    ("Sub", [signed(5), signed(2, 3, 5)], (0, 1), {}),
    ("Mul", [signed(2, 1, 5), signed(3, 1)], (0, 1), {}),
    ("Div", [signed(2, 1, 5), floats(3, 1)], (0, 1), {}),
    ("Min", [signed(2, 3, 5), signed(3, 1)], (0, 1), {}),
    ("Max", [signed(2, 3, 5), signed(5)], (0, 1), {}),
    ("Pow", [floats(2, 3), np.array([2], np.int64)], (0,), {}),
    ("Pow", [floats(2, 3), np.array(-0.5)], (0,), {}),
    ("Where", [signed(3, 1) > 0, signed(2, 3, 5), signed(5)], (1, 2), {}),
    ("Clip", [signed(3, 5), np.array(-0.5), np.array(0.7)], (0,), {}),
    # rows, stretches and steps
    ("Slice", [signed(2, 3, 7), ints(2), ints(2**62), ints(-1), ints(1)], (0,), {}),
    ("Slice", [signed(2, 3, 7), ints(-5), ints(-1), ints(2)], (0,), {}),
    ("Slice", [signed(2, 3, 7), ints(0), ints(3), ints(1)], (0,), {}),
    ("Slice", [signed(2, 3, 7), ints(1, 0), ints(7, 2), ints(2, 1), ints(2, 1)], (0,), {}),
    ("Slice", [signed(2, 3, 7), ints(-1), ints(-(2**62)), ints(-1), ints(-1)], (0,), {}),
    ("Slice", [signed(2, 3, 7), ints(5), ints(1), ints(2), ints(-2)], (0,), {}),
    ("Slice", [signed(2, 3, 7), ints(0, 1), ints(1, 3)], (0,), {}),
    ("Split", [signed(2, 7, 3), ints(1, 4, 2)], (0,), {"axis": 1}),
    ("Split", [signed(2, 7, 3)], (0,), {"axis": 1, "num_outputs": 3}),
    ("Concat", [signed(2, 3), signed(2, 1), signed(2, 4)], (0, 1, 2), {"axis": -1}),
    ("Gather", [signed(4, 3, 5), np.array([[1, 0], [3, 1]])], (0,), {"axis": 0}),
    ("Gather", [signed(4, 3, 5), np.array([2, -1, 2])], (0,), {"axis": 1}),
    ("Gather", [signed(4, 3, 5), np.array(-1)], (0,), {"axis": 2}),
    ("GatherND", [signed(4, 3, 5), np.array([[1, 2], [0, 0], [1, 2]])], (0,), {}),
    ("Tile", [signed(2, 1, 3), ints(2, 3, 1)], (0,), {}),
    ("Expand", [signed(3, 1, 5), ints(2, 3, 4, 5)], (0,), {}),
    ("Expand", [signed(3, 1, 5), ints(1, 4, 1)], (0,), {}),
    ("Trilu", [signed(2, 4, 5), np.array(1)], (0,), {"upper": 0}),
    ("Pad", [signed(2, 3, 4), ints(1, 0, -1, 2), np.array(3.0), ints(1, -1)], (0,), {}),
    ("Flatten", [signed(2, 3, 4)], (0,), {"axis": -1}),
    ("Reshape", [signed(2, 3, 4), ints(0, -1)], (0,), {}),
    ("Squeeze", [signed(2, 1, 4), ints(-2)], (0,), {}),
    ("Unsqueeze", [signed(2, 4), ints(-1, 0)], (0,), {}),
    ("Transpose", [signed(2, 3, 4)], (0,), {}),
    ("Identity", [signed(2, 3)], (0,), {}),
    # over axes
    ("ReduceMean", [signed(2, 3, 5), ints(-1, 0)], (0,), {"keepdims": 0}),
    ("ReduceMean", [signed(2, 3, 5)], (0,), {}),
    ("ReduceSum", [signed(2, 3, 5), ints(1)], (0,), {"keepdims": 0}),
    ("ReduceSum", [signed(2, 3, 5), ints()], (0,), {"noop_with_empty_axes": 1}),
    ("ReduceMax", [signed(2, 3, 5), ints(-1)], (0,), {"keepdims": 1}),
    ("ReduceMin", [signed(2, 3, 5), ints(0, 2)], (0,), {"keepdims": 0}),
    ("ReduceL2", [signed(2, 3, 5), ints(-1)], (0,), {"keepdims": 1}),
    ("ReduceSumSquare", [signed(2, 3, 5), ints(1)], (0,), {"keepdims": 0}),
    ("ReduceLogSumExp", [signed(2, 3, 5), ints(1)], (0,), {"keepdims": 0}),
    ("Softmax", [signed(2, 3, 5)], (0,), {"axis": 0}),
    ("Softmax", [signed(2, 3, 5)], (0,), {"axis": 1}),
    ("Softmax", [signed(2, 3, 5)], (0,), {}),
    ("LogSoftmax", [signed(2, 3, 5)], (0,), {"axis": 1}),
    ("LogSoftmax", [signed(2, 3, 5)], (0,), {}),
    # products
    ("MatMul", [signed(2, 3, 5), signed(5, 7)], (0, 1), {}),
    ("MatMul", [signed(2, 3, 4, 5), signed(3, 5, 7)], (0, 1), {}),
    ("MatMul", [signed(3, 4, 5), signed(2, 1, 5, 7)], (0, 1), {}),
    ("MatMul", [signed(4, 5), signed(2, 3, 5, 7)], (0, 1), {}),
    ("MatMul", [signed(5), signed(2, 5, 7)], (0, 1), {}),
    ("MatMul", [signed(2, 3, 5), signed(5)], (0, 1), {}),
    ("MatMul", [signed(5), signed(5, 7)], (0, 1), {}),
    ("MatMul", [signed(5), signed(5)], (0, 1), {}),
    *[
        ("Gemm", [signed(*a), signed(*b), c], (0, 1, 2), {"alpha": 0.7, "beta": 1.3, "transA": ta, "transB": tb})
        for ta, a in ((0, (3, 5)), (1, (5, 3)))
        for tb, b in ((0, (5, 7)), (1, (7, 5)))
        for c in (signed(7), signed(3, 1))
    ],
    ("Gemm", [signed(3, 5), signed(5, 7)], (0, 1), {}),
    ("Einsum", [signed(2, 3, 5), signed(2, 5, 7)], (0, 1), {"equation": "bij,bjk->bik"}),
    ("Einsum", [signed(2, 3, 4, 5), signed(2, 7, 4, 5)], (0, 1), {"equation": "bqhd, bkhd -> bhqk"}),
    ("Einsum", [signed(2, 3, 5), signed(5)], (0, 1), {"equation": "...j,j->..."}),
    ("Einsum", [signed(3, 5), signed(5, 7)], (0, 1), {"equation": "ij,jk"}),
    ("Einsum", [signed(2, 3, 5)], (0,), {"equation": "bij->jb"}),
    ("Einsum", [signed(2, 1, 3, 5), signed(2, 4, 5, 3)], (0, 1), {"equation": "...ij,...ji->...i"}),
    ("Einsum", [signed(3), signed(5)], (0, 1), {"equation": "i,j->ij"}),
]


# What ONNX Runtime computes in float32 alone.
SINGLE: list[tuple[str, list[Array | None], tuple[int, ...], dict[str, Any]]] = [
    ("LeakyRelu", [3 * signed(3, 5)], (0,), {"alpha": 0.3}),
    ("Elu", [3 * signed(3, 5)], (0,), {"alpha": 0.7}),
    ("HardSigmoid", [3 * signed(3, 7)], (0,), {"alpha": 0.25}),
    ("HardSwish", [3 * signed(3, 7)], (0,), {}),
    ("Softplus", [3 * signed(3, 5)], (0,), {}),
    ("Erf", [signed(3, 5)], (0,), {}),
    ("Gelu", [signed(3, 5)], (0,), {}),
    ("Gelu", [signed(3, 5)], (0,), {"approximate": "tanh"}),
    ("Mean", [signed(3, 5), signed(5), signed(3, 1)], (0, 1, 2), {}),
    ("Conv", [signed(2, 3, 8, 9), signed(5, 3, 3, 2)], (0,), {"strides": [3, 2]}),
    (
        "Conv",
        [signed(2, 4, 7, 9), signed(6, 2, 3, 2), signed(6)],
        (0,),
        {"group": 2, "pads": [1, 0, 2, 1], "dilations": [2, 1]},
    ),
    ("Conv", [signed(2, 3, 11), signed(5, 3, 4)], (0,), {"strides": [4], "auto_pad": "VALID"}),
]


@pytest.mark.parametrize("sizes", [FIXED, NAMELESS])
@pytest.mark.parametrize("case", SINGLE, ids=lambda case: case[0])
def test_a_rule_of_single_precision(
    case: tuple[str, list[Array | None], tuple[int, ...], dict[str, Any]], sizes: str
) -> None:
    kind, inputs, wrt, attributes = case
    given = [None if array is None else array.astype(np.float32) for array in inputs]
    Operator(kind, given, wrt, attributes, sizes=sizes).check(1e-2, 1e-3)


@pytest.mark.parametrize("sizes", [FIXED, NAMED, NAMELESS])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_a_rule_is_the_derivative(
    case: tuple[str, list[Array | None], tuple[int, ...], dict[str, Any]], sizes: str
) -> None:
    kind, inputs, wrt, attributes = case
    count = 3 if kind == "Split" else 1
    Operator(kind, inputs, wrt, attributes, outputs=count, sizes=sizes).check()


@pytest.mark.parametrize("case", [*CASES, *SINGLE], ids=lambda case: case[0])
def test_a_rule_in_half_precision(case: tuple[str, list[Array | None], tuple[int, ...], dict[str, Any]]) -> None:
    """The gradient of the same numbers in float32, but for the rounding of float16."""
    kind, inputs, wrt, attributes = case
    count = 3 if kind == "Split" else 1
    found = []
    for dtype in (np.float16, np.float32):
        given = [
            array if array is None or array.dtype.kind != "f" else array.astype(np.float16).astype(dtype)
            for array in inputs
        ]
        found.append(Operator(kind, given, wrt, attributes, outputs=count, sizes=NAMELESS).gradients())
    for half, single in zip(*found, strict=True):
        assert half.dtype == np.float16
        np.testing.assert_allclose(half, single, rtol=2e-2, atol=2e-2 * float(np.abs(single).max()))
