"""Damaged and altered files: each is refused when it is opened, before ONNX Runtime sees it, with its name."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from graphlens import HookedTransformer, surgery
from graphlens.errors import ModelFileError
from graphlens.file.manifest_format import FORMAT_VERSION
from graphlens.file.safetensors import SafetensorsFile
from tests.damage import MODEL, WEIGHTS, Change, refused, rewrite

pytestmark = pytest.mark.usefixtures("no_session")


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


@pytest.mark.parametrize("part", [0.0, 0.37, 0.999999])
def test_a_flipped_byte_anywhere_is_refused(part: float, tiny_copy: Path) -> None:
    path = tiny_copy / WEIGHTS
    data = path.read_bytes()
    start = len(SafetensorsFile(path).header)
    place = start + int(part * (len(data) - start))
    path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    refused(tiny_copy, "SHA-256", of=WEIGHTS)
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
    rewrite(tiny_copy, manifest(lambda data: data.update(format_version=FORMAT_VERSION + 1)))
    refused(tiny_copy, f"format {FORMAT_VERSION + 1}", f"reads up to {FORMAT_VERSION}", "Update graphlens", of=MODEL)


def test_a_newer_manifest_of_another_shape_is_still_called_newer(tiny_copy: Path) -> None:
    rewrite(tiny_copy, manifest('{"format_version": 7, "everything": "else"}'))
    refused(tiny_copy, "format 7", "Update graphlens", of=MODEL)


def test_a_file_without_manifest_is_refused(tiny_copy: Path) -> None:
    rewrite(tiny_copy, lambda proto: proto.ClearField("metadata_props"))
    refused(tiny_copy, "has no hook points", "Use the hooked folder that it was made of", of=MODEL)


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
    "files: no digest": lambda d: d["files"][WEIGHTS].pop("sha256"),
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
