"""Matching without torch: the packaged models without their manifests, and what is refused or left out and why."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from graphlens.file.manifest import METADATA_KEY
from graphlens.surgery.graph import read_manifest
from graphlens.surgery.match import Match, match, with_norms_apart
from tests import foreign_files as files
from tests.matched import activations, opened
from tests.scramble import scrambled, with_old_names

MODELS = Path(__file__).parents[2] / "models"
OURS = ("tiny-gpt2", "tiny-llama")


@pytest.fixture(scope="module", params=OURS)
def ours(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ir.Model, ir.Model]:
    """(a packaged model, the same without its manifest)."""
    # A copy: other tests may have linked the packaged weights, and onnx reads no weights with several links.
    folder = shutil.copytree(MODELS / request.param, tmp_path_factory.mktemp("ours") / request.param)
    model = ir.load(folder / "model.onnx")
    plain = model.clone()
    del plain.metadata_props[METADATA_KEY]
    plain.graph.sort()
    return model, plain


def test_a_model_of_ours_is_found_again_without_its_manifest(ours: tuple[ir.Model, ir.Model]) -> None:
    model, plain = ours
    manifest, found = read_manifest(model), match(plain)
    assert list(found.hooks) == list(manifest.hooks)
    assert {name: view.value for name, view in found.hooks.items()} == {
        name: entry.value for name, entry in manifest.hooks.items()
    }
    assert found.weights.keys() == manifest.weights.keys()
    assert not found.missing
    same = {name: getattr(manifest.config, name) for name in found.config if name not in ("tied", "n_ctx")}
    assert {name: value for name, value in found.config.items() if name in same} == same
    assert (found.kind, found.ports.logits) == ("decoder", found.hooks["unembed.hook_out"].value)


def test_names_order_and_metadata_say_nothing(ours: tuple[ir.Model, ir.Model]) -> None:
    _, plain = ours
    found = match(plain)
    for seed in range(3):
        other, old = scrambled(plain, seed)
        assert with_old_names(match(other), old) == found


def test_matching_takes_time_in_proportion_to_the_graph(ours: tuple[ir.Model, ir.Model]) -> None:
    _, plain = ours
    started = time.process_time()
    match(plain)
    assert time.process_time() - started < 2.0  # 30 layers of 250 nodes take 0.5 s


def test_a_given_shape_goes_before_an_inferred_one(ours: tuple[ir.Model, ir.Model]) -> None:
    _, plain = ours
    found = match(plain)
    tokens = found.ports.input
    assert match(plain, {tokens: (3, 11)}).hooks == found.hooks


def _decoder(tmp_path: Path) -> Path:
    file = tmp_path / "model.onnx"
    onnx.save(files.decoder(), file)
    return file


def test_every_hook_point_of_a_file_made_by_hand_has_its_axes(tmp_path: Path) -> None:
    model, found = opened(_decoder(tmp_path))
    tokens = np.random.default_rng(0).integers(0, files.VOCAB, (2, 6))
    feeds = {str(value.name): tokens for value in model.graph.inputs if value.const_value is None}
    values = activations(model, found, feeds)
    heads, size = files.HEADS, files.D // files.HEADS
    for name, array in values.items():
        end = name.rpartition(".")[2]
        if end in ("hook_q", "hook_k", "hook_v", "hook_z"):
            assert array.shape == (2, 6, heads, size), name
        elif end in ("hook_attn_scores", "hook_pattern"):
            assert array.shape == (2, heads, 6, 6), name
        else:
            assert array.shape[:2] == (2, 6), name
    pattern, v, z = (values[f"blocks.0.attn.hook_{end}"] for end in ("pattern", "v", "z"))
    np.testing.assert_allclose(np.einsum("bhqk,bkhd->bqhd", pattern, v), z, rtol=1e-5, atol=1e-6)


def _grouped(tmp_path: Path, repeats: list[int]) -> Match:
    """A graph in which keys and values of two heads are gathered for four."""
    d, heads, size = 12, 4, 3
    rng = np.random.default_rng(0)
    weights = {
        "table": rng.normal(size=(23, d)).astype(np.float32),
        "w_q": rng.normal(size=(d, heads * size)).astype(np.float32),
        "w_k": rng.normal(size=(d, 2 * size)).astype(np.float32),
        "w_v": rng.normal(size=(d, 2 * size)).astype(np.float32),
        "w_o": rng.normal(size=(heads * size, d)).astype(np.float32),
        "w_u": rng.normal(size=(d, 23)).astype(np.float32),
        "four": np.array([0, 0, heads, size]),
        "two": np.array([0, 0, 2, size]),
        "flat": np.array([0, 0, heads * size]),
        "repeats": np.array(repeats),
        "scale": np.array(size**-0.5, np.float32),
    }
    node = helper.make_node
    nodes = [node("Gather", ["table", "tokens"], ["x"])]
    for letter, shape in (("q", "four"), ("k", "two"), ("v", "two")):
        nodes += [
            node("MatMul", ["x", f"w_{letter}"], [f"{letter}0"]),
            node("Reshape", [f"{letter}0", shape], [f"{letter}1"]),
            node("Transpose", [f"{letter}1"], [f"{letter}2"], perm=[0, 2, 1, 3]),
        ]
    nodes += [
        node("Gather", ["k2", "repeats"], ["k3"], axis=1),
        node("Gather", ["v2", "repeats"], ["v3"], axis=1),
        node("Transpose", ["k3"], ["k4"], perm=[0, 1, 3, 2]),
        node("MatMul", ["q2", "k4"], ["products"]),
        node("Mul", ["products", "scale"], ["scores"]),
        node("Softmax", ["scores"], ["pattern"], axis=-1),
        node("MatMul", ["pattern", "v3"], ["z"]),
        node("Transpose", ["z"], ["z1"], perm=[0, 2, 1, 3]),
        node("Reshape", ["z1", "flat"], ["z2"]),
        node("MatMul", ["z2", "w_o"], ["out"]),
        node("Add", ["x", "out"], ["mid"]),
        node("MatMul", ["mid", "w_u"], ["logits"]),
    ]
    model = files.model(
        nodes,
        [files.value("tokens", files.INT64, ["b", "p"])],
        [files.value("logits", files.FLOAT, ["b", "p", 23])],
        weights,
    )
    file = tmp_path / "grouped.onnx"
    onnx.save(model, file)
    return opened(file)[1]


def test_grouped_heads_are_the_file_s_own_and_not_repeated(tmp_path: Path) -> None:
    found = _grouped(tmp_path, [0, 0, 1, 1])
    assert (found.config["n_heads"], found.config["n_key_value_heads"]) == (4, 2)
    assert found.hooks["blocks.0.attn.hook_k"].value == "k1"
    assert found.config["attn_only"] is True
    assert found.hooks["blocks.0.hook_resid_post"].value == "mid"


def test_heads_that_are_shared_in_another_order_are_those_that_queries_see(tmp_path: Path) -> None:
    # TransformerLens gives queries 0 and 1 key head 0; here they have 0 and 1, so there is a key head for each query.
    found = _grouped(tmp_path, [0, 1, 0, 1])
    assert (found.config["n_heads"], found.config["n_key_value_heads"]) == (4, 4)
    assert found.hooks["blocks.0.attn.hook_k"].value == "k3"
    assert not {"blocks.0.attn.W_K", "blocks.0.attn.W_V"} & found.weights.keys()


def test_a_model_without_shared_norms_is_handed_back(ours: tuple[ir.Model, ir.Model]) -> None:
    _, plain = ours
    assert with_norms_apart(plain) == (plain, {})
