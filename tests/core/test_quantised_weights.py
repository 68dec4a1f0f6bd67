"""Integers of other programs' weights as numbers: beside the operators that compute with them, run by ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphlens import HookedTransformer, adopt
from graphlens.errors import InputError
from graphlens.file.quantised import Quantisation, dequantised
from tests.foreign_decoder import HEADS, VOCAB, decoder, weights

Array = np.ndarray[Any, Any]
RANDOM = np.random.default_rng(2)


def computed(kind: str, inputs: dict[str, Array], domain: str = "", opset: int = 21, **attributes: Any) -> Array:
    """What ONNX Runtime gives for one node."""
    node = helper.make_node(kind, list(inputs), ["y"], domain=domain, **attributes)
    tensors = [numpy_helper.from_array(array, name) for name, array in inputs.items() if name != "x"]
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)] if "x" in inputs else []
    graph = helper.make_graph(
        [node], "one", given, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], tensors
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    feeds = {"x": inputs["x"]} if "x" in inputs else {}
    found: Array = onnxruntime.InferenceSession(model.SerializeToString()).run(["y"], feeds)[0]
    return found


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("zeros", [True, False])
def test_one_scale_and_one_for_each_row_or_column(dtype: Any, axis: int | None, zeros: bool) -> None:
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    array = RANDOM.integers(low, high, (5, 7), endpoint=True).astype(dtype)
    size = () if axis is None else (array.shape[axis],)
    scale = RANDOM.uniform(0.01, 0.1, size).astype(np.float32)
    zero = RANDOM.integers(low, high, size, endpoint=True).astype(dtype)
    given = {"w": array, "s": scale, **({"z": zero} if zeros else {})}
    expected = computed("DequantizeLinear", given, axis=0 if axis is None else axis)
    found = dequantised(array, Quantisation("s", "z" if zeros else None, axis), scale, zero if zeros else None)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("axis", [0, 1])
def test_blocks_along_an_axis(axis: int) -> None:
    array = RANDOM.integers(-128, 127, (12, 8)).astype(np.int8)
    shape = (3, 8) if axis == 0 else (12, 2)
    scale = RANDOM.uniform(0.01, 0.1, shape).astype(np.float32)
    zero = RANDOM.integers(-9, 9, shape).astype(np.int8)
    expected = computed("DequantizeLinear", {"w": array, "s": scale, "z": zero}, axis=axis, block_size=4)
    np.testing.assert_array_equal(dequantised(array, Quantisation("s", "z", axis, 8, 4), scale, zero), expected)


@pytest.mark.parametrize("columns", [64, 56])
@pytest.mark.parametrize(
    ("bits", "zeros"),
    [(4, "none"), (8, "none"), (4, "packed"), (8, "packed"), (4, "floats")],  # 8 with floats has no kernel
)
def test_matrices_in_blocks_of_few_bits(bits: int, columns: int, zeros: str) -> None:
    rows, block = 6, 16
    blocks = -(-columns // block)
    packed = RANDOM.integers(0, 255, (rows, blocks, block * bits // 8), endpoint=True).astype(np.uint8)
    scale = RANDOM.uniform(0.01, 0.1, rows * blocks).astype(np.float32)
    zero: Array | None = None
    if zeros == "packed":
        zero = RANDOM.integers(0, 255, rows * -(-blocks * bits // 8), endpoint=True).astype(np.uint8)
    if zeros == "floats":
        zero = RANDOM.uniform(0, 15, (rows, blocks)).astype(np.float32)
    given = {"x": np.eye(columns, dtype=np.float32), "w": packed, "s": scale, **({} if zero is None else {"z": zero})}
    attributes = {"K": columns, "N": rows, "bits": bits, "block_size": block}
    expected = computed("MatMulNBits", given, "com.microsoft", accuracy_level=1, **attributes)
    how = Quantisation("s", None if zero is None else "z", 0, bits, block, columns)
    np.testing.assert_allclose(dequantised(packed, how, scale, zero).T, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "how",
    [
        Quantisation("s", bits=3),
        Quantisation("s", block=0),
        Quantisation("s", axis=-1),
        Quantisation(7),  # type: ignore[arg-type]
    ],
)
def test_what_no_quantiser_writes_is_refused(how: Quantisation) -> None:
    with pytest.raises((ValueError, TypeError)):
        how.check()


def test_scales_of_another_size_are_an_error() -> None:
    with pytest.raises(ValueError, match="scales"):
        dequantised(np.zeros((4, 4), np.int8), Quantisation("s", axis=0, block=2), np.ones((3, 3), np.float32), None)


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> HookedTransformer:
    """The decoder with int8 weights, adopted: onnxruntime's own dynamic quantisation."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    folder = tmp_path_factory.mktemp("int8")
    source = decoder(folder / "float.onnx")
    quantize_dynamic(source, folder / "int8.onnx", weight_type=QuantType.QInt8, per_channel=True)
    adopt(folder / "int8.onnx", folder / "hooked", announce=lambda _: None)
    return HookedTransformer.from_onnx(folder / "hooked", "cpu")


def test_weights_of_an_int8_file_are_those_of_its_original_but_for_rounding(quantised: HookedTransformer) -> None:
    own = weights()
    step = np.abs(own["l0.i"]).max(0) / 127
    assert (np.abs(quantised.W_in[0] - own["l0.i"]) <= 0.51 * step).all()
    step = np.abs(own["w4"]).max(0) / 127
    assert (np.abs(quantised.W_U - own["w4"]) <= 0.51 * step).all()
    np.testing.assert_array_equal(quantised.b_in[0], own["l0.j"])
    assert quantised.W_Q.shape == (2, HEADS, own["l0.e"].shape[0], 5)


def test_an_int8_weight_is_read_and_not_set(quantised: HookedTransformer) -> None:
    with pytest.raises(InputError, match="stored as integers"):
        quantised.set_weights({"blocks.0.mlp.W_in": np.zeros_like(quantised.W_in[0])})
    ids = RANDOM.integers(0, VOCAB, (1, 6))
    before = quantised(ids)
    quantised.set_weights({"blocks.0.mlp.b_in": quantised.b_in[0] + 1})
    assert np.abs(quantised(ids) - before).max() > 1e-3
    quantised.reset_weights()
    np.testing.assert_array_equal(quantised(ids), before)


def test_an_int8_file_gives_what_it_gave(quantised: HookedTransformer, tmp_path: Path) -> None:
    folder = quantised.runner.engine.folder
    ids = RANDOM.integers(0, VOCAB, (2, 6))
    session = onnxruntime.InferenceSession(folder.parent / "int8.onnx")
    past = {
        value.name: np.zeros((2, HEADS, 0, 5), np.float32) for value in session.get_inputs() if "past" in value.name
    }
    positions = np.tile(np.arange(6), (2, 1))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": positions, **past}
    expected = session.run(["scores"], feeds)[0]
    # Where an activation lies between two integers, another rounding of its last bit moves it by a step.
    np.testing.assert_allclose(quantised(ids), expected, rtol=0, atol=0.02 * np.abs(expected).max())
