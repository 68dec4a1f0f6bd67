"""``graphlens inspect``: what it says of a file is what is in it, whoever wrote it; and why a file cannot be adopted."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.calibrate import CalibrationDataReader
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from graphlens import adopt, surgery
from graphlens.errors import GraphlensError, ModelFileError
from graphlens.pipelines.inspect import Inspection, inspect_file
from graphlens.surgery.adoptable import STILL, NotAdoptable, ensure_adoptable
from tests import foreign_files as made
from tests.command_line import graphlens as command
from tests.command_line import sentence


def inspected(model: onnx.ModelProto, folder: Path, external: str | None = None) -> Inspection:
    return inspect_file(made.write(model, folder / "model.onnx", external))


@pytest.mark.parametrize("kind", made.REFUSED)
def test_a_file_that_cannot_be_adopted_is_told_why_in_a_sentence(kind: str, tmp_path: Path) -> None:
    make, message = made.REFUSED[kind]
    file = made.write(make(), tmp_path / "model.onnx")
    with pytest.raises(NotAdoptable, match=message) as raised:
        ensure_adoptable(surgery.load_foreign(file), file)
    said = str(raised.value)
    assert said.startswith(f"{file}: ")
    assert said.endswith(STILL)  # what can still be done
    assert "\n" not in said
    assert said.removeprefix(f"{file}: ").removesuffix(STILL).strip() in inspect_file(file).obstacles
    adopted = command("adopt", file, "-o", tmp_path / "out")
    assert adopted.returncode == 1
    # A long path is broken anywhere to fit the terminal.
    assert sentence(said).replace(" ", "") in sentence(adopted.stderr).replace(" ", "")
    assert not (tmp_path / "out").exists()
    assert command("expose", file, "--list").returncode == 0


def test_one_attention_is_no_obstacle(tmp_path: Path) -> None:
    found = ensure_adoptable(surgery.load_foreign(made.write(made.one_layer(), tmp_path / "model.onnx")), "model.onnx")
    assert [core.node.op_type for core in found.cores] == ["Softmax"]


def test_operators_inputs_and_weights_are_those_of_the_file(tmp_path: Path) -> None:
    model = made.cross_attention()
    found = inspected(model, tmp_path)
    assert found.operators == dict(Counter(node.op_type for node in model.graph.node))
    assert list(found.operators.values()) == sorted(found.operators.values(), reverse=True)
    assert found.nodes == len(model.graph.node)
    assert (found.producer, found.ir_version, found.opsets) == ("pytorch 9.9", 8, {"ai.onnx": 17})
    assert [(port.name, port.type) for port in found.inputs] == [
        ("input_ids", "int64 [batch, sequence]"),
        ("encoder_hidden_states", f"float [batch, encoder_sequence, {made.D}]"),
    ]
    assert [(port.name, port.type) for port in found.outputs] == [("logits", f"float [batch, sequence, {made.VOCAB}]")]
    arrays = [numpy_helper.to_array(tensor) for tensor in model.graph.initializer]
    assert found.parameters == sum(array.size for array in arrays)
    assert found.embedded_bytes == sum(array.nbytes for array in arrays)
    assert found.external == {}
    assert (found.hooked, found.quantised, found.fused, found.found) == (None, (), {}, None)


def test_branches_loops_and_functions_are_counted(tmp_path: Path) -> None:
    merged = made.merged()
    branches = [attribute.g for node in merged.graph.node for attribute in node.attribute]
    nodes = [*merged.graph.node, *(node for branch in branches for node in branch.node)]
    assert inspected(merged, tmp_path).operators == dict(Counter(node.op_type for node in nodes))
    assert inspected(made.looping(), tmp_path).operators["Loop"] == 1


def test_external_data_are_named_and_missing_ones_do_not_stop_it(tmp_path: Path) -> None:
    found = inspected(made.one_layer(), tmp_path, "model.onnx_data")
    assert found.external == {"model.onnx_data": (tmp_path / "model.onnx_data").stat().st_size}
    (tmp_path / "model.onnx_data").unlink()
    gone = inspect_file(tmp_path)
    assert gone.external == {"model.onnx_data": None}
    assert gone.operators == found.operators
    assert [why for why in gone.obstacles if "model.onnx_data: the weights file is missing" in why]
    said = command("inspect", tmp_path)
    assert said.returncode == 0
    assert "model.onnx_data: missing" in said.stdout
    assert STILL in said.stdout


class _Calibration(CalibrationDataReader):
    """Two prompts."""

    def __init__(self) -> None:
        self._left = [{"input_ids": np.array([[3, 1, 4]])}, {"input_ids": np.array([[9, 2, 6]])}]

    def get_next(self) -> dict[str, np.ndarray]:
        return self._left.pop() if self._left else {}


def _static(source: Path, target: Path, form: QuantFormat, per_channel: bool) -> None:
    quantize_static(source, target, _Calibration(), quant_format=form, per_channel=per_channel)


def _blocks(source: Path, target: Path, block: int, symmetric: bool) -> None:
    quantizer = MatMulNBitsQuantizer(onnx.load(source), block_size=block, is_symmetric=symmetric)
    quantizer.process()
    quantizer.model.save_model_to_file(str(target), False)


def _half(source: Path, target: Path) -> None:
    model = onnx.load(source)
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    onnx.save(model, target)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("quantise", "said"),
    [
        (
            lambda a, b: quantize_dynamic(a, b, weight_type=QuantType.QInt8),
            ["dynamic int8, one scale a tensor: 5 products (MatMulInteger)"],
        ),
        (
            lambda a, b: quantize_dynamic(a, b, weight_type=QuantType.QUInt8, per_channel=True),
            ["dynamic uint8, one scale a channel: 5 products (MatMulInteger)"],
        ),
        (
            lambda a, b: quantize_dynamic(a, b, weight_type=QuantType.QInt8, nodes_to_exclude=["/lm_head/MatMul"]),
            [
                "dynamic int8, one scale a tensor: 4 products (MatMulInteger)",
                "1 product in floating point: /lm_head/MatMul",
            ],
        ),
        (lambda a, b: _blocks(a, b, 16, True), ["int4 weights in blocks of 16, symmetric: 5 products (MatMulNBits)"]),
        (
            lambda a, b: _blocks(a, b, 32, False),
            ["int4 weights in blocks of 32, zero points: 5 products (MatMulNBits)"],
        ),
        (
            lambda a, b: _static(a, b, QuantFormat.QDQ, False),
            ["int8 weights, one scale a tensor: 5 products (MatMul)", "QDQ: "],
        ),
        (
            lambda a, b: _static(a, b, QuantFormat.QDQ, True),
            ["int8 weights, one scale a channel: 5 products (MatMul)", "QDQ: "],
        ),
        (
            lambda a, b: _static(a, b, QuantFormat.QOperator, False),
            ["QOperator int8, one scale a tensor: 7 products (QLinearMatMul)"],
        ),
        (_half, ["float16 weights"]),
        (lambda a, b: b.write_bytes(a.read_bytes()), []),
    ],
)
def test_how_a_file_is_quantised(quantise: Callable[[Path, Path], None], said: list[str], tmp_path: Path) -> None:
    source, target = made.write(made.one_layer(), tmp_path / "float.onnx"), tmp_path / "quantised.onnx"
    quantise(source, target)
    found = inspect_file(target).quantised
    kept = [line for line in found if not line.startswith("QOperator int8: ")]  # QLinearSoftmax and the like
    assert len(kept) == len(said), found
    for line, wanted in zip(kept, said, strict=True):
        assert line.startswith(wanted), found


def test_a_weight_that_is_dequantised_in_blocks(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["w8", "s", "z"], ["w"], name="dq", axis=0, block_size=4),
        helper.make_node("MatMul", ["x", "w"], ["out"], name="mm"),
    ]
    weights = {"w8": np.ones((8, 3), np.int8), "s": np.ones((2, 3), np.float32), "z": np.zeros((2, 3), np.int8)}
    model = made.model(
        nodes, [made.value("x", made.FLOAT, [2, 8])], [made.value("out", made.FLOAT, [2, 3])], weights, 21
    )
    assert inspected(model, tmp_path).quantised == ("int8 weights, in blocks of 4: 1 product (MatMul)",)


def test_many_inputs_of_one_kind_take_one_line(tmp_path: Path) -> None:
    past = [made.value(f"past_key_values.{layer}.key", made.FLOAT, ["batch", 5, "past", 2]) for layer in range(30)]
    ends = [helper.make_node("Identity", [value.name], [f"present.{index}.key"]) for index, value in enumerate(past)]
    outputs = [made.value(node.output[0], made.FLOAT, ["batch", 5, "past", 2]) for node in ends]
    found = inspected(made.model(ends, past, outputs), tmp_path)
    assert [(port.name, port.count) for port in found.inputs] == [("past_key_values.N.key", 30)]
    assert "past_key_values.N.key  float [batch, 5, past, 2]  (x 30)" in "\n".join(found.lines())


def test_our_own_file_is_told_as_one(tiny_folder: Path) -> None:
    found = inspect_file(tiny_folder)
    hooks = surgery.read_manifest(surgery.load(tiny_folder)).hooks
    assert found.hooked is not None
    assert found.hooked.startswith("a hooked file: ")
    assert f"{len(hooks)} hook points" in found.hooked
    assert found.found is None
    assert found.obstacles == ()


def test_an_adopted_file_says_of_what(tmp_path: Path) -> None:
    file = made.write(made.decoder(), tmp_path / "gpt.onnx")
    adopt(file, tmp_path / "out")
    found = inspect_file(tmp_path / "out").hooked
    assert found is not None
    assert found.startswith("a hooked file, adopted from gpt.onnx of pytorch 9.9: ")


def test_a_stripped_file_of_ours_is_found_again(tiny_folder: Path, tmp_path: Path) -> None:
    """As another program's: without a manifest, by structure alone."""
    manifest = surgery.read_manifest(surgery.load(tiny_folder))
    assert command("strip", tiny_folder, "-o", tmp_path / "plain").returncode == 0
    found = inspect_file(tmp_path / "plain")
    assert found.hooked is None
    assert found.obstacles == ()
    assert found.found is not None
    assert found.found.kind == "decoder"
    assert set(manifest.hooks) <= set(found.found.hooks)
    for name in ("n_layers", "n_heads", "d_model", "d_head", "d_mlp", "d_vocab"):
        assert found.found.config[name] == getattr(manifest.config, name)
    assert found.found.identities["softmax(scores) = pattern"] == manifest.config.n_layers
    assert found.found.identities["pattern . v = z"] == manifest.config.n_layers
    assert "pattern . v = z (4)" in "\n".join(found.lines())


def test_the_json_has_all_of_it(tmp_path: Path) -> None:
    file = made.write(made.cross_attention(), tmp_path / "model.onnx")
    data = json.loads(command("inspect", file, "--json").stdout)
    found = inspect_file(file)
    assert data == json.loads(json.dumps(found.to_json()))
    assert data["operators"] == found.operators
    assert data["obstacles"] == list(found.obstacles)


def test_files_beside_it_are_named(tmp_path: Path) -> None:
    file = made.write(made.decoder(), tmp_path / "decoder_model.onnx")
    assert inspect_file(file).remarks == ()
    made.write(made.decoder(), tmp_path / "decoder_with_past_model.onnx")
    made.write(made.one_layer(), tmp_path / "encoder_model.onnx")
    said = inspect_file(file).remarks
    assert [line.split(" beside it ")[0] for line in said] == ["decoder_with_past_model.onnx", "encoder_model.onnx"]


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    for name, data, message in (
        ("empty.onnx", b"", "the file is empty"),
        ("text.onnx", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "not an ONNX model"),
        ("zeros.onnx", bytes(100), "not an ONNX model"),
        ("cut.onnx", made.one_layer().SerializeToString()[:1000], "not an ONNX model"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ModelFileError, match=message):
            inspect_file(tmp_path / name)


def test_tensors_of_text_operators_of_strangers_and_old_opsets_are_looked_at(tmp_path: Path) -> None:
    nodes = [helper.make_node("Tokenizer", ["text", "words"], ["out"], name="t", domain="com.example")]
    inputs, outputs = [made.value("text", made.STRING, ["n"])], [made.value("out", made.INT64, ["n", "m"])]
    graph = helper.make_graph(
        nodes, "g", inputs, outputs, [helper.make_tensor("words", TensorProto.STRING, [2], [b"a", b"b"])]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 9), helper.make_opsetid("com.example", 1)])
    found = inspected(model, tmp_path)
    assert found.fused == {"com.example::Tokenizer": 1}
    assert found.opsets == {"ai.onnx": 9, "com.example": 1}
    assert "no attention was found" in found.obstacles[0]


def _wide(count: int) -> onnx.ModelProto:
    """A chain of so many additions, and as many Softmax beside it that all read one value."""
    nodes, before = [], "x"
    for index in range(count):
        nodes.append(helper.make_node("Add", [before, "x"], [f"a{index}"], name=f"a{index}"))
        nodes.append(helper.make_node("Softmax", ["x"], [f"s{index}"], name=f"s{index}"))
        nodes.append(helper.make_node("Add", [f"s{index}", "x"], [f"t{index}"], name=f"t{index}"))
        before = f"a{index}"
    return made.model(nodes, [made.value("x", made.FLOAT, ["b", 4])], [made.value(before, made.FLOAT, ["b", 4])])


def test_looking_takes_time_in_proportion(tmp_path: Path) -> None:
    file = made.write(_wide(12_000), tmp_path / "model.onnx")
    started = time.process_time()
    found = inspect_file(file)
    assert found.nodes == 36_000
    assert time.process_time() - started < 10


def test_functions_that_explode_and_deep_graphs_are_obstacles(tmp_path: Path) -> None:
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]
    functions = [
        helper.make_function(
            "f", f"f{i}", ["x"], ["y"],
            [helper.make_node(f"f{i + 1}", ["x"], ["m"], domain="f"), helper.make_node(f"f{i + 1}", ["m"], ["y"], domain="f")],
            opsets,
        )
        for i in range(40)
    ]  # fmt: skip
    functions.append(helper.make_function("f", "f40", ["x"], ["y"], [helper.make_node("Relu", ["x"], ["y"])], opsets))
    graph = helper.make_graph(
        [helper.make_node("f0", ["x"], ["out"], domain="f")],
        "g", [made.value("x", made.FLOAT, [1])], [made.value("out", made.FLOAT, [1])],
    )  # fmt: skip
    found = inspected(helper.make_model(graph, functions=functions, opset_imports=opsets), tmp_path)
    assert any("functions expand to over" in why for why in found.obstacles)
    assert found.found is None


def _damaged(data: bytes, random: np.random.Generator) -> bytes:
    """Cut short, or with some bytes changed."""
    if random.random() < 0.25:
        return data[: int(random.integers(1, len(data)))]
    changed = bytearray(data)
    for place in random.integers(0, len(data), size=int(random.integers(1, 6))):
        changed[place] = int(random.integers(256))
    return bytes(changed)


@pytest.mark.parametrize("make", [made.one_layer, made.merged, made.all_types, made.looping])
def test_damaged_files_end_in_an_error_of_ours_or_in_an_answer(
    make: Callable[[], onnx.ModelProto], tmp_path: Path
) -> None:
    """In this process: no traceback. tests/hostile plays more of them with limits of memory and time."""
    data, random = make().SerializeToString(), np.random.default_rng(17)
    file = tmp_path / "model.onnx"
    answered = 0
    for _ in range(150):
        file.write_bytes(_damaged(data, random))
        try:
            found = inspect_file(file)
            assert json.dumps(found.to_json())
            assert found.lines()
            answered += 1
        except GraphlensError:
            continue
    assert 0 < answered < 150


@pytest.mark.skipif(sys.platform != "linux", reason="resource")
def test_a_tensor_that_claims_a_terabyte_takes_no_memory(tmp_path: Path) -> None:
    model = made.one_layer()
    model.graph.initializer[0].dims[0] = 1 << 38
    made.write(model, tmp_path / "model.onnx")
    code = (
        "import resource, sys; from graphlens.errors import ModelFileError\n"
        "from graphlens.pipelines.inspect import inspect_file\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (1 << 30, 1 << 30))\n"
        "try: inspect_file(sys.argv[1])\n"
        "except ModelFileError as error: print(error)"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert "tensor 'table' has the shape [274877906944, 10], and the bytes that it holds do not fit it" in ran.stdout
