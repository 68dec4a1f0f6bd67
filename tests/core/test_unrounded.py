"""A graph without its static quantisers: it computes what a float graph computes, and keeps what is no rounding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import graphlens
import graphlens.surgery.match
from graphlens import adopt
from graphlens.errors import ModelFileError
from graphlens.pipelines.adopt_quantisers import ensure_finite
from graphlens.surgery.foreign import load_foreign
from graphlens.surgery.match.records import Match
from graphlens.surgery.unfusing.unrounded import rounds_products, unrounded
from tests import foreign_decoder
from tests.quantised_runs import prompts, statically

Array = np.ndarray
RNG = np.random.default_rng(5)
X = RNG.normal(0, 1, (3, 7)).astype(np.float32)
W = RNG.normal(0, 1, (7, 5)).astype(np.float32)


def node(operator: str, inputs: Sequence[str], output: str, domain: str = "", **attributes: object) -> onnx.NodeProto:
    return helper.make_node(operator, list(inputs), [output], name=output, domain=domain, **attributes)


def model_of(nodes: Sequence[onnx.NodeProto], outputs: Sequence[str], **constants: Array) -> ir.Model:
    """A graph of "x" [3, 7]; scales "s", "t", zero points "z", "y" of uint8 and the weights "w" are there."""
    known = {
        "s": np.float32(0.05),
        "t": np.float32(0.06),
        "z": np.uint8(128),
        "y": np.uint8(120),
        "w": W,
        "order": np.asarray([7, 3]),
        **constants,
    }
    read = {name for each in nodes for name in each.input}
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 7])],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in known.items() if name in read],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=9))


def run(model: ir.Model, *names: str) -> list[Array]:
    proto = ir.to_proto(model)
    for output in proto.graph.output:
        output.ClearField("type")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found: list[Array] = session.run(list(names), {"x": X})
    return found


def pair(
    x: str, name: str, scale: str = "s", zero: str = "z", other: tuple[str, str] | None = None
) -> list[onnx.NodeProto]:
    read = other or (scale, zero)
    return [node("QuantizeLinear", [x, scale, zero], f"{name}_q"), node("DequantizeLinear", [f"{name}_q", *read], name)]


def test_what_is_rounded_is_handed_on() -> None:
    nodes = [*pair("x", "a"), node("MatMul", ["a", "w"], "b"), *pair("b", "c"), node("Tanh", ["c"], "d")]
    model = model_of(nodes, ["b", "c", "d"])
    plain = unrounded(model)
    b, c, d = run(plain, "b", "c", "d")
    assert np.abs(b - X @ W).max() <= 1e-5
    assert np.array_equal(b, c)
    assert np.abs(d - np.tanh(X @ W)).max() <= 1e-6
    rounded = run(model, "b")[0]  # the model itself is left as it was
    assert np.abs(rounded - X @ W).max() > 1e-3
    assert np.abs(rounded - (np.clip(np.round(X / np.float32(0.05)), -128, 127) * np.float32(0.05)) @ W).max() <= 1e-5


def test_saturated_numbers_are_what_they_were() -> None:
    (found,) = run(unrounded(model_of(pair("x", "a", "small"), ["a"], small=np.float32(1e-3))), "a")
    assert np.array_equal(found, X)


def test_integers_that_are_moved_and_joined_stand_for_their_numbers() -> None:
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], "q"),
        node("Transpose", ["q"], "moved", perm=[1, 0]),
        node("Reshape", ["q", "order"], "shaped"),
        node("Concat", ["moved", "shaped"], "joined", axis=1),
        node("DequantizeLinear", ["joined", "s", "z"], "a"),
    ]
    (found,) = run(unrounded(model_of(nodes, ["a"])), "a")
    assert np.array_equal(found, np.concatenate([X.T, X.reshape(7, 3)], 1))


def test_several_readers_get_the_same_numbers() -> None:
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], "q"),
        node("DequantizeLinear", ["q", "s", "z"], "a"),
        node("DequantizeLinear", ["q", "s2", "z2"], "b"),
    ]
    found = run(unrounded(model_of(nodes, ["a", "b"], s2=np.float32(0.05), z2=np.uint8(128))), "a", "b")
    assert all(np.array_equal(each, X) for each in found)


@pytest.mark.parametrize("other", [("t", "z"), ("s", "y")])
def test_another_scale_or_zero_point_is_no_rounding(other: tuple[str, str]) -> None:
    # It multiplies, or shifts: what the graph computes stays.
    model = model_of([*pair("x", "a", other=other), *pair("x", "b")], ["a", "b"])
    a, b = run(unrounded(model), "a", "b")
    assert np.array_equal(a, run(model, "a")[0])
    assert np.array_equal(b, X)


def test_scales_one_step_apart_over_all_integers_are_the_same() -> None:
    # QLinearSoftmax of ONNX Runtime rounds with 1 / 254 and is read with 1 / 255.
    sides = {"n": np.float32(1 / 254), "m": np.float32(1 / 255), "o": np.uint8(0), "far": np.float32(1 / 253)}
    (found,) = run(unrounded(model_of(pair("x", "a", "n", "o", ("m", "o")), ["a"], **sides)), "a")
    assert np.array_equal(found, X)
    model = model_of(pair("x", "a", "far", "o", ("m", "o")), ["a"], **sides)
    assert np.array_equal(run(unrounded(model), "a")[0], run(model, "a")[0])


@pytest.mark.parametrize("reader", ["output", "product", "branch"])
def test_integers_that_something_else_reads_stay(reader: str) -> None:
    nodes = pair("x", "a")
    outputs = ["a"]
    if reader == "output":
        outputs.append("a_q")
    elif reader == "product":
        nodes.append(node("MatMulInteger", ["a_q", "weights", "z"], "p"))
        outputs.append("p")
    else:
        inner = helper.make_graph(
            [node("Identity", ["a_q"], "i")], "then", [], [helper.make_tensor_value_info("i", TensorProto.UINT8, None)]
        )
        nodes.append(node("If", ["yes"], "p", then_branch=inner, else_branch=inner))
        outputs.append("p")
    weights = RNG.integers(0, 255, (7, 5)).astype(np.uint8)
    model = model_of(nodes, outputs, weights=weights, yes=np.asarray(True))
    for one, other in zip(run(unrounded(model), *outputs), run(model, *outputs), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize(
    "zeros", [["x_z", "m_z"], ["m_z", "x_z"], ["x_z"], []], ids=lambda names: " ".join(names) or "none"
)
def test_a_product_of_rounded_activations_is_theirs_with_their_own_zero_points_alone(zeros: list[str]) -> None:
    nodes = [
        node("Mul", ["w", "two"], "m"),
        *(
            helper.make_node("DynamicQuantizeLinear", [name], [f"{name}_q", f"{name}_s", f"{name}_z"])
            for name in ("m", "x")
        ),
        node("MatMulInteger", ["x_q", "m_q", *zeros], "i"),
        node("Cast", ["i"], "f", to=TensorProto.FLOAT),
        node("Mul", ["x_s", "m_s"], "scale"),
        node("Mul", ["f", "scale"], "y"),
    ]
    model = model_of(nodes, ["y"], two=np.asarray(2, np.float32))
    own = zeros == ["x_z", "m_z"]
    assert rounds_products(model) == own
    (found,) = run(unrounded(model), "y")
    np.testing.assert_allclose(found, X @ (2 * W) if own else run(model, "y")[0], rtol=1e-6, atol=1e-5)


def test_weights_stay_as_they_are() -> None:
    # Whether a file has their integers, or rounds them in the graph.
    whole = np.clip(np.round(W / np.float32(0.05)), -128, 127).astype(np.int8)
    nodes = [
        node("DequantizeLinear", ["integers", "s"], "v"),
        *pair("w", "u"),
        *pair("x", "a"),
        node("MatMul", ["a", "v"], "b"),
        node("MatMul", ["a", "u"], "c"),
    ]
    b, c = run(unrounded(model_of(nodes, ["b", "c"], integers=whole)), "b", "c")
    expected = X @ (whole.astype(np.float32) * np.float32(0.05))
    assert np.abs(b - expected).max() <= 1e-5
    assert np.abs(c - expected).max() <= 1e-5
    assert np.abs(b - X @ W).max() > 1e-2


def test_an_input_with_a_default_is_no_weight() -> None:
    model = model_of([*pair("m", "a"), node("Add", ["x", "a"], "b")], ["b"], m=X[0])
    value = model.graph.initializers["m"]
    value.shape, value.type = ir.Shape([7]), ir.TensorType(ir.DataType.FLOAT)
    model.graph.inputs.append(value)
    (found,) = run(unrounded(model), "b")
    assert np.abs(found - (X + X[0])).max() <= 1e-6


def test_sixteen_bits_of_onnx_runtimes_own() -> None:
    nodes = [
        node("QuantizeLinear", ["x", "s", "long"], "q", "com.microsoft"),
        node("DequantizeLinear", ["q", "s", "long"], "a", "com.microsoft"),
    ]
    (found,) = run(unrounded(model_of(nodes, ["a"], long=np.uint16(300))), "a")
    assert np.array_equal(found, X)


# In adopted files


@pytest.mark.parametrize(("form", "wide"), [("QDQ", False), ("QDQ", True), ("QOperator", False)])
def test_weights_and_hook_points_of_a_quantised_file_are_all_found(form: str, wide: bool, tmp_path: Path) -> None:
    file = statically("tiny-llama", tmp_path, form, wide)
    report = graphlens.adopt(file, tmp_path / "hooked", announce=lambda _: None)
    own = graphlens.HookedTransformer.from_onnx(graphlens.embedded_model("tiny-llama"), "cpu")
    assert not report.failed
    assert not report.adopted.missing
    assert set(report.hooks) == set(own.hook_points())
    assert max(report.identities.values()) <= 1e-5
    halves = [name for name in report.identities if "to half a step" in name]
    assert len(halves) > 20
    adopted = graphlens.HookedTransformer.from_onnx(tmp_path / "hooked", "cpu")
    tokens, _ = prompts("tiny-llama")
    _, cache = adopted.run_with_cache(tokens)
    # What is read is the file's own, rounded: few numbers are there, and no weight is nearer than its step.
    assert (len(np.unique(cache["blocks.1.attn.hook_q"])) <= 256) != wide
    for name, weight in own.state_dict().items():
        found = np.asarray(adopted.state_dict()[name])
        assert np.abs(found - np.asarray(weight)).max() <= 0.01 * max(1.0, float(np.abs(weight).max())), name


def test_hook_points_in_each_others_place_are_not_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = graphlens.surgery.match.match
    swaps = {"hook_attn_out": "hook_mlp_out", "hook_mlp_out": "hook_attn_out", "attn.hook_q": "attn.hook_k"}

    def swapped(*given: object, **named: object) -> Match:
        match = found(*given, **named)  # type: ignore[arg-type]
        hooks = dict(match.hooks)
        for one, other in swaps.items():
            hooks[f"blocks.1.{one}"] = match.hooks[f"blocks.1.{other}"]
        return Match(match.kind, match.config, hooks, match.weights, match.ports, match.missing, match.notes)

    file = statically("tiny-gpt2", tmp_path, "QDQ")
    monkeypatch.setattr(graphlens.surgery.match, "match", swapped)
    report, plain = (
        graphlens.adopt(each, dry_run=True, announce=lambda _: None) for each in (file, tmp_path / "whole.onnx")
    )
    assert {f"blocks.1.{name}" for name in swaps} <= report.failed.keys()
    assert "blocks.2.hook_attn_out" in report.hooks
    assert report.failed.keys() == plain.failed.keys()  # no hook point is forgiven more than in a float file


def test_what_a_quantiser_leaves_nothing_of_is_told(tmp_path: Path) -> None:
    """This model masks with the least number of float32, so that one step of its scores is 1e36."""
    file = statically("tiny-gpt2", tmp_path, "QDQ")
    report = graphlens.adopt(file, tmp_path / "hooked", announce=lambda _: None)
    assert not report.failed
    adopted = graphlens.HookedTransformer.from_onnx(tmp_path / "hooked", "cpu")
    _, cache = adopted.run_with_cache(prompts("tiny-gpt2")[0])
    lost = [hook for hook in report.hooks if hook.endswith("hook_pattern") and len(np.unique(cache[hook])) == 1]
    assert lost
    (note,) = [note for note in report.adopted.notes if "rounds all that" in note]
    assert lost[0] in note
    assert not [hook for hook in report.hooks if hook.endswith(("hook_q", "hook_pre")) and hook in note]


def test_an_infinite_scale_is_the_reason_where_graphs_differ(tmp_path: Path) -> None:
    """ONNX Runtime's calibration makes one of a mask of -inf: what is computed behind it is chance."""
    model = ir.load(statically("tiny-llama", tmp_path, "QDQ"))
    with pytest.raises(
        ModelFileError, match=r"the scale of its quantiser '.*attn_scores_QuantizeLinear' is inf.*mask of -1e4"
    ):
        ensure_finite(model, Path("a.onnx"))
    ensure_finite(model_of(pair("x", "a"), ["a"]), Path("a.onnx"))
    with pytest.raises(ModelFileError, match=r"'a_q' is 0\.0"):
        ensure_finite(model_of(pair("x", "a", "none"), ["a"], none=np.float32(0)), Path("a.onnx"))


def test_products_of_two_activations_that_are_rounded_in_a_run_are_proved_without(tmp_path: Path) -> None:
    """As optimum's dynamic quantiser makes them: queries and keys, pattern and values are integers when they are multiplied."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    source = foreign_decoder.decoder(tmp_path / "float.onnx")
    more = {"MatMulConstBOnly": False}
    quantize_dynamic(source, tmp_path / "int8.onnx", weight_type=QuantType.QInt8, extra_options=more)
    model = load_foreign(tmp_path / "int8.onnx")
    assert rounds_products(model)
    assert not rounds_products(unrounded(model))
    assert not rounds_products(load_foreign(source))
    found, plain = (adopt(file, dry_run=True, announce=lambda _: None) for file in (tmp_path / "int8.onnx", source))
    assert set(found.hooks) == set(plain.hooks)
    assert max(found.identities.values()) <= 1e-5
    assert (found.adopted.apart, plain.adopted.apart) == (False, True)
