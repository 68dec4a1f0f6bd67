"""Hostile files: data that leaves the folder, tensors that are not what they say, operators and functions that are refused."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from graphlens import surgery
from tests.damage import MODEL, WEIGHTS, Change, refused, rewrite

pytestmark = pytest.mark.usefixtures("no_session")


# External data that leaves the folder or the file


def external(proto: onnx.ModelProto) -> TensorProto:
    """The first tensor that lies in the weights file."""
    return next(tensor for tensor in proto.graph.initializer if tensor.data_location == TensorProto.EXTERNAL)


def pointing(**entries: Any) -> Change:
    """Sets entries of that tensor's external data."""

    def apply(proto: onnx.ModelProto) -> None:
        tensor = external(proto)
        old = {entry.key: entry.value for entry in tensor.external_data}
        tensor.ClearField("external_data")
        for key, value in {**old, **entries}.items():
            tensor.external_data.add(key=key, value=str(value))

    return apply


@pytest.mark.parametrize(
    "location",
    [
        "../outside/model.safetensors",
        "inside/../../outside/model.safetensors",
        "/etc/passwd",
        "C:\\Windows\\win.ini",
        "C:win.ini",
        "\\\\server\\share\\weights",
        "\\weights",
        "..\\outside\\model.safetensors",
        "",
    ],
)
def test_weights_outside_the_folder_are_refused(location: str, tiny_copy: Path, outside: Path) -> None:
    assert (outside / WEIGHTS).is_file()
    rewrite(tiny_copy, pointing(location=location))
    name = external(onnx.load(tiny_copy / MODEL, load_external_data=False)).name
    refused(tiny_copy, repr(name), "outside the folder")


def test_absolute_paths_are_refused_even_into_the_folder_itself(tiny_copy: Path) -> None:
    rewrite(tiny_copy, pointing(location=tiny_copy / WEIGHTS))
    refused(tiny_copy, "outside the folder")


def test_a_link_that_leaves_the_folder_is_refused(tiny_copy: Path, outside: Path) -> None:
    (tiny_copy / WEIGHTS).unlink()
    (tiny_copy / WEIGHTS).symlink_to(outside / WEIGHTS)
    refused(tiny_copy, "link", "hardlink", of=WEIGHTS)


def test_a_linked_subfolder_that_leaves_the_folder_is_refused(tiny_copy: Path, outside: Path) -> None:
    (tiny_copy / "part").symlink_to(outside)
    rewrite(tiny_copy, pointing(location=f"part/{WEIGHTS}"))
    refused(tiny_copy, "link", of=f"part/{WEIGHTS}")


@pytest.mark.parametrize("marker", ["*/_ORT_MEM_ADDR_/*", "_ORT_MEM_ADDR_", "*/_ORT_MEM_ADDR_/*1"])
def test_a_pointer_into_onnx_runtimes_memory_is_refused(marker: str, tiny_copy: Path) -> None:
    rewrite(tiny_copy, pointing(location=marker, offset=2**40))
    refused(tiny_copy, "ONNX Runtime's own memory")


@pytest.mark.parametrize(
    "place", [{"offset": 10**9}, {"offset": -8}, {"offset": "x"}, {"length": 4}, {"length": 10**12}, {"length": -4}]
)
def test_a_tensor_that_does_not_fit_its_file_is_refused(place: dict[str, Any], tiny_copy: Path) -> None:
    refused(rewrite(tiny_copy, pointing(**place)))


def test_the_last_byte_counts(tiny_copy: Path) -> None:
    size = (tiny_copy / WEIGHTS).stat().st_size
    proto = onnx.load(tiny_copy / MODEL, load_external_data=False)
    length = 4 * int(np.prod(external(proto).dims))
    surgery.check_graph(
        surgery.load(rewrite(tiny_copy, pointing(offset=size - length)), verify=False), tiny_copy / MODEL
    )
    refused(rewrite(tiny_copy, pointing(offset=size - length + 1)), f"{size:,}", of=WEIGHTS)


def test_a_folder_in_place_of_the_weights_is_refused(tiny_copy: Path) -> None:
    (tiny_copy / WEIGHTS).unlink()
    (tiny_copy / WEIGHTS).mkdir()
    refused(tiny_copy, of=WEIGHTS)


# Tensors that are not what they say


def adding(**tensor: Any) -> Change:
    return lambda proto: proto.graph.initializer.add(name="added", **tensor)


def test_negative_sizes_are_refused(tiny_copy: Path) -> None:
    def negative(proto: onnx.ModelProto) -> None:
        external(proto).dims[0] = -1

    refused(rewrite(tiny_copy, negative), "[-1, ")
    refused(rewrite(tiny_copy, adding(data_type=TensorProto.FLOAT, dims=[-5])))


@pytest.mark.parametrize("dims", [[2**40], [2**31, 2**31], [2**62, 2**62]])
def test_sizes_beyond_any_memory_are_refused(dims: list[int], tiny_copy: Path) -> None:
    refused(rewrite(tiny_copy, adding(data_type=TensorProto.FLOAT, dims=dims)), "bytes")


@pytest.mark.parametrize("kind", [TensorProto.STRING, TensorProto.UNDEFINED, 99])
def test_a_tensor_of_no_number_type_is_refused(kind: int, tiny_copy: Path) -> None:
    data = {"string_data": [b"text"]} if kind == TensorProto.STRING else {"raw_data": b"\0\0\0\0"}
    refused(rewrite(tiny_copy, adding(data_type=kind, dims=[1], **data)))


def test_a_sparse_tensor_is_refused(tiny_copy: Path) -> None:
    def sparse(proto: onnx.ModelProto) -> None:
        values = helper.make_tensor("sparse", TensorProto.FLOAT, [1], [1.0])
        indices = helper.make_tensor("at", TensorProto.INT64, [1], [0])
        proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [2**40]))

    refused(rewrite(tiny_copy, sparse), "sparse")


def test_a_sparse_tensor_in_an_attribute_is_refused(tiny_copy: Path) -> None:
    def sparse(proto: onnx.ModelProto) -> None:
        values = helper.make_tensor("sparse", TensorProto.FLOAT, [1], [1.0])
        indices = helper.make_tensor("at", TensorProto.INT64, [1], [0])
        tensor = helper.make_sparse_tensor(values, indices, [2**40])
        proto.graph.node.append(helper.make_node("Constant", [], ["added"], sparse_value=tensor))

    refused(rewrite(tiny_copy, sparse), "sparse")


def test_external_data_is_looked_for_in_attributes_subgraphs_and_functions(tiny_copy: Path) -> None:
    escaping = TensorProto(name="escaping", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    escaping.external_data.add(key="location", value="../outside")
    constant = helper.make_node("Constant", [], ["added"], value=escaping)
    output = helper.make_tensor_value_info("added", TensorProto.FLOAT, [1])
    in_attribute = helper.make_graph([constant], "branch", [], [output])
    in_initializers = helper.make_graph([], "branch", [], [output])
    in_initializers.initializer.append(escaping)

    def in_function(proto: onnx.ModelProto) -> None:
        opset = [helper.make_opsetid("", 20)]
        proto.functions.append(helper.make_function("f", "F", [], ["added"], [constant], opset))

    ways: list[Change] = [
        lambda proto: proto.graph.node.append(constant),
        lambda proto: proto.graph.node.append(branching(in_attribute)),
        lambda proto: proto.graph.node.append(branching(in_initializers)),
        in_function,
    ]
    good = (tiny_copy / MODEL).read_bytes()
    for way in ways:
        (tiny_copy / MODEL).write_bytes(good)
        refused(rewrite(tiny_copy, way), "'escaping'", "outside the folder")


# Operators and functions


def branching(body: onnx.GraphProto) -> onnx.NodeProto:
    """An If both of whose branches are ``body``."""
    return helper.make_node("If", ["condition"], ["out"], then_branch=body, else_branch=body)


def calling(domain: str, op_type: str) -> Change:
    def apply(proto: onnx.ModelProto) -> None:
        proto.graph.node.append(helper.make_node(op_type, ["input_ids"], ["added"], "the added node", domain=domain))
        proto.opset_import.append(helper.make_opsetid(domain, 1))

    return apply


@pytest.mark.parametrize("domain", ["my.company", "ai.onnx.contrib", "com.microsoft.extensions", "ai.onnx.training"])
def test_an_operator_of_another_domain_is_refused(domain: str, tiny_copy: Path) -> None:
    says = ("'the added node'", f"{domain}::Evil", "never registers a custom operator library")
    refused(rewrite(tiny_copy, calling(domain, "Evil")), *says)


def test_an_operator_of_another_domain_is_found_in_subgraphs_and_functions(tiny_copy: Path) -> None:
    evil = helper.make_node("Evil", ["input_ids"], ["added"], domain="my.company")
    output = helper.make_tensor_value_info("added", TensorProto.INT64, None)
    nested = helper.make_graph([branching(helper.make_graph([evil], "inner", [], [output]))], "outer", [], [output])
    good = (tiny_copy / MODEL).read_bytes()
    refused(rewrite(tiny_copy, lambda proto: proto.graph.node.append(branching(nested))), "my.company::Evil")
    (tiny_copy / MODEL).write_bytes(good)
    function = helper.make_function("f", "F", ["input_ids"], ["added"], [evil], [helper.make_opsetid("my.company", 1)])
    refused(rewrite(tiny_copy, lambda proto: proto.functions.append(function)), "my.company::Evil")


@pytest.mark.parametrize("domain", ["", "com.microsoft"])
def test_a_node_of_compiled_code_is_refused(domain: str, tiny_copy: Path) -> None:
    refused(rewrite(tiny_copy, calling(domain, "EPContext")), "'the added node'", "EPContext", "compiled")


def functions(
    count: int, calls: int, overload: str = "", decoys: bool = False, first: onnx.NodeProto | None = None
) -> Change:
    """A chain of functions each of which calls the one before ``calls`` times, and a call of the last."""
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("f", 1)]

    def call(index: int, source: str, target: str) -> onnx.NodeProto:
        return helper.make_node(f"F{index}", [source], [target], domain="f", overload=overload)

    def apply(proto: onnx.ModelProto) -> None:
        proto.opset_import.append(opsets[1])
        for index in range(count):
            names = ["x", *(f"t{step}" for step in range(calls - 1)), "y"]
            nodes = [call(index - 1, *names[step : step + 2]) for step in range(calls)]
            if index == 0:
                nodes = [first or helper.make_node("Identity", ["x"], ["y"])]
            made = helper.make_function("f", f"F{index}", ["x"], ["y"], nodes, opsets, overload=overload)
            proto.functions.append(made)
            if decoys:
                harmless = [helper.make_node("Identity", ["x"], ["y"])]
                proto.functions.append(helper.make_function("f", f"F{index}", ["x"], ["y"], harmless, opsets))
        proto.graph.node.append(call(count - 1, "input_ids", "added"))

    return apply


@pytest.fixture
def within_two_seconds() -> Iterator[None]:
    started = time.process_time()
    yield
    assert time.process_time() - started < 2


@pytest.mark.usefixtures("within_two_seconds")
def test_functions_that_double_thirty_times_are_refused_at_once(tiny_copy: Path) -> None:
    refused(rewrite(tiny_copy, functions(30, 2)), "expand")


@pytest.mark.usefixtures("within_two_seconds")
def test_doubling_functions_are_not_hidden_by_overloads_of_their_names(tiny_copy: Path) -> None:
    refused(rewrite(tiny_copy, functions(30, 2, overload="second", decoys=True)), "expand")


@pytest.mark.usefixtures("within_two_seconds")
def test_doubling_functions_in_subgraphs_are_refused(tiny_copy: Path) -> None:
    def apply(proto: onnx.ModelProto) -> None:
        functions(30, 2)(proto)
        node = proto.graph.node.pop()
        output = helper.make_tensor_value_info(node.output[0], TensorProto.INT64, None)
        proto.graph.node.append(branching(helper.make_graph([node], "branch", [], [output])))

    refused(rewrite(tiny_copy, apply), "expand")


def test_a_few_functions_are_fine(tiny_copy: Path) -> None:
    before = surgery.check(tiny_copy).nodes
    assert surgery.check(rewrite(tiny_copy, functions(4, 2))).nodes == before + 2**3


def test_a_function_that_calls_itself_is_refused(tiny_copy: Path) -> None:
    itself = helper.make_node("F0", ["x"], ["y"], domain="f")
    refused(rewrite(tiny_copy, functions(1, 1, first=itself)), "f::F0", "calls itself")


def test_functions_that_call_each_other_are_refused(tiny_copy: Path) -> None:
    refused(rewrite(tiny_copy, functions(3, 1, first=helper.make_node("F2", ["x"], ["y"], domain="f"))), "calls itself")


def test_a_function_that_calls_itself_is_refused_even_if_nothing_calls_it(tiny_copy: Path) -> None:
    def apply(proto: onnx.ModelProto) -> None:
        functions(1, 1, first=helper.make_node("F0", ["x"], ["y"], domain="f"))(proto)
        proto.graph.node.pop()

    refused(rewrite(tiny_copy, apply), "calls itself")


@pytest.mark.parametrize("count", [600, 3000])
def test_functions_nested_too_deep_are_refused(count: int, tiny_copy: Path) -> None:
    refused(rewrite(tiny_copy, functions(count, 1)), "nest too deep")


def nested(depth: int) -> onnx.NodeProto:
    """A node inside ``depth`` branches."""
    output = helper.make_tensor_value_info("out", TensorProto.INT64, None)
    node = helper.make_node("Identity", ["input_ids"], ["out"])
    other = helper.make_graph([node], "other", [], [output])
    for _ in range(depth):
        body = helper.make_graph([node], "body", [], [output])
        node = helper.make_node("If", ["condition"], ["out"], then_branch=body, else_branch=other)
    return node


def test_subgraphs_nested_too_deep_are_refused(tiny_copy: Path) -> None:
    good = (tiny_copy / MODEL).read_bytes()
    true = helper.make_node("Constant", [], ["condition"], value=helper.make_tensor("", TensorProto.BOOL, [], [1]))
    surgery.load(rewrite(tiny_copy, lambda proto: proto.graph.node.extend([true, nested(4)])))
    for depth in (9, 25):
        (tiny_copy / MODEL).write_bytes(good)
        deep = nested(depth)
        refused(rewrite(tiny_copy, lambda proto, deep=deep: proto.graph.node.append(deep)), "nested more than")


def test_a_value_that_nothing_computes_before_it_is_used_is_refused(tiny_copy: Path) -> None:
    def reverse(proto: onnx.ModelProto) -> None:
        nodes = list(reversed(proto.graph.node))
        del proto.graph.node[:]
        proto.graph.node.extend(nodes)

    good = (tiny_copy / MODEL).read_bytes()
    extra = helper.make_tensor_value_info("nothing", TensorProto.FLOAT, None)
    refused(rewrite(tiny_copy, reverse), "which nothing before it computes", of=MODEL)
    (tiny_copy / MODEL).write_bytes(good)
    refused(rewrite(tiny_copy, lambda proto: proto.graph.output.append(extra)), "'nothing' is computed by nothing")
    (tiny_copy / MODEL).write_bytes(good)
    refused(rewrite(tiny_copy, lambda proto: proto.graph.node.append(nested(1))), "'condition'", of=MODEL)


@pytest.mark.parametrize("version", [7, 99])
def test_an_opset_that_is_not_known_is_refused(version: int, tiny_copy: Path) -> None:
    def change(proto: onnx.ModelProto) -> None:
        proto.opset_import[0].version = version

    refused(rewrite(tiny_copy, change), f"opset {version}", of=MODEL)


def test_nesting_that_the_parser_refuses_is_refused(tiny_copy: Path) -> None:
    def field(number: int, content: bytes) -> bytes:
        size, length = bytearray(), len(content)
        while length > 127:
            size.append(length & 127 | 128)
            length >>= 7
        return bytes([number << 3 | 2, *size, length]) + content

    graph = b""
    for _ in range(200):  # graph.node = 1, node.attribute = 5, attribute.g = 6: onnx's own builder nests 33 at most
        graph = field(1, field(5, field(6, graph)))
    with (tiny_copy / MODEL).open("ab") as file:
        file.write(field(7, graph))  # model.graph: merged into the one before
    refused(tiny_copy, of=MODEL)


def test_a_refused_structure_names_the_graph_file_itself(tiny_copy: Path) -> None:
    os.rename(tiny_copy / MODEL, tiny_copy / "other.onnx")
    proto = onnx.load(tiny_copy / "other.onnx", load_external_data=False)
    calling("my.company", "Evil")(proto)
    (tiny_copy / "other.onnx").write_bytes(proto.SerializeToString())
    refused(tiny_copy / "other.onnx", of="other.onnx")
