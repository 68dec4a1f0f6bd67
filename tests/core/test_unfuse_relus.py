"""ReLUs that ONNX Runtime's static quantiser leaves out are put back where it did, and nowhere else."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from graphlens import surgery
from tests.fused import Array, normal, run

X = normal(0, 4, 9)


class _Reader(CalibrationDataReader):  # type: ignore[misc]  # the library is not typed
    def __init__(self) -> None:
        self._left = [{"x": X}]

    def get_next(self) -> dict[str, Array] | None:
        return self._left.pop() if self._left else None


def two_products(between: str, bias: bool = True) -> onnx.ModelProto:
    """An MLP with something between its products."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m"], name="first")]
    hidden = "m"
    if bias:
        nodes.append(helper.make_node("Add", ["m", "b"], ["h"], name="bias"))
        hidden = "h"
    if between == "squared":
        nodes += [helper.make_node("Relu", [hidden], ["r"]), helper.make_node("Mul", ["r", "r"], ["a"])]
    elif between:
        nodes.append(helper.make_node(between, [hidden], ["a"], name="act"))
    nodes.append(helper.make_node("MatMul", ["a" if between else hidden, "v"], ["y"], name="second"))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 9])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5])],
        [
            numpy_helper.from_array(array, name)
            for name, array in {"w": normal(1, 9, 7), "b": normal(2, 7), "v": normal(3, 7, 5)}.items()
            if bias or name != "b"
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def quantised(
    proto: onnx.ModelProto, folder: Path, form: QuantFormat, kind: QuantType = QuantType.QUInt8
) -> onnx.ModelProto:
    onnx.save(proto, folder / "plain.onnx")
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            quantize_static(folder / "plain.onnx", folder / "small.onnx", _Reader(), form, activation_type=kind)
    finally:
        logging.disable(before)
    return onnx.load(folder / "small.onnx")


def relus(model: ir.Model) -> int:
    return sum(node.op_type == "Relu" for node in model.graph)


@pytest.mark.parametrize("form", list(QuantFormat), ids=lambda form: form.name)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [QuantType.QUInt8, QuantType.QInt8], ids=lambda kind: kind.name)
@pytest.mark.parametrize("between", ["Relu", "squared"])
def test_a_relu_that_was_left_out_is_put_back(
    form: QuantFormat, bias: bool, kind: QuantType, between: str, tmp_path: Path
) -> None:
    proto = quantised(two_products(between, bias), tmp_path, form, kind)
    assert not relus(ir.from_proto(proto))
    done = surgery.unfuse(ir.from_proto(proto))
    assert relus(done.model) == 1
    assert not done.kept
    (original,), (found,) = run(proto, {"x": X * 3}), run(ir.to_proto(done.model), {"x": X * 3})
    if form == QuantFormat.QDQ:
        assert np.array_equal(found, original)
    (relu,) = [node for node in done.model.graph if node.op_type == "Relu"]
    assert done.origin[str(relu.name)] in {node.name for node in proto.graph.node}
    relu.op_type = "Identity"  # the quantiser behind it does the same: not a bit changes
    assert np.array_equal(run(ir.to_proto(done.model), {"x": X * 3})[0], found)


@pytest.mark.parametrize("between", ["", "Sigmoid", "Tanh", "LeakyRelu"])
def test_no_relu_comes_where_none_was(between: str, tmp_path: Path) -> None:
    proto = quantised(two_products(between), tmp_path, QuantFormat.QDQ)
    assert not relus(surgery.unfuse(ir.from_proto(proto)).model)


def test_a_relu_that_is_there_is_not_doubled(tmp_path: Path) -> None:
    proto = two_products("Relu")
    assert relus(surgery.unfuse(ir.from_proto(proto)).model) == 1
