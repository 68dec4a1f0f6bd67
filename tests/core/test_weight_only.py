"""Matrices stored as integers that Cast and Mul make numbers of: what exporters write that know no DequantizeLinear."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphlens import HookedTransformer, adopt
from graphlens.errors import InputError
from graphlens.pipelines.inspect import inspect_file
from tests.foreign_decoder import D_HEAD, D_MODEL, HEADS, LAYERS, VOCAB, decoder, weights

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Way:
    """How a matrix is stored.

    Attributes:
        axis: The axis with a scale for each entry; None for one scale.
        zero: True for unsigned integers with a zero point.
        turned: Where the integers are transposed back: "before" the Cast, "after" the Mul, or not at all.
        first: True if the scales are the product's first operand.
    """

    axis: int | None = 1
    zero: bool = False
    turned: str = ""
    first: bool = False


WAYS = (
    Way(),
    Way(0),
    Way(None),
    Way(zero=True),
    Way(turned="before"),
    Way(turned="after"),
    Way(0, True, "after", True),
    Way(None, True, "before"),
)


def stored(array: Array, way: Way) -> tuple[Array, Array, Array | None, Array]:
    """Integers, scales, zero points (None for none) and the numbers that they stand for, all the way around of ``array``."""
    over = None if way.axis is None else 1 - way.axis
    if way.zero:
        low = np.minimum(array.min(over, keepdims=True), 0)
        scale = ((np.maximum(array.max(over, keepdims=True), 0) - low) / 255).astype(np.float32)
        zero = np.rint(-low / scale).astype(np.uint8)
        integers = np.clip(np.rint(array / scale) + zero, 0, 255).astype(np.uint8)
        return integers, scale, zero, (integers.astype(np.float32) - zero.astype(np.float32)) * scale
    scale = (np.abs(array).max(over, keepdims=True) / 127).astype(np.float32)
    integers = np.rint(array / scale).astype(np.int8)
    return integers, scale, None, integers.astype(np.float32) * scale


def write(path: Path, way: Way) -> dict[str, Array]:
    """The small decoder with every matrix stored in one way; what its matrices are then."""
    model = onnx.load(decoder(path))
    graph, nodes, meant = model.graph, [], {}
    for tensor in [one for one in graph.initializer if one.name in weights() and len(one.dims) == 2]:
        name = tensor.name
        integers, scale, zero, meant[name] = stored(numpy_helper.to_array(tensor), way)
        graph.initializer.remove(tensor)
        if way.turned:
            integers = integers.T
            scale, zero = (scale.T, None if zero is None else zero.T) if way.turned == "after" else (scale, zero)
        given = {"i": np.ascontiguousarray(integers), "s": scale, **({} if zero is None else {"z": zero})}
        graph.initializer.extend(numpy_helper.from_array(array, f"{name}.{key}") for key, array in given.items())
        last = f"{name}.i"
        if way.turned == "before":
            nodes.append(helper.make_node("Transpose", [last], [f"{name}.t"], perm=[1, 0]))
            last = f"{name}.t"
        nodes.append(helper.make_node("Cast", [last], [f"{name}.f"], to=TensorProto.FLOAT))
        last = f"{name}.f"
        if zero is not None:
            nodes.append(helper.make_node("Cast", [f"{name}.z"], [f"{name}.o"], to=TensorProto.FLOAT))
            nodes.append(helper.make_node("Sub", [last, f"{name}.o"], [f"{name}.c"]))
            last = f"{name}.c"
        factors = [f"{name}.s", last] if way.first else [last, f"{name}.s"]
        end = f"{name}.m" if way.turned == "after" else name
        nodes.append(helper.make_node("Mul", factors, [end]))
        if way.turned == "after":
            nodes.append(helper.make_node("Transpose", [end], [name], perm=[1, 0]))
    for index, node in enumerate(nodes):
        graph.node.insert(index, node)
    onnx.save(model, path)
    return meant


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_every_matrix_is_read_as_the_numbers_that_it_stands_for(way: Way, tmp_path: Path) -> None:
    meant = write(tmp_path / "model.onnx", way)
    plain = adopt(decoder(tmp_path / "float.onnx"), dry_run=True, announce=lambda _: None)
    report = adopt(tmp_path / "model.onnx", tmp_path / "hooked", announce=lambda _: None)
    assert set(report.weights) == set(plain.weights)
    assert not report.adopted.missing
    model = HookedTransformer.from_onnx(tmp_path / "hooked", "cpu")
    by_head = (D_MODEL, HEADS, D_HEAD)
    for layer in range(LAYERS):
        q, k, v = (part.reshape(by_head).transpose(1, 0, 2) for part in np.split(meant[f"l{layer}.c"], 3, -1))
        for found, right in ((model.W_Q, q), (model.W_K, k), (model.W_V, v)):
            np.testing.assert_array_equal(found[layer], right)
        np.testing.assert_array_equal(model.W_O[layer], meant[f"l{layer}.e"].reshape(HEADS, D_HEAD, D_MODEL))
        np.testing.assert_array_equal(model.W_in[layer], meant[f"l{layer}.i"])
        np.testing.assert_array_equal(model.W_out[layer], meant[f"l{layer}.k"])
    np.testing.assert_array_equal(model.W_E, meant["w0"])
    np.testing.assert_array_equal(model.W_pos, meant["w1"])
    np.testing.assert_array_equal(model.W_U, meant["w4"])


def test_such_a_file_gives_what_it_gave_and_its_matrices_are_not_set(tmp_path: Path) -> None:
    write(tmp_path / "model.onnx", Way(zero=True))
    adopt(tmp_path / "model.onnx", tmp_path / "hooked", announce=lambda _: None)
    model = HookedTransformer.from_onnx(tmp_path / "hooked", "cpu")
    ids = np.random.default_rng(3).integers(0, VOCAB, (2, 7))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    past = {one.name: np.zeros((2, HEADS, 0, D_HEAD), np.float32) for one in session.get_inputs() if "past" in one.name}
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.tile(np.arange(7), (2, 1))}
    (expected,) = session.run(["scores"], feeds | past)
    np.testing.assert_allclose(model(ids), expected, rtol=0, atol=2e-5)
    with pytest.raises(InputError, match="stored as integers"):
        model.set_weights({"blocks.0.mlp.W_in": np.zeros_like(model.W_in[0])})


def test_scales_in_both_axes_are_no_weight(tmp_path: Path) -> None:
    """What is no quantisation is not guessed at: the matrix is absent, and the rest is there."""
    path = decoder(tmp_path / "model.onnx")
    model = onnx.load(path)
    tensor = next(one for one in model.graph.initializer if one.name == "l0.i")
    array = numpy_helper.to_array(tensor)
    model.graph.initializer.remove(tensor)
    scale = np.random.default_rng(0).uniform(0.01, 0.02, array.shape).astype(np.float32)
    given = {"l0.i.i": np.rint(array / scale).clip(-127, 127).astype(np.int8), "l0.i.s": scale}
    model.graph.initializer.extend(numpy_helper.from_array(one, name) for name, one in given.items())
    model.graph.node.insert(0, helper.make_node("Cast", ["l0.i.i"], ["l0.i.f"], to=TensorProto.FLOAT))
    model.graph.node.insert(1, helper.make_node("Mul", ["l0.i.f", "l0.i.s"], ["l0.i"]))
    onnx.save(model, path)
    report = adopt(path, dry_run=True, announce=lambda _: None)
    assert "blocks.0.mlp.W_in" not in report.weights
    assert "blocks.1.mlp.W_in" in report.weights
    assert "blocks.0.mlp.hook_pre" in report.hooks


def test_inspect_says_how_it_is_stored(tmp_path: Path) -> None:
    write(tmp_path / "model.onnx", Way(zero=True, turned="after"))
    found = inspect_file(tmp_path / "model.onnx")
    assert any("uint8 weights, one scale a channel: 9 products (MatMul)" in kind for kind in found.quantised)
