"""Convolutions that ONNX Runtime fused or put into blocks of channels compute the same after they are written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphlens import surgery
from graphlens.pipelines.adopt_probe import channel_block
from tests.fused import MICROSOFT, Array, Fused, difference, normal, run, same

BLOCKED = f"{MICROSOFT}.nchwc"
IMAGE = normal(0, 2, 3, 13, 15)


def saved(
    folder: Path, channels: int, image: Array = IMAGE, last: bool = False, bias: bool = True, **window: Any
) -> onnx.ModelProto:
    """One convolution as ONNX Runtime saves it where it optimises for this processor."""
    width = image.shape[1] // window.get("group", 1)
    inputs = ["x", "w", *(["b"] if bias else [])]
    after = ("Transpose", {"perm": [0, 2, 3, 1]}) if last else ("Neg", {})
    nodes = [helper.make_node("Conv", inputs, ["c"], name="conv", **window)]
    nodes.append(helper.make_node(after[0], ["c"], ["y"], **after[1]))
    constants = {"w": normal(1, channels, width, *window["kernel_shape"]), "b": normal(2, channels)}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *image.shape[1:]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items() if name in inputs],
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "saved.onnx")
    opsets = [helper.make_opsetid("", 17)]
    plain = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    onnxruntime.InferenceSession(plain.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "saved.onnx")


def blocked(proto: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in proto.graph.node if node.domain == BLOCKED]


def expanded(proto: onnx.ModelProto, **options: int) -> onnx.ModelProto:
    model = ir.from_proto(proto)
    done = surgery.unfuse(model, **options)
    assert not done.kept, done.kept
    assert done.expanded == {f"{BLOCKED}::Conv": 1, f"{BLOCKED}::ReorderOutput": 1}
    assert {node.domain for node in done.model.graph} == {""}
    return ir.to_proto(done.model)


WINDOWS: list[dict[str, Any]] = [
    {"kernel_shape": [4, 4], "strides": [4, 4]},
    {"kernel_shape": [3, 5], "pads": [1, 2, 0, 1], "strides": [2, 1]},
    {"kernel_shape": [3, 3], "dilations": [2, 2], "pads": [2, 2, 2, 2]},
    {"kernel_shape": [3, 3], "auto_pad": "SAME_UPPER"},
]


@pytest.mark.parametrize("channels", [8, 16, 24, 40, 48, 33])
@pytest.mark.parametrize("window", WINDOWS, ids=["patches", "padded", "dilated", "same"])
@pytest.mark.parametrize("last", [False, True])
def test_channels_in_blocks(channels: int, window: dict[str, Any], last: bool, tmp_path: Path) -> None:
    proto = saved(tmp_path, channels, last=last, bias=channels != 24, **window)
    assert blocked(proto) == ["Conv", "ReorderOutput"]
    block = channel_block(ir.from_proto(proto))
    assert block in (8, 16)
    (found,), (original,) = (run(each, {"x": IMAGE}) for each in (expanded(proto, block=block), proto))
    assert difference(found, original) <= 1e-5


def test_how_many_channels_a_block_has_is_not_guessed(tmp_path: Path) -> None:
    """32 channels are two blocks of 16 or four of 8: the wrong number would give other numbers, without a word."""
    proto = saved(tmp_path, 32, **WINDOWS[0])
    assert blocked(proto) == ["Conv", "ReorderOutput"]
    model = ir.from_proto(proto)
    done = surgery.unfuse(model)
    assert not done.expanded
    assert "nothing tells how many channels a block has" in done.kept[f"{BLOCKED}::Conv"]
    assert "channels in blocks" in done.kept[f"{BLOCKED}::ReorderOutput"]
    right = channel_block(model)
    (original,) = run(proto, {"x": IMAGE})
    (found,), (other,) = (run(expanded(proto, block=each), {"x": IMAGE}) for each in (right, 24 - right))
    assert difference(found, original) <= 1e-5
    assert difference(other, original) > 0.1


def test_the_number_of_channels_tells_where_it_fits_one_size(tmp_path: Path) -> None:
    proto = saved(tmp_path, 40, **WINDOWS[0])
    sizes = {tensor.name: list(tensor.dims) for tensor in proto.graph.initializer}
    rows = sizes[next(node for node in proto.graph.node if node.op_type == "Conv").input[1]][0]
    assert rows in (40, 48)
    (found,), (original,) = (run(each, {"x": IMAGE}) for each in (expanded(proto), proto))
    assert difference(found, original) <= 1e-5


def test_a_graph_that_is_not_in_blocks_needs_none() -> None:
    assert channel_block(Fused("FusedConv", [IMAGE, normal(1, 5, 3, 3, 3)]).model()) == 0


def test_convolutions_behind_one_another_stay(tmp_path: Path) -> None:
    """No vision transformer has them."""
    wide = normal(0, 1, 32, 9, 9)
    proto = saved(tmp_path, 32, wide, kernel_shape=[3, 3])
    assert blocked(proto) == ["ReorderInput", "Conv", "ReorderOutput"]
    done = surgery.unfuse(ir.from_proto(proto), block=16)
    assert not done.expanded
    assert set(done.kept) == {f"{BLOCKED}::{name}" for name in ("ReorderInput", "Conv", "ReorderOutput")}


ACTIVATIONS: list[tuple[str, list[float]]] = [
    ("", []),
    ("Relu", []),
    ("Sigmoid", []),
    ("Tanh", []),
    ("LeakyRelu", [0.3]),
    ("Clip", [-0.5, 0.7]),
    ("HardSigmoid", [0.3, 0.4]),
]


@pytest.mark.parametrize(("activation", "numbers"), ACTIVATIONS)
@pytest.mark.parametrize("summed", [False, True])
def test_a_convolution_with_an_activation_or_a_sum_inside(activation: str, numbers: list[float], summed: bool) -> None:
    attributes: dict[str, Any] = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "group": 1}
    if activation:
        attributes["activation"] = activation
    if numbers:
        attributes["activation_params"] = numbers
    inputs = [IMAGE, normal(1, 5, 3, 3, 3), normal(2, 5), *([normal(3, 2, 5, 13, 15)] if summed else [])]
    same(Fused("FusedConv", inputs, attributes=attributes))


def test_groups_and_no_bias() -> None:
    attributes = {"kernel_shape": [2, 2], "strides": [2, 2], "group": 3, "activation": "Relu"}
    same(Fused("FusedConv", [IMAGE, normal(1, 6, 1, 2, 2)], attributes=attributes))
