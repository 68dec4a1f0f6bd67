"""Gradient rules against torch's autograd, operator by operator, on odd sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.one_operator import FIXED, NAMELESS, Array, Operator, weights_of

DRAW = np.random.default_rng(12)
T = torch.Tensor


def signed(*shape: int) -> Array:
    return DRAW.standard_normal(shape).astype(np.float32)


def above(*shape: int) -> Array:
    return DRAW.uniform(0.3, 2.0, shape).astype(np.float32)


def ints(*numbers: int) -> Array:
    return np.array(numbers, np.int64)


# The operator, its inputs, its attributes, and torch's function of the inputs that are differentiated: the floats.
CASES: list[tuple[str, list[Array | None], dict[str, Any], Callable[..., T]]] = [
    ("Cos", [signed(3, 5, 7)], {}, torch.cos),
    ("Sin", [signed(3, 5, 7)], {}, torch.sin),
    ("Neg", [signed(3, 5)], {}, torch.neg),
    ("Exp", [signed(3, 5)], {}, torch.exp),
    ("Log", [above(3, 5)], {}, torch.log),
    ("Sqrt", [above(3, 5)], {}, torch.sqrt),
    ("Reciprocal", [above(3, 5)], {}, torch.reciprocal),
    ("Tanh", [signed(3, 5)], {}, torch.tanh),
    ("Sigmoid", [signed(3, 5)], {}, torch.sigmoid),
    ("Erf", [signed(3, 5)], {}, torch.erf),
    ("Relu", [signed(3, 5)], {}, torch.relu),
    ("Softplus", [3 * signed(3, 5)], {}, F.softplus),
    ("LeakyRelu", [signed(3, 5)], {"alpha": 0.2}, lambda x: F.leaky_relu(x, 0.2)),
    ("Elu", [signed(3, 5)], {}, F.elu),
    ("HardSwish", [4 * signed(3, 5)], {}, F.hardswish),
    ("HardSigmoid", [4 * signed(3, 5)], {"alpha": 1 / 6, "beta": 0.5}, F.hardsigmoid),
    ("Gelu", [2 * signed(3, 5)], {}, F.gelu),
    ("Gelu", [2 * signed(3, 5)], {"approximate": "tanh"}, lambda x: F.gelu(x, approximate="tanh")),
    ("Abs", [signed(3, 5)], {}, torch.abs),
    ("Pow", [above(3, 5), np.array(3, np.int64)], {}, lambda x: x**3),
    ("Pow", [above(3, 5), np.array(-1.5)], {}, lambda x: x**-1.5),
    ("Clip", [signed(3, 5), np.array(-0.5, np.float64), None], {}, lambda x: x.clamp(min=-0.5)),
    ("Add", [signed(3, 1, 7), signed(5, 1)], {}, torch.add),
    ("Sub", [signed(7), signed(3, 5, 7)], {}, torch.sub),
    ("Mul", [signed(3, 5, 7), signed(5, 1)], {}, torch.mul),
    ("Div", [signed(3, 1, 7), above(5, 7)], {}, torch.div),
    ("Max", [signed(3, 5), signed(5)], {}, torch.maximum),
    ("Min", [signed(3, 5), signed(3, 1)], {}, torch.minimum),
    ("Softmax", [signed(3, 5, 7)], {"axis": 1}, lambda x: x.softmax(1)),
    ("Softmax", [signed(3, 5, 7)], {"axis": 0}, lambda x: x.softmax(0)),
    ("LogSoftmax", [signed(3, 5, 7)], {"axis": -1}, lambda x: x.log_softmax(-1)),
    ("ReduceMean", [signed(3, 5, 7), ints(-1, 0)], {"keepdims": 0}, lambda x: x.mean((0, 2))),
    ("ReduceSum", [signed(3, 5, 7), ints(1)], {"keepdims": 1}, lambda x: x.sum(1, keepdim=True)),
    ("ReduceMax", [signed(3, 5, 7), ints(-1)], {"keepdims": 0}, lambda x: x.amax(-1)),
    ("ReduceMax", [np.tile(signed(3, 2), (1, 3)), ints(-1)], {"keepdims": 0}, lambda x: x.amax(-1)),  # ties
    ("ReduceMin", [signed(3, 5, 7), ints(0, 1)], {}, lambda x: x.amin((0, 1), keepdim=True)),
    ("ReduceL2", [signed(3, 5), ints(-1)], {}, lambda x: x.norm(dim=-1, keepdim=True)),
    ("ReduceLogSumExp", [signed(3, 5), ints(-1)], {"keepdims": 0}, lambda x: x.logsumexp(-1)),
    ("Slice", [signed(3, 5, 7), ints(4), ints(2**60), ints(-1)], {}, lambda x: x[..., 4:]),
    ("Slice", [signed(3, 5, 7), ints(-1), ints(-(2**60)), ints(1), ints(-2)], {}, lambda x: x.flip(1)[:, ::2]),
    ("Slice", [signed(3, 5, 7), ints(0, 1), ints(3, 5), ints(0, 2), ints(2, 3)], {}, lambda x: x[0:3:2, :, 1:5:3]),
    ("Concat", [signed(3, 5), signed(3, 1)], {"axis": -1}, lambda *x: torch.cat(x, -1)),
    ("Gather", [signed(5, 7), ints(1, -1, 1)], {"axis": 1}, lambda x: x[:, [1, -1, 1]]),
    ("GatherElements", [signed(3, 5), np.array([[0, 4], [4, 4], [1, 0]])], {"axis": 1},
     lambda x: x.gather(1, torch.tensor([[0, 4], [4, 4], [1, 0]]))),
    ("Tile", [signed(3, 1, 5), ints(1, 4, 2)], {}, lambda x: x.tile(1, 4, 2)),
    ("Expand", [signed(3, 1, 5), ints(2, 1, 4, 1)], {}, lambda x: x.expand(2, 3, 4, 5)),
    ("Where", [signed(3, 5) > 0, signed(3, 5), signed(5)], {}, lambda a, b: torch.where(CHOSEN, a, b)),
    ("Trilu", [signed(2, 5, 5)], {"upper": 0}, torch.tril),
    ("Transpose", [signed(3, 5, 7)], {"perm": [1, 2, 0]}, lambda x: x.permute(1, 2, 0)),
    ("Reshape", [signed(3, 5, 7), ints(5, -1)], {}, lambda x: x.reshape(5, -1)),
    ("MatMul", [signed(2, 3, 5, 7), signed(2, 1, 7, 4)], {}, torch.matmul),
    ("MatMul", [signed(5, 7), signed(3, 7, 4)], {}, torch.matmul),
    ("MatMul", [signed(3, 5, 7), signed(7)], {}, torch.matmul),
    ("MatMul", [signed(7), signed(3, 7, 4)], {}, torch.matmul),
    ("Gemm", [signed(7, 5), signed(4, 7), signed(4)], {"transA": 1, "transB": 1, "alpha": 0.5, "beta": 2.0},
     lambda a, b, c: 0.5 * a.T @ b.T + 2 * c),
    ("Einsum", [signed(2, 3, 5, 7), signed(2, 4, 5, 7)], {"equation": "bqhd,bkhd->bhqk"},
     lambda a, b: torch.einsum("bqhd,bkhd->bhqk", a, b)),
    ("Einsum", [signed(3, 5), signed(5, 7)], {"equation": "ij,jk"}, lambda a, b: torch.einsum("ij,jk", a, b)),
    ("Conv", [signed(2, 3, 9, 8), DRAW.standard_normal((4, 3, 4, 3))], {"strides": [4, 3]},
     lambda x: F.conv2d(x, KERNEL, stride=(4, 3))),
]  # fmt: skip
CHOSEN = torch.from_numpy(next(inputs[0] for kind, inputs, _, _ in CASES if kind == "Where"))
KERNEL = torch.from_numpy(next(inputs[1] for kind, inputs, _, _ in CASES if kind == "Conv").astype(np.float32))


@pytest.mark.parametrize("sizes", [FIXED, NAMELESS])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_a_rule_is_autograds(
    case: tuple[str, list[Array | None], dict[str, Any], Callable[..., T]], sizes: str
) -> None:
    """The float32 inputs are differentiated; a float64 one is a constant."""
    kind, inputs, attributes, function = case
    wrt = [place for place, array in enumerate(inputs) if array is not None and array.dtype == np.float32]
    given = [array.astype(np.float32) if array is not None and array.dtype == np.float64 else array for array in inputs]
    found = Operator(kind, given, wrt, attributes, sizes=sizes).gradients()
    tensors = [torch.tensor(inputs[place], requires_grad=True) for place in wrt]
    y = function(*tensors)
    (y * torch.tensor(weights_of(y.shape), dtype=torch.float32)).sum().backward()
    for gradient, tensor in zip(found, tensors, strict=True):
        assert tensor.grad is not None
        expected = tensor.grad.numpy()
        np.testing.assert_allclose(gradient, expected, rtol=2e-5, atol=2e-6 * max(1.0, float(np.abs(expected).max())))
