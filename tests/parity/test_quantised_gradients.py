"""Gradients through operators that round, against torch's autograd on the dequantised weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx_ir.tape import Tape

from graphlens import InputError, embedded_model, surgery
from graphlens.file.io_names import SEED
from graphlens.file.manifest import HookEntry
from graphlens.surgery.differentiating import straight_through
from graphlens.surgery.graph import install, numbered, write_manifest
from tests.one_operator import Array, weights_of

START, END = "blocks.0.hook_resid_pre", "blocks.0.hook_resid_post"
AXES = ("batch", "pos", "d_model")
DRAW = np.random.default_rng(3)


class Chain:
    """A hooked graph from ``x`` through some nodes to a result; sizes are not told."""

    def __init__(self, rank: int, build: Callable[[Chain, ir.Value], ir.Value], kind: str = "float32") -> None:
        self.tape, self.count = Tape(), 0
        dtype = ir.DataType.from_numpy(np.dtype(kind))
        given = ir.Value(name="given", shape=ir.Shape([None] * rank), type=ir.TensorType(dtype))
        x = self.op("Identity", given)
        x.name = START
        end = build(self, x)
        y = self.op("Identity", end)
        y.name, y.type, x.type = END, ir.TensorType(dtype), ir.TensorType(dtype)
        graph = ir.Graph([given], [y, x], nodes=[], opset_imports={"": 21, "com.microsoft": 1}, name="chain")
        install(graph, self.tape, numbered("chain/"), lambda node, place: f"{node.name}_{place}")
        self.model = ir.Model(graph, ir_version=10)
        manifest = surgery.read_manifest(surgery.load(embedded_model()))
        hooks = {name: HookEntry(name, AXES, kind) for name in (START, END)}
        write_manifest(self.model, replace(manifest, hooks=hooks, weights={}, files={}))

    def op(self, kind: str, *inputs: ir.Value | None, domain: str = "", **attributes: int | float | str) -> ir.Value:
        return self.tape.op(kind, list(inputs), attributes, domain=domain)

    def several(self, kind: str, count: int, *inputs: ir.Value) -> list[ir.Value]:
        return list(self.tape.op_multi_out(kind, list(inputs), num_outputs=count))

    def constant(self, array: Array) -> ir.Value:
        self.count += 1
        return self.tape.initializer(ir.tensor(np.asarray(array), name=f"c{self.count}"), name=f"c{self.count}")

    def gradient(self, x: Array) -> tuple[Array, Array, dict[str, int]]:
        """(y, d(weights_of(y) . y)/dx, what went straight through)."""
        made = surgery.differentiate(self.model, [START], of=END)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(ir.to_proto(made).SerializeToString(), options)
        shape = (
            onnxruntime.InferenceSession(ir.to_proto(self.model).SerializeToString(), options)
            .run([END], {"given": x})[0]
            .shape
        )
        seed = weights_of(shape).astype(x.dtype)
        y, slope = session.run([END, f"{START}_grad"], {"given": x, SEED: seed})
        return y, slope, dict(straight_through(made))


def by_torch(x: Array, weight: Array) -> tuple[Array, Array]:
    """(x @ weight, d(weights_of . that)/dx) by torch, in float64."""
    given = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    y = given @ torch.tensor(weight, dtype=torch.float64)
    (y * torch.tensor(weights_of(y.shape))).sum().backward()
    return y.detach().numpy(), given.grad.numpy()


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("columns", [False, True])
def test_a_dynamic_product_has_the_gradient_of_the_dequantised_weights(signed: bool, columns: bool) -> None:
    low, high, kind = (-127, 128, np.int8) if signed else (0, 256, np.uint8)
    integers = DRAW.integers(low, high, (13, 7)).astype(kind)
    zero = (
        (DRAW.integers(low, high, 7 if columns else ()).astype(kind))
        if not signed
        else np.zeros(7 if columns else (), kind)
    )
    scale = DRAW.uniform(0.01, 0.02, 7 if columns else ()).astype(np.float32)

    def build(chain: Chain, x: ir.Value) -> ir.Value:
        rounded, step, offset = chain.several("DynamicQuantizeLinear", 3, x)
        product = chain.op("MatMulInteger", rounded, chain.constant(integers), offset, chain.constant(zero))
        numbers = chain.op("Cast", product, to=int(ir.DataType.FLOAT))
        return chain.op("Mul", numbers, chain.op("Mul", step, chain.constant(scale)))

    x = DRAW.standard_normal((2, 5, 13)).astype(np.float32)
    y, slope, said = Chain(3, build).gradient(x)
    expected, gradient = by_torch(x, (integers.astype(float) - zero) * scale)
    assert np.abs(y - expected).max() <= 0.05 * np.abs(expected).max()  # it rounds
    np.testing.assert_allclose(slope, gradient, rtol=1e-5, atol=1e-5 * np.abs(gradient).max())
    assert said == {"DynamicQuantizeLinear": 1, "MatMulInteger": 1}


def test_a_dynamic_product_of_two_activations() -> None:
    """Both factors depend on x: a straight-through product is that of the two, each rounded."""

    def build(chain: Chain, x: ir.Value) -> ir.Value:
        left = chain.several("DynamicQuantizeLinear", 3, x)
        right = chain.several("DynamicQuantizeLinear", 3, chain.op("Transpose", x, perm=[0, 2, 1]))
        product = chain.op("MatMulInteger", left[0], right[0], left[2], right[2])
        return chain.op("Mul", chain.op("CastLike", product, x), chain.op("Mul", left[1], right[1]))

    x = DRAW.standard_normal((2, 5, 13)).astype(np.float32)
    _, slope, _ = Chain(3, build).gradient(x)
    given = torch.tensor(x, requires_grad=True)
    y = given @ given.transpose(1, 2)
    (y * torch.tensor(weights_of(y.shape), dtype=torch.float32)).sum().backward()
    assert given.grad is not None
    error = np.abs(slope - given.grad.numpy()).max()  # by the rounded numbers: half a step of the factors each
    assert 0 < error <= 0.02 * float(given.grad.abs().max())


BITS = [
    (4, 32, None),
    (4, 16, "packed"),
    (4, 16, "float"),
    (8, 16, None),
    (8, 32, "packed"),
    (2, 16, "packed"),
    (2, 32, None),
]


@pytest.mark.parametrize(("bits", "block", "zeros"), BITS)
def test_a_packed_product_has_the_gradient_of_the_dequantised_weights(bits: int, block: int, zeros: str | None) -> None:
    """K is no whole number of blocks, and the blocks of a row no whole number of bytes of zero points."""
    columns, rows = 3 * block - 8, 7
    blocks, each = 3, 8 // bits
    integers = DRAW.integers(0, 2**bits, (rows, blocks * block))
    packed = sum(integers[:, place::each] << (bits * place) for place in range(each)).astype(np.uint8)
    scales = DRAW.uniform(0.1, 0.2, (rows, blocks)).astype(np.float32)
    middle = np.full((rows, blocks), 2.0 ** (bits - 1))
    extra: list[Array] = []
    if zeros == "packed":
        whole = DRAW.integers(0, 2**bits, (rows, -(-blocks // each) * each))
        middle = whole[:, :blocks].astype(float)
        extra = [sum(whole[:, place::each] << (bits * place) for place in range(each)).astype(np.uint8).reshape(-1)]
    elif zeros == "float":
        middle = DRAW.uniform(3, 9, (rows, blocks)).astype(np.float32).astype(float)
        extra = [middle.astype(np.float32)]
    steps = integers.reshape(rows, blocks, block) - middle[..., None]
    weight = (steps * scales[..., None].astype(float)).reshape(rows, -1)[:, :columns]

    def build(chain: Chain, x: ir.Value) -> ir.Value:
        given = [
            packed.reshape(rows, blocks, block // each),
            scales.reshape(-1) if zeros != "float" else scales,
            *extra,
        ]
        return chain.op(
            "MatMulNBits", x, *map(chain.constant, given), domain="com.microsoft",
            K=columns, N=rows, bits=bits, block_size=block,
        )  # fmt: skip

    x = DRAW.standard_normal((2, 5, columns)).astype(np.float32)
    y, slope, said = Chain(3, build).gradient(x)
    expected, gradient = by_torch(x, weight.T)
    np.testing.assert_allclose(y, expected, atol=2e-3 * np.abs(expected).max())
    np.testing.assert_allclose(slope, gradient, rtol=1e-5, atol=1e-5 * np.abs(gradient).max())
    assert said == {"MatMulNBits": 1}


@pytest.mark.parametrize("axis", [None, 1, -1])
@pytest.mark.parametrize("kind", [np.int8, np.uint8])
def test_rounding_passes_the_gradient_within_the_range_as_in_torch(kind: type, axis: int | None) -> None:
    ends = np.iinfo(kind)
    size = 1 if axis is None else (5 if axis == 1 else 13)
    scale = DRAW.uniform(0.01, 0.03, size).astype(np.float32)
    zero = DRAW.integers(ends.min, ends.max, size).astype(kind)
    weight = DRAW.standard_normal((13, 7)).astype(np.float32)

    def build(chain: Chain, x: ir.Value) -> ir.Value:
        step, offset = chain.constant(scale if axis else scale[0]), chain.constant(zero if axis else zero[0])
        places = {} if axis is None else {"axis": axis}
        rounded = chain.op("QuantizeLinear", x, step, offset, **places)
        return chain.op("MatMul", chain.op("DequantizeLinear", rounded, step, offset, **places), chain.constant(weight))

    x = (2 * DRAW.standard_normal((2, 5, 13))).astype(np.float32)
    y, slope, said = Chain(3, build).gradient(x)
    given = torch.tensor(x, requires_grad=True)
    if axis is None:
        rounded = torch.fake_quantize_per_tensor_affine(given, float(scale[0]), int(zero[0]), ends.min, ends.max)
    else:
        rounded = torch.fake_quantize_per_channel_affine(
            given, torch.tensor(scale), torch.tensor(zero.astype(np.int32)), axis % 3, ends.min, ends.max
        )
    expected = rounded @ torch.tensor(weight)
    (expected * torch.tensor(weights_of(expected.shape), dtype=torch.float32)).sum().backward()
    assert given.grad is not None
    saturated = float((given.grad == 0).float().mean())
    assert 0.05 < saturated < 0.95
    np.testing.assert_allclose(y, expected.detach().numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(slope, given.grad.numpy(), rtol=1e-5, atol=1e-5)
    assert said == {"QuantizeLinear": 1, "DequantizeLinear": 1}


def test_weights_that_are_dequantised_are_no_rounding() -> None:
    integers = DRAW.integers(-127, 128, (13, 7)).astype(np.int8)

    def build(chain: Chain, x: ir.Value) -> ir.Value:
        weight = chain.op("DequantizeLinear", chain.constant(integers), chain.constant(np.float32(0.02)))
        return chain.op("MatMul", x, weight)

    x = DRAW.standard_normal((2, 5, 13)).astype(np.float32)
    _, slope, said = Chain(3, build).gradient(x)
    np.testing.assert_allclose(slope, by_torch(x, integers * 0.02)[1], rtol=1e-5, atol=1e-5)
    assert said == {}


def test_counts_and_indices_pass_no_gradient() -> None:
    """Integers that no quantised product adds up."""

    def build(chain: Chain, x: ir.Value) -> ir.Value:
        place = chain.op("ArgMax", x, axis=-1, keepdims=1)
        return chain.op("Mul", x, chain.op("Cast", place, to=int(ir.DataType.FLOAT)))

    x = DRAW.standard_normal((2, 5, 13)).astype(np.float32)
    _, slope, _ = Chain(3, build).gradient(x)
    np.testing.assert_allclose(slope, weights_of(x.shape) * x.argmax(-1, keepdims=True), rtol=1e-5)


def test_what_has_no_gradient_is_named() -> None:
    def scattered(chain: Chain, x: ir.Value) -> ir.Value:
        return chain.op("ScatterND", x, chain.constant(np.array([[0]])), chain.op("Neg", x))

    def blocked(chain: Chain, x: ir.Value) -> ir.Value:
        step = chain.constant(np.full((2, 5, 2), 0.1, np.float32))
        return chain.op("DequantizeLinear", chain.op("QuantizeLinear", x, step, block_size=7), step, block_size=7)

    with pytest.raises(InputError, match=r"the operator ScatterND of node .* has no derivative here"):
        surgery.differentiate(Chain(3, scattered).model, [START], of=END)
    with pytest.raises(InputError, match="quantised in blocks cannot be differentiated"):
        surgery.differentiate(Chain(3, blocked).model, [START], of=END)
