"""Files of other programs that are whole and cannot be adopted, or are damaged: one sentence, which says what it is about."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import graphlens
from graphlens import HookedTransformer
from graphlens.errors import GraphlensError, ModelFileError
from graphlens.pipelines.inspect import inspect_file
from graphlens.surgery.adoptable import NotAdoptable, making_sense
from tests import foreign_files as made
from tests.command_line import graphlens as command
from tests.command_line import sentence
from tests.hostile.truth import bare_session

IDS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def test_the_small_decoder_is_adopted_and_computes_what_it_computed(tmp_path: Path) -> None:
    """The other tests here take it apart: whole, it is no reason for a refusal."""
    file = made.write(made.decoder(), tmp_path / "model.onnx")
    graphlens.adopt(file, tmp_path / "out")
    model = HookedTransformer.from_onnx(tmp_path / "out")
    logits, cache = model.run_with_cache(IDS)
    names = ["logits", "h.1.pattern", "h.0.z_t", "h.0.post", "resid_1", "h.1.projected", "placed"]
    exposed = graphlens.expose(file, names[1:], tmp_path / "exposed.onnx")
    wanted = dict(zip(names, bare_session(str(exposed.file)).run(names, {"input_ids": IDS}), strict=True))
    np.testing.assert_allclose(logits, wanted["logits"], rtol=1e-4, atol=1e-5)
    for hook, name in (
        ("blocks.1.attn.hook_pattern", "h.1.pattern"),
        ("blocks.0.attn.hook_z", "h.0.z_t"),
        ("blocks.0.mlp.hook_post", "h.0.post"),
        ("blocks.1.hook_resid_pre", "resid_1"),
        ("blocks.1.hook_attn_out", "h.1.projected"),
    ):
        np.testing.assert_allclose(cache[hook], wanted[name], rtol=1e-4, atol=1e-5, err_msg=hook)
    np.testing.assert_allclose(cache["hook_pos_embed"], np.broadcast_to(wanted["placed"], (2, 5, made.D)), atol=1e-6)


def test_fused_operators_that_are_kept_show_what_is_around_them(tmp_path: Path) -> None:
    file = made.write(made.decoder(), tmp_path / "model.onnx")
    whole = graphlens.adopt(file, tmp_path / "whole")
    report = graphlens.adopt(file, tmp_path / "kept", keep_fused=True)
    hidden = {name for name in whole.hooks if ".ln" in name or name.startswith(("ln_final", "unembed.hook_in"))}
    assert set(whole.hooks) - set(report.hooks) == hidden
    assert {name for name, why in report.adopted.missing.items() if "--keep-fused leaves" in why} >= hidden - {
        "unembed.hook_in"
    }
    kinds = [node.op_type for node in onnx.load(tmp_path / "kept" / "model.onnx", load_external_data=False).graph.node]
    assert kinds.count("LayerNormalization") == 2 * made.LAYERS + 1
    assert list(report.adopted.kept) == ["LayerNormalization"]
    kept, other = (HookedTransformer.from_onnx(tmp_path / name) for name in ("kept", "whole"))
    logits, cache = kept.run_with_cache(IDS)
    expected, values = other.run_with_cache(IDS)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    for name in report.hooks:
        np.testing.assert_allclose(cache[name], values[name], rtol=1e-4, atol=1e-5, err_msg=name)
    edit = graphlens.Ablate("blocks.0.attn.hook_z", heads=1)
    edited = other.run_with_interventions(IDS, [edit])
    np.testing.assert_allclose(kept.run_with_interventions(IDS, [edit]), edited, rtol=1e-4, atol=1e-4)


def refused(model: onnx.ModelProto, folder: Path, *parts: str) -> None:
    """Adopting says so, in one block and without a folder; inspect says the same, and does not stop at it."""
    file = made.write(model, folder / "model.onnx") if model.ir_version else folder / "model.onnx"
    done = command("adopt", file, "-o", folder / "out")
    assert done.returncode == 1, done.stdout
    said = sentence(done.stderr)
    assert not (folder / "out").exists()
    obstacles = " ".join(inspect_file(file).obstacles)
    for part in parts:
        assert part in said, said
        assert part in obstacles, obstacles


def test_shapes_that_are_frozen(tmp_path: Path) -> None:
    refused(made.frozen(), tmp_path, "'input_ids' is frozen to 1 x 128")


def test_inputs_that_no_transformer_has(tmp_path: Path) -> None:
    model = made.decoder()
    model.graph.input.append(made.value("temperature", made.FLOAT, ["batch"]))
    model.graph.node.append(helper.make_node("Identity", ["temperature"], ["warm"], name="warm"))
    model.graph.output.append(made.value("warm", made.FLOAT, ["batch"]))
    refused(model, tmp_path, "'temperature'")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda node: node.input.pop(), "has 1 inputs, and the operator takes 2"),
        (lambda node: node.output.append("more"), "has 2 outputs, and the operator gives 1"),
        (
            lambda node: node.attribute.add(name="axis", i=3, type=2),
            "has an attribute 'axis', which the operator does not have",
        ),
    ],
)
def test_a_node_that_is_none_of_its_operator(
    change: Callable[[onnx.NodeProto], object], part: str, tmp_path: Path
) -> None:
    model = made.decoder()
    change(next(node for node in model.graph.node if node.name == "/lm_head/MatMul"))
    refused(model, tmp_path, "node '/lm_head/MatMul' (MatMul)", part, "the file is damaged")


@pytest.mark.parametrize(
    ("operator", "name", "attribute", "part"),
    [
        ("Transpose", "perm", [0, 0, 1, 1], "has the order of axes [0, 0, 1, 1], which is none"),
        ("Transpose", "perm", 2, "has an attribute 'perm' of the type INT, and the operator's is INTS"),
        ("LayerNormalization", "epsilon", "x", "has an attribute 'epsilon' of the type STRING"),
    ],
)
def test_an_attribute_that_does_not_fit(operator: str, name: str, attribute: object, part: str, tmp_path: Path) -> None:
    model = made.decoder()
    node = next(node for node in model.graph.node if node.op_type == operator)
    kept = [each for each in node.attribute if each.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, attribute)])
    refused(model, tmp_path, part)


def test_nodes_in_an_order_in_which_they_cannot_run(tmp_path: Path) -> None:
    """ONNX Runtime's float16 converter writes such files, and ONNX Runtime puts them in order."""
    model = made.decoder()
    whole = made.write(model, tmp_path / "whole.onnx")
    nodes = list(reversed(model.graph.node))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    file = made.write(model, tmp_path / "model.onnx")
    one, other = (graphlens.adopt(each, tmp_path / f"{each.stem}-hooked") for each in (whole, file))
    assert set(one.hooks) == set(other.hooks)
    models = (HookedTransformer.from_onnx(tmp_path / name) for name in ("whole-hooked", "model-hooked"))
    first, second = (each(IDS) for each in models)
    np.testing.assert_array_equal(first, second)
    assert [node.name for node in onnx.load(file).graph.node] == [
        node.name for node in nodes
    ]  # the file stays as it is


def test_nodes_that_wait_for_each_other(tmp_path: Path) -> None:
    model = made.decoder()
    model.graph.node[0].input[0] = model.graph.node[-1].output[0]
    refused(model, tmp_path, "which nothing before it computes")


def test_a_value_that_nothing_computes(tmp_path: Path) -> None:
    model = made.decoder()
    model.graph.node[-1].input[0] = "nowhere"
    refused(model, tmp_path, "'nowhere', which nothing before it computes")


def test_a_graph_that_contradicts_itself_is_told_as_such() -> None:
    with (
        pytest.raises(NotAdoptable, match=r"no sense could be made of its graph.*cannot reshape") as raised,
        making_sense("a.onnx"),
    ):
        np.zeros(3).reshape(2, 2)
    assert isinstance(raised.value.__cause__, ValueError)
    with pytest.raises(ModelFileError, match=r"^as it was$"), making_sense("a.onnx"):
        raise ModelFileError("as it was")


def test_heads_that_do_not_divide_the_width(tmp_path: Path) -> None:
    model = made.decoder()
    for tensor in model.graph.initializer:
        if tensor.name == "h.0.heads" or tensor.name == "heads":
            tensor.CopyFrom(numpy_helper.from_array(np.array([0, 0, 3, 4]), tensor.name))
    file = made.write(model, tmp_path / "model.onnx")
    with pytest.raises(GraphlensError):
        graphlens.adopt(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert inspect_file(file).lines()


def test_two_files_of_one_model_are_asked_about(tmp_path: Path) -> None:
    for name in ("decoder_model.onnx", "decoder_with_past_model.onnx"):
        made.write(made.decoder(), tmp_path / name)
    done = command("adopt", tmp_path, "-o", tmp_path / "out")
    assert done.returncode == 1
    assert "2 ONNX files lie in it (decoder_model.onnx, decoder_with_past_model.onnx). Name one of them" in sentence(
        done.stderr
    )
    named = command("adopt", tmp_path / "decoder_model.onnx", "-o", tmp_path / "out")
    assert named.returncode == 0, named.stderr
    assert "decoder_with_past_model.onnx beside it is the same decoder with a KV cache" in " ".join(
        named.stdout.split()
    )
