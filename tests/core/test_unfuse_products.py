"""Fused and quantised matrix products compute the same after they are written out."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphlens import surgery
from tests.fused import MICROSOFT, RNG, Array, Fused, difference, normal, run, run_unfused, same

M, K, N = 5, 8, 12


@pytest.mark.parametrize("operator", ["FusedMatMul", "TransposeMatMul"])
@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_transposed_products(operator: str, trans_a: int, trans_b: int, alpha: float) -> None:
    a = normal(0, 2, 3, K, M) if trans_a else normal(0, 2, 3, M, K)
    c = normal(1, 2, 3, N, K) if trans_b else normal(1, 2, 3, K, N)
    same(Fused(operator, [a, c], attributes={"transA": trans_a, "transB": trans_b, "alpha": alpha}))
    flat = Fused(
        operator, [a, c[0, 0]], attributes={"transA": trans_a, "transB": trans_b, "alpha": alpha}, constants=(1,)
    )
    same(flat)


@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("batches", [(1, 0), (0, 1), (1, 1)])
def test_products_with_batch_axes_moved(trans_a: int, trans_b: int, batches: tuple[int, int]) -> None:
    def side(seed: int, rows: int, columns: int, swapped: int, moved: int) -> Array:
        whole = normal(seed, 2, 3, columns, rows) if swapped else normal(seed, 2, 3, rows, columns)
        # [2, 3, r, c] with r, the axis before the last, in front
        return np.ascontiguousarray(whole.transpose(2, 0, 1, 3)) if moved else whole

    inputs = [side(0, M, K, trans_a, batches[0]), side(1, K, N, trans_b, batches[1])]
    attributes = {"transA": trans_a, "transB": trans_b, "transBatchA": batches[0], "transBatchB": batches[1]}
    same(Fused("FusedMatMul", inputs, attributes=attributes))


ACTIVATIONS: list[tuple[str, dict[str, float]]] = [
    ("Relu", {}),
    ("Sigmoid", {}),
    ("Tanh", {}),
    ("Softplus", {}),
    ("Softsign", {}),
    ("LeakyRelu", {"activation_alpha": 0.2}),
    ("Elu", {"activation_alpha": 0.7}),
    ("HardSigmoid", {"activation_alpha": 0.3, "activation_beta": 0.4}),
    ("ThresholdedRelu", {"activation_alpha": 0.7}),
    ("Selu", {"activation_alpha": 1.5, "activation_gamma": 1.1}),
]


@pytest.mark.parametrize(("activation", "options"), ACTIVATIONS)
def test_gemm_with_an_activation(activation: str, options: dict[str, float]) -> None:
    inputs = [normal(0, K, M), normal(1, N, K), normal(2, N)]
    attributes = {"transA": 1, "transB": 1, "alpha": 0.7, "beta": 0.3, "activation": activation, **options}
    same(Fused("FusedGemm", inputs, attributes=attributes))
    same(Fused("FusedGemm", [normal(0, M, K), normal(1, K, N)], attributes={"activation": activation, **options}))


def gelu(x: Array) -> Array:
    return x * 0.5 * (1 + np.tanh(np.float32(np.sqrt(2 / np.pi)) * (x + 0.044715 * x**3)))


def softmax(x: Array) -> Array:
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def test_operators_without_a_cpu_kernel() -> None:
    """NumPy, from the formulas in their schemas."""
    x, w, bias = normal(0, 2, M, K), normal(1, K, N), normal(2, N)
    assert difference(run_unfused(Fused("GemmFastGelu", [x, w, bias]))[0], gelu(x @ w + bias)) <= 1e-5
    assert difference(run_unfused(Fused("GemmFastGelu", [x, w]))[0], gelu(x @ w)) <= 1e-5
    skip = normal(3, 2, M, K)
    assert difference(run_unfused(Fused("BiasAdd", [x, bias[:K], skip]))[0], x + bias[:K] + skip) <= 1e-6
    scores, mask = normal(4, 2, 3, M, K), normal(5, 2, 1, 1, K)
    attributes = {"axis": 3, "is_inner_broadcast": 1}
    assert (
        difference(run_unfused(Fused("BiasSoftmax", [scores, mask], attributes=attributes))[0], softmax(scores + mask))
        <= 1e-6
    )
    left_out = Fused("BiasSoftmax", [scores, mask], attributes={"axis": 2, "is_inner_broadcast": 1}).unfused()
    assert "several axes" in left_out.kept["com.microsoft::BiasSoftmax"]


# Integers


def integers(seed: int, *shape: int, dtype: Any = np.uint8) -> Array:
    limits = np.iinfo(dtype)
    return RNG(seed).integers(limits.min, limits.max + 1, shape).astype(dtype)


def weights(seed: int, *shape: int, dtype: Any = np.int8) -> Array:
    """Of 7 bits: kernels of older processors saturate sums of two products of 8-bit numbers."""
    return (integers(seed, *shape, dtype=dtype) // 2).astype(dtype)


def of(number: float, dtype: Any = np.float32) -> Array:
    return np.array(number, dtype)


def steps(seed: int, count: int) -> Array:
    return RNG(seed).uniform(0.01, 0.03, count).astype(np.float32)


def within_a_step(fused: Fused, border: float = 0.02) -> None:
    """Equal integers, but for few that lie at the border of two steps."""
    expected, found = run(fused.proto(), fused.feeds())[0], run_unfused(fused)[0]
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    away = np.abs(found.astype(int) - expected.astype(int))
    assert away.max() <= 1
    assert (away > 0).mean() <= border
    assert len(np.unique(expected)) > min(expected.size // 4, 20)


@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_integer_products_as_numbers(columns: bool, bias: bool, zeros: bool, dtype: Any) -> None:
    b_scale = steps(2, N) if columns else of(0.02)
    b_zero = None if not zeros else weights(3, N, dtype=dtype) if columns else of(7, dtype)
    last = normal(4, N) if bias else None
    inputs = [
        integers(0, 2, M, K),
        weights(1, K, N, dtype=dtype),
        of(0.013),
        b_scale,
        of(121, np.uint8) if zeros else None,
        b_zero,
    ]
    same(Fused("MatMulIntegerToFloat", [*inputs, last], constants=(1,)))
    dynamic = [normal(0, 2, M, K), weights(1, K, N, dtype=dtype), b_scale, b_zero, last]
    same(Fused("DynamicQuantizeMatMul", dynamic, constants=(1,)))


@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize("opset", [10, 21])
def test_quantised_product(columns: bool, opset: int) -> None:
    scale = steps(2, N) if columns else of(0.02)
    zero = np.zeros(N, np.int8) if columns else of(3, np.int8)
    inputs = [
        integers(0, 2, M, K),
        of(0.013),
        of(121, np.uint8),
        weights(1, K, N),
        scale,
        zero,
        of(0.05),
        of(99, np.uint8),
    ]
    within_a_step(Fused("QLinearMatMul", inputs, 1, "", opset, constants=(3, 4, 5)))


@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_quantised_gemm(columns: bool, bias: bool, transposed: int, alpha: float) -> None:
    b_scale = steps(2, N) if columns else of(0.02)
    b_zero = np.zeros(N, np.int8) if columns else of(0, np.int8)
    b = weights(1, N, K) if transposed else weights(1, K, N)
    given = RNG(3).integers(-3000, 3000, N).astype(np.int32) if bias else None
    inputs = [integers(0, M, K), of(0.013), of(121, np.uint8), b, b_scale, b_zero, given]
    attributes = {"transB": transposed, "alpha": alpha}
    within_a_step(Fused("QGemm", [*inputs, of(0.02), of(99, np.uint8)], attributes=attributes, constants=(3, 4, 5)))
    same(Fused("QGemm", inputs, attributes=attributes, constants=(3, 4, 5)))


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_quantised_elements(dtype: Any) -> None:
    def zero(number: int) -> Array:
        return of(number, dtype)

    x, y = integers(0, 2, M, K, dtype=dtype), integers(1, 1, K, dtype=dtype)
    pair = [x, of(0.0213), zero(3), y, of(0.0307), zero(9), of(0.0411), zero(5)]
    for operator in ("QLinearAdd", "QLinearMul"):
        within_a_step(Fused(operator, pair))
    within_a_step(Fused("QLinearSigmoid", [x, of(0.03), zero(3), of(1 / 255), zero(0)]))
    within_a_step(Fused("QLinearLeakyRelu", [x, of(0.02), zero(30), of(0.02), zero(50)], attributes={"alpha": 0.3}))
    parts = [of(0.04), zero(5), x, of(0.02), zero(3), x[:, :2], of(0.03), zero(9)]
    within_a_step(Fused("QLinearConcat", parts, attributes={"axis": 1}))
    image = integers(0, 2, 30, M, K, dtype=dtype)
    within_a_step(Fused("QLinearGlobalAveragePool", [image, of(0.0213), zero(3), of(0.0137), zero(5)]))


@pytest.mark.parametrize("keepdims", [0, 1])
def test_quantised_mean(keepdims: int) -> None:
    """ONNX Runtime has no CPU kernel: NumPy, from the formula in the operator's schema."""
    x = integers(0, 2, 30, M, K)
    inputs = [x, of(0.0213), of(3, np.uint8), of(0.0137), of(5, np.uint8)]
    found = run_unfused(Fused("QLinearReduceMean", inputs, attributes={"axes": [1, -1], "keepdims": keepdims}))[0]
    mean = ((x.astype(np.float64) - 3) * 0.0213).mean((1, -1), keepdims=bool(keepdims))
    expected = np.clip(np.rint(mean / 0.0137) + 5, 0, 255).astype(np.uint8)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_zero_points_that_are_left_out_are_zero(dtype: Any) -> None:
    """ONNX Runtime needs them, though the schema does not."""
    x, zero = integers(0, 2, M, K, dtype=dtype), of(0, dtype)
    with_them = run_unfused(Fused("QLinearSigmoid", [x, of(0.03), zero, of(1 / 255), zero]))[0]
    without = run_unfused(Fused("QLinearSigmoid", [x, of(0.03), None, of(1 / 255), None]))[0]
    np.testing.assert_array_equal(without, with_them)
    assert without.dtype == dtype


@pytest.mark.parametrize("opset", [12, 13])
@pytest.mark.parametrize("scale", [1 / 255, 1 / 256, 0.0037])
@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_quantised_softmax(opset: int, scale: float, dtype: Any) -> None:
    zero = of(-128 if dtype is np.int8 else 0, dtype)
    inputs = [integers(0, 3, M, K, dtype=dtype), of(0.02), of(3, dtype), of(scale), zero]
    attributes = {"axis": -1 if opset == 13 else 2, "opset": opset}
    within_a_step(Fused("QLinearSoftmax", inputs, attributes=attributes))
    within_a_step(Fused("QLinearSoftmax", inputs, attributes=attributes, constants=(1, 2, 3, 4)))


def test_quantised_choice() -> None:
    x, y = integers(0, 2, M, K), integers(1, 2, M, K)
    chosen = RNG(2).integers(0, 2, (2, M, K)).astype(bool)
    inputs = [chosen, x, of(0.02), of(3, np.uint8), y, of(0.03), of(9, np.uint8), of(0.04), of(5, np.uint8)]
    within_a_step(Fused("QLinearWhere", inputs))


@pytest.mark.parametrize("channels", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_quantised_convolution(channels: bool, bias: bool) -> None:
    scale = steps(2, 6) if channels else of(0.02)
    zero = np.zeros(6, np.int8) if channels else of(0, np.int8)
    last = RNG(3).integers(-3000, 3000, 6).astype(np.int32) if bias else None
    inputs = [
        integers(0, 2, 3, 8, 8),
        of(0.013),
        of(121, np.uint8),
        weights(1, 6, 3, 4, 4),
        scale,
        zero,
        of(0.05),
        of(99, np.uint8),
        last,
    ]
    attributes = {"kernel_shape": [4, 4], "strides": [4, 4]}
    within_a_step(Fused("QLinearConv", inputs, 1, "", attributes=attributes, constants=(3, 4, 5, 8)))


@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize("past", [True, False])
@pytest.mark.parametrize("unidirectional", [0, 1])
@pytest.mark.parametrize("mask", [True, False])
def test_quantised_attention(columns: bool, past: bool, unidirectional: int, mask: bool) -> None:
    rows, new, heads, head = 3, 5, 3, 8
    width = 3 * heads * head
    inputs = [
        integers(0, rows, new, 10),
        weights(1, 10, width),
        normal(2, width),
        of(0.013),
        steps(3, width) if columns else of(0.02),
        np.array([5, 2, 4], np.int32) if mask else None,
        of(121, np.uint8),
        np.zeros(width, np.int8) if columns else of(0, np.int8),
        normal(4, 2, rows, heads, 4, head) if past else None,
    ]
    attributes = {"num_heads": heads, "unidirectional": unidirectional}
    same(Fused("QAttention", inputs, 2 if past else 1, attributes=attributes, constants=(1, 2, 4, 7)))


def readers(order: list[int], shown: bool) -> onnx.ModelProto:
    """Integers that a quantised operator and two nodes read as the same numbers, and one as other numbers."""
    nodes = [
        helper.make_node("QLinearAdd", ["q", "s", "z", "q", "s", "z", "t", "z"], ["a"], "add", None, MICROSOFT),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["first"], "one"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["second"], "two"),
        helper.make_node("DequantizeLinear", ["q", "t", "z"], ["other"], "three"),
    ]
    tail = [
        helper.make_node("DequantizeLinear", ["a", "t", "z"], ["sum"], "four"),
        helper.make_node("Sum", ["first", "second", "other", "sum"], ["y"], "last"),
    ]
    arrays = {"s": of(0.0213), "t": of(0.0411), "z": of(7, np.uint8)}
    names = ["y", "second"] if shown else ["y"]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]
    head = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], "zero")
    graph = helper.make_graph(
        [head, *(nodes[place] for place in order), *tail],
        "readers",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, K])],
        outputs,
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    domains = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=domains, ir_version=10)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [1, 0, 3, 2], [3, 2, 1, 0]])
@pytest.mark.parametrize("shown", [True, False])
def test_integers_become_numbers_once(order: list[int], shown: bool) -> None:
    """So that what edits these numbers reaches all that read them."""
    proto = readers(order, shown)
    done = surgery.unfuse(ir.from_proto(proto))
    made = [node for node in done.model.graph if node.op_type == "DequantizeLinear" and node.inputs[0].name == "q"]
    assert len(made) == 2
    feeds = {"x": normal(1, 2, K)}
    for found, expected in zip(run(ir.to_proto(done.model), feeds), run(proto, feeds), strict=True):
        np.testing.assert_array_equal(found, expected)
