"""Damaged, altered and hostile files: each is refused when it is opened, before ONNX Runtime sees it, with its name."""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from graphlens import HookedTransformer, surgery
from graphlens.errors import ModelFileError
from graphlens.file.safetensors import SafetensorsFile
from graphlens.surgery.fingerprint import quick_fingerprint

Change = Callable[[onnx.ModelProto], Any]
MODEL, WEIGHTS = "model.onnx", "model.safetensors"


@pytest.fixture(autouse=True)
def no_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test in which anything starts to open a session."""

    def fail(*_: object, **__: object) -> None:
        pytest.fail("a session was opened")

    for name in ("graphlens.runtime.sessions.open_session", "graphlens.runtime.open_session"):
        monkeypatch.setattr(name, fail)
    monkeypatch.setattr("graphlens.engine.opener.open_session", fail)
    monkeypatch.setattr("onnxruntime.InferenceSession", fail)


def rewrite(folder: Path, change: Change) -> Path:
    """Changes the graph file of a folder; returns the folder."""
    proto = onnx.load(folder / MODEL, load_external_data=False)
    change(proto)
    (folder / MODEL).write_bytes(proto.SerializeToString())
    return folder


def refused(path: Path, *says: str, of: str = "") -> str:
    """The message of the error that opening gives, by every door; it holds ``says`` and the path of the file ``of``."""
    messages = set()
    for opening in (HookedTransformer.from_onnx, surgery.load, surgery.check):
        with pytest.raises(ModelFileError) as caught:
            opening(path)
        messages.add(str(caught.value))
    assert len(messages) == 1
    (message,) = messages
    folder = path if path.suffix != ".onnx" else path.parent
    for part in (*says, str(folder / of) if of else str(folder)):
        assert part in message
    return message


def test_an_undamaged_file_passes_and_only_running_it_opens_a_session(tiny_copy: Path, tokens: np.ndarray) -> None:
    # The control of this file: the copy is good, and no_session does catch a session.
    report = surgery.check(tiny_copy)
    model = HookedTransformer.from_onnx(tiny_copy)
    with pytest.raises(pytest.fail.Exception, match="a session was opened"):
        model(tokens)
    proto = onnx.load(tiny_copy / MODEL, load_external_data=False)
    external = [t for t in proto.graph.initializer if t.data_location == TensorProto.EXTERNAL]
    assert report.nodes == len(proto.graph.node)
    assert report.external_files == (WEIGHTS,)
    assert report.external_bytes == sum(4 * int(np.prod(t.dims)) for t in external) > 0
    assert 0 < report.embedded_bytes < 100_000


# The graph file


@pytest.mark.parametrize("part", [1e-4, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999, 0.9999])
def test_a_truncated_graph_is_refused(part: float, tiny_copy: Path) -> None:
    data = (tiny_copy / MODEL).read_bytes()
    (tiny_copy / MODEL).write_bytes(data[: int(len(data) * part)])
    refused(tiny_copy, of=MODEL)


@pytest.mark.parametrize("content", [b"", b"\0", b"hello", b"\xff" * 1000, b"<!DOCTYPE html><html></html>", b"PK\3\4"])
def test_a_file_that_is_no_graph_is_refused(content: bytes, tiny_copy: Path) -> None:
    (tiny_copy / MODEL).write_bytes(content)
    refused(tiny_copy, of=MODEL)
    refused(tiny_copy / MODEL, of=MODEL)


def test_what_is_not_there_is_refused(tiny_copy: Path, tmp_path: Path) -> None:
    (tiny_copy / MODEL).unlink()
    refused(tiny_copy, "no such file", "graphlens export", of=MODEL)
    refused(tmp_path / "nowhere", "no such file", "graphlens export")
    (tiny_copy / MODEL).mkdir()
    refused(tiny_copy, "no such file", of=MODEL)


def test_an_onnx_file_without_hooks_is_refused_and_told_how_to_get_some(tmp_path: Path) -> None:
    tensor = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "plain", [tensor], [tensor])
    onnx.save(helper.make_model(graph), tmp_path / "plain.onnx")
    refused(tmp_path / "plain.onnx", "not a hooked file", "graphlens export", of="plain.onnx")


def test_random_damage_to_a_graph_gives_no_other_error(tiny_copy: Path) -> None:
    data, rng = (tiny_copy / MODEL).read_bytes(), np.random.default_rng(0)
    count = 0
    for _ in range(60):
        damaged = np.frombuffer(data, np.uint8).copy()
        damaged[rng.integers(len(data), size=3)] = rng.integers(256, size=3)
        (tiny_copy / MODEL).write_bytes(damaged.tobytes())
        try:
            surgery.load(tiny_copy)
        except ModelFileError:
            count += 1
    assert count >= 30


# The weights file


def test_a_missing_weights_file_is_named(tiny_copy: Path) -> None:
    (tiny_copy / WEIGHTS).unlink()
    refused(tiny_copy, "missing", "export the model again", of=WEIGHTS)


@pytest.mark.parametrize("left", [0, 5, 8, 100, 0.5, -1])
def test_a_shortened_weights_file_is_refused(left: float, tiny_copy: Path) -> None:
    size = (tiny_copy / WEIGHTS).stat().st_size
    os.truncate(tiny_copy / WEIGHTS, int(left * size) if 0 < left < 1 else left % size)
    refused(tiny_copy, of=WEIGHTS)


def test_a_lengthened_weights_file_is_refused(tiny_copy: Path) -> None:
    size = (tiny_copy / WEIGHTS).stat().st_size
    os.truncate(tiny_copy / WEIGHTS, size + 64)
    refused(tiny_copy, f"{size + 64:,}", f"{size:,}", of=WEIGHTS)


def test_another_models_weights_of_the_same_layout_are_refused(tiny_copy: Path) -> None:
    path = tiny_copy / WEIGHTS
    header = SafetensorsFile(path).header
    values = np.frombuffer(path.read_bytes()[len(header) :], np.float32)
    path.write_bytes(header + (-values).tobytes())
    refused(tiny_copy, "not the weights this graph was exported with", of=WEIGHTS)


def test_renamed_tensors_of_the_same_values_are_refused(tiny_copy: Path) -> None:
    path = tiny_copy / WEIGHTS
    data = path.read_bytes()
    assert data.count(b"h.0.ln_1.weight") == data.count(b"h.0.ln_2.weight") == 1
    swapped = data.replace(b"h.0.ln_1.weight", b"h.0.ln_9.weight").replace(b"h.0.ln_2.weight", b"h.0.ln_1.weight")
    path.write_bytes(swapped.replace(b"h.0.ln_9.weight", b"h.0.ln_2.weight"))
    refused(tiny_copy, "not the weights this graph was exported with", of=WEIGHTS)


def test_another_models_weights_of_another_size_are_refused(tiny_copy: Path) -> None:
    path = tiny_copy / WEIGHTS
    size = path.stat().st_size
    text = json.dumps({"other": {"dtype": "F32", "shape": [size], "data_offsets": [0, 4 * size]}}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4 * size))
    refused(tiny_copy, f"{size:,}", of=WEIGHTS)


HEADERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "list": lambda h: [],
    "null": lambda h: None,
    "no offsets": lambda h: {"a": {"dtype": "F32", "shape": [1]}},
    "entry is a list": lambda h: {"a": [1, 2]},
    "past the end": lambda h: {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 10**12]}},
    "before the start": lambda h: {"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}},
    "backwards": lambda h: {"a": {"dtype": "F32", "shape": [1], "data_offsets": [8, 4]}},
    "fractional": lambda h: {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0.0, 4.0]}},
    "negative size": lambda h: {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
}


def write_header(path: Path, text: bytes) -> None:
    """Replaces the header of a safetensors file; the file keeps its size."""
    size = path.stat().st_size
    path.write_bytes((struct.pack("<Q", len(text)) + text).ljust(size, b"\0")[:size])


@pytest.mark.parametrize("kind", HEADERS)
def test_a_malformed_weights_header_is_refused(kind: str, tiny_copy: Path) -> None:
    write_header(tiny_copy / WEIGHTS, json.dumps(HEADERS[kind]({})).encode())
    refused(tiny_copy, of=WEIGHTS)


def test_a_header_that_promises_more_than_the_file_holds_is_told_from_other_weights(tiny_copy: Path) -> None:
    write_header(tiny_copy / WEIGHTS, json.dumps(HEADERS["past the end"]({})).encode())
    refused(tiny_copy, "cut short", of=WEIGHTS)


@pytest.mark.parametrize("text", [b"{", b"\xff\xfe\xfd", b"[" * 100_000], ids=["cut", "not text", "deeply nested"])
def test_a_weights_header_that_is_no_json_is_refused(text: bytes, tiny_copy: Path) -> None:
    write_header(tiny_copy / WEIGHTS, text)
    refused(tiny_copy, of=WEIGHTS)


def test_a_header_longer_than_the_file_is_refused(tiny_copy: Path) -> None:
    with (tiny_copy / WEIGHTS).open("r+b") as file:
        file.write(struct.pack("<Q", 2**63))
    refused(tiny_copy, of=WEIGHTS)


def test_a_flipped_byte_that_opening_does_not_see_is_found_by_check(tiny_copy: Path) -> None:
    path = tiny_copy / WEIGHTS
    before, data = quick_fingerprint(path), path.read_bytes()
    entries = SafetensorsFile(path).entries.values()
    largest = max(entries, key=lambda entry: entry.length)

    def flipped(place: int) -> bytes:
        return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]

    middle = largest.offset + largest.length // 2
    for place in range(middle, middle + largest.length // 4, 997):
        path.write_bytes(flipped(place))
        if quick_fingerprint(path) == before:
            break
    else:
        pytest.fail("the quick fingerprint reads every byte")
    HookedTransformer.from_onnx(tiny_copy)
    with pytest.raises(ModelFileError, match="SHA-256") as caught:
        surgery.check(tiny_copy)
    assert str(path) in str(caught.value)
    path.write_bytes(data)
    surgery.check(tiny_copy)


# The tokenizer


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_damaged_tokenizer_is_refused(name: str, text: str, tiny_copy: Path) -> None:
    (tiny_copy / name).write_text(text)
    with pytest.raises(ModelFileError) as caught:
        HookedTransformer.from_onnx(tiny_copy)
    assert str(tiny_copy) in str(caught.value)
    assert "tokenizer" in str(caught.value)


# The manifest


def manifest(change: Callable[[dict[str, Any]], Any] | str) -> Change:
    """Changes the manifest's data, or replaces its text."""

    def apply(proto: onnx.ModelProto) -> None:
        (entry,) = [entry for entry in proto.metadata_props if entry.key == "graphlens"]
        if isinstance(change, str):
            entry.value = change
        else:
            data = json.loads(entry.value)
            change(data)
            entry.value = json.dumps(data)

    return apply


def test_a_manifest_of_a_newer_format_is_refused_and_says_to_update(tiny_copy: Path) -> None:
    rewrite(tiny_copy, manifest(lambda data: data.update(format_version=data["format_version"] + 1)))
    refused(tiny_copy, "format 2", "reads up to 1", "Update graphlens", of=MODEL)


def test_a_newer_manifest_of_another_shape_is_still_called_newer(tiny_copy: Path) -> None:
    rewrite(tiny_copy, manifest('{"format_version": 7, "everything": "else"}'))
    refused(tiny_copy, "format 7", "Update graphlens", of=MODEL)


def test_a_file_without_manifest_is_refused(tiny_copy: Path) -> None:
    rewrite(tiny_copy, lambda proto: proto.ClearField("metadata_props"))
    refused(tiny_copy, "not a hooked file", "graphlens export", of=MODEL)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "3", '"x"', "{}", '{"format_version": "1"}', '{"format_version": 1}', "[" * 100_000]
)
def test_a_malformed_manifest_is_refused(text: str, tiny_copy: Path) -> None:
    rewrite(tiny_copy, manifest(text))
    refused(tiny_copy, "manifest is malformed", "Export the model again", of=MODEL)


@pytest.mark.parametrize("key", ["config", "hooks", "weights", "files", "source", "revision", "processing", "exporter"])
def test_a_manifest_that_lacks_a_part_is_refused(key: str, tiny_copy: Path) -> None:
    rewrite(tiny_copy, manifest(lambda data: data.pop(key)))
    refused(tiny_copy, "manifest is malformed", f"'{key}'", of=MODEL)


HOOK, VIEW = "hook_embed", "embed.W_E"
WRONG_TYPES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "config: a list": lambda d: d.update(config=[]),
    "config: a missing size": lambda d: d["config"].pop("n_heads"),
    "config: an unknown entry": lambda d: d["config"].update(n_wheels=4),
    "config: a size that is text": lambda d: d["config"].update(d_vocab="700"),
    "config: a fractional size": lambda d: d["config"].update(n_layers=4.5),
    "hooks: a list": lambda d: d.update(hooks=[]),
    "hooks: no value": lambda d: d["hooks"][HOOK].pop("value"),
    "hooks: a value that is a list": lambda d: d["hooks"][HOOK].update(value=["hook_embed"]),
    "hooks: axes that are a number": lambda d: d["hooks"][HOOK].update(axes=3),
    "files: text": lambda d: d.update(files="model.safetensors"),
    "files: a size that is text": lambda d: d["files"][WEIGHTS].update(size="large"),
    "files: an unknown entry": lambda d: d["files"][WEIGHTS].update(md5="x"),
    "weights: no file": lambda d: d["weights"][VIEW].pop("file"),
    "weights: a shape that is a number": lambda d: d["weights"][VIEW].update(shape=3),
    "exporter: text": lambda d: d.update(exporter="graphlens"),
}


@pytest.mark.parametrize("kind", WRONG_TYPES)
def test_a_manifest_with_a_wrong_type_is_refused(kind: str, tiny_copy: Path) -> None:
    rewrite(tiny_copy, manifest(WRONG_TYPES[kind]))
    refused(tiny_copy, "malformed", of=MODEL)


def test_a_hook_whose_value_is_not_in_the_graph_is_named(tiny_copy: Path) -> None:
    rewrite(tiny_copy, manifest(lambda data: data["hooks"][HOOK].update(value="gone")))
    refused(tiny_copy, f"{HOOK!r}", of=MODEL)


@pytest.fixture
def outside(tiny_copy: Path) -> Path:
    """A folder beside the model's, with the same weights."""
    folder = tiny_copy.parent / "outside"
    folder.mkdir()
    shutil.copyfile(tiny_copy / WEIGHTS, folder / WEIGHTS)
    return folder


@pytest.mark.parametrize("way", ["..", "absolute", "a folder"])
@pytest.mark.parametrize("part", ["files", "weights"])
def test_a_manifest_that_points_outside_its_folder_is_refused(
    part: str, way: str, tiny_copy: Path, outside: Path
) -> None:
    place = {"..": f"../outside/{WEIGHTS}", "absolute": str(outside / WEIGHTS), "a folder": "."}[way]

    def point(data: dict[str, Any]) -> None:
        if part == "files":
            data["files"][place] = data["files"][WEIGHTS]
        else:
            data["weights"][VIEW]["file"] = place

    refused(rewrite(tiny_copy, manifest(point)))


def test_weights_that_the_manifest_has_no_fingerprint_of_are_refused(tiny_copy: Path) -> None:
    refused(rewrite(tiny_copy, manifest(lambda data: data["files"].clear())), WEIGHTS)


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
    surgery.load(rewrite(tiny_copy, pointing(offset=size - length)))
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
    started = time.perf_counter()
    yield
    assert time.perf_counter() - started < 2


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
    """A node inside ``depth`` Loops."""
    output = helper.make_tensor_value_info("out", TensorProto.INT64, None)
    node = helper.make_node("Identity", ["input_ids"], ["out"])
    for _ in range(depth):
        node = helper.make_node("Loop", ["", ""], ["out"], body=helper.make_graph([node], "body", [], [output]))
    return node


def test_subgraphs_nested_too_deep_are_refused(tiny_copy: Path) -> None:
    good = (tiny_copy / MODEL).read_bytes()
    surgery.load(rewrite(tiny_copy, lambda proto: proto.graph.node.append(nested(4))))
    for depth in (17, 25):
        (tiny_copy / MODEL).write_bytes(good)
        deep = nested(depth)
        refused(rewrite(tiny_copy, lambda proto, deep=deep: proto.graph.node.append(deep)), "nested more than")


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
