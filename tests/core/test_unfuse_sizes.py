"""Types and sizes that unfusing follows are those of a run, and enough of them where a file says none."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphlens import surgery
from tests.core.test_unfuse_attention import attention, multi_head, standard
from tests.core.test_unfuse_grouped import B, P, grouped
from tests.core.test_unfuse_norms import cache, weight, x
from tests.core.test_unfuse_opsets import OLD
from tests.fused import MICROSOFT, Array, Fused, difference, normal, run

CASES = {
    **OLD,
    "Attention": attention(True, "rows", unidirectional=1),
    "lengths": attention(mask="ends and starts", wide=11),
    "MultiHeadAttention": multi_head(True, "rows and columns", True, unidirectional=1),
    "standard": standard(True, 2, mask=normal(9, 5, 9), softcap=0.5, is_causal=1),
    "standard of heads": standard(four=True, groups=2, opset=24, ends=np.array([5, 2, 3])),
    "prompt": grouped([5, 2, 4], packed=True, rotary=16, sink=True, local_window_size=2),
    "step": grouped(
        [P + 1, 2, P], 1, P, rotary=32, sliding_window_cache=1, local_window_size=3, bias=normal(5, B, 1, 1, P + 1)
    ),
    "LayerNormalization": Fused("LayerNormalization", [x(), weight(), weight(2)], 3, ""),
    "RotaryEmbedding": Fused(
        "RotaryEmbedding",
        [normal(0, 3, 5, 48), np.array([2]), *cache(8)],
        attributes={"num_heads": 3, "rotary_embedding_dim": 8, "interleaved": 1},
    ),
}


def compare(proto: onnx.ModelProto, feeds: dict[str, Array]) -> None:
    """Compares what is said of every value of the unfused graph with what a run makes of it."""
    model = surgery.unfuse(ir.from_proto(proto)).model
    said = {str(value.name): value for node in model.graph for value in node.outputs if value.name}
    shown = ir.to_proto(model)
    del shown.graph.value_info[:]
    del shown.graph.output[:]
    shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in said)
    sizes = {
        dim.dim_param: feeds[each.name].shape[axis]
        for each in proto.graph.input
        for axis, dim in enumerate(each.type.tensor_type.shape.dim)
        if dim.dim_param
    }
    for (name, value), found in zip(said.items(), run(shown, feeds), strict=True):
        assert value.dtype is not None, name
        assert value.dtype.numpy() == found.dtype, name
        if value.shape is None:
            continue
        assert len(value.shape) == found.ndim, name
        for size, real in zip(value.shape, found.shape, strict=True):
            known = size if isinstance(size, int) else sizes.get(str(size.value))
            assert known is None or known == real, name


@pytest.mark.parametrize("case", CASES)
def test_what_is_said_of_values_is_what_a_run_makes_of_them(case: str) -> None:
    compare(CASES[case].proto(), CASES[case].feeds())


def heads_by_a_shape(size: int) -> onnx.ModelProto:
    """Queries that are split into heads by a shape that a run computes, as torch exports them; no types of values inside."""
    nodes = [
        helper.make_node("SkipLayerNormalization", ["x", "x", "g"], ["n"], "norm", None, MICROSOFT),
        helper.make_node("MatMul", ["n", "w"], ["p"]),
        helper.make_node("Shape", ["p"], ["shape"]),
        helper.make_node("Slice", ["shape", "zero", "two"], ["lead"]),
        helper.make_node("Concat", ["lead", "tail"], ["sizes"], axis=0),
        helper.make_node("Reshape", ["p", "sizes"], ["split"]),
        helper.make_node("Transpose", ["split"], ["heads"], perm=[0, 2, 1, 3]),
        helper.make_node("Slice", ["heads", "zero", "all", "two"], ["cut"]),
        helper.make_node("Attention", ["cut", "cut", "cut"], ["y"], "fused", is_causal=1),
    ]
    arrays = {
        "g": weight(1, 24),
        "w": normal(2, 24, 24),
        "zero": np.array([0]),
        "two": np.array([2]),
        "all": np.array([2**63 - 1]),
        "tail": np.array([size, 8]),
    }
    graph = helper.make_graph(
        nodes,
        "heads",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", "s", 24])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    domains = [helper.make_opsetid("", 23), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=domains, ir_version=11)


@pytest.mark.parametrize("size", [3, -1])
def test_heads_are_found_where_a_run_computes_the_shape(size: int) -> None:
    proto, feeds = heads_by_a_shape(size), {"x": normal(3, 2, 5, 24)}
    done = surgery.unfuse(ir.from_proto(proto))
    assert not done.kept
    assert done.expanded == {f"{MICROSOFT}::SkipLayerNormalization": 1, "Attention": 1}
    assert difference(run(ir.to_proto(done.model), feeds)[0], run(proto, feeds)[0]) <= 1e-5
    compare(proto, feeds)
