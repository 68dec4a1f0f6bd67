"""Reading a graph file leaves its large tensors in it: everything else is as the whole file says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphlens import ModelFileError
from graphlens.file.large_tensors import LEAST, light_bytes
from graphlens.surgery.foreign import load_foreign


def file_with(path: Path, *arrays: np.ndarray, typed: bool = False) -> Path:
    """A graph that adds up constants; ``typed`` puts their numbers into fields of their type in place of raw bytes."""
    names = [f"w{index}" for index in range(len(arrays))]
    tensors = [numpy_helper.from_array(array, name) for name, array in zip(names, arrays, strict=True)]
    if typed:
        tensors = [
            helper.make_tensor(name, TensorProto.FLOAT, array.shape, array.ravel().tolist())
            for name, array in zip(names, arrays, strict=True)
        ]
    nodes, last = [], "x"
    for name in names:
        nodes.append(helper.make_node("Add", [last, name], [f"{name}/sum"], name=f"add {name}"))
        last = f"{name}/sum"
    shape = arrays[0].shape
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    found = helper.make_tensor_value_info(last, TensorProto.FLOAT, shape)
    graph = helper.make_graph(nodes, "sums", [given], [found], tensors, doc_string="a graph")
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], producer_name="elsewhere")
    onnx.save(model, path)
    return path


def small_and_large() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [
        random.normal(size=(3, LEAST)).astype(np.float32),
        np.float32([[1.5]]),
        random.normal(size=(3, LEAST)).astype(np.float32),
    ]


def test_large_tensors_are_told_by_their_place(tmp_path: Path) -> None:
    arrays = small_and_large()
    file = file_with(tmp_path / "model.onnx", *arrays)
    light = light_bytes(file)
    assert len(light) < 2000 < file.stat().st_size
    found, whole = onnx.load_model_from_string(light), onnx.load(file)
    for tensor, array in zip(found.graph.initializer, arrays, strict=True):
        if array.nbytes < LEAST:
            np.testing.assert_array_equal(numpy_helper.to_array(tensor), array)
            continue
        place = {entry.key: entry.value for entry in tensor.external_data}
        assert place["location"] == "model.onnx"
        raw = file.read_bytes()[int(place["offset"]) :][: int(place["length"])]
        np.testing.assert_array_equal(np.frombuffer(raw, np.float32).reshape(tensor.dims), array)
    for tensor, full in zip(found.graph.initializer, whole.graph.initializer, strict=True):
        if tensor.external_data:
            del tensor.external_data[:]
            tensor.ClearField("data_location")
            tensor.raw_data = full.raw_data
    assert found == whole


def test_a_model_is_read_with_its_tensors_where_they_lie(tmp_path: Path) -> None:
    arrays = small_and_large()
    model = load_foreign(file_with(tmp_path / "model.onnx", *arrays))
    for name, array in zip(("w0", "w1", "w2"), arrays, strict=True):
        tensor = model.graph.initializers[name].const_value
        assert tensor is not None
        np.testing.assert_array_equal(tensor.numpy(), array)


def test_numbers_in_fields_of_their_type_are_read_whole(tmp_path: Path) -> None:
    array = np.arange(2.0 * LEAST, dtype=np.float32).reshape(2, LEAST)
    file = file_with(tmp_path / "model.onnx", array, typed=True)
    assert onnx.load_model_from_string(light_bytes(file)) == onnx.load(file)


@pytest.mark.parametrize(
    "content", [b"", b"\x00", b"\xff" * 9000, b"\x3a\xff\xff\xff\xff\x7f" + b"x" * 9000, b"text " * 2000]
)
def test_what_is_no_model_is_handed_on_as_it_is(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(content)
    assert light_bytes(file) == content
    with pytest.raises(ModelFileError):
        load_foreign(file)


def test_every_cut_and_every_changed_length_ends_in_an_error_or_the_same_model(tmp_path: Path) -> None:
    file = file_with(tmp_path / "model.onnx", *small_and_large())
    whole = bytearray(file.read_bytes())
    random = np.random.default_rng(3)
    for _ in range(150):
        damaged = bytearray(whole)
        if random.random() < 0.3:
            del damaged[int(random.integers(1, len(damaged))) :]
        else:
            damaged[int(random.integers(0, 120))] = int(random.integers(0, 256))
        file.write_bytes(damaged)
        try:
            model = load_foreign(file)
        except ModelFileError:
            continue
        for value in model.graph.initializers.values():
            tensor = value.const_value
            assert tensor is not None
            assert tensor.nbytes <= len(whole)
