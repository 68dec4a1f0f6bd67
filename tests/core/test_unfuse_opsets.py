"""Files of older opsets compute the same after they are raised, and what cannot be raised is refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphlens import surgery
from graphlens.errors import InputError, ModelFileError
from graphlens.surgery.unfusing.opsets import LEAST
from tests.fused import MICROSOFT, RNG, Array, Fused, normal, run, run_unfused, same

X = normal(0, 2, 3, 4, 5)
IMAGE = normal(1, 2, 3, 6, 5)
SCALES = np.array([1, 1, 2, 1.5], np.float32)


def old(
    operator: str, opset: int, *inputs: Array, outputs: int = 1, constants: tuple[int, ...] = (), **attributes: Any
) -> Fused:
    return Fused(operator, inputs, outputs, "", opset, attributes, constants)


REDUCTIONS = [
    f"Reduce{kind}" for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
]


@pytest.mark.parametrize("operator", REDUCTIONS)
@pytest.mark.parametrize("opset", [7, 11, 13])
def test_reductions(operator: str, opset: int) -> None:
    if operator == "ReduceSum" and opset == 13:
        same(old(operator, opset, np.abs(X), np.array([1, -1]), constants=(1,)))
        return
    for attributes in ({"axes": [1, 3]}, {"axes": [2], "keepdims": 0}, {}, {"keepdims": 0}):
        same(old(operator, opset, np.abs(X), **attributes))


@pytest.mark.parametrize("operator", ["Softmax", "LogSoftmax", "Hardmax"])
@pytest.mark.parametrize("axis", [None, 0, 1, 2, 3, -1, -2])
@pytest.mark.parametrize("opset", [7, 11, 12])
def test_softmax_of_several_axes(operator: str, axis: int | None, opset: int) -> None:
    if axis is not None and axis < 0 and opset < 11:
        axis += 4
    same(old(operator, opset, X, **({} if axis is None else {"axis": axis})))


OLD = {
    "Squeeze": old("Squeeze", 11, normal(2, 2, 1, 3, 1), axes=[1, -1]),
    "Squeeze without axes": old("Squeeze", 9, normal(2, 2, 1, 3, 1)),
    "Unsqueeze": old("Unsqueeze", 12, X, axes=[0, 3]),
    "Split": old("Split", 11, X, axis=2, split=[1, 3], outputs=2),
    "Split in equal parts": old("Split", 12, X, axis=-2, outputs=2),
    "Split of opset 13": old("Split", 13, X, axis=2, outputs=2),
    "Split of opset 13 with sizes": old("Split", 13, X, np.array([3, 1]), axis=2, outputs=2, constants=(1,)),
    "Clip": old("Clip", 9, X, min=-0.5, max=0.3),
    "Clip below": old("Clip", 7, X, max=0.3),
    "Dropout": old("Dropout", 11, X, ratio=0.4),
    "Dropout of opset 7": old("Dropout", 7, X, ratio=0.4),
    "Dropout of opset 13": old("Dropout", 13, X),
    "Pad": old("Pad", 9, X, pads=[0, 1, 0, 2, 0, 0, 1, 0], value=0.7),
    "Pad by reflection": old("Pad", 10, X, pads=[0, 1, 0, 2, 0, 0, 1, 0], mode="reflect"),
    "Slice": old("Slice", 9, X, starts=[1, -2], ends=[9, -1], axes=[0, 3]),
    "Slice without axes": old("Slice", 9, X, starts=[0, 1], ends=[2, 3]),
    "TopK": old("TopK", 9, X, k=2, axis=2, outputs=2),
    "Upsample": old("Upsample", 9, IMAGE, SCALES, mode="nearest", constants=(1,)),
    "Upsample linearly": old("Upsample", 9, IMAGE, np.array([1, 1, 2, 2], np.float32), mode="linear", constants=(1,)),
    "Upsample of opset 7": old("Upsample", 7, IMAGE, scales=[1.0, 1.0, 2.0, 1.5], mode="nearest"),
    "Resize": old("Resize", 10, IMAGE, SCALES, mode="nearest", constants=(1,)),
    "Scatter": old("Scatter", 9, X[0, 0], np.array([[1, 0, 2, 3, 0]]), normal(4, 1, 5), axis=0),
    "BatchNormalization": old(
        "BatchNormalization", 9, IMAGE, normal(2, 3), normal(3, 3), normal(4, 3), np.abs(normal(5, 3))
    ),
    "GridSample": old("GridSample", 16, IMAGE, RNG(3).uniform(-1, 1, (2, 4, 4, 2)).astype(np.float32), mode="bilinear"),
    "Gemm": old("Gemm", 7, normal(2, 4, 3), normal(3, 5, 3), normal(4, 5), transB=1),
    "MatMul": old("MatMul", 8, X, normal(2, 5, 3)),
    "Cast": old("Cast", 8, X, to=TensorProto.INT64),
    "Concat": old("Concat", 9, X, X, axis=1),
    "Pow": old("Pow", 7, np.abs(X), np.array(3, np.float32)),
    "Gather": old("Gather", 7, X, np.array([1, 0])),
    "Where": old("Where", 9, X > 0, X, np.array(0, np.float32)),
    "AveragePool": old("AveragePool", 7, IMAGE, kernel_shape=[2, 2], strides=[2, 1], pads=[1, 0, 1, 1]),
    "MaxPool": old("MaxPool", 8, IMAGE, kernel_shape=[2, 2], pads=[1, 0, 1, 1]),
    "OneHot": old("OneHot", 9, np.array([[1, 4], [0, 2]]), np.array(6), np.array([0, 1], np.float32), constants=(1,)),
    "CumSum": old("CumSum", 11, X, np.array(2)),
    "ArgMax": old("ArgMax", 7, X, axis=2),
    "Mean": old("Mean", 8, X, X[0]),
    "DequantizeLinear": old(
        "DequantizeLinear", 10, np.array([3, 250], np.uint8), np.array(0.1, np.float32), np.array(9, np.uint8)
    ),
    "LayerNormalization": old("LayerNormalization", 17, X, normal(2, 5)),
}


@pytest.mark.parametrize("case", OLD)
def test_raised(case: str) -> None:
    same(OLD[case])
    assert OLD[case].unfused().model.opset_imports[""] == LEAST


def test_the_mask_of_dropout() -> None:
    for opset in (7, 10):
        found = run_unfused(old("Dropout", opset, X, outputs=2))
        np.testing.assert_array_equal(found[0], X)
        assert found[1].all()
        assert found[1].dtype == (np.bool_ if opset == 10 else np.float32)


def test_what_is_not_raised_is_refused_by_name() -> None:
    with pytest.raises(ModelFileError, match=r"RoiAlign \('fused'\) of opset 11 means something else in opset 20"):
        old("RoiAlign", 11, IMAGE, normal(2, 3, 4), np.array([0, 1, 0])).unfused()
    with pytest.raises(ModelFileError, match="reads opset 7 and later"):
        surgery.unfuse(ir.from_proto(old("Relu", 6, X).proto()))
    with pytest.raises(ModelFileError, match="in a form for training"):
        old("BatchNormalization", 9, IMAGE, *(normal(seed, 3) for seed in range(4)), outputs=5).unfused()


def test_later_opsets_stay() -> None:
    for opset in (20, 23):
        assert old("Relu", opset, X).unfused().model.opset_imports[""] == opset


def told(name: str, kind: int, shape: list[Any] | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def chain() -> onnx.ModelProto:
    """A file of opset 11: a quantised layer that stays, a fused one, and a branch with an operator that changed."""
    weight = RNG(3).integers(0, 256, (6, 1, 16)).astype(np.uint8)
    inner = helper.make_graph(
        [helper.make_node("Squeeze", ["n"], ["s"], axes=[0])],
        "then",
        [],
        [told("s", TensorProto.FLOAT, None)],
    )
    other = helper.make_graph(
        [helper.make_node("ReduceMean", ["n"], ["t"], axes=[0], keepdims=0)],
        "else",
        [],
        [told("t", TensorProto.FLOAT, None)],
    )
    nodes = [
        helper.make_node("Unsqueeze", ["x"], ["u"], axes=[0]),
        helper.make_node(
            "MatMulNBits", ["u", "w", "scales"], ["m"], "linear", domain=MICROSOFT, K=32, N=6, bits=4, block_size=32
        ),
        helper.make_node("FastGelu", ["m", "bias"], ["g"], domain=MICROSOFT),
        helper.make_node("FastGelu", ["g"], ["n"], domain=MICROSOFT),
        helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=other),
    ]
    arrays = {"w": weight, "scales": np.full(6, 0.1, np.float32), "bias": normal(5, 6)}
    graph = helper.make_graph(
        nodes,
        "chain",
        [
            told("x", TensorProto.FLOAT, ["n", 32]),
            told("c", TensorProto.BOOL, []),
        ],
        [
            told("y", TensorProto.FLOAT, None),
            told("m", TensorProto.FLOAT, None),
        ],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 11), helper.make_opsetid(MICROSOFT, 1)], ir_version=6
    )


def test_a_quantised_layer_is_kept_where_the_opset_is_raised() -> None:
    proto = chain()
    done = surgery.unfuse(ir.from_proto(proto))
    assert done.expanded == {"com.microsoft::FastGelu": 2}
    assert list(done.kept) == ["com.microsoft::MatMulNBits"]
    assert "matrix product" in done.kept["com.microsoft::MatMulNBits"]
    for choice in (True, False):
        feeds = {"x": normal(7, 1, 32), "c": np.array(choice)}
        for found, expected in zip(run(ir.to_proto(done.model), feeds), run(proto, feeds), strict=True):
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_the_original_stays_as_it_was() -> None:
    model = ir.from_proto(chain())
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    surgery.unfuse(model)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_names_and_origins() -> None:
    done = surgery.unfuse(ir.from_proto(chain()))
    nodes = {str(node.name): node for node in done.model.graph}
    assert len(nodes) == len(list(done.model.graph))
    values = {value.name for node in nodes.values() for value in node.outputs}
    assert values >= {"u", "m", "g", "n", "y"}
    for new, origin in done.origin.items():
        assert new.startswith(f"{origin}/")
    assert "linear" in nodes
    assert {origin.partition("_")[0] for origin in done.origin.values()} == {
        "Unsqueeze",
        "FastGelu",
        "Squeeze",
        "ReduceMean",
    }


def test_unfusing_again_changes_nothing() -> None:
    once = surgery.unfuse(ir.from_proto(chain()))
    again = surgery.unfuse(once.model)
    assert not again.expanded
    assert not again.origin
    written = [ir.to_proto(done.model).SerializeToString(deterministic=True) for done in (once, again)]
    assert written[0] == written[1]


def test_names_that_a_file_has_are_never_taken() -> None:
    """Of nodes, values and initializers; a first fused operator was written out by someone else."""
    fused = Fused("QuickGelu", [normal(0, 2, 3)])
    proto = surgery.unfuse(fused.model()).model
    text = ir.to_proto(proto)
    node = helper.make_node("QuickGelu", ["out0"], ["last"], "fused", None, MICROSOFT, alpha=0.3)
    text.graph.node.append(node)
    text.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    text.graph.output.append(helper.make_tensor_value_info("last", TensorProto.FLOAT, None))
    done = surgery.unfuse(ir.from_proto(text))
    assert done.expanded == {f"{MICROSOFT}::QuickGelu": 1}
    for found, expected in zip(run(ir.to_proto(done.model), fused.feeds()), run(text, fused.feeds()), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_constants_that_a_branch_needs_first() -> None:
    """They belong to the main graph, where later nodes find them too."""
    inner = helper.make_graph([helper.make_node("Squeeze", ["x"], ["s"], axes=[0])], "then", [], [told("s", 1, None)])
    other = helper.make_graph(
        [helper.make_node("ReduceMax", ["x"], ["t"], axes=[0], keepdims=0)], "else", [], [told("t", 1, None)]
    )
    nodes = [
        helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=other),
        helper.make_node("Unsqueeze", ["y"], ["z"], axes=[0]),
    ]
    ends = [told("x", 1, ["n", 4]), told("c", TensorProto.BOOL, [])], [told("z", 1, None)]
    proto = helper.make_model(
        helper.make_graph(nodes, "g", *ends), opset_imports=[helper.make_opsetid("", 11)], ir_version=6
    )
    done = surgery.unfuse(ir.from_proto(proto))
    for choice in (True, False):
        feeds = {"x": normal(3, 1, 4), "c": np.array(choice)}
        np.testing.assert_array_equal(run(ir.to_proto(done.model), feeds)[0], run(proto, feeds)[0])


def test_what_is_kept_because_it_was_asked_for() -> None:
    for word in ("FastGelu", "com.microsoft::FastGelu"):
        done = surgery.unfuse(ir.from_proto(chain()), keep=[word])
        assert not done.expanded
        assert "asked for" in done.kept["com.microsoft::FastGelu"]
        assert [node.op_type for node in done.model.graph].count("FastGelu") == 2
    assert surgery.unfuse(ir.from_proto(chain()), keep=["Attention", "If"]).expanded
    with pytest.raises(InputError, match=r"keep='FastGelo': .* Nearest: 'FastGelu'"):
        surgery.unfuse(ir.from_proto(chain()), keep=["FastGelo"])
