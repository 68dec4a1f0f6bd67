"""``graphlens expose``: any values of any ONNX file as outputs, of every type, and the original as it was."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper

import graphlens
from graphlens import HookedTransformer, surgery
from graphlens.errors import ExportError, GraphlensError, InputError, ModelFileError
from graphlens.pipelines.expose import list_values
from tests import foreign_files as made
from tests.command_line import graphlens as command
from tests.command_line import sentence

IDS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
FEEDS = {"input_ids": IDS}


def runs(file: Path, names: Sequence[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """By plain ONNX Runtime, all optimisations on."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    return list(ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"]).run(list(names), feeds))


def outputs(file: Path) -> dict[str, onnx.TypeProto]:
    loaded = onnx.load(file, load_external_data=False)
    return {value.name: value.type for value in loaded.graph.output}


def checked(file: Path) -> None:
    onnx.checker.check_model(str(file), full_check=True)


def test_values_are_what_the_graph_computes_and_the_original_is_untouched(tmp_path: Path) -> None:
    file = made.write(made.one_layer(), tmp_path / "model.onnx")
    before = file.read_bytes()
    wrote = graphlens.expose(file, ["pattern", "*scores*", "y"], tmp_path / "exposed.onnx")
    assert wrote.file == tmp_path / "exposed.onnx"
    assert wrote.added == ("scores", "pattern", "y")
    assert wrote.already == ()
    assert file.read_bytes() == before
    checked(wrote.file)
    assert list(outputs(wrote.file)) == ["logits", "scores", "pattern", "y"]
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in made.one_layer().graph.initializer}
    x = weights["table"][IDS].astype(np.float64)
    q, k, v = (
        (x @ weights[f"w_{name}"]).reshape(2, 5, made.HEADS, -1).transpose(0, 2, 1, 3) for name in ("q", "k", "v")
    )
    scores = q @ k.transpose(0, 1, 3, 2) * weights["scale"]
    pattern = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    y = x + (pattern @ v).transpose(0, 2, 1, 3).reshape(2, 5, -1) @ weights["w_o"]
    found = runs(wrote.file, ["scores", "pattern", "y", "logits"], FEEDS)
    for value, wanted in zip(found, [scores, pattern, y, y @ weights["unembed"]], strict=True):
        np.testing.assert_allclose(value, wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found[-1], runs(file, ["logits"], FEEDS)[0])


def test_every_other_byte_is_as_it_was(tmp_path: Path) -> None:
    model = made.all_types()
    model.doc_string = "kept"
    model.graph.quantization_annotation.add(tensor_name="biased")
    model.metadata_props.add(key="author", value="somebody")
    model.training_info.add().algorithm.name = "kept too"
    file = made.write(model, tmp_path / "model.onnx")
    wrote = onnx.load(graphlens.expose(file, ["product", "larger"], tmp_path / "out.onnx").file)
    assert [value.name for value in wrote.graph.output] == ["out", "product", "larger"]
    del wrote.graph.output[1:]
    assert wrote.SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    file = made.write(made.one_layer(), tmp_path / "a" / "model.onnx", "weights.bin")
    monkeypatch.setattr("graphlens.pipelines.expose.copy_with", fail)
    with pytest.raises(ExportError, match="The disk is full"):
        graphlens.expose(file, "pattern", tmp_path / "new" / "folder")
    assert not list((tmp_path / "new").iterdir())
    with pytest.raises(ExportError, match="The disk is full"):
        graphlens.expose(file, "pattern", file.parent / "beside.onnx")
    assert sorted(path.name for path in file.parent.iterdir()) == ["model.onnx", "weights.bin"]


def test_what_an_optimiser_would_fuse_away_stays_readable(tmp_path: Path) -> None:
    file = made.write(made.one_layer(), tmp_path / "model.onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    kept = {name for node in onnx.load(tmp_path / "optimised.onnx").graph.node for name in node.output}
    assert "products" not in kept  # the product and its scale became one FusedMatMul
    wrote = graphlens.expose(file, ["products", "scores"], tmp_path / "out.onnx")
    products, scores = runs(wrote.file, ["products", "scores"], FEEDS)
    np.testing.assert_allclose(products * np.float32((made.D // made.HEADS) ** -0.5), scores, rtol=1e-5)


def test_values_of_every_type_get_their_types_and_ranks(tmp_path: Path) -> None:
    file = made.write(made.all_types(), tmp_path / "model.onnx")
    wrote = graphlens.expose(file, "*", tmp_path / "all.onnx")
    assert wrote.unranked == ()
    assert wrote.already == ("out",)
    checked(wrote.file)
    types = outputs(wrote.file)
    kinds = {name: kind.tensor_type.elem_type for name, kind in types.items() if kind.HasField("tensor_type")}
    names = {name: onnx.TensorProto.DataType.Name(kind) for name, kind in kinds.items()}
    assert names == {
        **dict.fromkeys(("out", "product", "biased", "most", "step"), "FLOAT"),
        **{"half": "FLOAT16", "brain": "BFLOAT16", "double": "DOUBLE", "folded": "DOUBLE", "larger": "BOOL"},
        **dict.fromkeys(("best", "places", "shape", "rows_of", "spread"), "INT64"),
        **{"words": "STRING", "bytes": "UINT8", "zero": "UINT8"},
    }
    assert types["both"].sequence_type.elem_type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert types["maybe"].optional_type.elem_type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    x = np.arange(15, dtype=np.float32).reshape(5, 3) - 7
    plain = [name for name in names if name not in ("brain", "both", "maybe")]
    for name, value in zip(plain, runs(wrote.file, plain, {"x": x}), strict=True):
        assert len(types[name].tensor_type.shape.dim) == value.ndim, name
    sequence, folded = runs(wrote.file, ["both", "folded"], {"x": x})
    assert [each.shape for each in sequence] == [(5, 4), (5, 4)]
    assert folded.shape == (5, 1, 4)


def test_a_rank_that_no_run_finds_is_told(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["folded"], name="folded"),
        helper.make_node("SequenceAt", ["many", "at"], ["one"], name="one"),
        helper.make_node("Add", ["folded", "one"], ["out"], name="out"),
    ]
    inputs = [
        made.value("x", made.FLOAT, ["n"]),
        made.value("shape", made.INT64, ["axes"]),
        helper.make_tensor_sequence_value_info("many", made.FLOAT, None),
    ]
    model = made.model(nodes, inputs, [made.value("out", made.FLOAT, ["a", "b"])], {"at": np.array(0)})
    file = made.write(model, tmp_path / "model.onnx")
    done = command("expose", file, "--like", "folded", "-o", tmp_path / "out.onnx")
    assert done.returncode == 0, done.stderr
    assert "The number of axes of 1 is not known before a run ('folded' first)" in " ".join(done.stdout.split())
    session = ort.InferenceSession(str(tmp_path / "out.onnx"), providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_outputs()] == ["out", "folded"]


def test_external_data_open_beside_the_copy(tmp_path: Path) -> None:
    folder = tmp_path / "original"
    file = made.write(made.one_layer(), folder / "model.onnx", "model.onnx_data")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    wanted = runs(file, ["logits"], FEEDS)[0]
    for out, written in ((tmp_path / "copy", "model.onnx"), (folder / "beside.onnx", "beside.onnx")):
        wrote = graphlens.expose(file, "pattern", out)
        assert wrote.file.name == written
        assert (wrote.file.parent / "model.onnx_data").stat().st_nlink == 1
        checked(wrote.file)
        logits, pattern = runs(wrote.file, ["logits", "pattern"], FEEDS)
        np.testing.assert_array_equal(logits, wanted)
        np.testing.assert_allclose(pattern.sum(-1), 1, rtol=1e-5)
    assert {name: (folder / name).read_bytes() for name in before} == before
    linked = graphlens.expose(folder, "pattern", tmp_path / "linked", link=True)
    assert (linked.file.parent / "model.onnx_data").samefile(folder / "model.onnx_data")
    np.testing.assert_array_equal(runs(linked.file, ["logits"], FEEDS)[0], wanted)


def test_nothing_that_is_there_is_replaced(tmp_path: Path) -> None:
    file = made.write(made.one_layer(), tmp_path / "a" / "model.onnx", "weights.bin")
    for out in (file, file.parent):
        with pytest.raises(InputError, match="this is the original"):
            graphlens.expose(file, "pattern", out)
    other = made.write(made.convolutions(), tmp_path / "b" / "cnn.onnx", "weights.bin")
    weights = (other.parent / "weights.bin").read_bytes()
    with pytest.raises(ExportError, match=r"weights\.bin: exists"):
        graphlens.expose(file, "pattern", tmp_path / "b")
    with pytest.raises(ExportError, match=r"cnn\.onnx: exists"):
        graphlens.expose(file, "pattern", other)
    assert (other.parent / "weights.bin").read_bytes() == weights
    assert sorted(path.name for path in other.parent.iterdir()) == ["cnn.onnx", "weights.bin"]


@pytest.mark.parametrize(
    ("make", "like", "message"),
    [
        (made.one_layer, "patern", "matches no value of this model. Nearest: 'pattern'"),
        (made.one_layer, "*SCORE", "Nearest: 'scores'"),
        (made.one_layer, "w_q", "'w_q' is a weight (an initializer), and not computed"),
        (made.one_layer, "input_ids", "'input_ids' is an input, and not computed"),
        (made.one_layer, "w_*", "matches only 'w_q', which is a weight"),
        (made.merged, "with_pattern", "'with_pattern' is inside then_branch of the If 'optimum::if'"),
        (made.merged, "*_scores", "which is inside"),
        (made.looping, "pattern", "inside body of the Loop '/loop'"),
    ],
)
def test_what_is_no_computed_value_is_named(make: type, like: str, message: str, tmp_path: Path) -> None:
    file = made.write(make(), tmp_path / "model.onnx")
    with pytest.raises(InputError) as raised:
        graphlens.expose(file, [like], tmp_path / "out.onnx")
    assert message in str(raised.value)
    assert not (tmp_path / "out.onnx").exists()


def test_values_around_a_branch_and_a_loop_are_exposed(tmp_path: Path) -> None:
    for make, feeds in ((made.merged, {"use_cache_branch": np.array(True)}), (made.looping, {})):
        file = made.write(make(), tmp_path / f"{make.__name__}.onnx")
        wrote = graphlens.expose(file, ["x", "y"], tmp_path / make.__name__)
        checked(wrote.file)
        table = next(onnx.numpy_helper.to_array(t) for t in onnx.load(file).graph.initializer if t.name == "table")
        x, y = runs(wrote.file, ["x", "y"], FEEDS | feeds)
        np.testing.assert_array_equal(x, table[IDS])
        assert y.shape == x.shape


def test_the_list_shows_what_matches_and_writes_nothing(tmp_path: Path) -> None:
    file = made.write(made.one_layer(), tmp_path / "model.onnx")
    listed = command("expose", file, "--list", "--like", "*scores*", "--like", "logits")
    assert listed.returncode == 0, listed.stderr
    assert [line.split()[:2] for line in listed.stdout.splitlines()] == [["Mul", "scores"], ["MatMul", "logits"]]
    assert listed.stdout.splitlines()[1].endswith("FLOAT[batch, sequence, 23]  (an output already)")
    every = json.loads(command("expose", file, "--list", "--json").stdout)
    computed = [name for node in made.one_layer().graph.node for name in node.output]
    assert [value["name"] for value in every] == computed == [value.name for value in list_values(file)]
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_the_command_says_what_it_wrote_and_what_is_missing(tmp_path: Path) -> None:
    file = made.write(made.one_layer(), tmp_path / "model.onnx")
    out = tmp_path / "out.onnx"
    done = command("expose", file, "--like", "pattern", "--like", "logits", "-o", out)
    assert done.stdout.strip() == f"Wrote {out}: 1 more outputs, 1 were outputs already"
    for arguments, message in (
        (("-o", tmp_path / "b.onnx"), "--like is missing"),
        (("--like", "pattern"), "-o is missing"),
        (("--like", "nothing", "-o", tmp_path / "b.onnx"), "matches no value"),
        (("--like", "", "-o", tmp_path / "b.onnx"), "name the values"),
    ):
        refused = command("expose", file, *arguments)
        assert refused.returncode == 1
        assert message in sentence(refused.stderr)


@pytest.mark.parametrize("like", [3, None, [], [3], [""], ""])
def test_what_is_no_pattern_is_refused(like: object, tmp_path: Path) -> None:
    file = made.write(made.one_layer(), tmp_path / "model.onnx")
    with pytest.raises(InputError, match="name the values, as names or shell patterns"):
        graphlens.expose(file, like, tmp_path / "out.onnx")  # type: ignore[arg-type]


def test_a_hooked_file_stays_one(tiny: HookedTransformer, tiny_folder: Path, tmp_path: Path) -> None:
    inner = next(shown.name for shown in list_values(tiny_folder) if not shown.is_output and shown.operator == "MatMul")
    wrote = graphlens.expose(tiny_folder, inner, tmp_path / "more")
    again = HookedTransformer.from_onnx(tmp_path / "more")
    np.testing.assert_array_equal(again([[1, 2, 3]]), tiny([[1, 2, 3]]))
    assert inner in outputs(wrote.file)


def test_surgery_has_one_expose(tmp_path: Path) -> None:
    """Hook points of a hooked model (tests/core/test_surgery.py), values by their names of any other."""
    model = surgery.load_foreign(made.write(made.one_layer(), tmp_path / "model.onnx"))
    assert [value.name for value in surgery.expose(model, ["z", "scores"]).graph.outputs] == ["logits", "scores", "z"]
    assert [value.name for value in model.graph.outputs] == ["logits"]
    with pytest.raises(InputError, match="Nearest: 'scores'"):
        surgery.expose(model, ["score"])


def test_a_file_that_onnx_runtime_refuses_says_so(tmp_path: Path) -> None:
    model = made.one_layer()
    model.graph.node[1].domain = "com.example"
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    file = made.write(model, tmp_path / "model.onnx")
    with pytest.raises(ModelFileError, match=r"not in the file, and ONNX Runtime, which infers them.*com\.example"):
        graphlens.expose(file, "pattern", tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()
    stated = model.graph.value_info.add()
    stated.CopyFrom(made.value("pattern", made.FLOAT, ["batch", made.HEADS, "sequence", "sequence"]))
    made.write(model, file)
    assert graphlens.expose(file, "pattern", tmp_path / "out.onnx").added == ("pattern",)  # nothing had to be asked


def test_missing_and_hostile_weights_are_refused_before_anything_opens_them(tmp_path: Path) -> None:
    file = made.write(made.one_layer(), tmp_path / "a" / "model.onnx", "weights.bin")
    (tmp_path / "a" / "weights.bin").rename(tmp_path / "secret")
    with pytest.raises(ModelFileError, match=r"weights\.bin: the weights file is missing"):
        graphlens.expose(file, "pattern", tmp_path / "out.onnx")
    (tmp_path / "a" / "weights.bin").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelFileError, match="leaves the folder"):
        graphlens.expose(file, "pattern", tmp_path / "out.onnx")
    (tmp_path / "empty.onnx").touch()
    with pytest.raises(ModelFileError, match="the file is empty"):
        graphlens.expose(tmp_path / "empty.onnx", "x", tmp_path / "out.onnx")
    with pytest.raises(ModelFileError, match="no such file"):
        graphlens.expose(tmp_path / "gone.onnx", "x", tmp_path / "out.onnx")


def test_a_loop_without_end_ends(tmp_path: Path) -> None:
    """Types are inferred and nothing is run where ranks are known; where they are not, the run has a limit."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["going"], ["still"]),
            helper.make_node("Add", ["state", "state"], ["next"]),
        ],
        "body",
        [
            made.value("step", made.INT64, []),
            made.value("going", made.BOOL, []),
            made.value("state", made.FLOAT, ["n"]),
        ],
        [made.value("still", made.BOOL, []), made.value("next", made.FLOAT, ["n"])],
    )
    nodes = [
        helper.make_node("Loop", ["", "yes", "x"], ["y"], name="/loop", body=body),
        helper.make_node("Reshape", ["y", "shape"], ["folded"], name="folded"),
        helper.make_node("Identity", ["y"], ["out"], name="out"),
    ]
    inputs = [made.value("x", made.FLOAT, ["n"]), made.value("shape", made.INT64, ["axes"])]
    model = made.model(nodes, inputs, [made.value("out", made.FLOAT, ["n"])], {"yes": np.array(True)})
    file = made.write(model, tmp_path / "model.onnx")
    with pytest.raises(ModelFileError, match=r"crashed with signal|did not open and run"):
        graphlens.expose(file, "folded", tmp_path / "out.onnx")


def test_folders_name_their_file(tmp_path: Path) -> None:
    made.write(made.one_layer(), tmp_path / "one" / "decoder_model.onnx")
    assert list_values(tmp_path / "one", "pattern")[0].operator == "Softmax"
    made.write(made.one_layer(), tmp_path / "one" / "encoder_model.onnx")
    with pytest.raises(ModelFileError, match=r"2 ONNX files lie in it \(decoder_model\.onnx, encoder_model\.onnx\)"):
        list_values(tmp_path / "one")
    made.write(made.one_layer(), tmp_path / "js" / "onnx" / "model.onnx")
    made.write(made.one_layer(), tmp_path / "js" / "onnx" / "model_quantized.onnx")
    assert list_values(tmp_path / "js", "pattern")
    (tmp_path / "none").mkdir()
    with pytest.raises(GraphlensError, match="no ONNX file lies in this folder"):
        list_values(tmp_path / "none")


@pytest.mark.skipif(sys.platform != "linux", reason="a process of its own with a limit")
def test_exposing_imports_no_torch_and_little_else() -> None:
    code = "import graphlens, sys; graphlens.expose; assert not {'torch', 'transformers', 'onnxruntime'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
