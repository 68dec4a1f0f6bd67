"""Integers that follow from the numbers of prompts and tokens are made once: beside the same graph as it was, at other sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphlens.surgery.adopted.counts import make_counts_once
from graphlens.surgery.graph import drop_unused

WIDTH, PAST = 6, "past_key_values.0.key"
Nodes = list[onnx.NodeProto]
Array = np.ndarray[Any, Any]
# (prompts, tokens, earlier tokens); none of those that counts are derived from.
SIZES = ((1, 1, 0), (1, 1, 4), (2, 9, 0), (3, 2, 5), (4, 12, 1), (1, 130, 2))


def constant(name: str, numbers: object, dtype: type = np.int64) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.asarray(numbers, dtype)))


def node(kind: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, inputs, [output], name=output, **attributes)


def size(axis: int, name: str = "n", of: str = "x") -> Nodes:
    """A size as exporters read it: a scalar."""
    return [
        node("Shape", [of], f"{name}.shape"), constant(f"{name}.axis", axis),
        node("Gather", [f"{name}.shape", f"{name}.axis"], name),
    ]  # fmt: skip


def made(nodes: Nodes, past: bool = True) -> onnx.ModelProto:
    """A graph that gives ``y``, computed from tokens, an optional mask and an optional past."""
    inputs = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])]
    mask = helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["mask_batch", "mask_sequence"])
    inputs.append(mask)
    defaults = {"attention_mask": np.ones((1, 1), np.int64)}
    if past:
        sizes = ["past_batch", 1, "past_sequence", WIDTH]
        inputs.append(helper.make_tensor_value_info(PAST, TensorProto.FLOAT, sizes))
        defaults[PAST] = np.zeros((1, 1, 0, WIDTH), np.float32)
    table = np.random.default_rng(0).normal(size=(11, WIDTH)).astype(np.float32)
    tensors = [numpy_helper.from_array(array, name) for name, array in {**defaults, "table": table}.items()]
    start = [node("Gather", ["table", "input_ids"], "x")]
    output = onnx.ValueInfoProto(name="y")
    graph = helper.make_graph([*start, *nodes], "g", inputs, [output], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def run(proto: onnx.ModelProto, feeds: dict[str, Array]) -> Array:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    taken = {value.name for value in (*session.get_inputs(), *session.get_overridable_initializers())}
    found: Array = session.run(["y"], {name: array for name, array in feeds.items() if name in taken})[0]
    return found


def compare(nodes: Nodes, past: bool = True) -> ir.Model:
    """Compares a graph as it was with what becomes of it, and gives that."""
    proto = made(nodes, past)
    model = ir.from_proto(proto)
    make_counts_once(model)
    drop_unused(model)
    after = ir.to_proto(model)
    random = np.random.default_rng(1)
    for prompts, tokens, earlier in SIZES:
        ids = random.integers(0, 11, (prompts, tokens))
        before = earlier if past else 0
        mask = random.integers(0, 2, (prompts, before + tokens))
        keys = random.normal(size=(prompts, 1, before, WIDTH)).astype(np.float32)
        for feeds in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": mask, PAST: keys}):
            expected, found = run(proto, feeds), run(after, feeds)
            assert found.dtype == expected.dtype
            assert np.array_equal(found, expected), (prompts, tokens, earlier)
    return model


READ = [node("Cast", ["n"], "y", to=TensorProto.FLOAT)]  # a reader that is no integer itself
TWO = constant("two", 2)
FOLLOW = {
    "a shape": [node("Shape", ["x"], "n")],
    "prompts": size(0),
    "tokens": size(1),
    "a width": size(2),
    "three times the tokens": [*size(1, "m"), constant("k", 3), node("Mul", ["m", "k"], "n")],
    "tokens and two": [*size(1, "m"), TWO, node("Add", ["m", "two"], "n")],
    "all tokens of all prompts": [*size(0, "a"), *size(1, "b"), node("Mul", ["a", "b"], "n")],
    "earlier tokens": size(2, of=PAST),
    "earlier and new tokens": [*size(2, "a", PAST), *size(1, "b"), node("Add", ["a", "b"], "n")],
    "a size of joined keys": [
        constant("axes", [1]), node("Unsqueeze", ["x", "axes"], "keys"),
        node("Shape", ["x"], "s"), constant("i", [0]), node("Gather", ["s", "i"], "b"), constant("rest", [1, 1, 1]),
        node("Concat", ["b", "rest"], "full", axis=0), node("Expand", [PAST, "full"], "old"),
        node("Concat", ["old", "keys"], "joined", axis=2), node("Shape", ["joined"], "n"),
    ],
    "of another type": [*size(1, "m"), node("Cast", ["m"], "n", to=TensorProto.INT32)],
}  # fmt: skip
STAY = {
    "cut at the longest input": [*size(1, "m"), constant("k", 100), node("Min", ["m", "k"], "n")],
    "another beyond a length": [
        *size(1, "m"), constant("k", 100), node("Greater", ["m", "k"], "c"), node("Where", ["c", "k", "m"], "n"),
    ],
    "no less than four": [*size(1, "m"), constant("k", 4), node("Max", ["m", "k"], "n")],
    "another for a single token": [
        *size(1, "m"), constant("one", 1), constant("k", 3), node("Equal", ["m", "one"], "c"),
        node("Where", ["c", "k", "m"], "n"),
    ],
    "another for a single prompt": [
        *size(0, "m"), constant("one", 1), constant("k", 3), node("Equal", ["m", "one"], "c"),
        node("Where", ["c", "k", "m"], "n"),
    ],
    "half of the tokens": [*size(1, "m"), TWO, node("Div", ["m", "two"], "n")],
    "whether they are even": [*size(1, "m"), TWO, node("Mod", ["m", "two"], "n")],
    "squared": [*size(1, "m"), node("Mul", ["m", "m"], "n")],
    "numbers of the mask": [constant("i", [0, 0]), node("GatherND", ["attention_mask", "i"], "n")],
    "a number of the mask's default": [
        constant("minus", [-1]), constant("zero", 0), node("Reshape", ["attention_mask", "minus"], "flat"),
        node("Gather", ["flat", "zero"], "n"),
    ],
    "how many tokens are not 0": [node("NonZero", ["input_ids"], "z"), node("Shape", ["z"], "n")],
    "a part as long as a token says": [
        constant("start", [0]), constant("first", [[0, 0]]), node("GatherND", ["input_ids", "first"], "end"),
        node("Slice", ["x", "start", "end", "start"], "part"), node("Shape", ["part"], "n"),
    ],
    "tokens that are 1": [
        constant("k", 1), node("Equal", ["input_ids", "k"], "c"), constant("f", [-1]), node("Reshape", ["c", "f"], "cf"),
        node("Reshape", ["input_ids", "f"], "flat"), node("Compress", ["flat", "cf"], "z"), node("Shape", ["z"], "n"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", FOLLOW)
def test_what_follows_from_counts_is_read_off_the_inputs(name: str) -> None:
    model = compare([*FOLLOW[name], *READ])
    assert not any(each.op_type == "Gather" for each in model.graph)  # x, the table's rows, is not needed for it
    assert "table" not in model.graph.initializers


@pytest.mark.parametrize("name", STAY)
def test_what_does_not_follow_stays(name: str) -> None:
    proto = made([*STAY[name], *READ])
    model = compare([*STAY[name], *READ])
    (kept,) = (each for each in proto.graph.node if each.output[0] == "n")
    assert kept.op_type in [each.op_type for each in model.graph]


def heads(past: bool) -> ir.Model:
    """A reshape into heads, by sizes read off the value."""
    nodes = [
        *size(0, "a"), *size(1, "b"), constant("axis", [0]),
        node("Unsqueeze", ["a", "axis"], "a1"), node("Unsqueeze", ["b", "axis"], "b1"), constant("tail", [3, 2]),
        node("Concat", ["a1", "b1", "tail"], "wanted", axis=0), node("Reshape", ["x", "wanted"], "y"),
    ]  # fmt: skip
    return compare(nodes, past)


@pytest.mark.parametrize("past", [False, True])
def test_a_reshape_that_keeps_sizes_gets_a_constant(past: bool) -> None:
    (reshape,) = (each for each in heads(past).graph if each.op_type == "Reshape")
    wanted = reshape.inputs[1]
    assert wanted is not None
    assert wanted.const_value is not None
    assert wanted.const_value.numpy().tolist() == [0, 0, 3, 2]


def joined(past: bool) -> ir.Model:
    """Tokens of all prompts in one axis."""
    nodes = [
        *size(0, "a"), *size(1, "b"), node("Mul", ["a", "b"], "ab"), constant("axis", [0]),
        node("Unsqueeze", ["ab", "axis"], "ab1"), constant("tail", [2, 3]),
        node("Concat", ["ab1", "tail"], "wanted", axis=0), node("Reshape", ["x", "wanted"], "y"),
    ]  # fmt: skip
    return compare(nodes, past)


def test_one_size_is_left_to_the_reshape() -> None:
    (reshape,) = (each for each in joined(past=False).graph if each.op_type == "Reshape")
    assert reshape.inputs[1] is not None
    assert reshape.inputs[1].const_value is not None
    assert reshape.inputs[1].const_value.numpy().tolist() == [-1, 2, 3]


OLD: Nodes = [  # keys of every prompt, as the first nodes of an adopted graph make them of a default
    node("Shape", ["x"], "xs"), constant("i0", [0]), node("Gather", ["xs", "i0"], "xb"), constant("units", [1, 1, 1]),
    node("Concat", ["xb", "units"], "expanded", axis=0), node("Expand", [PAST, "expanded"], "old"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "allowzero"), [(["c1", "one", "a1"], 0), (["c1", "one", "a1"], 1), (["c1", "a1"], 1), (["a1", "c1"], 1)]
)
def test_of_an_empty_past_no_size_is_left_open(sizes: list[str], allowzero: int) -> None:
    nodes = [
        *OLD, *size(2, "a", "old"), *size(0, "c", "old"), constant("axis", [0]),
        node("Unsqueeze", ["a", "axis"], "a1"), node("Unsqueeze", ["c", "axis"], "c1"),
        constant("tail", [2, 3]), constant("one", [1]), node("Concat", [*sizes, "tail"], "wanted", axis=0),
        node("Reshape", ["old", "wanted"], "y", allowzero=allowzero),
    ]  # fmt: skip
    compare(nodes)
